"""What one mail looks like in the stream, what a handler gets to see of it, and the id that is the same wherever it is met.

Pure. A stream entry is a flat map of strings (`to_fields`); its `record` field is one JSON object (`record_to_json`,
`record_from_json`). All dates are ISO 8601 in UTC ("2024-05-01T12:00:00Z") or "" where there is none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from src.common.exceptions import ArchiveMissing, ArchiveUnavailable

if TYPE_CHECKING:
    from src.mail.mime import Part  # which imports this module

SCHEMA: Final = "1"
"""Version of the stream entry. A higher major number means: readers of this version must not touch the entry."""

RECORD_BYTES: Final = 128 * 1024
"""Most bytes of UTF-8 that the `record` field may have."""

_MAX_ACCOUNT: Final = 320  # RFC 3696 erratum 1690: 64 for the local part, @, 255 for the domain
_NOT_IN_ACCOUNT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_GMAIL_VALUE = re.compile("[1-9][0-9]{0,19}")
_HASH_VALUE = re.compile("[0-9a-f]{64}")
_END_OF_HEADER = re.compile(rb"(?:\A|\n)\r?\n")

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

# Bytes of JSON that a field may keep when the whole record is too large; what they leave goes to body_text.
_LIST_CAPS: Final = {
    "to": 16_384,
    "cc": 8_192,
    "reply_to": 2_048,
    "references": 4_096,
    "attachments": 16_384,
    "gm_labels": 4_096,
    "defects": 4_096,
}
_TEXT_CAPS: Final = {
    "subject": 2_048,
    "body_preview": 2_048,
    "message_id": 1_024,
    "in_reply_to": 1_024,
    "raw_ref": 1_024,
    "gm_thrid": 64,
    "date": 64,
    "ingested_at": 64,
    "traceparent": 256,
}


@dataclass(frozen=True, slots=True)
class Address:
    """One mailbox of an address header (RFC 5322 section 3.4), decoded; either half may be ""."""

    name: str
    address: str

    def __str__(self) -> str:
        if self.name and self.address:
            return f"{self.name} <{self.address}>"
        return self.address or self.name


@dataclass(frozen=True, slots=True)
class Attachment:
    """A part that is not the text of the mail. `size` (bytes) and `sha256` (hex) are those of the decoded content.

    `content` gives that content; only the attachments of an Email have it.
    """

    name: str
    content_type: str
    size: int
    sha256: str
    content: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)

    def open(self) -> BinaryIO:
        """The decoded content as a file, from the archived raw mail. Raises what `Email.raw` raises."""
        if self.content is None:
            raise ArchiveMissing("this attachment comes from a record without its mail: take it from Email.attachments")
        return BytesIO(self.content())


@dataclass(frozen=True, slots=True)
class Envelope:
    """What is known of a mail before its body is parsed: the IMAP server's word and what intake adds.

    `size` is RFC822.SIZE in bytes, `internal_date` INTERNALDATE. `truncated`: only the head of the mail is at hand.
    `defects`: reasons already known (a stub, an unfetchable body); they come first in the record's own.
    """

    account: str
    mailbox: str
    uid: int
    uidvalidity: int
    internal_date: str
    size: int
    email_id: str
    correlation_id: str
    ingested_at: str
    gm_thrid: str = ""
    gm_labels: tuple[str, ...] = ()
    raw_ref: str = ""
    truncated: bool = False
    defects: tuple[str, ...] = ()
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """The mail itself. Texts hold no control characters but newline and tab, and no lone surrogates."""

    uidvalidity: int = 0
    message_id: str = ""
    gm_thrid: str = ""
    gm_labels: tuple[str, ...] = ()
    from_: Address = Address("", "")
    to: tuple[Address, ...] = ()
    cc: tuple[Address, ...] = ()
    reply_to: tuple[Address, ...] = ()
    subject: str = ""
    date: str = ""
    size: int = 0
    in_reply_to: str = ""
    references: tuple[str, ...] = ()
    is_auto: bool = False
    is_bounce: bool = False
    is_list: bool = False
    body_preview: str = ""
    body_text: str = ""
    body_truncated: bool = False
    attachments: tuple[Attachment, ...] = ()
    raw_ref: str = ""
    defects: tuple[str, ...] = ()
    traceparent: str = ""
    ingested_at: str = ""


def to_fields(envelope: Envelope, record: Record) -> dict[str, str]:
    """The stream entry of a mail. `record` is at most RECORD_BYTES of UTF-8: lists and texts are cut where it would be more."""
    text = record_to_json(record)
    if len(text.encode()) > RECORD_BYTES:
        record = _fitted(record)
        text = record_to_json(record)
    return {
        "schema": SCHEMA,
        "email_id": envelope.email_id,
        "account": envelope.account,
        "mailbox": envelope.mailbox,
        "uid": str(envelope.uid),
        "internal_date": envelope.internal_date,
        "from": str(record.from_),
        "subject": record.subject,
        "correlation_id": envelope.correlation_id,
        "record": text,
    }


def record_to_json(record: Record) -> str:
    """The record as one compact JSON object on one line; not ASCII-escaped, so it is encoded as UTF-8."""
    return _dumps(
        {
            "uidvalidity": record.uidvalidity,
            "message_id": record.message_id,
            "gm_thrid": record.gm_thrid,
            "gm_labels": record.gm_labels,
            "from": _plain(record.from_),
            "to": [_plain(address) for address in record.to],
            "cc": [_plain(address) for address in record.cc],
            "reply_to": [_plain(address) for address in record.reply_to],
            "subject": record.subject,
            "date": record.date,
            "size": record.size,
            "in_reply_to": record.in_reply_to,
            "references": record.references,
            "is_auto": record.is_auto,
            "is_bounce": record.is_bounce,
            "is_list": record.is_list,
            "body_preview": record.body_preview,
            "body_text": record.body_text,
            "body_truncated": record.body_truncated,
            "attachments": [_plain(attachment) for attachment in record.attachments],
            "raw_ref": record.raw_ref,
            "defects": record.defects,
            "traceparent": record.traceparent,
            "ingested_at": record.ingested_at,
        }
    )


def record_from_json(text: str) -> Record:
    """The record a stream entry carries. Unknown keys are ignored, missing ones take their default.

    Raises ValueError where the text is no JSON object, a value has the wrong type, or a text holds a lone surrogate.
    """
    try:
        data = json.loads(text)
        text.encode()
    except RecursionError:
        raise ValueError("record: JSON nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"record: a JSON object is expected, not {type(data).__name__}")
    return Record(
        uidvalidity=_int(data, "uidvalidity"),
        message_id=_text(data, "message_id"),
        gm_thrid=_text(data, "gm_thrid"),
        gm_labels=_texts(data, "gm_labels"),
        from_=_address(data.get("from", {}), "from"),
        to=_addresses(data, "to"),
        cc=_addresses(data, "cc"),
        reply_to=_addresses(data, "reply_to"),
        subject=_text(data, "subject"),
        date=_text(data, "date"),
        size=_int(data, "size"),
        in_reply_to=_text(data, "in_reply_to"),
        references=_texts(data, "references"),
        is_auto=_bool(data, "is_auto"),
        is_bounce=_bool(data, "is_bounce"),
        is_list=_bool(data, "is_list"),
        body_preview=_text(data, "body_preview"),
        body_text=_text(data, "body_text"),
        body_truncated=_bool(data, "body_truncated"),
        attachments=tuple(_attachment(item) for item in _list(data, "attachments")),
        raw_ref=_text(data, "raw_ref"),
        defects=_texts(data, "defects"),
        traceparent=_text(data, "traceparent"),
        ingested_at=_text(data, "ingested_at"),
    )


class Email:
    """What a handler gets: one stream entry, read-only. What redis-cli shows is at hand; the rest is decoded on first touch.

    The properties that need the record raise ValueError where the entry carries none or a broken one; so does `uid`.
    `fetch_raw`: raw_ref → the raw mail (`Archive.get`); None where RAW_ARCHIVE is off.
    """

    def __init__(self, fields: Mapping[str, str], fetch_raw: Callable[[str], bytes] | None = None) -> None:
        self._fields = fields
        self._fetch_raw = fetch_raw

    def __repr__(self) -> str:
        return f"Email({self.email_id!r}, mailbox={self.mailbox!r}, uid={self._fields.get('uid', '')})"

    @cached_property
    def record(self) -> Record:
        return record_from_json(self._fields.get("record", ""))

    @property
    def email_id(self) -> str:
        """The stable id of the mail: the idempotency key for effects outside Redis."""
        return self._fields.get("email_id", "")

    @property
    def account(self) -> str:
        return self._fields.get("account", "")

    @property
    def mailbox(self) -> str:
        return self._fields.get("mailbox", "")

    @property
    def uid(self) -> int:
        return int(self._fields.get("uid", ""))

    @property
    def internal_date(self) -> str:
        return self._fields.get("internal_date", "")

    @property
    def subject(self) -> str:
        return self._fields.get("subject", "")

    @property
    def correlation_id(self) -> str:
        return self._fields.get("correlation_id", "")

    @property
    def sender(self) -> Address:
        return self.record.from_

    @property
    def to(self) -> tuple[Address, ...]:
        return self.record.to

    @property
    def cc(self) -> tuple[Address, ...]:
        return self.record.cc

    @property
    def reply_to(self) -> tuple[Address, ...]:
        return self.record.reply_to

    @property
    def date(self) -> str:
        """The Date header: what the sender claims. `internal_date` is the server's word."""
        return self.record.date

    @property
    def text(self) -> str:
        """The text of the mail, at most 64 KiB; `truncated` says whether there was more."""
        return self.record.body_text

    @property
    def preview(self) -> str:
        return self.record.body_preview

    @cached_property
    def attachments(self) -> tuple[Attachment, ...]:
        """`attachments[0].open()` reads the content of the first one."""
        listed = self.record.attachments
        return tuple(replace(item, content=partial(self._content, number)) for number, item in enumerate(listed))

    def raw(self) -> bytes:
        """The whole mail as the IMAP server gave it.

        Raises ArchiveUnavailable (the archive is away: this attempt fails, a later one may not) and ArchiveMissing (this mail is
        not in it: it was too large and entered as a stub, came while RAW_ARCHIVE was off, or is damaged).
        """
        return self._raw

    @cached_property
    def _raw(self) -> bytes:
        if not self.raw_ref:
            raise ArchiveMissing("this mail was not archived: it entered as a stub (see defects), or RAW_ARCHIVE was off")
        if self._fetch_raw is None:
            raise ArchiveUnavailable("RAW_ARCHIVE is off here, but this mail was archived: set it as the producer has it")
        return self._fetch_raw(self.raw_ref)

    @cached_property
    def _leaves(self) -> tuple[bytes, list[Part]]:
        """The raw mail as `parse` reads it, and its leaves."""
        from src.mail.mime import Limits, read_message

        raw = self._raw if b"\n" in self._raw else self._raw.replace(b"\r", b"\n")
        return raw, read_message(raw, Limits()).leaves

    def _content(self, number: int) -> bytes:
        """The decoded content of attachment `number` (from 0): it is the leaf with its hash, of those from `number` on."""
        from src.mail.mime import content

        wanted = self.record.attachments[number]
        raw, leaves = self._leaves
        for part in leaves[number:]:
            data, _ = content(raw, part)
            if len(data) == wanted.size and hashlib.sha256(data).hexdigest() == wanted.sha256:
                return data
        raise ArchiveMissing(f"the raw mail has no part that is attachment {number} of its record")

    @property
    def labels(self) -> tuple[str, ...]:
        """Gmail's labels; () elsewhere."""
        return self.record.gm_labels

    @property
    def message_id(self) -> str:
        """The Message-ID header. Its sender chose it: two mails can have the same. `email_id` is the key."""
        return self.record.message_id

    @property
    def in_reply_to(self) -> str:
        return self.record.in_reply_to

    @property
    def references(self) -> tuple[str, ...]:
        return self.record.references

    @property
    def size(self) -> int:
        """Bytes of the whole mail on the IMAP server."""
        return self.record.size

    @property
    def is_auto(self) -> bool:
        return self.record.is_auto

    @property
    def is_bounce(self) -> bool:
        return self.record.is_bounce

    @property
    def is_list(self) -> bool:
        return self.record.is_list

    @property
    def defects(self) -> tuple[str, ...]:
        """What was wrong with the mail or left out of the record, in plain words; () for a well-formed mail."""
        return self.record.defects

    @property
    def truncated(self) -> bool:
        return self.record.body_truncated

    @property
    def raw_ref(self) -> str:
        return self.record.raw_ref

    @property
    def traceparent(self) -> str:
        return self.record.traceparent


