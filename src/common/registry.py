"""Which daemons there are: each writes itself into a hash of Redis from time to time, and takes itself out when it ends.

Nothing expires by itself: an entry holds the server's time of its last heartbeat, and who reads judges by the server's time. So a
daemon that was killed is still seen, as silent, for a day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from src.common.keys import Keys
from src.common.redis_client import RedisClient

HEARTBEAT_SECONDS = 10.0
SILENT_SECONDS = 35.0  # three heartbeats missed and a moment: it is gone, or cut off
FORGET_SECONDS = 86_400
MOST_REASONS = 20
REASON_CHARS = 500


@dataclass(frozen=True)
class Registration:
    """A daemon. `role`: producer or worker. `name`: unique, also over restarts. `address`: of its endpoint, "" for none.
    `started`: ISO 8601 in UTC."""

    role: str
    name: str
    address: str
    version: str
    host: str
    pid: int
    started: str


@dataclass(frozen=True)
class News:
    """What a daemon says of itself with each heartbeat. `why`: what does not go as it should, one sentence each. `counts`: mails
    since it began, by what became of them (`published`; `started`, `done`, `retried`, `dead`, …), and `in_flight` now."""

    why: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


NOTHING_NEW = News()


@dataclass(frozen=True)
class Seen:
    """A registration that stands in Redis. `silent`: seconds since its last heartbeat, by the server's clock. `news`: of then."""

    daemon: Registration
    silent: float
    news: News = NOTHING_NEW

    @property
    def alive(self) -> bool:
        return self.silent <= SILENT_SECONDS


def register(redis: RedisClient, keys: Keys, daemon: Registration, news: News = NOTHING_NEW) -> None:
    """One heartbeat; works when Redis is at its maxmemory. Raises what RedisClient raises."""
    why = [reason[:REASON_CHARS] for reason in news.why[:MOST_REASONS]]
    entry = {**asdict(daemon), "why": why, "counts": dict(news.counts)}
    redis.run("register", [keys.daemons], [daemon.name, json.dumps(entry), FORGET_SECONDS])


def leave(redis: RedisClient, keys: Keys, daemon: Registration) -> None:
    """Gone for good, of one's own will."""
    redis.call("HDEL", keys.daemons, daemon.name)


def registered(redis: RedisClient, keys: Keys) -> list[Seen]:
    """All that stand there, by role and name; entries that cannot be read are left out."""
    seconds, micros = redis.call("TIME")
    now = int(seconds) + int(micros) / 1e6
    found = []
    for entry in redis.hash(keys.daemons).values():
        beat, _, content = entry.partition("|")
        try:
            found.append(_seen(json.loads(content), max(0.0, now - int(beat) / 1000)))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return sorted(found, key=lambda seen: (seen.daemon.role, seen.daemon.name))


def _seen(entry: Mapping[str, Any], silent: float) -> Seen:
    """Fields of a later version are passed over."""
    told: dict[str, Any] = {name.name: str(entry[name.name]) for name in fields(Registration)}
    daemon = Registration(**told | {"pid": int(entry["pid"])})
    counts = {str(name): int(count) for name, count in entry.get("counts", {}).items()}
    return Seen(daemon, silent, News(tuple(map(str, entry.get("why", ()))), counts))
