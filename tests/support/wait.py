"""The one place where tests sleep: waiting for a condition with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.01


def until(condition: Callable[[], T], timeout: float = 20.0, what: str = "the condition") -> T:
    """Ask `condition` every 10 ms until its answer is true; return that answer.

    Raises AssertionError with `what` and the last answer after `timeout` seconds.
    What `condition` raises is passed on: a condition that may fail for a while says so itself.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout:g} s: {what} (last answer: {answer!r})")
        time.sleep(POLL_SECONDS)
