"""The id that follows one mail from intake to its handler, in every log line."""

from __future__ import annotations

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
