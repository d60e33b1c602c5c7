"""What becomes of a mail whose handler raised, for any error, attempt and chance."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.exceptions import BreakerOpen, MailboxMissing, Permanent, RedisUnavailable, RetryLater
from src.worker.backoff import LONGEST_DELAY, Decision, Policy, ceiling, decide

policies = st.builds(
    Policy,
    attempts=st.integers(1, 50),
    base=st.floats(0.001, 1e6),
    factor=st.floats(1, 1e6),
    cap=st.floats(0.001, 1e9),
)
attempts = st.integers(1, 10**6)
chances = st.floats(0, 1, exclude_max=True)


@given(policies, attempts)
def test_the_ceiling_never_falls_and_never_passes_the_cap(policy: Policy, attempt: int) -> None:
    """However many attempts there were: no overflow, no negative wait."""
    assert 0 < ceiling(attempt, policy) <= ceiling(attempt + 1, policy) <= policy.cap


@given(policies)
def test_the_first_ceiling_is_the_base(policy: Policy) -> None:
    assert ceiling(1, policy) == min(policy.base, policy.cap)


@given(policies, st.integers(0, 100), chances)
def test_any_error_is_retried_until_its_attempts_are_used_up(policy: Policy, before: int, chance: float) -> None:
    """0 <= delay <= ceiling; the last attempt buries, and so does every later one."""
    decision = decide(RuntimeError("boom"), before, policy, chance)
    if before + 1 >= policy.attempts:
        assert decision == Decision("bury", 0.0, "attempts")
    else:
        assert decision.verb == "retry"
        assert 0 <= decision.delay <= ceiling(before + 1, policy)


@given(policies, st.integers(0, 100), chances)
def test_permanent_buries_at_once(policy: Policy, before: int, chance: float) -> None:
    """At any attempt, and so do its subclasses."""
    assert decide(Permanent("no"), before, policy, chance) == Decision("bury", 0.0, "permanent")
    assert decide(MailboxMissing("no"), before, policy, chance) == Decision("bury", 0.0, "permanent")


@pytest.mark.parametrize("error", [RedisUnavailable("away"), SystemExit(3), ValueError()], ids=repr)
def test_whatever_is_not_permanent_is_retried(error: BaseException) -> None:
    """A handler that calls sys.exit is retried as one that raises."""
    assert decide(error, 0, Policy(), 0.5) == Decision("retry", 0.5, "")


class Unset(RetryLater):
    def __init__(self) -> None:
        """Without the delay."""


@pytest.mark.parametrize(
    ("seconds", "delay"),
    [(60, 60.0), ("60", 60.0), (" 1.5 ", 1.5), (-5, 0.0), ("-5", 0.0), (1e300, LONGEST_DELAY), ("9" * 300, LONGEST_DELAY)]
    + [
        (said, 0.5)
        for said in (None, "", "Wed, 21 Oct 2026 07:28:00 GMT", timedelta(60), float("inf"), float("nan"), 10**400, "²")
    ],
    ids=lambda value: str(value)[:20],
)
def test_whatever_a_handler_asks_for_its_delay_is_a_number(seconds: Any, delay: float) -> None:
    """Numbers in bounds are taken, also as text; for anything else the policy's own delay."""
    assert decide(RetryLater(seconds), 0, Policy(), 0.5) == Decision("retry", delay, "")
    breaker = BreakerOpen("crm", 1.0)
    breaker.seconds = seconds
    assert decide(breaker, 0, Policy(), 0.5) == Decision("postpone", delay + 0.5, "")


def test_an_error_that_asks_for_no_delay_gets_the_policys() -> None:
    """A subclass that does not call the constructor of RetryLater."""
    assert decide(Unset(), 0, Policy(), 0.5) == Decision("retry", 0.5, "")


def test_no_policy_waits_longer_than_the_longest_delay() -> None:
    """A delay that Redis cannot be told would end each worker."""
    assert decide(OSError(), 0, Policy(base=1e308, cap=1e308), 0.5) == Decision("retry", LONGEST_DELAY, "")


def test_the_default_policy_in_numbers() -> None:
    """Eight attempts; 1 s doubled up to an hour; full jitter: chance 0 waits nothing, the whole range is used."""
    assert [ceiling(attempt, Policy()) for attempt in (1, 2, 3, 7, 12, 13, 5000)] == [1, 2, 4, 64, 2048, 3600, 3600]
    assert decide(OSError(), 2, Policy(), 0.0).delay == 0.0
    assert decide(OSError(), 2, Policy(), 0.999).delay == pytest.approx(3.996)
    assert decide(OSError(), 6, Policy(), 0.5).verb == "retry"
    assert decide(OSError(), 7, Policy(), 0.5).verb == "bury"
