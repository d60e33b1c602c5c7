"""Which daemons there are: each writes itself into a hash of Redis from time to time, and takes itself out when it ends.

Nothing expires by itself: an entry holds the server's time of its last heartbeat, and who reads judges by the server's time. So a
daemon that was killed is still seen, as silent, for a day.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from src.common.keys import Keys
from src.common.redis_client import RedisClient

HEARTBEAT_SECONDS = 10.0
SILENT_SECONDS = 35.0  # three heartbeats missed and a moment: it is gone, or cut off
FORGET_SECONDS = 86_400


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
class Seen:
    """A registration that stands in Redis. `silent`: seconds since its last heartbeat, by the server's clock."""

    daemon: Registration
    silent: float

    @property
    def alive(self) -> bool:
        return self.silent <= SILENT_SECONDS


def register(redis: RedisClient, keys: Keys, daemon: Registration) -> None:
    """One heartbeat; works when Redis is at its maxmemory. Raises what RedisClient raises."""
    redis.run("register", [keys.daemons], [daemon.name, json.dumps(asdict(daemon)), FORGET_SECONDS])


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
            found.append(Seen(Registration(**json.loads(content)), max(0.0, now - int(beat) / 1000)))
        except (ValueError, TypeError):
            continue
    return sorted(found, key=lambda seen: (seen.daemon.role, seen.daemon.name))
