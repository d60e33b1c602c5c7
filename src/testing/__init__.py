"""For the tests of your handlers: a mail from text, a context, a handler that fails, a Gmail to try things on.

from src.testing import context, email

def test_an_invoice_is_seen():
    mail = email("From: billing@supplier.example\\nSubject: Invoice 17\\n\\nPlease pay.")
    assert handle(mail, context(mail)) == {"invoice": True}
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from src.common.circuit_breaker import Breakers, Rules
from src.common.clock import SYSTEM
from src.mail.record import Email
from src.sandbox.server import Sandbox
from src.worker.context import Context
from src.worker.steps import MemoryServices
from src.worker.trial import delivery_of

__all__ = ["FailTimes", "Sandbox", "context", "email"]

RESULT_MAX = 65_536


def email(message: str | bytes, *, account: str = "you@example.org", mailbox: str = "INBOX", labels: Sequence[str] = ()) -> Email:
    """The Email that a handler would get of this message: header, empty line, text. `raw()` and attachments work."""
    raw = message.encode() if isinstance(message, str) else message
    delivery = delivery_of(raw, now=datetime.now(UTC), account=account, mailbox=mailbox, labels=labels)
    return Email(delivery.fields, lambda raw_ref: raw)


def context(
    mail: Email, *, attempt: int = 1, replays: int = 0, timeout: float = 60.0, steps: dict[str, str] | None = None
) -> Context:
    """What a handler is told beside `mail`. `steps`: what earlier attempts left (step → JSON); a second context given the same dict is
    the next attempt. `timeout` in seconds from now.
    """
    breakers = Breakers(Rules(), SYSTEM.monotonic, lambda: 1.0)
    services = MemoryServices(breakers, steps if steps is not None else {})
    log = logging.LoggerAdapter(logging.getLogger("handler"), {"correlation_id": mail.correlation_id})
    deadline = datetime.now(UTC) + timedelta(seconds=timeout)
    return Context(mail.email_id, attempt, replays, deadline, log, mail, services, RESULT_MAX)


@dataclass
class FailTimes:
    """A handler that fails `times` times for each mail, then does what `handler` does (default: nothing).

    `error` makes the exception. In a module of yours: `handle = FailTimes(2)`, then `worker.py --handler that_module:handle`.
    """

    times: int
    handler: Callable[[Email, Context], dict[str, Any] | None] = lambda mail, told: None
    error: Callable[[], Exception] = field(default=lambda: RuntimeError("fails on purpose"))

    def __call__(self, mail: Email, told: Context) -> dict[str, Any] | None:
        if told.attempt <= self.times:
            raise self.error()
        return self.handler(mail, told)
