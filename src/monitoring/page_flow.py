"""The last hour, minute by minute, from counters that only grow and that somebody looks at now and then. Pure: the time is handed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MINUTES = 60
GAP_SECONDS = 150.0  # nobody looked for so long: what was counted meanwhile belongs to no minute

Counters = Mapping[tuple[str, str], int]  # (kind, source) → how many so far


@dataclass
class Minute:
    """`counts`: kind → how many within it. `live`, `oldest` (seconds): the highest seen within it."""

    counts: dict[str, int] = field(default_factory=dict)
    live: int = 0
    oldest: float = 0.0


class Flow:
    """`add` each look; `last_hour` for the charts. Holds 60 minutes and the counters of the last look."""

    def __init__(self) -> None:
        self._minutes: dict[int, Minute] = {}
        self._counters: dict[tuple[str, str], int] = {}
        self._looked: float | None = None

    def add(self, now: float, counters: Counters, live: int, oldest: float) -> None:
        """What a look at `now` (seconds of the day's clock) saw. A source that is new, or was not seen for long, counts from here on; a
        counter that went back began anew."""
        fresh = self._looked is None or not 0 <= now - self._looked <= GAP_SECONDS
        minute = self._minutes.setdefault(int(now // 60), Minute())
        for (kind, source), count in counters.items():
            before = count if fresh else self._counters.get((kind, source), count)
            minute.counts[kind] = minute.counts.get(kind, 0) + (count - before if count >= before else count)
        minute.live, minute.oldest = max(minute.live, live), max(minute.oldest, oldest)
        self._counters, self._looked = dict(counters), now
        for old in [number for number in self._minutes if not 0 <= int(now // 60) - number < MINUTES]:
            del self._minutes[old]

    def last_hour(self, now: float) -> list[Minute | None]:
        """60 minutes, the oldest first, the last one still running; None for one in which nobody looked."""
        last = int(now // 60)
        return [self._minutes.get(number) for number in range(last - MINUTES + 1, last + 1)]
