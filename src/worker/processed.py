"""The sets of finished mail, looked after by a person: counted, asked, cleared. Workers only add to them (`idempotency`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.mail.record import member_of, split_email_id

UNDATED = "undated"


@dataclass(frozen=True, slots=True, order=True)
class Day:
    """The finished mail of an account with one INTERNALDATE day. `day`: YYYYMMDD or `undated`. `mails`: how many.

    `bytes`: what the set takes in Redis. `seconds`: until it expires, -1 for never.
    """

    account: str
    day: str
    key: str
    mails: int
    bytes: int
    seconds: int


def days(redis: RedisClient, keys: Keys, account: str | None = None) -> Iterator[Day]:
    """Of all accounts, or of one; in no order. Found by SCAN: work goes on meanwhile, what comes or goes then may be missed."""
    for key, owner, day in sets(redis, keys, account):
        mails = int(redis.call("SCARD", key))
        if mails:
            used, seconds = redis.call("MEMORY", "USAGE", key), redis.call("TTL", key)
            yield Day(owner, day, key, mails, int(used or 0), int(seconds))


def days_of(redis: RedisClient, keys: Keys, email_id: str, candidates: Sequence[str] | None = None) -> list[str]:
    """The days (YYYYMMDD or `undated`) under which a mail counts as done; looks at `candidates`, else at all of its account.

    Raises ValueError where `email_id` cannot be one.
    """
    member, parts = member_of(email_id), split_email_id(email_id)
    account = parts[1] if parts else ""
    found = candidates if candidates is not None else [day for _, _, day in sets(redis, keys, account)]
    return sorted(day for day in set(found) if redis.are_members(keys.processed_day(account, day), [member]) == [True])


def clear(redis: RedisClient, chosen: Sequence[Day]) -> int:
    """Delete these sets; how many were there. Their mail is known nowhere afterwards: read again, it is handled again."""
    return sum(int(redis.call("UNLINK", day.key)) for day in chosen)


def sets(redis: RedisClient, keys: Keys, account: str | None) -> Iterator[tuple[str, str, str]]:
    """(key, account, day) of the sets of `account`, or of all; each once, though SCAN may name a key twice."""
    seen: set[str] = set()
    cursor = "0"
    while True:
        cursor, page = redis.call("SCAN", cursor, "MATCH", keys.processed_pattern(account), "COUNT", 1000)
        for key in page:
            owner, _, day = key.removeprefix(f"{keys.stream}:processed:").rpartition(":")
            if (
                key not in seen
                and (account is None or owner == account)
                and (day == UNDATED or (len(day) == 8 and day.isdigit()))
            ):
                seen.add(key)
                yield key, owner, day
        if str(cursor) == "0":
            return
