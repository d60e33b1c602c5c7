"""One store for the unit tests of the transitions, on fakeredis and on real Valkey, with all that it holds as plain data.

Each case runs on both (the fixture `store`), so that the fake cannot lie. `put` and `content` speak the same language, a
dict with a part for each key: tables state everything that stands before and after a transition.

What fakeredis 2.40 lacks: `#!lua` lines and XSETID (cut off here), INFO, CONFIG, ACL, maxmemory, replies that get lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fakeredis
import redis

from src.common.keys import Keys
from src.common.redis_client import Arg, Fields, RedisClient
from src.worker.delivery import Delivery, Seat

Content = dict[str, Any]

STREAM, GROUP = "stream", "workers"
DAY = "a|INBOX|20260131"
DONE = "a:20260131"
_SINCE = re.compile(r"\|\d{13}$")
REAL_CLOCK = 10**9  # entry ids above this many ms were made by the server; the tables' own are small


class FakeTransport:
    """fakeredis as `RedisClient` wants its transport: RESP2 replies as text, every script by EVAL and without what it lacks."""

    def __init__(self) -> None:
        self._redis: Any = fakeredis.FakeRedis(decode_responses=True, protocol=2)
        self._redis.response_callbacks.clear()

    def execute_command(self, *args: Arg) -> Any:
        if args[0] == "EVALSHA":
            raise redis.exceptions.NoScriptError("NOSCRIPT")
        if args[0] == "EVAL":
            source = "\n".join(
                line for line in str(args[1]).splitlines() if not line.startswith("#!lua") and "XSETID" not in line
            )
            args = ("EVAL", source, *args[2:])
        return self._redis.execute_command(*args)

    def close(self) -> None:
        self._redis.close()


def fields_of(email_id: str, *, day: str = "2026-01-31", **more: str) -> Fields:
    """A stream entry of account a with all that a transition looks at."""
    return {
        "schema": "1",
        "email_id": email_id,
        "account": "a",
        "mailbox": "INBOX",
        "uid": email_id.rpartition(":")[2],
        "internal_date": f"{day}T00:00:00Z" if day else "",
        "correlation_id": f"c{email_id}",
        "record": "{}",
        **more,
    }


def present(content: Content) -> Content:
    """Without the parts that hold nothing."""
    return {name: part for name, part in content.items() if part}


def flat(fields: Fields) -> list[str]:
    return [part for pair in fields.items() for part in pair]


@dataclass(frozen=True)
class Store:
    """A Redis that holds one stream and what stands beside it.

    The parts of `put` and `content`, each left out where it is empty:
    stream {entry id: email_id} · pending {entry id: (consumer, delivery count)} · index, starts, tries, open {field: value} ·
    due {member} · dlq [(email_id, reason, attempts)] · results [(email_id, outcome, result)] · processed {account:day: {member}}.
    An entry id that the server made is shown as `#1`, `#2`, … by its place in its stream, a moment of its clock as `now`.
    """

    redis: RedisClient
    keys: Keys = Keys(STREAM)  # noqa: RUF009  # frozen

    def seat(self, consumer: str = "w1") -> Seat:
        return Seat(self.redis, self.keys, GROUP, consumer)

    def put(self, content: Content) -> None:
        """Make the store hold `content` (stream, pending, dlq, due with due time 0 and the hashes)."""
        content, call, keys = present(content), self.redis.call, self.keys
        call("XGROUP", "CREATE", keys.stream, GROUP, "0", "MKSTREAM")
        for entry, email_id in content.get("stream", {}).items():
            call("XADD", keys.stream, entry, *flat(fields_of(email_id)))
        for entry, (consumer, count) in content.get("pending", {}).items():
            call("XCLAIM", keys.stream, GROUP, consumer, 0, entry, "RETRYCOUNT", count, "FORCE", "JUSTID")
        for key in ("index", "starts", "tries", "open"):
            if key in content:
                call("HSET", getattr(keys, key), *flat(content[key]))
        delivered = [*content.get("pending", {}), *(member.split("|")[0] for member in content.get("due", ()))]
        if delivered:
            call("XGROUP", "SETID", keys.stream, GROUP, max(delivered, key=lambda entry: int(entry.split("-")[0])))
        for member in content.get("due", ()):
            call("ZADD", keys.due, 0, member)
        for number, (email_id, reason, attempts) in enumerate(content.get("dlq", ()), start=1):
            notes = {"dead_reason": reason, "dead_attempts": attempts}
            call("XADD", keys.dlq, f"{number}-0", *flat(fields_of(email_id, **notes)))
        for name, members in content.get("processed", {}).items():
            call("SADD", f"{keys.stream}:processed:{name}", *members)
        assert self.content() == content, "the table itself cannot be put"

    def content(self) -> Content:
        """All that stands in Redis now."""
        keys, redis = self.keys, self.redis
        entries, dead = redis.entries(keys.stream, count=10_000), redis.entries(keys.dlq, count=10_000)
        named = _names([entry for entry, _ in entries])
        letters = _names([letter for letter, _ in dead])
        pending = redis.call("XPENDING", keys.stream, GROUP, "-", "+", 10_000) if self._group() else []
        parts = {
            "stream": {named[entry]: fields.get("email_id", "") for entry, fields in entries},
            "pending": {named.get(entry, entry): (consumer, count) for entry, consumer, _, count in pending},
            "index": {
                email_id: place[:2] + (named if place[0] == "S" else letters).get(place[2:], place[2:])
                for email_id, place in redis.hash(keys.index).items()
            },
            "starts": redis.hash(keys.starts),
            "tries": {email_id: _SINCE.sub("|now", value) for email_id, value in redis.hash(keys.tries).items()},
            "due": set(redis.call("ZRANGE", keys.due, 0, -1)),
            "dlq": [
                (fields.get("dead_id") or fields["email_id"], fields["dead_reason"], fields["dead_attempts"])
                for _, fields in dead
            ],
            "results": [
                (fields["email_id"], fields["outcome"], fields["result"])
                for _, fields in redis.entries(keys.results, count=10_000)
            ],
            "open": redis.hash(keys.open),
            "processed": {
                key.removeprefix(f"{keys.stream}:processed:"): set(redis.call("SMEMBERS", key))
                for key in redis.call("KEYS", f"{keys.stream}:processed:*")
            },
        }
        return present(parts)

    def add(self, entry: str, fields: Fields) -> None:
        """An entry that nobody has read."""
        self.redis.call("XADD", self.keys.stream, entry, *flat(fields))

    def held(self, entry: str, count: int = 1, *, email_id: str = "") -> Delivery:
        """An entry as a worker holds it that was given it with `count`."""
        found = self.redis.entries(self.keys.stream, entry, entry, count=1)
        return Delivery(entry, count, found[0][1] if found else fields_of(email_id))

    def age(self, entry: str, consumer: str, milliseconds: int) -> None:
        """Let a pending entry look as if nobody had renewed it for so long."""
        self.redis.call("XCLAIM", self.keys.stream, GROUP, consumer, 0, entry, "IDLE", milliseconds, "JUSTID")

    def idle(self, entry: str) -> int:
        """For how many ms nobody renewed a pending entry."""
        return int(self.redis.call("XPENDING", self.keys.stream, GROUP, entry, entry, 1)[0][2])

    def consumers(self) -> set[str]:
        rows = self.redis.call("XINFO", "CONSUMERS", self.keys.stream, GROUP)
        return {row[row.index("name") + 1] for row in rows}

    def _group(self) -> bool:
        return bool(self.redis.call("EXISTS", self.keys.stream)) and bool(self.redis.call("XINFO", "GROUPS", self.keys.stream))


def _names(entries: Sequence[str]) -> dict[str, str]:
    made = [entry for entry in entries if int(entry.split("-")[0]) > REAL_CLOCK]
    return {entry: f"#{made.index(entry) + 1}" if entry in made else entry for entry in entries}
