"""What a worker does for the handler of one mail while it runs: steps that are kept with the mail, breakers it goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from src.common.circuit_breaker import Breakers, Permit
from src.common.exceptions import LeaseLost, Permanent
from src.worker.context import MOST_STEPS
from src.worker.delivery import Delivery, Seat


@dataclass(slots=True)
class LocalServices:
    """Services (`src.worker.context`) of one delivery, in the worker's own process.

    `again`: repeats a call while Redis is away, for as long as the process may wait. `kept`: a step was kept in this delivery.
    """

    seat: Seat
    delivery: Delivery
    breakers: Breakers
    keep_seconds: float
    again: Callable[[Callable[[], Any]], Any]
    kept: bool = False
    _permits: dict[int, Permit] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)

    def recall(self, step: str) -> str | None:
        key = self.seat.keys.steps(self.delivery.email_id)
        known: str | None = self.again(lambda: self.seat.redis.call("HGET", key, step))
        return known

    def record(self, step: str, result: str) -> None:
        """Raises LeaseLost, and Permanent where a mail has too many steps."""
        seat, mail = self.seat, self.delivery
        keys = [seat.keys.stream, seat.keys.steps(mail.email_id)]
        args: list[str | int] = [seat.group, seat.consumer, mail.stream_id, mail.count]
        args += [MOST_STEPS, round(self.keep_seconds), step, result]
        self.kept = True  # before the call: its reply may be lost
        verdict = self.again(lambda: seat.redis.run("step", keys, args))
        if verdict == "LOST":
            raise LeaseLost(f"another worker has {mail.email_id} by now: step {step!r} was done and may be repeated")
        if verdict == "MANY":
            raise Permanent(f"a mail has {MOST_STEPS} steps at most; name them by what they do, not by a counter or a time")

    def enter(self, breaker: str) -> int:
        number = next(self._numbers)
        self._permits[number] = self.breakers.get(breaker).enter()
        return number

    def leave(self, permit: int, failed: bool | None) -> None:
        _report(self._permits.pop(permit), failed)


@dataclass
class MemoryServices:
    """Services without a worker, for `worker.py --try` and for tests of handlers: steps are kept in `steps`, breakers in `breakers`."""

    breakers: Breakers
    steps: dict[str, str] = field(default_factory=dict)
    _permits: dict[int, Permit] = field(default_factory=dict)

    def recall(self, step: str) -> str | None:
        return self.steps.get(step)

    def record(self, step: str, result: str) -> None:
        self.steps.setdefault(step, result)

    def enter(self, breaker: str) -> int:
        number = len(self._permits)
        self._permits[number] = self.breakers.get(breaker).enter()
        return number

    def leave(self, permit: int, failed: bool | None) -> None:
        _report(self._permits[permit], failed)


def _report(permit: Permit, failed: bool | None) -> None:
    {None: permit.unused, True: permit.failure, False: permit.success}[failed]()
