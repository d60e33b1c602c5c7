"""What a handler is told beside the mail, and what it can ask of its worker while it runs."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from src.common.circuit_breaker import says_it_failed
from src.common.exceptions import BreakerOpen, Permanent
from src.mail.record import Email

MOST_STEPS = 100  # of one mail
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Services(Protocol):
    """The worker, as the context of one mail sees it: in the same process, or at the other end of a pipe.

    `recall` and `record` raise LeaseLost where another worker has the mail by now; `enter` raises BreakerOpen.
    """

    def recall(self, step: str) -> str | None:
        """The JSON that `step` of this mail left."""
        ...

    def record(self, step: str, result: str) -> None: ...

    def enter(self, breaker: str) -> int:
        """A permit for one call through the breaker of that name."""
        ...

    def leave(self, permit: int, failed: bool | None) -> None:
        """How that call ended; None: it was not made, or its end says nothing of the other side."""
        ...


@dataclass(slots=True)  # not frozen: made for each mail, which would take three times as long
class Context:
    """What a handler is told beside the mail. To be read only.

    idempotency_key: stable for this mail, whoever delivers it how often: hand it to outside systems. attempt: from 1.
    replays: how often the mail came back from the dead letters or was reprocessed. deadline: when HANDLER_TIMEOUT ends this attempt
    (UTC). log: its lines carry the mail's correlation id.
    """

    idempotency_key: str
    attempt: int
    replays: int
    deadline: datetime
    log: logging.LoggerAdapter[logging.Logger]
    _email: Email
    _services: Services
    _result_max: int

    @property
    def first_seen(self) -> str:
        """When the producer took the mail in: ISO 8601 in UTC, the same for every attempt and replay."""
        return self._email.record.ingested_at

    @contextmanager
    def breaker(self, name: str) -> Iterator[None]:
        """A guard around a call to something that may be down: `with context.breaker("crm"): post(…)`.

        It raises BreakerOpen without a call while too many failed: let it pass, and the mail comes again when the breaker
        reopens, with no attempt counted. Any exception of the call counts as a failure, but Permanent and SkipEmail.
        """
        permit = self._services.enter(name)
        failed: bool | None = None
        try:
            yield
            failed = False
        except BreakerOpen:  # of another one
            raise
        except Exception as error:  # the handler's own, which goes on: it is only counted here
            failed = says_it_failed(error)
            raise
        finally:
            self._services.leave(permit, failed)

    def once(self, step: str, function: Callable[[], Any]) -> Any:
        """`function()`, or what it returned when this step of this mail was done before; for a coroutine function: to be awaited.

        What it returns is JSON and is kept with the mail until a day after its end, so a retry or a replay does not repeat the step. A
        crash after the call and before its record repeats it: hand `idempotency_key` to what it calls.
        Raises LeaseLost (another worker has this mail by now: stop) and Permanent (no JSON, too large, too many steps).
        """
        if inspect.iscoroutinefunction(function):
            return self._once_async(step, function)
        known = self._services.recall(step)
        if known is not None:
            return json.loads(known)
        result = function()
        self._services.record(step, encoded(result, self._result_max, f"the result of step {step!r}"))
        return result

    async def _once_async(self, step: str, function: Callable[[], Awaitable[Any]]) -> Any:
        known = await asyncio.to_thread(self._services.recall, step)
        if known is not None:
            return json.loads(known)
        result = await function()
        text = encoded(result, self._result_max, f"the result of step {step!r}")
        await asyncio.to_thread(self._services.record, step, text)
        return result


def encoded(value: object, most: int, what: str) -> str:
    """`value` as compact JSON of at most `most` bytes. Raises Permanent: repeating the handler would not change it."""
    try:
        text = _JSON.encode(value)
        size = len(text) if text.isascii() else len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise Permanent(f"{what} is not JSON: {error}") from error
    if size > most:
        raise Permanent(f"{what} has {size} bytes of JSON; RESULT_MAX_BYTES is {most}")
    return text
