"""From the bytes of a mail to its record. Pure; takes any bytes and never raises: what cannot be read is named in `defects`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

from src.mail.headers import Headers, addresses, decode_words, message_ids, smuggles, utc_date, value_and_parameters
from src.mail.mime import Limits, Message, Part, content, read_message
from src.mail.record import Address, Attachment, Envelope, Record
from src.mail.text import clean_text, cut_utf8, decode_charset, html_to_text, one_line, preview

__all__ = ["Limits", "parse", "stub"]

_LIMITS = Limits()
_MOST_SUBJECT = 2_000  # characters
_MOST_ID = 998  # characters: RFC 5322's longest line
_MOST_DEFECTS = 30
_DANGEROUS_IN_NAMES = re.compile('[\u200e\u200f\u202a-\u202e\u2066-\u2069<>:"|?*]')
_SENDER = re.compile(r".+@[^@]+")
_DAEMONS = ("mailer-daemon", "postmaster")


def parse(raw: bytes, envelope: Envelope, limits: Limits = _LIMITS) -> Record:
    """The record of a whole mail, or of as much of it as `raw` holds where `envelope.truncated`."""
    if b"\n" not in raw:
        raw = raw.replace(b"\r", b"\n")
    message = read_message(raw, limits)
    headers = message.root.headers
    defects = [one_line(defect) for defect in envelope.defects] + message.defects
    bodies, files = _bodies_and_files(message)
    text, more_text = _text(raw, bodies, limits, defects)
    sender = _sender(headers, limits, defects)
    return Record(
        uidvalidity=envelope.uidvalidity,
        message_id=_message_id(headers),
        gm_thrid=envelope.gm_thrid,
        gm_labels=tuple(one_line(label) for label in envelope.gm_labels),
        from_=sender,
        to=_addresses(headers, "to", limits, defects),
        cc=_addresses(headers, "cc", limits, defects),
        reply_to=_addresses(headers, "reply-to", limits, defects),
        subject=_subject(headers, defects),
        date=_date(headers, defects),
        size=envelope.size,
        in_reply_to=next(iter(message_ids(headers.get("in-reply-to"))), "")[:_MOST_ID],
        references=message_ids(headers.get("references")),
        is_auto=_is_auto(headers),
        is_bounce=_is_bounce(message, sender),
        is_list=_is_list(headers),
        body_preview=preview(text, limits.preview),
        body_text=text,
        body_truncated=more_text or envelope.truncated,
        attachments=tuple(_attachment(raw, part, envelope.truncated, defects) for part in files),
        raw_ref=envelope.raw_ref,
        defects=_told_once(defects),
        traceparent=envelope.traceparent,
        ingested_at=envelope.ingested_at,
    )


def stub(envelope: Envelope, head: bytes, reason: str) -> Record:
    """The record of a mail of which only the head is at hand: header and first 64 KiB, or nothing at all.

    `reason` (why) is its first defect behind those of the envelope; `body_truncated` is true. An attachment whose end is
    missing has no hash, and the size of what is there.
    """
    return parse(head, replace(envelope, truncated=True, defects=(*envelope.defects, reason)))


# --- header ------------------------------------------------------------------------------------------------------------


def _addresses(headers: Headers, name: str, limits: Limits, defects: list[str]) -> tuple[Address, ...]:
    if any(smuggles(value) for value in headers.get_all(name)):
        defects.append(f"line ends or control characters in {name}")
    found = addresses(", ".join(headers.get_all(name))[: limits.header_bytes], limits.addresses + 1)
    if len(found) > limits.addresses:
        defects.append(f"more than {limits.addresses} addresses in {name}")
    return found[: limits.addresses]


def _sender(headers: Headers, limits: Limits, defects: list[str]) -> Address:
    """The first address of From; both halves "" where there is none."""
    sender = next(iter(_addresses(headers, "from", limits, defects)), Address("", ""))
    if headers.has("from") and not _SENDER.fullmatch(sender.address):
        defects.append("the sender's address cannot be read")
    return sender


def _subject(headers: Headers, defects: list[str]) -> str:
    value = headers.get("subject")
    subject = decode_words(value)
    if smuggles(value):
        defects.append("line ends or control characters in subject")
    if len(subject) > _MOST_SUBJECT:
        defects.append(f"a subject of more than {_MOST_SUBJECT} characters")
    return subject[:_MOST_SUBJECT]


def _message_id(headers: Headers) -> str:
    value = one_line(headers.get("message-id"))
    return next(iter(message_ids(value)), value)[:_MOST_ID]


def _date(headers: Headers, defects: list[str]) -> str:
    value = headers.get("date")
    date = utc_date(value)
    if value and not date:
        defects.append("the date cannot be read")
    return date


def _is_auto(headers: Headers) -> bool:
    """Sent by a program: RFC 3834's Auto-Submitted, or what programs without it use."""
    submitted = value_and_parameters(headers.get("auto-submitted"))[0].partition("(")[0].strip()
    suppress = headers.get("x-auto-response-suppress").strip().lower()
    return (
        submitted not in ("", "no")
        or _precedence(headers) in ("bulk", "auto_reply", "junk")
        or suppress not in ("", "none")
        or headers.has("x-autoreply", "x-autorespond")
    )


