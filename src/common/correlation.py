"""The id that follows one mail from intake to its handler, in every log line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_current: ContextVar[str] = ContextVar("correlation_id", default="")


def current() -> str:
    return _current.get()


@contextmanager
def correlated(correlation_id: str) -> Iterator[None]:
    """Every log line written inside carries `correlation_id`."""
    token = _current.set(correlation_id)
    try:
        yield
    finally:
        _current.reset(token)


def traceparent_of(correlation_id: str) -> str:
    """The W3C trace context of a mail that no span of ours began: both ids follow from the correlation id, sampled.

    (https://www.w3.org/TR/trace-context/#traceparent-header)
    """
    digest = hashlib.sha256(correlation_id.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"
