"""The only retry layer for calls: decorators on tenacity that wait on the shutdown's event and end with it.

Each repeats what is Transient for its kind, for ever, until the process is to stop; then the last error is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import tenacity

from src.common.exceptions import BreakerOpen, ImapUnavailable, RedisFull, RedisUnavailable, TokenEndpointUnavailable
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)

Call = TypeVar("Call", bound=Callable[..., Any])


class Decorator(Protocol):
    def __call__(self, call: Call) -> Call: ...


def _decorator(kinds: tuple[type[Exception], ...], wait: tenacity.wait.wait_base, shutdown: Shutdown, what: str) -> Decorator:
    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        delay = state.next_action.sleep if state.next_action else 0.0
        level = logging.WARNING if state.attempt_number in (1, 10) or state.attempt_number % 50 == 0 else logging.DEBUG
        log.log(level, "%s: %s; trying again in %.1f s (try %d)", what, error, delay, state.attempt_number)

    def decorate(call: Call) -> Call:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(kinds),
            wait=_until_asked_again(wait),
            stop=tenacity.stop_when_event_set(shutdown.event),
            sleep=tenacity.sleep_using_event(shutdown.event),
            before_sleep=say,
            reraise=True,
        )
        return cast(Call, retrying.wraps(call))

    return decorate


def _until_asked_again(wait: tenacity.wait.wait_base) -> Callable[[tenacity.RetryCallState], float]:
    """`wait`, but no longer than until the breaker that refused the call asks again: a try that was not made costs no backoff."""

    def seconds(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        refusal = error.__cause__ if error else None
        return min(wait(state), refusal.seconds) if isinstance(refusal, BreakerOpen) else wait(state)

    return seconds


def retry_on_redis_error(shutdown: Shutdown, cap: float = 5.0) -> Decorator:
    """Exponential backoff with full jitter up to `cap` seconds, while Redis is away or full."""
    wait = tenacity.wait_random_exponential(multiplier=0.1, max=cap)
    return _decorator((RedisUnavailable, RedisFull), wait, shutdown, "Redis is away or full")


def retry_on_imap_error(shutdown: Shutdown, cap: float = 300.0) -> Decorator:
    """Exponential backoff with full jitter up to `cap` seconds, while the IMAP server cannot be had."""
    wait = tenacity.wait_random_exponential(multiplier=0.5, max=cap)
    return _decorator((ImapUnavailable,), wait, shutdown, "IMAP is away")


def retry_on_network_error(shutdown: Shutdown, cap: float = 60.0) -> Decorator:
    """Exponential backoff with full jitter up to `cap` seconds, on any OSError of a socket."""
    return _decorator((OSError,), tenacity.wait_random_exponential(multiplier=0.1, max=cap), shutdown, "no connection")


def retry_on_oauth_error(shutdown: Shutdown, seconds: float = 10.0) -> Decorator:
    """A fixed wait, while the token endpoint cannot be had. A revoked token is no such error."""
    return _decorator((TokenEndpointUnavailable,), tenacity.wait_fixed(seconds), shutdown, "the token endpoint is away")
