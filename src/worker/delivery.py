"""A mail as the stream delivers it, and what can be said of it before anything is decoded. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

from src.common.digits import number_in
from src.common.keys import Keys, open_field
from src.common.redis_client import Fields, RedisClient
from src.mail.record import SCHEMA, member_of, split_email_id

_AS_WRITTEN = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True)
class Seat:
    """A consumer's place in the group: what every transition of the worker needs."""

    redis: RedisClient
    keys: Keys
    group: str
    consumer: str


@dataclass(frozen=True)
class Delivery:
    """One entry in one worker's hands. (consumer, `count`) is the fence: `count` grows whenever the entry changes hands."""

    stream_id: str
    count: int
    fields: Fields

    @cached_property
    def foreign(self) -> str:
        """Why this entry is no mail of ours; "" if it is one."""
        id_parts = split_email_id(self.fields.get("email_id", ""))
        if number_in(self.fields.get("schema", "")) is None:
            return "no schema"
        if id_parts is None:
            return "no valid email_id"
        if id_parts[1] != self.fields.get("account"):
            return "email_id of another account"
        if not is_internal_date(self.fields.get("internal_date", "-")):
            return "internal_date is neither empty nor YYYY-MM-DDTHH:MM:SSZ"
        if "mailbox" not in self.fields or "record" not in self.fields:
            return "no mailbox or record"
        return ""

    @property
    def newer(self) -> bool:
        """Written by a producer of a later major schema than this worker knows."""
        schema = self.fields.get("schema", "")
        return schema != SCHEMA and (number_in(schema) or 0) > int(SCHEMA)

    @cached_property
    def email_id(self) -> str:
        return f"foreign:{self.stream_id}" if self.foreign else self.fields["email_id"]

    @property
    def correlation_id(self) -> str:
        return self.fields.get("correlation_id", "")

    @property
    def replays(self) -> int:
        return number_in(self.fields.get("replays", "")) or 0


def sorted_out(mails: Iterable[Delivery]) -> tuple[list[Delivery], list[Delivery], list[Delivery]]:
    """(those of a newer producer, those that are no mail of ours, the others)."""
    newer: list[Delivery] = []
    foreign: list[Delivery] = []
    ours: list[Delivery] = []
    for mail in mails:
        (newer if mail.newer else foreign if mail.foreign else ours).append(mail)
    return newer, foreign, ours


class Place(NamedTuple):
    """Where a mail's id stands once it is done, and under which day it counts while it is not."""

    email_id: str
    member: str
    processed: str
    open_field: str


def place_of(keys: Keys, fields: Fields) -> Place:
    """Of an entry that is a mail of ours (`Delivery.foreign` is "")."""
    email_id, account, internal_date = fields["email_id"], fields["account"], fields["internal_date"]
    return Place(
        email_id,
        member_of(email_id),
        keys.processed(account, internal_date),
        open_field(account, fields["mailbox"], internal_date),
    )


def numbered(processed: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The distinct processed sets of a batch as script keys, and the number (from 1) of each."""
    sets = list(dict.fromkeys(processed))
    return sets, {key: number for number, key in enumerate(sets, start=1)}


def is_internal_date(text: str) -> bool:
    try:
        if _AS_WRITTEN.fullmatch(text):  # strptime takes seven times as long
            return datetime.fromisoformat(text[:-1]) is not None
        return text == "" or (text.isascii() and datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ") is not None)
    except ValueError:
        return False


def deliveries(reply: Sequence[Sequence[object]]) -> list[Delivery]:
    """The answer of `promote` and `recover`: [stream id, count, [name, value, …]]…"""
    found = []
    for stream_id, count, flat in reply:
        names = list(flat)  # type: ignore[call-overload]  # a RESP2 array of strings
        found.append(Delivery(str(stream_id), int(str(count)), dict(zip(names[::2], names[1::2], strict=True))))
    return found
