"""What becomes of a mail whose handler raised. Pure: the random number is handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from src.common.exceptions import BreakerOpen, Permanent, RetryLater


@dataclass(frozen=True, slots=True)
class Policy:
    """Delay after failed attempt n: d = min(cap, base x factor^(n-1)) seconds, of which the part `jitter` is random."""

    attempts: int = 8
    base: float = 1.0
    factor: float = 2.0
    cap: float = 3600.0
    jitter: float = 1.0


@dataclass(frozen=True, slots=True)
class Decision:
    """`verb`: retry after `delay` seconds, postpone (the same, and no attempt counts), or bury for `reason`."""

    verb: Literal["retry", "postpone", "bury"]
    delay: float
    reason: str


def ceiling(attempt: int, policy: Policy) -> float:
    """Longest delay in seconds after failed attempt `attempt` (from 1)."""
    try:
        return min(policy.cap, policy.base * policy.factor ** (attempt - 1))
    except OverflowError:
        return policy.cap


def decide(error: BaseException, attempts_before: int, policy: Policy, chance: float) -> Decision:
    """`attempts_before`: failed attempts before this one. `chance`: uniform in [0, 1)."""
    attempt = attempts_before + 1
    if isinstance(error, BreakerOpen):
        return Decision("postpone", error.seconds + chance, "")  # not all at the same moment
    if isinstance(error, Permanent):
        return Decision("bury", 0.0, "permanent")
    if attempt >= policy.attempts:
        return Decision("bury", 0.0, "attempts")
    if isinstance(error, RetryLater):
        return Decision("retry", error.seconds, "")
    return Decision("retry", ceiling(attempt, policy) * (1 - policy.jitter * (1 - chance)), "")
