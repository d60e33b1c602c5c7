"""Mail that a handler could not finish: its next attempt, its grave, its way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from src.common.clock import iso
from src.common.keys import Keys
from src.common.redis_client import Fields, RedisClient
from src.worker.delivery import Delivery, Place, Seat, numbered, place_of

Verb = Literal["retry", "crash", "postpone", "bury", "foreign"]
MAX_ERROR_CHARS = 2_000
MAX_TRACEBACK_CHARS = 8_000


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
        return "dead_id" in self.fields

    @property
    def email_id(self) -> str:
        return self.fields.get("dead_id") or self.fields.get("email_id", "")


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


def bounded(error: str, traceback: str) -> tuple[str, str]:
    """Both as they are kept. A long message is cut within the traceback too, or it would push the frames out of it. Safe to repeat."""
    if len(error) > MAX_ERROR_CHARS:
        traceback = traceback.replace(error, error[:MAX_ERROR_CHARS])
    return error[:MAX_ERROR_CHARS], traceback[-MAX_TRACEBACK_CHARS:]


def _utf8(text: str) -> str:
    """An error may quote a file name or a header with lone surrogates, which Redis cannot be told."""
    return text.encode(errors="replace").decode()


def look(redis: RedisClient, keys: Keys, *, after: str = "-", count: int = 100) -> list[DeadLetter]:
    """Dead letters in order of death, from id `after` on; nothing is changed."""
    return [DeadLetter(entry_id, fields) for entry_id, fields in redis.entries(keys.dlq, after, count=count)]


def replay(redis: RedisClient, keys: Keys, letters: Sequence[DeadLetter]) -> list[str]:
    """Back into the stream with a fresh count of attempts; a letter: OK | NONE | STALE | FOREIGN (cannot be replayed). Safe to repeat."""
    ours = [letter for letter in letters if not letter.foreign]
    places = [place_of(keys, letter.fields) for letter in ours]
    sets, number = numbered(place.processed for place in places)
    args: list[str | int] = []
    for letter, place in zip(ours, places, strict=True):
        args += [letter.id, place.email_id, place.member, number[place.processed]]
    reply = iter(redis.run("replay", [keys.stream, keys.index, keys.starts, keys.tries, keys.dlq, *sets], args) if ours else [])
    return ["FOREIGN" if letter.foreign else next(reply) for letter in letters]


def discard(
    redis: RedisClient, keys: Keys, letters: Sequence[DeadLetter], *, processed_days: float, results_max: int
) -> list[str]:
    """Give letters up for good: their ids count as processed, so the mail will not come back. A letter: OK | NONE."""
    places = [
        Place("", "0", keys.processed("", ""), "") if letter.foreign else place_of(keys, letter.fields) for letter in letters
    ]
    sets, number = numbered(place.processed for place in places)
    args: list[str | int] = [round(processed_days * 86_400), results_max]
    for letter, place in zip(letters, places, strict=True):
        args += [letter.id, place.email_id, place.member, number[place.processed], place.open_field]
    return list(redis.run("discard", [keys.index, keys.dlq, keys.open, keys.results, *sets], args)) if letters else []
