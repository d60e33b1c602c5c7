"""A consumer for tests: the real one, with a handler that is a function at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from config.settings import Settings, WorkSettings
from src.common.circuit_breaker import Breakers, Rules
from src.common.clock import Clock
from src.worker.backoff import Policy
from src.worker.consume import Consumer
from src.worker.delivery import Seat
from src.worker.processor import Handler, Handlers, Terms

Function = Callable[..., Any]


def handler_of(function: Function, work: WorkSettings, kind: Any = "plain") -> Handler:
    """`function` as a loaded handler."""
    policy = Policy(work.max_attempts, work.backoff_base, work.backoff_factor, work.backoff_cap, work.backoff_jitter)
    return Handler("tests:handler", function, kind, policy, work.handler_timeout)


def consumer_of(
    seat: Seat,
    settings: Settings,
    function: Function,
    clock: Clock,
    *,
    again: Callable[[Callable[[], Any]], Any] = lambda call: call(),
    fetch_raw: Callable[[str], bytes] | None = None,
) -> Consumer:
    """`again`: what repeats a handler's calls to Redis; here each is made once. Breakers open after five failures."""
    return Consumer(
        seat,
        settings.stream,
        settings.work,
        Handlers((), handler_of(function, settings.work)),
        Terms(lambda: 0.0, settings.stream.result_max_bytes, fetch_raw),
        clock,
        Breakers(Rules(), clock.monotonic, lambda: 1.0),
        again,
    )
