"""Is this process worth keeping? Pure: the loops' last turns and the time are handed in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from src.common.clock import Clock


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


def liveness(loops: Mapping[str, Loop], now: float) -> tuple[int, dict[str, object]]:
    """(HTTP status, body) of GET /health: 503 only where a restart would help, that is where one of our own loops stands still."""
    stuck = sorted(name for name, loop in loops.items() if now - loop.turned > loop.limit)
    if stuck:
        return 503, {"status": "stuck", "why": f"no turn in time: {', '.join(stuck)}"}
    return 200, {"status": "ok", "loops": {name: round(now - loop.turned, 1) for name, loop in sorted(loops.items())}}
