"""Bytes and markup of unknown quality to plain text: character sets, forbidden characters, HTML.

Pure. Every function takes anything, returns text that encodes as UTF-8, and takes time linear in its input.

HTML is read through lxml's event interface: no tree is built, and the depth is bounded, because libxml2 looks through all
open elements for the one that an end tag closes. Parsers that build the tree of the HTML standard (lexbor in selectolax,
justhtml) need quadratic memory by that standard's own rules; `html.parser` of Python 3.11 and 3.12 is quadratic on "<!--" and "</".
"""

from __future__ import annotations

import codecs
import re
from encodings.aliases import aliases
from typing import Final

from lxml import etree  # type: ignore[import-untyped]  # it has no types of its own

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ASCII_CONTROLS = bytes(byte for byte in range(128) if _CONTROLS.match(chr(byte)))
_SURROGATES = re.compile("[\ud800-\udfff]")
_NOT_IN_CODEC_NAMES = re.compile("[-. :]")
_ASCII_SUPERSETS: Final = frozenset({"", "utf-8", "us-ascii", "ascii", "iso-8859-1", "iso-8859-15", "windows-1252"})
_INVISIBLE = "\u00ad\u034f\u200b-\u200d\u2060\ufeff"
# A group to repeat in it would cost memory for each time.
_INVISIBLE_PADDING = re.compile(f"[{_INVISIBLE}][{_INVISIBLE}\\s]*[{_INVISIBLE}]")

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
    "iso_8859_9": "cp1254",
    "iso_2022_jp": "iso2022_jp_ext",
    "koi8_u": "koi8_u",
    "cp874": "cp874",
    "windows_874": "cp874",
}

_BREAKS: Final = {
    **dict.fromkeys(("blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "ol", "p", "pre", "ul"), 2),
    **dict.fromkeys(("address", "article", "aside", "dd", "div", "dt", "figure", "footer", "form", "header", "li", "main"), 1),
    **dict.fromkeys(("body", "fieldset", "nav", "option", "section", "table", "tr"), 1),
}
"""Line ends around an element: 2 where a reader sees an empty line."""
_CELLS: Final = frozenset({"td", "th"})
_UNSEEN: Final = frozenset({"script", "style", "title", "template"})
_DEEPEST: Final = 500
_ENRICHED = re.compile(r"<(/?)([A-Za-z0-9-]{1,60})>|<<|\n+|[^<\n]+|<")


def has_controls(text: str) -> bool:
    """Whether there are control characters other than newline, tab and carriage return in it."""
    return not text.isprintable() and _CONTROLS.search(text.replace("\r", "")) is not None


def clean_text(text: str) -> str:
    """LF for every line end, no control characters but newline and tab, U+FFFD for lone surrogates."""
    if text.isprintable():  # then there is none of these in it
        return text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return text.encode("ascii").translate(None, _ASCII_CONTROLS).decode("ascii")
    if text.replace("\n", "").isprintable():
        return text
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text))


def one_line(text: str) -> str:
    """The same on one line: every run of white space is one blank, none at the ends."""
    return " ".join(clean_text(text).split())


def preview(text: str, characters: int) -> str:
    """The beginning of a text on one line, without the invisible characters that newsletters pad theirs with."""
    line = one_line(_without_padding(text[: characters * 3]))
    if len(line) <= characters:  # there may be more behind much padding; the last one may be half of one
        line = one_line(_without_padding(text[: characters * 20]))
    return line[:characters].rstrip()


def _without_padding(text: str) -> str:
    return text if text.isascii() else _INVISIBLE_PADDING.sub(" ", text)


def cut_utf8(text: str, size: int) -> str:
    """The longest prefix of at most `size` bytes of UTF-8."""
    if len(text) * 4 <= size:
        return text
    return text.encode()[:size].decode(errors="ignore")


def decode_charset(data: bytes, charset: str, *, whole: bool = True) -> tuple[str, str]:
    """(text, defect): `data` in the charset it claims, or in the one that it can be.

    A charset that accepts every byte proves nothing, so UTF-8 goes before the claimed single-byte ones; others go first. Where a
    few bytes of a long text are wrong, those are U+FFFD; windows-1252 and ISO 8859-1 come last. `whole`=False: the data may
    end in the middle of a character.
    """
    if data.isascii() and charset.lower() in _ASCII_SUPERSETS:
        return data.decode("ascii"), ""
    claimed = CODECS.get(_NOT_IN_CODEC_NAMES.sub("_", charset.strip(" \t'\"").lower()), "")
    unknown = f"unknown charset {one_line(charset)[:40]}" if charset and not claimed else ""
    mismatch = unknown or f"the text is not in the charset it claims ({one_line(charset)[:40] or 'none'})"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and claimed != "utf_32":
        claimed = "utf_16"
    elif claimed == "utf_16":
        claimed = "utf_16_le" if data[::2].count(0) < data[1::2].count(0) else "utf_16_be"  # without a mark: RFC 2781 section 4.3
    accepts_everything = claimed.startswith(("cp12", "iso8859", "koi8", "latin", "mac_"))
    for codec in ("utf_8", claimed) if accepts_everything or not claimed else (claimed, "utf_8"):
        text = _decoded(data, codec, whole) if codec else None
        if text is not None:
            as_claimed = codec == claimed or data.isascii() or not charset
            return text, unknown if as_claimed else mismatch
    mostly = _decoded(data, claimed or "utf_8", whole, "replace") or ""
    if mostly.count("\ufffd") * 2 < len(mostly) - len(mostly.encode("ascii", "ignore")):
        return mostly, mismatch
    return _decoded(data, "cp1252", whole) or data.decode("latin-1"), mismatch