def sent_by(from_: str, wanted: str) -> bool:
    """Whether a stream entry's `from` is the address `wanted`, or of its domain where that begins with @. Case does not matter."""
    address = (from_.rpartition("<")[2].removesuffix(">") if from_.endswith(">") else from_).casefold()
    return address.endswith(wanted.casefold()) if wanted.startswith("@") else address == wanted.casefold()


# --- ids ---------------------------------------------------------------------------------------------------------------


def gmail_email_id(account: str, msgid: str) -> str:
    """`gm:<account>:<msgid>` from X-GM-MSGID (unsigned 64 bits, decimal). Raises ValueError on anything else."""
    return _checked(f"gm:{account}:{msgid}")


def hashed_email_id(account: str, *parts: bytes) -> str:
    """`h:<account>:<SHA-256>`. Each part is hashed behind its length, so that ("ab", "c") and ("a", "bc") differ.

    Raises ValueError where the account is empty, too long or holds control characters.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return _checked(f"h:{account}:{digest.hexdigest()}")


def header_email_id(account: str, internal_date: str, size: int, header: bytes, start: bytes = b"") -> str:
    """The id of a mail on a server without X-GM-MSGID: INTERNALDATE (UTC), RFC822.SIZE in bytes, and the header.

    `header` may be BODY[HEADER] or any prefix of the mail that holds the whole header: what follows the first empty line is
    left out, so a stub and the whole mail have the same id. `start`: the first 64 KiB of a mail without Message-ID, whose header
    may be another mail's too.
    """
    end = _END_OF_HEADER.search(header)
    header = (header[: end.start()] if end else header).rstrip(b"\r\n")
    return hashed_email_id(account, internal_date.encode(), str(size).encode(), header, start)


def in_mailbox_scope(email_id: str, mailbox: str) -> str:
    """The id under DEDUP_SCOPE=mailbox, where the same mail in another folder is another mail. ValueError on a bad id."""
    known = split_email_id(email_id)
    if known is None:
        raise ValueError(f"no valid email_id: {email_id[:400]!r}")
    return hashed_email_id(known[1], email_id.encode(), mailbox.encode("utf-8", "surrogatepass"))


def split_email_id(email_id: str) -> tuple[Literal["gm", "h"], str, str] | None:
    """(kind, account, value) of an id that this module could have made, else None. The account may hold colons."""
    kind, _, rest = email_id.partition(":")
    account, _, value = rest.rpartition(":")
    if not 0 < len(account) <= _MAX_ACCOUNT or _NOT_IN_ACCOUNT.search(account):
        return None
    if kind == "gm" and _GMAIL_VALUE.fullmatch(value) and int(value) < 1 << 64:
        return "gm", account, value
    if kind == "h" and _HASH_VALUE.fullmatch(value):
        return "h", account, value
    return None


@lru_cache(8192)  # each mail is asked for at its start and at its end
def member_of(email_id: str) -> str:
    """The mail's member in its account's processed set: 63 bits, decimal, so that the set stays an intset.

    Gmail's id without its top bit; else the first 63 bits of the hash. Raises ValueError on a bad id.
    """
    known = split_email_id(email_id)
    if known is None:
        raise ValueError(f"no valid email_id: {email_id[:400]!r}")
    kind, _, value = known
    return str(int(value) & ((1 << 63) - 1) if kind == "gm" else int(value[:16], 16) >> 1)


def _checked(email_id: str) -> str:
    if split_email_id(email_id) is None:
        raise ValueError(f"no valid email_id: {email_id[:400]!r}")
    return email_id


# --- fitting a record into its bytes -----------------------------------------------------------------------------------


def _fitted(record: Record) -> Record:
    """The record within RECORD_BYTES: every list and text within its cap, then as much body_text as there is room for."""
    changes: dict[str, Any] = {}
    notes: list[str] = []
    for name, cap in _LIST_CAPS.items():
        items = getattr(record, name)
        kept = _first_items(items, cap)
        if len(kept) < len(items):
            changes[name] = kept
            notes.append(f"{name}: {len(kept)} of {len(items)} kept")
    for name, cap in _TEXT_CAPS.items():
        text = getattr(record, name)
        kept_text = _first_characters(text, cap)
        if len(kept_text) < len(text):
            changes[name] = kept_text
            notes.append(f"{name}: cut")
    sender = Address(_first_characters(record.from_.name, 1_024), _first_characters(record.from_.address, 1_024))
    if sender != record.from_:
        changes["from_"] = sender
        notes.append("from: cut")
    changes["defects"] = (*changes.get("defects", record.defects), *notes)
    bare = replace(record, **changes, body_text="", body_truncated=False)
    room = RECORD_BYTES - len(record_to_json(bare).encode())
    body = _first_characters(record.body_text, room)
    return replace(bare, body_text=body, body_truncated=record.body_truncated or len(body) < len(record.body_text))


def _first_items(items: tuple[Any, ...], cap: int) -> tuple[Any, ...]:
    """The longest prefix whose JSON is at most `cap` bytes."""
    used = 0
    for count, item in enumerate(items):
        used += _json_bytes(item if isinstance(item, str) else _plain(item)) + 1
        if used > cap:
            return items[:count]
    return items


def _first_characters(text: str, cap: int) -> str:
    """The longest prefix whose JSON, quotes left out, is at most `cap` bytes."""
    if _json_bytes(text) - 2 <= cap:
        return text
    low, high = 0, min(len(text), cap)
    while low < high:
        middle = (low + high + 1) // 2
        if _json_bytes(text[:middle]) - 2 <= cap:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _json_bytes(value: Any) -> int:
    return len(_dumps(value).encode())


def _dumps(value: Any) -> str:
    return _JSON.encode(value)


# --- JSON to types -----------------------------------------------------------------------------------------------------


def _plain(item: Address | Attachment) -> dict[str, str | int]:
    if isinstance(item, Address):
        return {"name": item.name, "address": item.address}
    return {"name": item.name, "content_type": item.content_type, "size": item.size, "sha256": item.sha256}


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"record: {key} must be a text")
    value.encode()
    return value


def _int(data: dict[str, Any], key: str) -> int:
    value = data.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"record: {key} must be an integer")
    return value


def _bool(data: dict[str, Any], key: str) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"record: {key} must be true or false")
    return value


def _list(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"record: {key} must be a list")
    return value


def _texts(data: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple(_text({key: item}, key) for item in _list(data, key))


def _address(value: Any, key: str) -> Address:
    if not isinstance(value, dict):
        raise ValueError(f"record: {key} must hold objects with name and address")
    return Address(_text(value, "name"), _text(value, "address"))


def _addresses(data: dict[str, Any], key: str) -> tuple[Address, ...]:
    return tuple(_address(item, key) for item in _list(data, key))


def _attachment(value: Any) -> Attachment:
    if not isinstance(value, dict):
        raise ValueError("record: attachments must hold objects")
    return Attachment(_text(value, "name"), _text(value, "content_type"), _int(value, "size"), _text(value, "sha256"))
