"""IMAP4rev1 as text: command lines into values, sequence sets, SEARCH keys, FETCH items, and the way back. Pure.

RFC 3501 (6 commands, 9 grammar), modified UTF-7 of its 5.1.3, and Gmail's X-GM-EXT-1 items.
"""

from __future__ import annotations

import base64
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from src.sandbox.store import Entry

# An atom is a str, a quoted string or literal is bytes, a parenthesised list is a list.
Value = str | bytes | list["Value"]

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_LITERAL = re.compile(rb"\{(\d{1,9})(\+?)\}\Z")
_DEPTH = 20


class Malformed(Exception):
    """The command is not IMAP4rev1 as far as the sandbox speaks it: answer BAD with this text."""


def literal_at_end(line: bytes) -> tuple[int, bool] | None:
    """(octets, does the client wait for a continuation) of a literal that ends this line."""
    match = _LITERAL.search(line)
    return (int(match[1]), not match[2]) if match else None


def parse_command(parts: Sequence[bytes]) -> tuple[str, str, list[Value]]:
    """(tag, command in capitals, arguments) of a command: line, literal, line, literal, …, line."""
    scanner = _Scanner(parts)
    values = scanner.sequence(closing=False, depth=0)
    if len(values) < 2 or not isinstance(values[0], str) or not isinstance(values[1], str):
        raise Malformed("Could not parse command")
    return values[0], values[1].upper(), values[2:]


def text(value: Value) -> str:
    """An astring argument as text."""
    if isinstance(value, list):
        raise Malformed("Expected a string, got a list")
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


class _Scanner:
    """Walks over the parts of one command; a literal's octets are a part of their own."""

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._parts = parts
        self._part = 0
        self._at = 0

    def sequence(self, *, closing: bool, depth: int) -> list[Value]:
        if depth > _DEPTH:
            raise Malformed("Nested too deeply")
        values: list[Value] = []
        while True:
            line = self._parts[self._part]
            if self._at >= len(line):
                if closing:
                    raise Malformed("Missing ')'")
                return values
            octet = line[self._at : self._at + 1]
            if octet == b" ":
                self._at += 1
            elif octet == b"(":
                self._at += 1
                values.append(self.sequence(closing=True, depth=depth + 1))
            elif octet == b")":
                if not closing:
                    raise Malformed("Unexpected ')'")
                self._at += 1
                return values
            elif octet == b'"':
                values.append(self._quoted(line))
            elif octet == b"{" and self._part + 2 < len(self._parts) and _LITERAL.match(line, self._at):
                values.append(self._parts[self._part + 1])
                self._part, self._at = self._part + 2, 0
            else:
                values.append(self._atom(line))

    def _quoted(self, line: bytes) -> bytes:
        out = bytearray()
        at = self._at + 1
        while at < len(line):
            if line[at] == 0x22:
                self._at = at + 1
                return bytes(out)
            if line[at] == 0x5C:
                at += 1
            out += line[at : at + 1]
            at += 1
        raise Malformed("Missing '\"'")

    def _atom(self, line: bytes) -> str:
        start, brackets = self._at, 0
        while self._at < len(line):
            octet = line[self._at]
            if octet == 0x5B:
                brackets += 1
            elif octet == 0x5D:
                brackets -= 1
            elif brackets <= 0 and octet in b' ()"{':
                break
            self._at += 1
        if self._at == start:
            raise Malformed("Could not parse command")
        return line[start : self._at].decode("utf-8", "surrogateescape")


def uids_in(sequence_set: str, uids: Sequence[int]) -> list[int]:
    """Those of the ascending `uids` that a set of UIDs names (RFC 3501, 9: sequence-set); `*` is the last one.

    `n:*` beyond the end names the last message, since the order of a range's ends does not matter.
    """
    last = uids[-1] if uids else 0
    found: set[int] = set()
    for low, high in _ranges(sequence_set, last):
        found.update(uids[bisect_left(uids, low) : bisect_right(uids, high)])
    return sorted(found)


