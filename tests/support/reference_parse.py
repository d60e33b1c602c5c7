"""The reference record: what the standard library's parser (compat32 policy) makes of a mail, read in the plainest way.

The oracle of tests/unit/test_parse_differential.py. It shares no code with src/mail and knows no bounds: never feed it hostile
mail. It reads the parts that hold the text by RFC 8621 section 4.1.4, as src/mail/parse.py says it does.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import io
import re
from dataclasses import dataclass
from email.generator import BytesGenerator
from email.header import decode_header
from email.message import Message
from email.utils import collapse_rfc2231_value, getaddresses
from html.parser import HTMLParser

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Reference:
    """`text`, `subject` and names without white space: how lines are broken and blanks collapsed is not compared."""

    subject: str
    senders: Pairs
    recipients: Pairs
    text: str
    files: list[tuple[str, int, str]]
    """Content type, decoded size, SHA-256."""


_MESSAGE_TYPE = re.compile(rb"^(content-type:\s*)message/", re.IGNORECASE | re.MULTILINE)
_KEPT_WHOLE = b"application/x-kept-whole-message."


def reference(raw: bytes) -> Reference:
    """The parser would open mails within the mail and lose their octets: under another type they are kept whole."""
    mail = email.message_from_bytes(_MESSAGE_TYPE.sub(rb"\1" + _KEPT_WHOLE, raw), policy=email.policy.compat32)
    texts, files = _split(mail)
    return Reference(
        subject=squeeze(_words(mail.get("subject", ""))),
        senders=_people(mail, "from")[:1],
        recipients=[person for name in ("to", "cc", "reply-to") for person in _people(mail, name)],
        text=squeeze("".join(texts)).replace(_KEPT_WHOLE.decode(), "message/"),
        files=[_file(part, "\r\n" if b"\r\n" in raw else "\n") for part in files],
    )


def squeeze(text: str) -> str:
    """Without white space, control and format characters."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u200b-\u200d\u2060\ufeff]+", "", text)


def _words(value: object) -> str:
    raw = str(value) if isinstance(value, str) else str(getattr(value, "_chunks", [("", "")])[0][0])
    pieces = []
    for chunk, charset in decode_header(raw.replace("\r", "").replace("\n", "")):
        octets = chunk if isinstance(chunk, bytes) else chunk.encode("ascii", "surrogateescape")
        pieces.append(_decoded(octets, charset or ""))
    return "".join(pieces)


def _people(mail: Message, name: str) -> Pairs:
    lines = [str(value).replace("\r", "").replace("\n", "") for value in _raw_values(mail, name)]
    pairs = [(squeeze(_words(who)), squeeze(_words(address))) for who, address in getaddresses(lines)]
    named = [(who or address, "") if "@" not in address else (who, address) for who, address in pairs]
    return [pair for pair in named if pair != ("", "")]


def _raw_values(mail: Message, name: str) -> list[str]:
    return [value for known, value in mail.raw_items() if known.lower() == name]


@dataclass(frozen=True, order=True)
class _Version:
    """A text; the least of one alternative is shown."""

    html: bool
    number: int
    alternative: int
    branch: int
    text: str


def _split(mail: Message) -> tuple[list[str], list[Message]]:
    """(the texts that are shown, the attachments)."""
    texts: list[_Version] = []
    files: list[Message] = []
    alternatives = 0

    def visit(part: Message, around: str, number: int, alternative: int, branch: int) -> None:
        nonlocal alternatives
        kind = part.get_content_type()
        if kind.startswith("multipart/") and isinstance(part.get_payload(), list):
            opens = kind == "multipart/alternative" and not alternative
            if opens:
                alternatives += 1
                alternative = alternatives
            for child_number, child in enumerate(part.get_payload()):
                visit(child, kind, child_number, alternative, child_number + 1 if opens else branch)
        elif _is_text(part, around, number):
            texts.append(_Version(part.get_content_type() != "text/plain", len(texts), alternative, branch, _text(part)))
        else:
            files.append(part)
            if part.get_content_disposition() == "inline" and kind in ("text/plain", "text/html"):
                texts.append(_Version(False, len(texts), -len(texts) - 1, 0, _text(part)))

    visit(mail, "", 0, 0, 0)
    shown: list[str] = []
    for version in texts:
        rivals = [rival for rival in texts if rival.alternative == version.alternative]
        best = min([rival for rival in rivals if rival.text.strip()] or rivals)
        if not version.alternative or (version.html, version.branch) == (best.html, best.branch):
            shown.append(version.text)
    return shown, files


def _is_text(part: Message, around: str, number: int) -> bool:
    if part.get_content_disposition() == "attachment":
        return False
    kind = part.get_content_type()
    if kind.startswith("multipart/"):  # without parts: its payload is a text
        return True
    if kind not in ("text/plain", "text/html"):
        return False
    if number == 0 or around == "multipart/alternative":
        return True
    return not part.get_filename() and not (around == "multipart/related" and (part["content-id"] or part["content-location"]))


def _text(part: Message) -> str:
    octets = part.get_payload(decode=True)
    charset = part.get_param("charset", "")
    text = _decoded(octets if isinstance(octets, bytes) else b"", collapse_rfc2231_value(charset) if charset else "")
    return _seen(text) if part.get_content_type() == "text/html" else text


def _decoded(octets: bytes, charset: str) -> str:
    same = {"us-ascii": "utf-8", "iso-8859-1": "cp1252", "unknown-8bit": "utf-8", "gb2312": "gb18030", "": "utf-8"}
    for codec in (same.get(charset.lower(), charset), "utf-8", "cp1252"):
        try:
            return octets.decode(codec)
        except (UnicodeError, LookupError):
            continue
    return octets.decode("latin-1")


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = ""
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden = self.hidden or (tag if tag in ("script", "style", "title") else "")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = "" if tag == self.hidden else self.hidden

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.append(data)


def _seen(markup: str) -> str:
    reader = _Seen()
    reader.feed(markup)
    reader.close()
    return "".join(reader.text)


def _file(part: Message, line_end: str) -> tuple[str, int, str]:
    kind, octets = part.get_content_type(), part.get_payload(decode=True)
    if isinstance(part.get_payload(), list):  # a part of a digest has no field that names its type
        octets = b"".join(_octets(message, line_end) for message in part.get_payload() if isinstance(message, Message))
    assert isinstance(octets, bytes)
    octets = octets.replace(_KEPT_WHOLE, b"message/")
    return kind.replace(_KEPT_WHOLE.decode(), "message/"), len(octets), hashlib.sha256(octets).hexdigest()


def _octets(mail: Message, line_end: str) -> bytes:
    written = io.BytesIO()
    BytesGenerator(written, mangle_from_=False, maxheaderlen=0).flatten(mail, linesep=line_end)
    return written.getvalue()
