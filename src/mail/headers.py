"""Header fields: unfolding, encoded words, addresses, parameters, dates (RFC 5322, 2047, 2231).

Pure, linear in the input, and without the standard library's header parsers: those recurse on nested comments and are
quadratic on long lists. Values handed in are bounded by `src.mail.mime`.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_tz
from typing import Final
from urllib.parse import unquote_to_bytes

from src.mail.record import Address
from src.mail.text import decode_charset, has_controls, one_line

_WORD = re.compile(r"=\?([^?*\s]{1,64})(?:\*[^?\s]{0,64})?\?([bBqQ])\?(.*?)\?=", re.DOTALL)
_ADDRESS_TOKEN = re.compile(
    r'"((?:[^"\\]|\\.)*)"?|<((?:[^<>"]|"(?:[^"\\]|\\.){0,100}")*(?=>)|[^<>]*)>?|([(),;:>])|((?:=\?[^?\s]{1,64}\?[bBqQ]\?[^?\s]{0,200}\?=|[^"(),;:<>=]+|=)+)',
    re.DOTALL,
)
_LOCAL_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|\(|[^"(]+', re.DOTALL)
_COMMENT_TOKEN = re.compile(r"\\.|[()]|[^\\()]+|\\", re.DOTALL)
_PARAMETER = re.compile(r';\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"?|([^;]*))', re.DOTALL)
_MAY_HOLD_PARENTHESES: Final = ("filename", "name")  # where senders forget the quotes
_SEGMENT = re.compile(r"([^*]+)(?:\*([0-9]{1,3}))?(\*)?")
_MESSAGE_ID = re.compile(r"<[^<>\s]+>")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")

_AROUND_COLON = re.compile(r" ?: ?")

_FIRST_YEAR: Final = 1900  # RFC 5322 section 3.3
_LAST_YEAR: Final = 2100


@dataclass(slots=True)
class Headers:
    """The header fields of one part, in order: (name in lower case, raw value, folds kept)."""

    fields: list[tuple[str, bytes]] = field(default_factory=list)

    def get(self, name: str) -> str:
        """The first field of that name (lower case), unfolded, 8-bit bytes read as UTF-8 or windows-1252; "" if none."""
        for known, value in self.fields:
            if known == name:
                return _readable(value)
        return ""

    def get_all(self, name: str) -> list[str]:
        return [_readable(value) for known, value in self.fields if known == name]

    def only(self, name: str) -> Headers:
        """A header of nothing but the fields of that name."""
        return Headers([(known, value) for known, value in self.fields if known == name])

    def has(self, *names: str) -> bool:
        return any(known in names for known, _ in self.fields)


def _readable(value: bytes) -> str:
    text = value.decode("ascii") if value.isascii() else decode_charset(value, "")[0]
    return text.replace("\r", "").replace("\n", "").strip()


def decode_words(value: str) -> str:
    """A value with its encoded words decoded (RFC 2047), on one line. Words of one charset in a row are decoded as one."""
    return one_line(_decoded(value))


def smuggles(value: str) -> bool:
    """Whether its encoded words hide line ends or control characters."""
    decoded = _decoded(value)
    return "\n" in decoded or "\r" in decoded or has_controls(decoded)


def _decoded(value: str) -> str:
    if "=?" not in value:
        return value
    pieces: list[str] = []
    run = b""
    run_charset = ""
    at = 0
    # A word begun before the last "?=" has an end, so no place is looked at twice.
    for word in _WORD.finditer(value, 0, value.rfind("?=") + 2):
        charset, encoding, payload = word[1].lower(), word[2].lower(), word[3]
        between = value[at : word.start()]
        at = word.end()
        if between.strip() or not run or charset != run_charset:
            pieces.append(decode_charset(run, run_charset)[0])
            if between.strip() or not run:
                pieces.append(between)
            run = b""
        run_charset = charset
        run += _word_bytes(payload, encoding)
    pieces.append(decode_charset(run, run_charset)[0])
    pieces.append(value[at:])
    return "".join(pieces)


def _word_bytes(payload: str, encoding: str) -> bytes:
    if encoding == "q":
        return binascii.a2b_qp(payload.encode("utf-8", "replace"), header=True)
    letters = _NOT_BASE64.sub("", payload)
    letters = letters[: len(letters) - (len(letters) % 4 == 1)]
    return binascii.a2b_base64(letters + "==")


def addresses(value: str, most: int) -> tuple[Address, ...]:
    """The mailboxes of an address list (RFC 5322 section 3.4), groups opened, comments as names; at most `most` of them.

    Takes what senders write: bare names, missing brackets and quotes, ";" for ",". Encoded words are decoded after the
    list is split, so that a comma inside of one does not split it.
    """
    found: list[Address] = []
    words: list[_Word] = []
    comment = ""
    angle: str | None = None
    in_address = False
    at = 0
    while at < len(value) and len(found) < most:
        token = _ADDRESS_TOKEN.match(value, at)
        if token is None:
            break
        at = token.end()
        quoted, bracketed, mark, text = token.groups()
        if quoted is not None:
            words.append(_Word(_ESCAPED.sub(r"\1", quoted), token[0]))
        elif bracketed is not None:
            angle = angle or bracketed
        elif text is not None or (mark == ":" and in_address):  # a colon of a domain literal
            text = text or ":"
            in_address = in_address or "@" in text
            if words and not words[-1].quoted:
                words[-1] = _Word(words[-1].text + text)
            else:
                words.append(_Word(text))
        elif mark == "(":
            comment, at = _comment(value, at)
        elif mark == ":" and angle is None:
            words, comment = [], ""  # the name of a group
        elif mark in ",;":
            found.extend(_mailbox(words, angle, comment))
            words, angle, comment, in_address = [], None, "", False
    if len(found) < most:
        found.extend(_mailbox(words, angle, comment))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Word:
    """A piece of a phrase or an address; `quoted`: as it stood in its quotes, "" where it had none."""

    text: str
    quoted: str = ""


def _comment(value: str, at: int) -> tuple[str, int]:
    """The comment whose "(" is just before `at`, and where the text goes on behind it."""
    depth = 1
    pieces: list[str] = []
    for token in _COMMENT_TOKEN.finditer(value, at):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return _ESCAPED.sub(r"\1", "".join(pieces)), token.end()
        pieces.append(token[0])
    return "".join(pieces), len(value)


def _without_comments(value: str) -> str:
    """A structured value without its comments; what looks like one inside of quotes stays."""
    pieces: list[str] = []
    at = 0
    while (token := _LOCAL_TOKEN.match(value, at)) is not None:
        at = token.end()
        if token[0] == "(":
            at = _comment(value, at)[1]
        else:
            pieces.append(token[0])
    return "".join(pieces)


def _mailbox(words: list[_Word], angle: str | None, comment: str) -> list[Address]:
    if angle is not None:
        address = _bare_address(angle)
        name = decode_words("".join(word.text for word in words)) or decode_words(comment)
        return [Address(name, address)] if name or address else []
    atoms = _atoms(words)
    with_at = [atom for atom in atoms if "@" in atom.text]
    chosen = next((atom for atom in reversed(with_at) if not atom.quoted), with_at[-1] if with_at else None)
    name = decode_words(" ".join(atom.text for atom in atoms if atom is not chosen))
    if chosen is None:  # a user of the sender's own machine, or half of a name that holds a comma
        return [Address(name, "")] if name else []
    return [Address(name or decode_words(comment), _bare_address(chosen.text))]


def _atoms(words: list[_Word]) -> list[_Word]:
    """The words of a mailbox without brackets, split at white space that is not around "@" or a dot behind it (section 4.4)."""
    atoms: list[_Word] = []
    for word in words:
        for piece in [word] if word.quoted else map(_Word, word.text.split()):
            before = atoms[-1].text if atoms else ""
            in_domain = "@" in before and (before[-1] in "@." or piece.text.startswith("."))
            if atoms and (in_domain or piece.text.startswith("@")):
                atoms[-1] = _Word((atoms[-1].quoted or before) + piece.text)
            else:
                atoms.append(piece)
    return atoms


def _bare_address(text: str) -> str:
    """An address without comments, without white space outside quotes, and without the route of old ("@a,@b:user@host")."""
    if "(" in text or '"' in text:
        text = _without_comments(text)
        pieces = [token if token[0] == '"' else "".join(token.split()) for token in _LOCAL_TOKEN.findall(text)]
        address = one_line("".join(pieces))
    else:
        address = "".join(one_line(text).split())
    if address.startswith("@") and ":" in address:
        address = address.partition(":")[2]
    return address


def value_and_parameters(value: str) -> tuple[str, dict[str, str]]:
    """A Content-Type or Content-Disposition in two: its value in lower case; its parameters by name in lower case.

    RFC 2231 (charset, %XX, numbered pieces) is decoded; encoded words, which senders use in its place, are left as they are.
    """
    head = value.partition(";")[0]
    if "=" in head and len(words := head.split(None, 1)) == 2:  # the first ";" was forgotten
        head, value = words[0], f"{words[0]};{value[value.index(words[1]) :]}"
    head = head.partition("(")[0].strip(" \t\"'").lower()
    plain: dict[str, str] = {}
    pieces: dict[str, dict[int, tuple[str, bool]]] = {}
    for match in _PARAMETER.finditer(value):
        segment = _SEGMENT.fullmatch(match[1].lower())
        if segment is None:
            continue
        name, number, encoded = segment[1], segment[2], bool(segment[3])
        if match[2] is not None:
            text = _ESCAPED.sub(r"\1", match[2])
        else:
            text = (match[3] if name in _MAY_HOLD_PARENTHESES else match[3].partition(" (")[0]).strip()
        if number is None and not encoded:
            plain.setdefault(name, text)
        else:
            pieces.setdefault(name, {}).setdefault(int(number or 0), (text, encoded))
    return head, plain | {name: _joined(parts) for name, parts in pieces.items()} if pieces else plain


def _joined(parts: dict[int, tuple[str, bool]]) -> str:
    """RFC 2231 section 4.1: the numbered pieces of a value; the first may name the charset of all."""
    charset = ""
    data = b""
    for position, number in enumerate(sorted(parts)):
        text, encoded = parts[number]
        if encoded and position == 0 and text.count("'") >= 2:
            charset, _, text = text.split("'", 2)
        data += unquote_to_bytes(text.encode("utf-8", "replace")) if encoded else text.encode("utf-8", "replace")
    return decode_charset(data, charset)[0]


def message_ids(value: str) -> tuple[str, ...]:
    """Every `<…>` of a Message-ID, In-Reply-To or References field, brackets kept, comments and white space in them dropped."""
    found = _MESSAGE_ID.findall(value)
    if not found and "<" in value:
        found = _MESSAGE_ID.findall("".join(_without_comments(value).split()))
    return tuple(one_line(identifier) for identifier in found)


def utc_date(value: str) -> str:
    """A Date field as ISO 8601 in UTC; "" where it cannot be read or lies outside 1900 to 2100. No zone means UTC."""
    text = one_line(value[:200])
    if "(" in text or " :" in text or ": " in text:
        text = _AROUND_COLON.sub(":", one_line(_without_comments(text)))
    try:
        parsed = parsedate_tz(text[:100])
        if parsed is None:
            return ""
        year, month, day, hour, minute, second = parsed[:6]
        moment = datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC) - timedelta(seconds=parsed[9] or 0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return ""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if _FIRST_YEAR <= moment.year <= _LAST_YEAR else ""
