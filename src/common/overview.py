"""What the stream holds, in numbers: for the metrics, the status page and the scripts."""

from __future__ import annotations

from dataclasses import dataclass

from src.common.exceptions import GroupMissing
from src.common.keys import Keys
from src.common.redis_client import RedisClient


@dataclass(frozen=True)
class Overview:
    """Mails, and one age. `unread` + `in_flight` + `waiting` = `live`, but for what changed between two questions.

    `live`: unfinished, all that stand in the stream. `in_flight`: delivered to a worker. `waiting`: for their next attempt. `dead`: dead
    letters. `results`: entries of the results stream. `oldest`: seconds, by the server's clock, since the oldest unfinished mail was
    published; 0.0 for none.
    """

    live: int
    in_flight: int
    waiting: int
    dead: int
    results: int
    oldest: float

    @property
    def unread(self) -> int:
        """Published, and not yet delivered to any worker."""
        return max(0, self.live - self.in_flight - self.waiting)


def look(redis: RedisClient, keys: Keys, group: str) -> Overview:
    """Seven short questions (XLEN, XPENDING, ZCARD, XRANGE, TIME), none of which grows with the stream. Raises what RedisClient raises."""
    live = redis.length(keys.stream)
    first = redis.entries(keys.stream, count=1)
    seconds, micros = redis.call("TIME")
    oldest = int(seconds) + int(micros) / 1e6 - int(first[0][0].partition("-")[0]) / 1000 if first else 0.0
    return Overview(
        live=live,
        in_flight=_pending(redis, keys, group),
        waiting=int(redis.call("ZCARD", keys.due)),
        dead=redis.length(keys.dlq),
        results=redis.length(keys.results),
        oldest=max(0.0, oldest),
    )


def _pending(redis: RedisClient, keys: Keys, group: str) -> int:
    """XPENDING's summary; 0 where there is no stream or no group yet."""
    try:
        return int(redis.call("XPENDING", keys.stream, group)[0])
    except GroupMissing:
        return 0
