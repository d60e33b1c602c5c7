"""What becomes of a mail whose handler raised. Pure: the random number is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from src.common.exceptions import BreakerOpen, Permanent, RetryLater

LONGEST_DELAY = 365 * 86_400.0  # seconds, whoever asks for more


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
    own = ceiling(attempt, policy) * (1 - policy.jitter * (1 - chance))
    if isinstance(error, BreakerOpen):
        return Decision("postpone", _delay(error, own) + chance, "")  # not all at the same moment
    if isinstance(error, Permanent):
        return Decision("bury", 0.0, "permanent")
    if attempt >= policy.attempts:
        return Decision("bury", 0.0, "attempts")
    return Decision("retry", _delay(error, own) if isinstance(error, RetryLater) else min(own, LONGEST_DELAY), "")


def _delay(error: RetryLater | BreakerOpen, own: float) -> float:
    """What the error asks for, in bounds; `own`, the policy's delay, where that is no finite number: a handler may say anything."""
    try:
        asked = float(error.seconds)
    except (AttributeError, TypeError, ValueError, OverflowError):
        asked = own
    return min(max(0.0, asked if math.isfinite(asked) else own), LONGEST_DELAY)
