"""One look at Redis a second, by a thread of its own: whether it answers, how full it is; and the heartbeat of this daemon.

What was seen last is kept for /health, /ready, /status and /metrics, which therefore never wait for Redis.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from src.common import pauses, registry
from src.common.clock import Clock
from src.common.exceptions import BreakerOpen, ConfigurationError, RedisFull, ScriptRefused, Transient
from src.common.health import Beats, Memory, is_full
from src.common.keys import Keys
from src.common.redis_client import Fields, RedisClient
from src.common.registry import HEARTBEAT_SECONDS, News, Registration
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
NOT_ASKED = "Redis did not say yet whether it is paused by hand"
ANSWER_SECONDS = 5.0  # without an answer for so long Redis counts as away, also before the call has timed out


@dataclass(frozen=True)
class Limits:
    """`high`, `low`: parts of maxmemory at which intake pauses and goes on. `allow_eviction`: a policy that evicts is no fault."""

    high: float
    low: float
    allow_eviction: bool


def check_policy(redis: RedisClient, *, allow_eviction: bool) -> None:
    """At the start of a daemon, beside `persists()`: a Redis that evicts throws unfinished mail away when it is full.

    Raises ConfigurationError for one that does. Where it may not be asked: a warning; where it is away: nothing, `Watch` asks later.
    """
    try:
        memory = redis.memory()
    except Transient:
        return
    fault = eviction_fault(memory) if memory else ""
    if memory is None:
        log.warning("Redis does not let us ask for its maxmemory-policy (INFO memory): make sure it is noeviction")
    elif fault and allow_eviction:
        log.warning("%s", fault)
    elif fault:
        raise ConfigurationError(fault)


def eviction_fault(memory: Memory) -> str:
    """What is wrong with the policy, and the line to run; "" for nothing."""
    if memory.policy in ("noeviction", ""):
        return ""
    return (
        f"the maxmemory-policy of Redis is {memory.policy}: it would throw unfinished mail away when it is full. "
        "Run: redis-cli CONFIG SET maxmemory-policy noeviction (ALLOW_EVICTION=true starts nevertheless)"
    )


class Watch:
    """`daemon`: who we are; `news`: what it says of itself with each heartbeat. Start it once the endpoint is open; `stop` takes the
    daemon out of the registry."""

    def __init__(
        self,
        redis: RedisClient,
        keys: Keys,
        daemon: Registration,
        limits: Limits,
        beats: Beats,
        shutdown: Shutdown,
        clock: Clock,
        news: Callable[[], News] = News,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._daemon = daemon
        self._news = news
        self._limits = limits
        self._beats = beats
        self._shutdown = shutdown
        self._clock = clock
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._answered = clock.monotonic()
        self._fault = ""
        self._memory: Memory | None = None
        self._persists: bool | None = None
        self._server = ""
        self._full = False
        self._next_beat = 0.0
        self._paused: Fields | None = None
        self._troubles = 0  # as the last heartbeat told: a new one is told at once
        self._refused = ""  # why Redis does not take our heartbeat
        self._evicts = ""  # what is wrong with its policy
        self._weighed = False

    def start(self, socket_timeout: float) -> None:
        """`socket_timeout`: seconds after which a call to Redis counts as lost."""
        self.look()
        self._thread = self._shutdown.guard("watch", lambda: self._run(socket_timeout))

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def look(self) -> None:
        """Ask once. What Redis does not answer is remembered; a policy that evicts ends the process with exit code 2."""
        try:
            self._ask()
        except Transient as error:
            if not isinstance(error.__cause__, BreakerOpen):
                self._fault = str(error)
        else:
            self._fault, self._answered = "", self._clock.monotonic()

    # what was seen

    @property
    def away(self) -> str:
        """Why Redis cannot be had now; "" if it can."""
        silent = self._clock.monotonic() - self._answered
        if self._fault or silent > ANSWER_SECONDS:
            return f"no answer for {silent:.0f} s" + (f" ({self._fault})" if self._fault else "")
        return ""

    @property
    def full(self) -> str:
        """Why nothing more may be taken in; "" if it may."""
        memory = self._memory
        if not self._full or memory is None:
            return ""
        return f"Redis holds {memory.used / 1e6:.1f} MB, {memory.level:.0%} of its maxmemory; intake goes on below {self._limits.low:.0%}"

    @property
    def degraded(self) -> list[str]:
        """One sentence for each thing that is wrong with Redis."""
        refused = f"Redis refuses to be written to: {self._refused}" if self._refused and not self.away else ""
        return [text for text in (f"Redis: {self.away}" if self.away else "", self.full, self._evicts, refused) if text]

    def paused(self, *fields: str) -> str:
        """Why somebody holds up what `fields` of `Keys.paused` name, "" if nobody does; not known before Redis answered once."""
        return NOT_ASKED if self._paused is None else pauses.why(self._paused, fields)

    @property
    def memory(self) -> Memory | None:
        """As last seen; None before, and where Redis may not be asked."""
        return self._memory

    def server(self) -> dict[str, object]:
        """For /status."""
        memory = self._memory
        return {
            "reachable": not self.away,
            "why": self.away or self._refused,
            "seconds_since_answer": round(self._clock.monotonic() - self._answered, 1),
            "version": self._server,
            "persists": self._persists,
            "maxmemory_policy": memory.policy if memory else None,
            "used_memory": memory.used if memory else None,
            "maxmemory": memory.limit if memory else None,
            "intake_paused": bool(self._full),
        }

    # the thread

    def _run(self, socket_timeout: float) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self._beats.turn("watch", limit=60 + 4 * socket_timeout)
            self.look()
        self._beats.ended("watch")
        try:
            registry.leave(self._redis, self._keys, self._daemon)
        except Transient as error:
            log.debug("not taken out of the registry: %s", error)

    def _ask(self) -> None:
        self._paused = self._redis.hash(self._keys.paused)
        self._weigh(self._redis.memory())
        now, news = self._clock.monotonic(), self._news()
        if now >= self._next_beat or len(news.why) != self._troubles:
            self._beat(news)
            self._next_beat, self._troubles = now + HEARTBEAT_SECONDS, len(news.why)

    def _beat(self, news: News) -> None:
        self._persists, self._server = self._redis.persists(), self._redis.version()
        try:
            registry.register(self._redis, self._keys, self._daemon, news)
        except (RedisFull, ConfigurationError, ScriptRefused) as error:
            if not self._refused:
                log.warning("this daemon cannot be registered: %s", error)
            self._refused = str(error)
        else:
            self._refused = ""

    def _weigh(self, memory: Memory | None) -> None:
        self._memory = memory
        if memory is None:
            return
        fault = "" if self._limits.allow_eviction else eviction_fault(memory)
        if fault and not self._evicts:
            log.error("%s", fault)
            if not self._weighed:  # Redis was away when the daemon began
                self._shutdown.request("the maxmemory-policy of Redis", exit_code=2)
        self._evicts, self._weighed = fault, True
        before, limits = self._full, self._limits
        self._full = is_full(before, memory.level, high=limits.high, low=limits.low)
        if self._full and not before:
            log.warning("%s. Raise maxmemory, or let workers catch up", self.full)
        elif before and not self._full:
            log.info("Redis holds %.0f%% of its maxmemory: intake goes on", 100 * memory.level)