def positions_in(sequence_set: str, uids: Sequence[int]) -> list[int]:
    """The UIDs at these sequence numbers. `Malformed`: a number beyond the end."""
    found: set[int] = set()
    for low, high in _ranges(sequence_set, len(uids)):
        if low < 1 or high > len(uids):
            raise Malformed("Invalid message sequence number")
        found.update(uids[low - 1 : high])
    return sorted(found)


def _ranges(sequence_set: str, last: int) -> Iterable[tuple[int, int]]:
    for part in sequence_set.split(","):
        first, _, second = part.partition(":")
        ends = [last if end == "*" else _number(end) for end in ((first, second) if ":" in part else (first,))]
        yield min(ends), max(ends)


def _number(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise Malformed(f"Not a number: {digits[:40]}")
    return int(digits)


Predicate = Callable[[int, Entry], bool]


def search(values: list[Value], uids: Sequence[int], load: Callable[[Sequence[int]], list[tuple[int, Entry]]]) -> list[int]:
    """The UIDs among `uids` (ascending, by sequence number) that all keys of a SEARCH match.

    Sets narrow first; `load` is asked for entries only where a key needs them.
    """
    keys = _SearchKeys(values, uids).all()
    found: Sequence[int] = uids
    for key in keys:
        if isinstance(key, frozenset):
            found = [uid for uid in found if uid in key]
    predicates = [key for key in keys if not isinstance(key, frozenset)]
    if not predicates:
        return list(found)
    return [uid for uid, entry in load(found) if all(holds(uid, entry) for holds in predicates)]


class _SearchKeys:
    """RFC 3501, 6.4.4: a key is the frozenset of UIDs that it names, or a predicate."""

    def __init__(self, values: list[Value], uids: Sequence[int]) -> None:
        self._values = values
        self._uids = uids
        self._at = 0

    def all(self) -> list[frozenset[int] | Predicate]:
        keys: list[frozenset[int] | Predicate] = []
        while self._at < len(self._values):
            keys.append(self._key())
        if not keys:
            raise Malformed("Missing search key")
        return keys

    def _next(self) -> Value:
        if self._at >= len(self._values):
            raise Malformed("Missing argument of a search key")
        self._at += 1
        return self._values[self._at - 1]

    def _key(self) -> frozenset[int] | Predicate:
        value = self._next()
        if isinstance(value, list):
            keys = [_as_predicate(key) for key in _SearchKeys(value, self._uids).all()]
            return lambda uid, entry: all(holds(uid, entry) for holds in keys)
        name = text(value).upper()
        if name == "ALL":
            return lambda uid, entry: True
        if name == "UID":
            return frozenset(uids_in(text(self._next()), self._uids))
        if name == "NOT":
            inner = _as_predicate(self._key())
            return lambda uid, entry: not inner(uid, entry)
        if name == "OR":
            left, right = _as_predicate(self._key()), _as_predicate(self._key())
            return lambda uid, entry: left(uid, entry) or right(uid, entry)
        if name in ("SINCE", "BEFORE", "ON"):
            return _by_day(name, _date(text(self._next())))
        if name in ("LARGER", "SMALLER"):
            size = _number(text(self._next()))
            larger = name == "LARGER"
            return lambda uid, entry: len(entry.message.raw) > size if larger else len(entry.message.raw) < size
        if name in _FLAG_KEYS:
            flag, wanted = _FLAG_KEYS[name]
            return lambda uid, entry: (flag in entry.flags) is wanted
        if name == "X-GM-MSGID":
            msgid = _number(text(self._next()))
            return lambda uid, entry: entry.message.gm_msgid == msgid
        if name[:1].isdigit() or name[:1] == "*":
            return frozenset(positions_in(name, self._uids))
        raise Malformed(f"Unknown search key {name[:40]}")


_FLAG_KEYS = {
    "SEEN": ("\\Seen", True),
    "UNSEEN": ("\\Seen", False),
    "FLAGGED": ("\\Flagged", True),
    "UNFLAGGED": ("\\Flagged", False),
    "DELETED": ("\\Deleted", True),
    "UNDELETED": ("\\Deleted", False),
    "ANSWERED": ("\\Answered", True),
    "UNANSWERED": ("\\Answered", False),
}


def _as_predicate(key: frozenset[int] | Predicate) -> Predicate:
    return (lambda uid, entry: uid in key) if isinstance(key, frozenset) else key


def _by_day(name: str, day: date) -> Predicate:
    if name == "SINCE":
        return lambda uid, entry: entry.message.internal_date.date() >= day
    if name == "BEFORE":
        return lambda uid, entry: entry.message.internal_date.date() < day
    return lambda uid, entry: entry.message.internal_date.date() == day


def _date(value: str) -> date:
    day, _, rest = value.partition("-")
    month, _, year = rest.partition("-")
    try:
        return date(_number(year), _month(month), _number(day))
    except ValueError:
        raise Malformed(f"Not a date: {value[:40]}") from None


def _month(name: str) -> int:
    if name.capitalize() not in _MONTHS:
        raise Malformed(f"Not a month: {name[:40]}")
    return _MONTHS.index(name.capitalize()) + 1


_DATE_TIME = re.compile(r" ?(\d{1,2})-(\w{3})-(\d{4}) (\d\d):(\d\d):(\d\d) ([+-]\d{4})\Z", re.ASCII)


def read_date_time(value: str) -> datetime:
    """The date-time of APPEND: `17-Jul-1996 02:44:25 -0700`."""
    match = _DATE_TIME.match(value)
    if not match:
        raise Malformed(f"Not a date-time: {value[:40]}")
    day, month, year, hour, minute, second, zone = match.groups()
    try:
        return datetime.strptime(
            f"{day}-{_month(month):02}-{year} {hour}:{minute}:{second} {zone}", "%d-%m-%Y %H:%M:%S %z"
        ).astimezone(UTC)
    except ValueError:
        raise Malformed(f"Not a date-time: {value[:40]}") from None


def date_time(moment: datetime) -> str:
    """INTERNALDATE as FETCH shows it, in UTC."""
    return f"{moment.day:2}-{_MONTHS[moment.month - 1]}-{moment:%Y %H:%M:%S} +0000"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that FETCH is asked for. `part`: "", "HEADER", "TEXT" or "FIELDS" of a BODY; `partial`: (first octet, octets)."""

    name: str
    label: str
    part: str = ""
    fields: tuple[str, ...] = ()
    negated: bool = False
    partial: tuple[int, int] | None = None
    peek: bool = True


_SIMPLE_ITEMS = frozenset({"UID", "FLAGS", "INTERNALDATE", "RFC822.SIZE"})
_GMAIL_ITEMS = frozenset({"X-GM-MSGID", "X-GM-THRID", "X-GM-LABELS"})
_MACROS = {"FAST": ("FLAGS", "INTERNALDATE", "RFC822.SIZE")}
_BODY = re.compile(r"BODY(\.PEEK)?\[([^\]]*)\](?:<(\d{1,10})\.(\d{1,10})>)?\Z", re.IGNORECASE)
_FIELDS = re.compile(r"HEADER\.FIELDS(\.NOT)? \(([^()]+)\)\Z", re.IGNORECASE)


def fetch_items(value: Value, *, by_uid: bool, gmail: bool) -> list[Item]:
    """The items of a FETCH; UID FETCH always shows the UID too (RFC 3501, 6.4.8)."""
    names = [text(name) for name in (value if isinstance(value, list) else [value])]
    if len(names) == 1:
        names = list(_MACROS.get(names[0].upper(), names))
    items = [_item(name, gmail) for name in names]
    if by_uid and all(item.name != "UID" for item in items):
        items.insert(0, Item("UID", "UID"))
    if not items:
        raise Malformed("FETCH of nothing")
    return items


def _item(asked: str, gmail: bool) -> Item:
    name = asked.upper()
    if name in _SIMPLE_ITEMS or (gmail and name in _GMAIL_ITEMS):
        return Item(name, name)
    if name == "RFC822":
        return Item("BODY", "RFC822", peek=False)
    match = _BODY.match(asked)
    if not match:
        raise Malformed(f"Unknown FETCH item {asked[:60]}")
    peek, section, first, octets = match.groups()
    partial = (int(first), int(octets)) if first is not None else None
    label = f"BODY[{section.upper()}]" + (f"<{first}>" if first is not None else "")
    if section.upper() in ("", "HEADER", "TEXT"):
        return Item("BODY", label, section.upper(), partial=partial, peek=bool(peek))
    chosen = _FIELDS.match(section)
    if not chosen:
        raise Malformed(f"Unknown section {section[:60]}")
    fields = tuple(field.strip('"').lower() for field in chosen[2].split())
    return Item("BODY", label, "FIELDS", fields, negated=bool(chosen[1]), partial=partial, peek=bool(peek))


def fetch_line(position: int, uid: int, entry: Entry, labels: Sequence[str], items: Sequence[Item]) -> bytes:
    """One untagged FETCH response, its CRLF included."""
    return b"* %d FETCH (%b)\r\n" % (position, b" ".join(_shown(item, uid, entry, labels) for item in items))


def _shown(item: Item, uid: int, entry: Entry, labels: Sequence[str]) -> bytes:
    message = entry.message
    match item.name:
        case "UID":
            return b"UID %d" % uid
        case "FLAGS":
            return b"FLAGS (%b)" % " ".join(sorted(entry.flags)).encode()
        case "INTERNALDATE":
            return b'INTERNALDATE "%b"' % date_time(message.internal_date).encode()
        case "RFC822.SIZE":
            return b"RFC822.SIZE %d" % len(message.raw)
        case "X-GM-MSGID" | "X-GM-THRID":
            return b"%b %d" % (item.name.encode(), message.gm_msgid)
        case "X-GM-LABELS":
            return b"X-GM-LABELS (%b)" % b" ".join(quoted(encode_name(label)) for label in labels)
    octets = _section(item, message.raw, message.header_end)
    if item.partial:
        octets = octets[item.partial[0] : item.partial[0] + item.partial[1]]
    return b"%b {%d}\r\n%b" % (item.label.encode("utf-8", "surrogateescape"), len(octets), octets)


def _section(item: Item, raw: bytes, header_end: int) -> bytes:
    match item.part:
        case "":
            return raw
        case "HEADER":
            return raw[:header_end]
        case "TEXT":
            return raw[header_end:]
    fields = re.findall(rb"(?m)^[^\s:]+:.*(?:\r?\n[ \t].*)*\r?\n?", raw[:header_end])
    return (
        b"".join(
            field
            for field in fields
            if (field.partition(b":")[0].decode("ascii", "replace").lower() in item.fields) is not item.negated
        )
        + b"\r\n"
    )


def quoted(name: str) -> bytes:
    """A name as a quoted string, already free of 8-bit characters."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'.encode("ascii")


def encode_name(name: str) -> str:
    """A mailbox name in modified UTF-7 (RFC 3501, 5.1.3)."""
    return re.sub(r"&|[^\x20-\x7e]+", lambda run: _shifted(run[0]), name)


def _shifted(run: str) -> str:
    if run == "&":
        return "&-"
    packed = base64.b64encode(run.encode("utf-16-be", "surrogatepass")).decode("ascii")
    return f"&{packed.rstrip('=').replace('/', ',')}-"


def decode_name(name: str) -> str:
    """Back from modified UTF-7. `Malformed`: it is not."""
    return re.sub(r"&([^-]*)-", lambda run: _unshifted(run[1]), name)


def _unshifted(packed: str) -> str:
    if not packed:
        return "&"
    try:
        octets = base64.b64decode(packed.replace(",", "/") + "=" * (-len(packed) % 4), validate=True)
        return octets.decode("utf-16-be")
    except ValueError:
        raise Malformed("Not a mailbox name in modified UTF-7") from None
