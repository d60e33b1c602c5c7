"""Is this process worth keeping, is it at work, may it take more in? Pure: the loops' last turns, what was seen and the time are handed in.

Three pages, three questions. /health, for a supervisor: would a restart help? /ready, for a person or an alert: does mail move?
/status: everything, as JSON.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from src.common.clock import Clock

Page = tuple[int, dict[str, object]]  # (HTTP status, body)

# A mailbox that is read, or that will be as soon as another producer lets go of it.
AT_WORK = ("CONNECTED", "BACKFILL_PAUSED", "STANDBY")


@dataclass(frozen=True)
class Loop:
    """A loop of ours: when it turned last (monotonic seconds) and how long a turn may take."""

    turned: float
    limit: float


@dataclass
class Beats:
    """The last turn of each loop of the process. Thread-safe."""

    clock: Clock
    _loops: dict[str, Loop] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def turn(self, name: str, limit: float) -> None:
        """Loop `name` turns now; its next turn comes within `limit` seconds."""
        with self._lock:
            self._loops[name] = Loop(self.clock.monotonic(), limit)

    def ended(self, name: str) -> None:
        with self._lock:
            self._loops.pop(name, None)

    def seen(self) -> dict[str, Loop]:
        with self._lock:
            return dict(self._loops)


def liveness(loops: Mapping[str, Loop], now: float, degraded: Sequence[str] = ()) -> Page:
    """GET /health: 503 only where a restart would help, that is where one of our own loops stands still.

    `degraded`: what is wrong elsewhere (Redis is away, a token is dead), one sentence each: said, but no reason to be killed.
    """
    stuck = sorted(name for name, loop in loops.items() if now - loop.turned > loop.limit)
    if stuck:
        return 503, {"status": "stuck", "why": f"no turn in time: {', '.join(stuck)}"}
    body: dict[str, object] = {"status": "degraded", "why": "; ".join(degraded)} if degraded else {"status": "ok"}
    return 200, {**body, "loops": {name: round(now - loop.turned, 1) for name, loop in sorted(loops.items())}}


def readiness(reasons: Sequence[str]) -> Page:
    """GET /ready: `reasons` why no mail moves, one sentence each; none: it does."""
    return (503, {"ready": False, "why": list(reasons)}) if reasons else (200, {"ready": True, "why": []})


def intake_reasons(redis: str, mailboxes: Mapping[str, tuple[str, str]]) -> list[str]:
    """Why a producer takes nothing in. `redis`: why Redis cannot be had, "" if it can. `mailboxes`: title → (state, why).

    One mailbox at work is enough: a dead token among others is their owner's trouble, not the producer's.
    """
    reasons = [f"Redis: {redis}"] if redis else []
    if not any(state in AT_WORK for state, _ in mailboxes.values()):
        reasons += [f"{title}: {state}{f': {why}' if why else ''}" for title, (state, why) in mailboxes.items()]
    return reasons


def work_reasons(redis: str, *, joined: bool, blocked: str) -> list[str]:
    """Why a worker handles nothing. `redis`: why Redis cannot be had, "" if it can. `joined`: it is in the group. `blocked`: why it does
    not read (too many dead letters, all breakers open, an entry of a newer version), "" if it does."""
    reasons = [f"Redis: {redis}"] if redis else []
    reasons += [] if joined else ["the consumer group is not joined yet"]
    return reasons + ([f"not reading: {blocked}"] if blocked else [])


@dataclass(frozen=True)
class Memory:
    """What Redis says of its memory: bytes used, bytes allowed (0: no limit), and what it does at the limit."""

    used: int
    limit: int
    policy: str

    @property
    def level(self) -> float:
        """Part of the limit that is used; 0.0 without one."""
        return self.used / self.limit if self.limit else 0.0


def is_full(was_full: bool, level: float, *, high: float, low: float) -> bool:
    """Whether intake is to pause: from `high` on, until `level` is below `low` again."""
    return level >= low if was_full else level >= high
