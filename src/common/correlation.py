"""The id that follows one mail from intake to its handler, in every log line."""

from __future__ import annotations

import hashlib
from contextvars import ContextVar, Token

_current: ContextVar[str] = ContextVar("correlation_id", default="")


def current() -> str:
    return _current.get()


class correlated:  # used as a statement: `with correlated(…):`
    """Every log line written inside carries `correlation_id`. Once for each mail, so no generator stands behind it."""

    __slots__ = ("_id", "_token")

    def __init__(self, correlation_id: str) -> None:
        self._id = correlation_id

    def __enter__(self) -> None:
        self._token: Token[str] = _current.set(self._id)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def traceparent_of(correlation_id: str) -> str:
    """The W3C trace context of a mail that no span of ours began: both ids follow from the correlation id, sampled.

    (https://www.w3.org/TR/trace-context/#traceparent-header)
    """
    digest = hashlib.sha256(correlation_id.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"
