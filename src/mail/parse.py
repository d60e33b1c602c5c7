"""From the bytes of a mail to its record. Pure; takes any bytes and never raises: what cannot be read is named in `defects`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Final

from src.mail.headers import Headers, addresses, decode_words, message_ids, smuggles, utc_date, value_and_parameters
from src.mail.mime import Limits, Message, Part, content, read_message
from src.mail.record import Address, Attachment, Envelope, Record
from src.mail.text import clean_text, cut_utf8, decode_charset, enriched_to_text, html_to_text, one_line, preview, unflow

__all__ = ["Limits", "parse", "stub"]

_LIMITS = Limits()
_MOST_SUBJECT = 2_000  # characters
_MOST_ID = 998  # characters: RFC 5322's longest line
_MOST_DEFECTS = 30
_MISLEADING_IN_NAMES = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SENDER = re.compile(r".+@[^@]+")
_BODY_TYPES: Final = {"text/plain": 0, "text/html": 1, "text/enriched": 2, "text/richtext": 3}
"""Rank of a type among the versions of one text."""
_ENRICHED: Final = frozenset({"text/enriched", "text/richtext"})
_FILES_OF_TEXT: Final = frozenset({"text/calendar", "text/vcard", "text/x-vcard", "text/directory", "text/csv"})
_META_CHARSET = re.compile(rb"<meta\b[^>]{0,200}\bcharset\s{0,9}=\s{0,9}[\"']?([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
_MARKUP = 16  # encoded bytes that are read for each byte of text that the record may hold, at most
_ENCODED = 8  # the same for what is no HTML
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
    values = headers.get_all(name)
    if not values:
        return ()
    if any(smuggles(value) for value in values):
        defects.append(f"line ends or control characters in {name}")
    found = addresses(", ".join(values)[: limits.header_bytes], limits.addresses + 1)
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
        (sender.address or sender.name).partition("@")[0].lower() in _DAEMONS
        or root.headers.has("x-failed-recipients")
        or any(part.content_type == "message/delivery-status" for part in message.leaves)
    )


def _is_list(headers: Headers) -> bool:
    """Sent to many through a list (RFC 2919, RFC 2369)."""
    return headers.has("list-id", "list-post", "list-unsubscribe") or _precedence(headers) == "list"


def _precedence(headers: Headers) -> str:
    return headers.get("precedence").strip().lower()


# --- body --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Body:
    """A part that a reader may see as text. Of one `place` in the mail only one `version` is seen: the first that is not blank."""

    place: int
    version: int
    part: Part


def _bodies_and_files(message: Message) -> tuple[list[_Body], list[Part]]:
    """The texts, place by place and the best version first, and the attachments.

    It is RFC 8621 section 4.1.4 with fewer surprises: a multipart/alternative is one place, a version of it is what one of its
    branches holds of one type; its versions may have names; pictures are attachments wherever they stand; a text with a name whose
    sender says "inline" is both.
    """
    places: dict[int, dict[tuple[str, int], list[Part]]] = {}
    files: list[Part] = []
    for number, part in enumerate(message.leaves):
        if _is_attachment(part, alone=part is message.root):
            files.append(part)
            if part.disposition == "inline" and part.content_type in _BODY_TYPES:
                places[-number] = {(part.content_type, 0): [part]}
        else:
            versions = places.setdefault(part.alternative or -number, {})
            versions.setdefault((part.content_type, part.branch), []).append(part)
    return [
        _Body(place, version, part)
        for place, versions in places.items()
        for version, key in enumerate(sorted(versions, key=lambda key: _BODY_TYPES.get(key[0], 0)))
        for part in versions[key]
    ], files


def _is_attachment(part: Part, *, alone: bool) -> bool:
    if part.disposition == "attachment":
        return True
    if part.content_type not in _BODY_TYPES:
        unknown_text = part.content_type.startswith("text/") and part.content_type not in _FILES_OF_TEXT
        return not (alone and unknown_text) or bool(part.file_name)
    if part.first or part.inside == "multipart/alternative":
        return False
    return bool(part.file_name) or (part.inside == "multipart/related" and part.headers.has("content-id", "content-location"))


def _text(raw: bytes, bodies: list[_Body], limits: Limits, defects: list[str]) -> tuple[str, bool]:
    """(text of the mail within its limit, whether there was more)."""
    pieces: list[str] = []
    seen: dict[int, int] = {}
    room = limits.body_text
    unread = limits.body_text * _MARKUP
    for body in bodies:
        if seen.get(body.place, body.version) != body.version:
            continue
        part = body.part
        most = min(unread, limits.body_text * (_MARKUP if part.content_type == "text/html" else _ENCODED))
        piece = _part_text(raw, part, most, defects)
        kept = cut_utf8(piece, room)
        if kept.strip():
            pieces.append(kept)
            seen[body.place] = body.version
        if part.end - part.start > most or len(kept) < len(piece):
            return "\n\n".join(pieces), True
        room = max(0, room - len(kept.encode()) - 2)
        unread -= part.end - part.start
    return "\n\n".join(pieces), False


def _part_text(raw: bytes, part: Part, most: int, defects: list[str]) -> str:
    """The text of one part, of at most `most` of its encoded bytes: no more is decoded than can end up in the record."""
    data, defect = content(raw, part, most)
    whole = part.end - part.start <= most
    charset = part.parameters.get("charset", "")
    markup_defect = ""
    if part.content_type == "text/html" and not charset and (meta := _META_CHARSET.search(data, 0, 4096)):
        charset = meta[1].decode("ascii")
    text, charset_defect = decode_charset(data, charset, whole=whole)
    if part.content_type == "text/html":
        text, markup_defect = html_to_text(text if whole else _without_open_tag(text))
    elif part.content_type in _ENRICHED:
        text = enriched_to_text(text)
    else:
        text = clean_text(text.removeprefix("\ufeff"))
        if part.parameters.get("format", "").lower() == "flowed":
            text = unflow(text, delete_space=part.parameters.get("delsp", "").lower() == "yes")
        text = text.strip("\n")
    defects.extend(note for note in (defect, charset_defect, markup_defect) if note)
    return text


def _without_open_tag(markup: str) -> str:
    """Markup that was cut somewhere, without the tag that was cut."""
    return markup[: markup.rfind("<")] if markup.rfind("<") > markup.rfind(">") else markup


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
    """A file name that is only that: no path, and no marks that turn the direction of its letters around."""
    base = re.split(r"[/\\]", name)[-1]
    base = one_line(_MISLEADING_IN_NAMES.sub("", base)).strip(". ") if base.strip(". ") else ""
    return cut_utf8(base, 255)


def _told_once(defects: list[str]) -> tuple[str, ...]:
    once = list(dict.fromkeys(defects))
    if len(once) > _MOST_DEFECTS:
        return (*once[:_MOST_DEFECTS], f"and {len(once) - _MOST_DEFECTS} more")
    return tuple(once)
