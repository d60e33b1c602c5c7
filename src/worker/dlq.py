"""Mail that a handler could not finish: its next attempt, its grave, its way back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from config.settings import StreamSettings
from src.common.clock import iso
from src.common.error_groups import bounded, group_of
from src.common.keys import Keys
from src.common.redis_client import Fields, RedisClient
from src.worker.delivery import Delivery, Place, Seat, numbered, place_of

log = logging.getLogger(__name__)

Verb = Literal["retry", "crash", "postpone", "bury", "foreign"]
PAGE = 100  # letters read at once
MAX_FIELDS = 1_020  # `bury` keeps 1,000 fields and adds its notes; what is wider was put there by somebody else
_ENTRY_ID = re.compile(r"\d+-\d+")


@dataclass(frozen=True, slots=True)
class Failure:
    """A mail that was not finished, what is to become of it and why. `delay` in seconds (retry, crash, postpone).

    crash: the process that handled it died. Like retry, but its start stays marked: it is a suspect and begins alone the next time.
    """

    delivery: Delivery
    verb: Verb
    delay: float = 0.0
    reason: str = ""
    error_type: str = ""
    error: str = ""
    traceback: str = ""
    handler: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """`verdict`: RETRY, POSTPONED, DEAD, GONE (deleted by hand), ALREADY (this call repeated), LOST. `attempts`: failed ones so far."""

    verdict: str
    attempts: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """`fields`: the stream entry as it was, and the dead_* notes."""

    id: str
    fields: Fields

    @property
    def foreign(self) -> bool:
        """Not a mail of ours, by its notes or because somebody else put it there: it can only be looked at and discarded."""
        return "dead_id" in self.fields or len(self.fields) > MAX_FIELDS or bool(Delivery(self.id, 0, self.fields).foreign)

    @property
    def email_id(self) -> str:
        return self.fields.get("dead_id") or self.fields.get("email_id") or f"foreign:{self.id}"

    @property
    def group(self) -> str:
        """See `src.common.error_groups.fingerprint`."""
        return group_of(self.fields)


def fail(seat: Seat, failures: Sequence[Failure], *, now: datetime) -> list[Failed]:
    """Settle mails that were not finished, in one round trip; one answer a mail. Safe to repeat."""
    keys = seat.keys
    args: list[str | int] = [seat.group, seat.consumer, iso(now)]
    for failure in failures:
        mail = failure.delivery
        day = "" if mail.foreign else place_of(keys, mail.fields).open_field
        error, traceback = bounded(failure.error, failure.traceback)
        args += [mail.stream_id, mail.count, mail.email_id, day, failure.verb, round(failure.delay * 1000), failure.reason]
        args += [failure.error_type, _utf8(error), _utf8(traceback), failure.handler]
    reply = seat.redis.run("fail", [keys.stream, keys.index, keys.starts, keys.tries, keys.due, keys.dlq, keys.open], args)
    return [Failed(verdict, int(attempts)) for verdict, attempts in reply]


def _utf8(text: str) -> str:
    """An error may quote a file name or a header with lone surrogates, which Redis cannot be told."""
    return text.encode(errors="replace").decode()


def look(redis: RedisClient, keys: Keys, *, after: str = "-", count: int = 100) -> list[DeadLetter]:
    """Dead letters in order of death, from id `after` on; nothing is changed."""
    return [DeadLetter(entry_id, fields) for entry_id, fields in redis.entries(keys.dlq, after, count=count)]


def find(redis: RedisClient, keys: Keys, wanted: Sequence[str]) -> dict[str, DeadLetter]:
    """The letters of these dead-letter ids and email_ids, by what was asked for; those that are not there are left out.

    An id is looked up; only `foreign:…`, which no index knows, costs a look through all letters (one for all of them).
    """
    located = redis.call("HMGET", keys.index, *wanted) if wanted else []
    found = {}
    for name, location in zip(wanted, located, strict=True):
        place = name if _ENTRY_ID.fullmatch(name) else str(location or "").removeprefix("D:")
        entries = redis.entries(keys.dlq, place, place, count=1) if _ENTRY_ID.fullmatch(place) else []
        if entries:
            found[name] = DeadLetter(*entries[0])
    rest = {name for name in wanted if name not in found and not _ENTRY_ID.fullmatch(name)}
    for letter in letters(redis, keys) if rest else ():
        if letter.email_id in rest:
            found[letter.email_id] = letter
    return found


def newest(redis: RedisClient, keys: Keys) -> str:
    """Id of the last letter; "" where there is none."""
    last = redis.call("XREVRANGE", keys.dlq, "+", "-", "COUNT", 1)
    return str(last[0][0]) if last else ""


def letters(redis: RedisClient, keys: Keys, until: str | None = None) -> Iterator[DeadLetter]:
    """All dead letters up to id `until` (None: up to the last one now), the oldest first, read page by page."""
    until = newest(redis, keys) if until is None else until
    start = "-"
    while until and (page := redis.entries(keys.dlq, start, until, count=PAGE)):
        for entry_id, fields in page:
            yield DeadLetter(entry_id, fields)
        start = f"({page[-1][0]}"


def replay(redis: RedisClient, keys: Keys, letters: Sequence[DeadLetter]) -> list[str]:
    """Back into the stream with a fresh count of attempts. Safe to repeat. A letter: OK | NONE (not there any more) |
    STALE (its mail lives or was done elsewhere: the letter is removed) | FOREIGN (no mail of ours: it cannot be replayed)."""
    ours = [letter for letter in letters if not letter.foreign]
    places = [place_of(keys, letter.fields) for letter in ours]
    sets, number = numbered(place.processed for place in places)
    args: list[str | int] = []
    for letter, place in zip(ours, places, strict=True):
        args += [letter.id, place.email_id, place.member, number[place.processed], place.open_field]
    reply = iter(
        redis.run("replay", [keys.stream, keys.index, keys.starts, keys.tries, keys.dlq, keys.open, *sets], args) if ours else []
    )
    return ["FOREIGN" if letter.foreign else next(reply) for letter in letters]


def discard(
    redis: RedisClient, keys: Keys, letters: Sequence[DeadLetter], *, processed_days: float, results_max: int
) -> list[str]:
    """Give letters up for good: their ids count as processed, so the mail will not come back. A letter: OK | NONE | STALE (as `replay`
    has them). Safe to repeat."""
    places = [
        Place("", "0", keys.processed("", ""), "") if letter.foreign else place_of(keys, letter.fields) for letter in letters
    ]
    sets, number = numbered(place.processed for place in places)
    steps = [keys.steps(place.email_id) for place in places]
    args: list[str | int] = [round(processed_days * 86_400), results_max]
    for letter, place in zip(letters, places, strict=True):
        args += [letter.id, place.email_id, place.member, number[place.processed], place.open_field]
    own = [keys.index, keys.dlq, keys.open, keys.results, keys.stream]
    return list(redis.run("discard", [*own, *steps, *sets], args)) if letters else []


def expire(redis: RedisClient, keys: Keys, stream: StreamSettings, *, most: int = PAGE) -> int:
    """Give up to `most` letters up that died more than DLQ_DAYS ago, by the server's clock; how many. Any worker may call it."""
    [seconds, _] = redis.call("TIME")
    before = round((int(seconds) - stream.dlq_days * 86_400) * 1000)
    if before <= 0:
        return 0
    old = [DeadLetter(entry_id, fields) for entry_id, fields in redis.entries(keys.dlq, "-", f"({before}", count=most)]
    answers = discard(redis, keys, old, processed_days=stream.processed_days, results_max=stream.results_max)
    given_up = answers.count("OK")
    if given_up:
        log.warning(
            "%d dead letters are older than DLQ_DAYS=%g: they are given up, their mail will not come back",
            given_up,
            stream.dlq_days,
        )
    return given_up