def _is_bounce(message: Message, sender: Address) -> bool:
    """A delivery status notification (RFC 3464), or mail from nobody (Return-Path: <>) by or like a mail system."""
    root = message.root
    if root.content_type == "multipart/report" and root.parameters.get("report-type", "").lower() == "delivery-status":
        return True
    if root.headers.get("return-path").replace(" ", "") != "<>":
        return False
    return (
        sender.address.partition("@")[0].lower() in _DAEMONS
        or root.headers.has("x-failed-recipients")
        or any(part.content_type == "message/delivery-status" for part in message.leaves)
    )


def _is_list(headers: Headers) -> bool:
    """Sent to many through a list (RFC 2919, RFC 2369)."""
    return headers.has("list-id", "list-post", "list-unsubscribe") or _precedence(headers) == "list"


def _precedence(headers: Headers) -> str:
    return headers.get("precedence").strip().lower()


# --- body --------------------------------------------------------------------------------------------------------------


def _bodies_and_files(message: Message) -> tuple[list[Part], list[Part]]:
    """The parts that a reader sees as the text, one for each multipart/alternative, and those that are attachments."""
    shown: dict[int, Part] = {}
    files: list[Part] = []
    for number, part in enumerate(message.leaves):
        if _is_attachment(part, alone=part is message.root):
            files.append(part)
            continue
        place = part.alternative or -number
        if place not in shown or (shown[place].content_type, part.content_type) == ("text/html", "text/plain"):
            shown[place] = part
    return list(shown.values()), files


def _is_attachment(part: Part, *, alone: bool) -> bool:
    return (
        part.content_type not in ("text/plain", "text/html")
        or part.disposition == "attachment"
        or (bool(part.file_name) and not alone)
    )


def _text(raw: bytes, bodies: list[Part], limits: Limits, defects: list[str]) -> tuple[str, bool]:
    """(text of the mail within its limit, whether there was more)."""
    pieces: list[str] = []
    room = limits.body_text
    for part in bodies:
        piece, more = _part_text(raw, part, limits, defects)
        kept = cut_utf8(piece, room)
        if kept:
            pieces.append(kept)
        if more or len(kept) < len(piece):
            return "\n\n".join(pieces), True
        room = max(0, room - len(kept.encode()) - 2)
    return "\n\n".join(pieces), False


def _part_text(raw: bytes, part: Part, limits: Limits, defects: list[str]) -> tuple[str, bool]:
    """(text of one part, whether only its beginning was read): no more is decoded than can end up in the record."""
    markup = part.content_type == "text/html"
    most = limits.body_text * (16 if markup else 8)
    data, defect = content(raw, part, most)
    whole = part.end - part.start <= most
    text, charset_defect = decode_charset(data, part.parameters.get("charset", ""), whole=whole)
    defects.extend(note for note in (defect, charset_defect) if note)
    return (html_to_text(text) if markup else clean_text(text.removeprefix("\ufeff")).strip("\n")), not whole


def _attachment(raw: bytes, part: Part, truncated: bool, defects: list[str]) -> Attachment:
    data, defect = content(raw, part)
    cut_off = truncated and part.end == len(raw)
    if defect and not cut_off:
        defects.append(f"attachment: {defect}")
    digest = "" if cut_off else hashlib.sha256(data).hexdigest()
    name = _base_name(part.file_name)
    if name != part.file_name:
        defects.append("an attachment's name is no plain file name")
    return Attachment(name, part.content_type, len(data), digest)


def _base_name(name: str) -> str:
    """A file name that is only that: no path, no drive, nothing that a file system or a reader would take for another."""
    base = re.split(r"[/\\]", name)[-1]
    base = one_line(_DANGEROUS_IN_NAMES.sub("", base)).strip(". ") if base.strip(". ") else ""
    return cut_utf8(base, 255)


def _told_once(defects: list[str]) -> tuple[str, ...]:
    once = list(dict.fromkeys(defects))
    if len(once) > _MOST_DEFECTS:
        return (*once[:_MOST_DEFECTS], f"and {len(once) - _MOST_DEFECTS} more")
    return tuple(once)
