"""A consumer's place in the group: enter, keep what it holds, take over what others left, hand back, leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from src.common.exceptions import ConfigurationError
from src.worker.delivery import Delivery, Seat, deliveries

PAGE = 1_000  # mails in one call: Lua hands at most some 8,000 values on to a command
REAP_AFTER_MS = 3_600_000  # a consumer that holds nothing and has not asked for an hour is gone


def join(seat: Seat) -> None:
    """Enter the group, making it (from the first entry on) if there is none. Raises ConfigurationError for a second group."""
    answer = seat.redis.run("join", [seat.keys.stream], [seat.group, seat.consumer])
    if answer[0] == "OTHER":
        raise ConfigurationError(
            f"CONSUMER_GROUP={seat.group}: the stream {seat.keys.stream} already has the group {answer[1]}, and a stream has one "
            f"(finished mail is deleted, a second group would miss it). To fan out, read {seat.keys.results} or publish from your "
            "handler into a stream of your own; to rename, let the workers drain, stop them, then: "
            f"redis-cli XGROUP DESTROY {seat.keys.stream} {answer[1]}"
        )
    if answer[0] == "BADKEY":
        raise ConfigurationError(f"STREAM_NAME={seat.keys.stream}: that key is a {answer[1]}, not a stream; choose another name")


def leave(seat: Seat) -> None:
    """Remove this consumer if it holds nothing; else its name stays until another worker took over what it holds."""
    seat.redis.run("reap", [seat.keys.stream], [seat.group, 0, seat.consumer])


def reap(seat: Seat) -> int:
    """Remove consumers that are long gone and hold nothing; how many."""
    return int(seat.redis.run("reap", [seat.keys.stream], [seat.group, REAP_AFTER_MS, ""]))


def renew(seat: Seat, mails: Sequence[Delivery]) -> list[str]:
    """Renew the leases of `mails`; the stream ids of those that are no longer ours."""
    lost: list[str] = []
    for page in _pages(mails):
        held = [part for mail in page for part in (mail.stream_id, mail.count)]
        lost += seat.redis.run("renew", [seat.keys.stream], [seat.group, seat.consumer, *held])
    return lost


def recover(seat: Seat, *, lease: float, most: int, in_flight: Iterable[str]) -> list[Delivery]:
    """Take over up to `most` mails that nobody renewed for `lease` seconds, except those of `in_flight` (stream ids)."""
    return deliveries(
        seat.redis.run("recover", [seat.keys.stream], [seat.group, seat.consumer, round(lease * 1000), most, *in_flight])
    )


def promote(seat: Seat, *, most: int) -> list[Delivery]:
    """Take up to `most` mails whose next attempt is due."""
    keys = seat.keys
    return deliveries(seat.redis.run("promote", [keys.stream, keys.tries, keys.due], [seat.group, seat.consumer, most]))


def release(seat: Seat, mails: Sequence[Delivery]) -> int:
    """Hand `mails` back: any worker takes them at its next tick, and their start is not counted. How many were still ours."""
    released = 0
    for page in _pages(mails):
        held = [part for mail in page for part in (mail.stream_id, mail.count, mail.email_id)]
        released += seat.redis.run("release", [seat.keys.stream, seat.keys.starts], [seat.group, seat.consumer, *held])
    return released


def _pages(mails: Sequence[Delivery]) -> list[Sequence[Delivery]]:
    return [mails[first : first + PAGE] for first in range(0, len(mails), PAGE)]
