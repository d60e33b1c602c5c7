"""Bytes and markup of unknown quality to plain text: character sets, forbidden characters, HTML.

Pure. Every function takes anything, returns text that encodes as UTF-8, and takes time linear in its input.
"""

from __future__ import annotations

import codecs
import html
import re
from encodings.aliases import aliases
from typing import Final

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_INVISIBLE_PADDING = re.compile("[\u00ad\u034f\u200b-\u200d\u2060\ufeff](?:\\s*[\u00ad\u034f\u200b-\u200d\u2060\ufeff])+")

# Python's character sets by every name it knows them under; no codec that is not one (zlib, idna, unicode_escape).
_NOT_CHARSETS: Final = {"base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec", "zlib_codec", "mbcs"}
CODECS: Final[dict[str, str]] = {
    **{name: codec for name, codec in aliases.items() if codec not in _NOT_CHARSETS},
    **{codec: codec for codec in aliases.values() if codec not in _NOT_CHARSETS},
    # What senders write and what they mean by it (encoding.spec.whatwg.org, section 4.2).
    "ascii": "cp1252",
    "us_ascii": "cp1252",
    "latin_1": "cp1252",
    "latin1": "cp1252",
    "iso_8859_1": "cp1252",
    "iso8859_1": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "x_gbk": "gb18030",
    "shift_jis": "cp932",
    "x_sjis": "cp932",
    "euc_kr": "cp949",
    "ks_c_5601_1987": "cp949",
    "big5": "big5hkscs",
    "iso_8859_8_i": "iso8859_8",
    "koi8_u": "koi8_u",
    "cp874": "cp874",
    "windows_874": "cp874",
}

_BLOCK = re.compile(
    "address|article|aside|blockquote|br|dd|div|dl|dt|figure|footer|form|h[1-6]|header|hr|li|main|nav|ol|p|pre|section|table|tr|ul"
)
_CELLS: Final = frozenset({"td", "th"})
_UNSEEN: Final = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style", "title", "template")}
_QUOTE_OR_END = re.compile("=\\s*([\"'])|>")
_TAG_NAME = re.compile("/?([a-zA-Z][a-zA-Z0-9]*)")
_HUGE_REFERENCE = re.compile("&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{8,});?")


def has_controls(text: str) -> bool:
    """Whether there are control characters other than newline, tab and carriage return in it."""
    return _CONTROLS.search(text.replace("\r", "")) is not None


def clean_text(text: str) -> str:
    """LF for every line end, no control characters but newline and tab, U+FFFD for lone surrogates."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text))


def one_line(text: str) -> str:
    """The same on one line: every run of white space is one blank, none at the ends."""
    return " ".join(clean_text(text).split())


def preview(text: str, characters: int) -> str:
    """The beginning of a text on one line, without the invisible characters that newsletters pad theirs with."""
    return one_line(_INVISIBLE_PADDING.sub(" ", text[: characters * 20]))[:characters].rstrip()


def cut_utf8(text: str, size: int) -> str:
    """The longest prefix of at most `size` bytes of UTF-8."""
    if len(text) * 4 <= size:
        return text
    return text.encode()[:size].decode(errors="ignore")


def decode_charset(data: bytes, charset: str, *, whole: bool = True) -> tuple[str, str]:
    """(text, defect): `data` in the charset it claims, or in the one that it can be.

    A charset that accepts every byte proves nothing, so UTF-8 goes before the claimed single-byte ones; others go first.
    windows-1252 and ISO 8859-1 come last. `whole`=False: the data may end in the middle of a character.
    """
    if data.isascii() and charset.lower() in ("", "utf-8", "us-ascii", "iso-8859-1"):
        return data.decode("ascii"), ""
    claimed = CODECS.get(re.sub("[-. :]", "_", charset.strip().lower()), "")
    defect = f"unknown charset {one_line(charset)[:40]}" if charset and not claimed else ""
    accepts_everything = claimed.startswith(("cp12", "iso8859", "koi8", "latin", "mac_"))
    for codec in ("utf_8", claimed, "cp1252") if accepts_everything or not claimed else (claimed, "utf_8", "cp1252"):
        if not codec:
            continue
        try:
            text = codecs.getincrementaldecoder(codec)("strict").decode(data, whole)
        except UnicodeError:
            continue
        if codec not in (claimed, "utf_8") or (codec == "utf_8" and claimed not in ("utf_8", "") and not data.isascii()):
            defect = defect or f"the text is not in the charset it claims ({one_line(charset)[:40] or 'none'})"
        return text, defect
    return data.decode("latin-1"), defect or f"the text is not in the charset it claims ({one_line(charset)[:40] or 'none'})"


def html_to_text(markup: str) -> str:
    """What a reader would see of an HTML text: tags, comments, scripts and styles dropped, one line for each block."""
    pieces: list[str] = []
    at = 0
    quotes_close = True
    while (start := markup.find("<", at)) >= 0:
        pieces.append(_flow(markup[at:start]))
        if markup.startswith("<!--", start):
            end = markup.find("-->", start + 4)
            at = end + 3 if end >= 0 else len(markup)
            continue
        name = _TAG_NAME.match(markup, start + 1)
        if name is None and not markup.startswith(("<!", "<?", "</"), start):
            pieces.append("<")
            at = start + 1
            continue
        end = _end_of_tag(markup, start) if quotes_close else -1
        if end < 0:
            quotes_close = False  # from here on a tag ends at its first ">": looking for a closing quote again is quadratic
            end = markup.find(">", start)
        if end < 0:
            at = len(markup)
            break
        at = end + 1
        tag = name[1].lower() if name else ""
        if _BLOCK.fullmatch(tag):
            pieces.append("\n")
        elif tag in _CELLS:
            pieces.append(" ")
        elif tag in _UNSEEN and markup[start + 1] != "/":
            closing = _UNSEEN[tag].search(markup, at)
            at = closing.start() if closing else len(markup)
    pieces.append(_flow(markup[at:]))
    return _tidy("".join(pieces))


def _end_of_tag(markup: str, start: int) -> int:
    """Where the tag's own ">" is, those inside quoted attribute values not counted; -1 where there is none."""
    at = start
    while (mark := _QUOTE_OR_END.search(markup, at)) is not None:
        if mark[1] is None:
            return mark.start()
        closing = markup.find(mark[1], mark.end())
        if closing < 0:
            return -1
        at = closing + 1
    return -1


def _flow(text: str) -> str:
    """Text between two tags: its line ends are blanks, its character references are characters."""
    if "&" in text:
        text = html.unescape(_HUGE_REFERENCE.sub("\ufffd", text))
    return re.sub(r"[\s\x00-\x1f]+", " ", text) if text else ""


def _tidy(text: str) -> str:
    """No blanks at either end of a line, at most one empty line in a row."""
    lines: list[str] = []
    for line in _INVISIBLE_PADDING.sub(" ", text).split("\n"):
        tidy = " ".join(line.split())
        if tidy or (lines and lines[-1]):
            lines.append(tidy)
    return clean_text("\n".join(lines)).strip("\n")