def _decoded(data: bytes, codec: str, whole: bool, errors: str = "strict") -> str | None:
    try:
        if whole and codec == "utf_8":  # by far the most frequent
            return data.decode("utf-8", errors)
        return codecs.getincrementaldecoder(codec)(errors).decode(data, whole)
    except UnicodeError:
        return None


def html_to_text(markup: str) -> tuple[str, str]:
    """(what a reader would see of an HTML text, defect): tags, comments, scripts and styles dropped, a line for each block."""
    reader = _Reader()
    parser = etree.HTMLParser(target=reader, encoding="utf-8")
    defect = ""
    try:
        parser.feed(_SURROGATES.sub("\ufffd", markup).replace("\0", ""))  # for each NUL it would call `data`
        parser.close()
    except _TooDeep:
        defect = f"HTML nested deeper than {_DEEPEST}"
    return _tidy("".join(reader.pieces)), defect


class _TooDeep(Exception):
    """More elements are open than libxml2 should look through."""


class _Reader:
    """The target of lxml's events: the text in `pieces`."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self._depth = self._unseen = self._verbatim = self._breaks = 0

    def start(self, tag: str, _attributes: object) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _TooDeep
        if tag == "br":
            self._breaks += 1
        elif tag in _CELLS:
            self.pieces.append(" ")
        elif tag in _BREAKS:
            self._breaks = max(self._breaks, _BREAKS[tag])
        self._unseen += tag in _UNSEEN
        self._verbatim += tag == "pre"

    def end(self, tag: str) -> None:
        self._depth -= 1
        if tag in _BREAKS:
            self._breaks = max(self._breaks, _BREAKS[tag])
        self._unseen -= tag in _UNSEEN
        self._verbatim -= tag == "pre"

    def data(self, text: str) -> None:
        if self._unseen:
            return
        if self._breaks:
            if text.isspace():
                return
            self.pieces.append("\n" * min(self._breaks, 2))
            self._breaks = 0
        self.pieces.append(text if self._verbatim else text.replace("\n", " ").replace("\r", " "))

    def close(self) -> None:
        """lxml calls it at the end."""


def enriched_to_text(markup: str) -> str:
    """What a reader would see of text/enriched (RFC 1896), or of the text/richtext before it (RFC 1341 section 7.1.3)."""
    pieces: list[str] = []
    unseen = 0
    for token in _ENRICHED.finditer(clean_text(markup)):
        name = (token[2] or "").lower()
        if name in ("param", "comment"):
            unseen = max(0, unseen + (-1 if token[1] else 1))
        elif name == "nl":
            pieces.append("\n")
        elif name == "lt" or token[0] == "<<":
            pieces.append("<")
        elif not name and not unseen:
            text = token[0]
            pieces.append((text[1:] or " ") if text[0] == "\n" else text)
    return _tidy("".join(pieces))


def unflow(text: str, *, delete_space: bool) -> str:
    """The paragraphs of a text/plain; format=flowed (RFC 3676 section 4), each on one line, quotes marked as they were.

    `delete_space`: DelSp=yes, the blank at the end of a flowed line is not part of the text.
    """
    lines: list[str] = []
    open_depth = -1  # how deep the quote is whose last line goes on in the next; -1: none does
    for line in text.split("\n"):
        words = line.lstrip(">")
        depth = len(line) - len(words)
        words = words.removeprefix(" ")  # space-stuffed
        signature = words == "-- "
        flows = words.endswith(" ") and not signature
        if flows and delete_space:
            words = words[:-1]
        if depth == open_depth and not signature:
            lines.append(words)
        else:
            lines.append(("\n" if lines else "") + (">" * depth + " " if depth else "") + words)
        open_depth = depth if flows else -1
    return "".join(lines)


def _tidy(text: str) -> str:
    """No blanks at either end of a line, at most one empty line in a row."""
    lines: list[str] = []
    for line in _without_padding(text).split("\n"):
        tidy = " ".join(line.split())
        if tidy or (lines and lines[-1]):
            lines.append(tidy)
    return clean_text("\n".join(lines)).strip("\n")
