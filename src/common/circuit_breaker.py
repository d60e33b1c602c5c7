"""Circuit breakers: a side that fails again and again is left alone for a while, then asked by one call, the probe.

    CLOSED ──at least `failures` failed calls, and `rate` of all, within `window`──► OPEN ──its time is over──► HALF_OPEN
       ▲                                                                              ▲                            │
       └─────────────────────────── the probe succeeds ───────────────────────────────┴─────── it fails ───────────┘

A breaker waits for nobody and repeats nothing: it answers at once, with a permit or with BreakerOpen. Its lock is held around its
state, never around a call. Time and randomness are handed in.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from config.settings import BreakerSettings
from src.common.exceptions import BreakerOpen, Permanent, SkipEmail

log = logging.getLogger(__name__)

Result = TypeVar("Result")
State = Literal["CLOSED", "OPEN", "HALF_OPEN"]
Listener = Callable[[str, State, State], None]  # (name, old state, new state); called without the lock; must not raise

SLICES = 10  # the window moves on by tenths of itself: memory and work do not grow with the number of calls
MAX_CAUSE_CHARS = 200
PROBE_LOOK_SECONDS = 1.0  # how soon it is worth asking again while a probe is under way


@dataclass(frozen=True)
class Rules:
    """When to open and for how long, in seconds.

    The n-th opening in a row lasts `open_seconds` x 2^(n-1), at most `open_cap`, of which a random half to whole is waited. A probe
    that has not reported after `probe_seconds` (its thread died) lets a second one in.
    """

    failures: int = 5
    rate: float = 0.5
    window: float = 60.0
    open_seconds: float = 30.0
    open_cap: float = 300.0
    probe_seconds: float = 60.0


def rules_of(breakers: BreakerSettings) -> Rules:
    return Rules(breakers.failures, breakers.rate, breakers.window, breakers.open_seconds, breakers.open_cap)


def says_it_failed(error: Exception) -> bool:
    """The usual answer to "is this error a failure of the side that was asked": a verdict on one mail is none."""
    return not isinstance(error, (Permanent, SkipEmail))


class CircuitBreaker:
    """The breaker of one side, for any number of threads and for async code (nothing in it blocks).

    `monotonic`: seconds. `rand`: random numbers in [0, 1). `counts`: whether an exception is a failure; one that is not means that
    the side answered, which is a success.
    """

    def __init__(
        self,
        name: str,
        rules: Rules,
        monotonic: Callable[[], float],
        rand: Callable[[], float],
        *,
        counts: Callable[[Exception], bool] = says_it_failed,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.name = name
        self.rules = rules
        self.counts = counts
        self._monotonic = monotonic
        self._rand = rand
        self._listeners = listeners
        self._lock = threading.Lock()
        self._state: State = "CLOSED"
        self._era = 0  # grows with each change: what an earlier era's call reports is no news
        self._opened = 0  # openings in a row
        self._cause = ""  # how it failed last
        self._until = 0.0  # OPEN: when it ends; HALF_OPEN: when the probe counts as lost
        self._slices: deque[tuple[int, int, int]] = deque()  # (number of the slice, calls, failures)

    def call(self, function: Callable[[], Result]) -> Result:
        """`function()`, if calls are let in. Raises BreakerOpen, and what `function` raises."""
        with self.enter():
            return function()

    def enter(self) -> Permit:
        """Leave for one call: `with breaker.enter(): …`, or report with the permit's methods. Raises BreakerOpen."""
        with self._lock:
            now, old = self._monotonic(), self._state
            if old != "CLOSED":
                if now < self._until:
                    raise BreakerOpen(self.name, self._wait(now), self._cause)
                self._until = now + self.rules.probe_seconds
                if old == "OPEN":
                    self._become("HALF_OPEN")
            permit = Permit(self, self._era)
        if old == "OPEN":
            self._tell(old, "HALF_OPEN")
        return permit

    @property
    def seconds(self) -> float:
        """How long until a call is let in; 0.0 if one is let in now."""
        with self._lock:
            return self._wait(self._monotonic())

    def snapshot(self) -> dict[str, object]:
        """For /status."""
        with self._lock:
            now = self._monotonic()
            calls, failures = self._counted(now)
            return {
                "state": self._state,
                "calls": calls,
                "failures": failures,
                "opened_in_a_row": self._opened,
                "seconds_until_next_try": round(self._wait(now), 1),
            }

    def report(self, era: int, failed: bool | None, cause: str = "") -> None:
        """What became of a permit's call; None: it was not made, or says nothing. `cause`: how it failed."""
        with self._lock:
            old = self._state
            if era != self._era:
                return
            if failed is None:
                if old == "HALF_OPEN":
                    self._until = self._monotonic()  # the next call is the probe
                return
            self._cause = cause[:MAX_CAUSE_CHARS] if failed else ""
            new = self._judge(failed, self._monotonic())
            if new == old:
                return
            self._become(new)
        self._tell(old, new)

    def _judge(self, failed: bool, now: float) -> State:
        if self._state == "HALF_OPEN":
            return self._open(now) if failed else "CLOSED"
        number = int(now * SLICES // self.rules.window)
        calls, failures = 0, 0
        if self._slices and self._slices[-1][0] == number:
            _, calls, failures = self._slices.pop()
        self._slices.append((number, calls + 1, failures + failed))
        calls, failures = self._counted(now)
        ripe = failed and failures >= self.rules.failures and failures >= self.rules.rate * calls
        return self._open(now) if ripe else "CLOSED"

    def _open(self, now: float) -> State:
        longest = min(self.rules.open_seconds * 2.0**self._opened, self.rules.open_cap)
        self._until = now + longest * (0.5 + 0.5 * self._rand())
        self._opened = min(self._opened + 1, 64)
        return "OPEN"

    def _become(self, state: State) -> None:
        self._state = state
        self._era += 1
        self._slices.clear()
        if state == "CLOSED":
            self._opened = 0

    def _counted(self, now: float) -> tuple[int, int]:
        """(calls, failures) within the window."""
        oldest = int(now * SLICES // self.rules.window) - SLICES + 1
        while self._slices and self._slices[0][0] < oldest:
            self._slices.popleft()
        return sum(part[1] for part in self._slices), sum(part[2] for part in self._slices)

    def _wait(self, now: float) -> float:
        if self._state == "CLOSED":
            return 0.0
        left = max(0.0, self._until - now)
        return left if self._state == "OPEN" else min(left, PROBE_LOOK_SECONDS)

    def _tell(self, old: State, new: State) -> None:
        for listener in self._listeners:
            listener(self.name, old, new)


class Permit:
    """Leave for one call. Report once, by `success`, `failure` or `unused`; what is reported later, or too late, is no news.

    As a context manager it reports by how its block ends: an exception is a failure if the breaker `counts` it, else a success;
    BreakerOpen of another breaker, and what is no Exception (KeyboardInterrupt, a cancelled task), say nothing.
    """

    def __init__(self, breaker: CircuitBreaker, era: int) -> None:
        self._breaker = breaker
        self._era = era
        self._reported = False

    def success(self) -> None:
        self._report(False)

    def failure(self, cause: str = "") -> None:
        self._report(True, cause)

    def unused(self) -> None:
        """The call was not made: a probe's turn goes to the next call."""
        self._report(None)

    def _report(self, failed: bool | None, cause: str = "") -> None:
        if not self._reported:
            self._reported = True
            self._breaker.report(self._era, failed, cause)

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.success()
        elif isinstance(error, BreakerOpen) or not isinstance(error, Exception):
            self.unused()
        else:
            self._report(self._breaker.counts(error), str(error))


class Breakers:
    """All breakers of a process, by name, under one set of rules."""

    def __init__(
        self,
        rules: Rules,
        monotonic: Callable[[], float],
        rand: Callable[[], float],
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._rules = rules
        self._monotonic = monotonic
        self._rand = rand
        self._listeners = (log_change, *listeners)
        self._breakers: dict[str, CircuitBreaker] = {}
        self._lock = threading.Lock()

    def get(
        self, name: str, *, counts: Callable[[Exception], bool] = says_it_failed, open_cap: float | None = None
    ) -> CircuitBreaker:
        """The breaker `name`, made at the first call. `open_cap`: a shorter longest time open than the common one, in seconds."""
        with self._lock:
            if name not in self._breakers:
                rules = self._rules
                if open_cap is not None:
                    rules = replace(rules, open_seconds=min(rules.open_seconds, open_cap), open_cap=min(rules.open_cap, open_cap))
                self._breakers[name] = CircuitBreaker(
                    name, rules, self._monotonic, self._rand, counts=counts, listeners=self._listeners
                )
            return self._breakers[name]

    def snapshot(self) -> dict[str, dict[str, object]]:
        """For /status: name → state, calls and failures within the window, seconds until the next try."""
        return {name: breaker.snapshot() for name, breaker in sorted(self._known().items())}

    def all_open(self) -> float | None:
        """Seconds until the first of them lets a call in, if none does now; None if one does, or there are none."""
        waits = [breaker.seconds for breaker in self._known().values()]
        return min(waits) if waits and min(waits) > 0 else None

    def _known(self) -> Mapping[str, CircuitBreaker]:
        with self._lock:
            return dict(self._breakers)


def log_change(name: str, old: State, new: State) -> None:
    """The listener that every breaker has: one line when an outage begins, one when it ends."""
    if (old, new) == ("CLOSED", "OPEN"):
        log.warning("%s fails again and again: it is left alone for a while", name)
    elif new == "CLOSED":
        log.info("%s answers again", name)
    else:
        log.debug("breaker of %s: %s", name, new)
