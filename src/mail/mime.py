"""The parts of a mail (RFC 2045, 2046): where each begins and ends, and its decoded content.

Pure. The bytes are read once, in order, with a stack of open multiparts: no recursion, no copy of the mail, time linear in
its size whatever it nests, and every limit is enforced while reading. On well-formed mail the parts are those of the standard
library's parser (compat32 policy), the careful path: tests/unit/test_parse_differential.py compares the two on thousands of mails
and lists every difference with its reason. That parser itself keeps within no bounds: its time is quadratic in the parts of a mail.
"""

from __future__ import annotations

import binascii
import codecs
import re
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import pybase64

from src.mail.headers import Headers, decode_words, value_and_parameters


@dataclass(frozen=True, slots=True)
class Limits:
    """What is read of one mail; the rest is left out and named in `defects`. Bytes, but for the counts and `preview`."""

    depth: int = 100
    parts: int = 1000
    headers: int = 1000
    header_bytes: int = 64 * 1024
    total_header: int = 1 << 20
    body_text: int = 64 * 1024
    preview: int = 200
    addresses: int = 1000
    dashes: int = 200_000
    """Lines that begin with "--" and are no delimiter."""


_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:")
_FIELD_OF_MAIL = re.compile(
    rb"(?:content-|x-|mime-version|message-id|received|return-path|reply-to|from|sender|to|cc|bcc|subject|date|references"
    rb"|in-reply-to|list-|dkim-|arc-)[!-9;-~]*[ \t]*:",
    re.IGNORECASE,
)
_BLANK_LINES = re.compile(rb"[\r\n]{1,100}")
_UU_BEGIN = re.compile(rb"^begin [0-7]{3,4} [^\r\n]*\r?\n", re.MULTILINE)
_SHORTEST_UU_LINE = 32  # bytes, on average; they have 62
_BLANKS_AT_LINE_END = re.compile(rb"(?<![ \t])[ \t]+(?=\r?\n)")
_BLANK_LINE_ENDS = (b" \r\n", b" \n", b"\t\r\n", b"\t\n")
_MEDIA_TYPE = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,127}/[!#$%&'*+.^_`|~0-9a-z-]{1,127}")
_LONGEST_BOUNDARY = 1000
_STRETCH = 1 << 16  # bytes
_ENCODING_NAME = re.compile("[;(].*|[\\s\"']", re.DOTALL)
_NOT_BASE64 = bytes(byte for byte in range(256) if not re.match(rb"[A-Za-z0-9+/=]", bytes([byte])))


@dataclass
class Part:
    """One leaf of the tree. `start` and `end` are offsets of its content, still transfer-encoded, in the mail.

    `alternative` numbers the outermost multipart/alternative around it, or is 0; `branch` numbers that one's child in which it
    stands. `inside` is the type of the multipart right around it, or ""; `first`: it is that one's first part.
    """

    headers: Headers
    default_type: str = "text/plain"
    alternative: int = 0
    branch: int = 0
    inside: str = ""
    first: bool = True
    start: int = 0
    end: int = 0

    @cached_property
    def _type(self) -> tuple[str, dict[str, str]]:
        return value_and_parameters(self.headers.get("content-type"))

    @cached_property
    def _disposition(self) -> tuple[str, dict[str, str]]:
        return value_and_parameters(self.headers.get("content-disposition"))

    @cached_property
    def content_type(self) -> str:
        """RFC 2045 section 5.2: what is missing has the default type, what is malformed is text/plain."""
        value = self._type[0]
        if not value:
            return self.default_type
        return value if _MEDIA_TYPE.fullmatch(value) else "text/plain"

    @property
    def parameters(self) -> dict[str, str]:
        return self._type[1]

    @property
    def disposition(self) -> str:
        return self._disposition[0]

    @cached_property
    def file_name(self) -> str:
        """Decoded, also the encoded words of senders that do not know RFC 2231; still whatever the sender likes."""
        return decode_words(self._disposition[1].get("filename") or self.parameters.get("name", ""))

    @property
    def boundary(self) -> bytes:
        """Of a multipart; b"" for any other part and where there is none that could be found."""
        if not self.content_type.startswith("multipart/"):
            return b""
        boundary = self.parameters.get("boundary", "").rstrip().encode("utf-8", "replace")
        return boundary if len(boundary) <= _LONGEST_BOUNDARY else b""


@dataclass
class Message:
    """A mail in parts: its own header as `root.headers`, the leaves in order, what was wrong or left out."""

    root: Part
    leaves: list[Part] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Multipart:
    """One that is open. `hides`: the place in the stack of the one around it whose boundary it has too, or None."""

    part: Part
    hides: int | None = None
    children: int = 0


def read_message(raw: bytes, limits: Limits) -> Message:
    """Finds the parts of a mail. Never raises."""
    reader = _HeaderReader(raw, limits)
    root = Part(Headers())
    root.headers, root.start = reader.read(_first_field(raw), ())
    root.end = len(raw)
    message = Message(root, defects=reader.defects)
    stack: list[_Multipart] = []
    levels: dict[bytes, int] = {}  # boundary -> the place in the stack of the innermost that has it
    alternatives = parts = dashes = 0

    def enter(part: Part) -> Part | None:
        """Opens a multipart and answers None, or answers the leaf that the part is."""
        nonlocal alternatives
        if not part.content_type.startswith("multipart/"):
            return part
        if not part.boundary:
            message.defects.append("multipart without a boundary")
            return Part(part.headers.only("content-transfer-encoding"), start=part.start)
        if len(stack) >= limits.depth:
            message.defects.append(f"nested deeper than {limits.depth}")
            return part
        if part.content_type == "multipart/alternative" and not part.alternative:
            alternatives += 1
            part.alternative = alternatives
        stack.append(_Multipart(part, hides=levels.get(part.boundary)))
        levels[part.boundary] = len(stack) - 1
        return None

    def leave(level: int, end: int) -> None:
        """Closes every multipart from `level` up at `end`. What stands in one without parts is shown as text."""
        while len(stack) > level:
            closed = stack.pop()
            if closed.hides is None:
                del levels[closed.part.boundary]
            else:
                levels[closed.part.boundary] = closed.hides
            if not closed.children and closed.part.start < end:
                message.defects.append("multipart without parts")
                message.leaves.append(Part(Headers(), start=closed.part.start, end=end))

    leaf = enter(root)
    line = root.start
    while stack:
        line = _next_dashes(raw, line)
        if line < 0:
            break
        end_of_line = _after_line(raw, line)
        level, closing = _delimiter(raw[line + 2 : min(end_of_line, line + _LONGEST_BOUNDARY + 8)], levels)
        if level is None:
            dashes += 1
            if dashes > limits.dashes:
                message.defects.append(f"more than {limits.dashes} lines that begin with two dashes")
                break
            line = end_of_line
            continue
        end = _before_line_end(raw, line)
        if leaf is not None:
            leaf.end = max(leaf.start, end)
            message.leaves.append(leaf)
            leaf = None
        empty = not stack[level].children
        leave(level if closing else level + 1, end)
        line = end_of_line
        if closing:
            if empty and line < len(raw):
                leaf = Part(Headers(), start=line)  # what stands behind it is all that there is to read
            continue
        parts += 1
        if parts > limits.parts or reader.left <= 0:
            message.defects.append(f"more than {limits.parts} parts" if reader.left > 0 else "too much header")
            stack.clear()
            break
        around = stack[-1]
        kind = around.part.content_type
        around.children += 1
        part = Part(
            Headers(),
            "message/rfc822" if kind == "multipart/digest" else "text/plain",
            alternative=around.part.alternative,
            branch=around.children if kind == "multipart/alternative" and not around.part.branch else around.part.branch,
            inside=kind,
            first=around.children == 1,
        )
        part.headers, part.start = reader.read(line, levels)
        leaf = enter(part)
        line = part.start
    if leaf is not None:
        leaf.end = len(raw)
        message.leaves.append(leaf)
    if stack:
        message.defects.append("the last delimiter of a multipart is missing")
        leave(0, len(raw))
    return message


def _first_field(raw: bytes) -> int:
    """Where the header begins: behind a byte order mark, and behind empty lines that a field follows."""
    at = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    blanks = _BLANK_LINES.match(raw, at)
    return blanks.end() if blanks and _FIELD.match(raw, blanks.end()) else at


def _next_dashes(raw: bytes, line: int) -> int:
    """The next line that begins with "--", from the beginning of a line on; -1 if there is none."""
    if raw.startswith(b"--", line):
        return line
    dash = line
    while (dash := raw.find(b"-", dash)) >= 0:  # by far the fastest search; base64, most of all mail, has none
        found = raw.find(b"\n--", max(line, dash - 1), dash + _STRETCH)
        if found >= 0:
            return found + 1
        dash += _STRETCH - 1
    return -1


def _after_line(raw: bytes, at: int) -> int:
    found = raw.find(b"\n", at)
    return found + 1 if found >= 0 else len(raw)


def _before_line_end(raw: bytes, line: int) -> int:
    """Where the line before `line` ends: its line end belongs to the delimiter (RFC 2046 section 5.1.1)."""
    end = line - 1
    return end - 1 if end > 0 and raw[end - 1] == 0x0D else end


def _delimiter(dashed: bytes, levels: dict[bytes, int]) -> tuple[int | None, bool]:
    """(place in the stack of the multipart that a line delimits, or None; whether it closes it). `dashed`: behind the "--"."""
    text = dashed.rstrip(b" \t\r\n")
    if text in levels:
        return levels[text], False
    if text.endswith(b"--"):
        return levels.get(text[:-2]), True
    return None, False


class _HeaderReader:
    """Reads header blocks while there is header left to read; `left` bytes for the whole mail."""

    def __init__(self, raw: bytes, limits: Limits) -> None:
        self._raw = raw
        self._limits = limits
        self.left = limits.total_header
        self.defects: list[str] = []

    def read(self, start: int, boundaries: Container[bytes]) -> tuple[Headers, int]:
        """The header that begins at `start`, and where the content behind it does.

        It ends at an empty line, at a line that is no field (unless a well-known field follows: then it is passed over), at a
        delimiter of one of `boundaries`, or with the bytes left.
        """
        raw, limits = self._raw, self._limits
        headers = Headers()
        name, first, last = "", 0, 0  # the field being read: raw[first:last]
        line = start
        while line < len(raw):
            after = _after_line(raw, line)
            if after - start > self.left:
                self.defects.append(f"more than {limits.total_header} bytes of header")
                line = line if boundaries else _skip_header(raw, line)
                self._keep(headers, name, first, min(last, start + self.left))
                self.left = 0
                return headers, line
            if raw[line] in b" \t" and (name or _FIELD.match(raw, after)):
                if not name:
                    self.defects.append("the header begins with a folded line")
                last = after
                line = after
                continue
            text = raw[line : min(after, line + 4096)]
            if not text.strip(b"\r\n"):
                line = after
                break
            if text.startswith(b"--") and text[2:].rstrip(b" \t\r\n").removesuffix(b"--") in boundaries:
                break
            match = _FIELD.match(text)
            if match is None and not text.startswith((b"From ", b">From ", b":")):
                self.defects.append("a line of the header is no field")
                if text.startswith(b"--") or not _FIELD_OF_MAIL.match(raw, after):
                    break
            self._keep(headers, name, first, last)
            name = match[1].decode("ascii").lower() if match else ""
            first, last = line + (match.end() if match else 0), after
            line = after
        self._keep(headers, name, first, last)
        self.left -= line - start
        return headers, line

    def _keep(self, headers: Headers, name: str, first: int, last: int) -> None:
        if not name:
            return
        if len(headers.fields) >= self._limits.headers:
            self.defects.append(f"more than {self._limits.headers} header fields")
            return
        if last - first > self._limits.header_bytes:
            self.defects.append(f"a header field of more than {self._limits.header_bytes} bytes")
            last = first + self._limits.header_bytes
        headers.fields.append((name, self._raw[first:last]))


def _skip_header(raw: bytes, at: int) -> int:
    """Where the content begins behind the next empty line."""
    ends = [found + len(mark) for mark in (b"\n\r\n", b"\n\n") if (found := raw.find(mark, at)) >= 0]
    return min(ends, default=len(raw))


def content(raw: bytes, part: Part, most: int | None = None) -> tuple[bytes, str]:
    """(decoded content, defect or "") of a part. `most`: decode only about that many of its encoded bytes, for the eye.

    White space at the end of a quoted-printable line was added on the way (RFC 2045 section 6.7). It is dropped from what is read;
    in files it stays, as in every other parser, so that hashes are the same everywhere.
    """
    end = part.end if most is None else min(part.end, part.start + most)
    encoding = _ENCODING_NAME.sub("", part.headers.get("content-transfer-encoding")).lower()
    if encoding in ("", "7bit", "8bit", "binary"):
        return raw[part.start : end], ""
    if encoding == "base64":
        decoded, defect = _base64(raw, part.start, end, cut=end < part.end)
        first_line = raw[part.start : min(end, part.start + 1000)].lstrip().partition(b"\n")[0]
        if defect and most is not None and b" " in first_line.rstrip():
            return raw[part.start : end], "words instead of base64, left as they are"
        return decoded, defect
    if encoding == "quoted-printable":
        data = raw[part.start : end]
        added = most is not None and any(mark in data for mark in _BLANK_LINE_ENDS)
        return binascii.a2b_qp(_BLANKS_AT_LINE_END.sub(b"", data) if added else data), ""
    if encoding in ("x-uuencode", "uuencode", "x-uue", "uue"):
        return _uuencode(raw[part.start : end], cut=end < part.end)
    return raw[part.start : end], "unknown transfer encoding, content left as it is"


def _base64(raw: bytes, start: int, end: int, *, cut: bool) -> tuple[bytes, str]:
    """Decodes what can be decoded. What stands behind the padding is left out, what is no base64 is passed over."""
    letters = raw[start:end].replace(b"\r", b"").replace(b"\n", b"")
    with suppress(binascii.Error):
        return pybase64.b64decode(letters, validate=True), ""  # whole, with no other byte in it
    try:
        decoded = binascii.a2b_base64(letters)
    except binascii.Error:
        kept = letters.translate(None, _NOT_BASE64).partition(b"=")[0]
        decoded = binascii.a2b_base64(kept[: len(kept) - (len(kept) % 4 == 1)] + b"==")
    else:
        if cut or len(decoded) == (len(letters) - sum(map(letters.count, (b" ", b"\t", b"=")))) * 3 // 4:
            return decoded, ""
    return decoded or raw[start:end], "" if cut else "broken base64"


def _uuencode(data: bytes, *, cut: bool) -> tuple[bytes, str]:
    """The file between "begin" and "end"; the data as it is where there is none."""
    begin = _UU_BEGIN.search(data)
    if begin is None:
        return data, "broken uuencode"
    decoded = bytearray()
    line = begin.end()
    for _ in range(len(data) // _SHORTEST_UU_LINE + 100):
        after = _after_line(data, line)
        text = data[line:after].rstrip()
        if text == b"end":
            return bytes(decoded), ""
        try:
            decoded += _uu_line(text)
        except binascii.Error:
            break
        if line == after:
            break
        line = after
    return bytes(decoded), "" if cut else "broken uuencode"


def _uu_line(text: bytes) -> bytes:
    """The bytes of one line; what stands behind as many letters as its first one promises is left out, as encoders pad differently."""
    promised = (((text[0] - 32) & 63) * 4 + 5) // 3 if text else 0
    return binascii.a2b_uu(text[:promised]) if text else b""
