"""The demo's handler: it takes its time, and by the number of the mail it fails once, fails always, or gives up at once."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from src.common.exceptions import Permanent
from src.mail.record import Email

PACE = threading.Event()  # never set: waiting for it is how this handler takes its time


class Context(Protocol):
    """What is used of `src.worker.context.Context`."""

    @property
    def attempt(self) -> int: ...


def handle(email: Email, context: Context) -> dict[str, Any]:
    """Of 50 mails in a row one is buried at once, one after its last attempt, and five are done at their second attempt."""
    number = int(email.email_id.rpartition(":")[2])
    PACE.wait(0.05 * (1 + number % 5))
    if number % 50 == 7:
        raise Permanent("this mail is for nobody: no attempt would change that")
    if number % 50 == 12:
        raise RuntimeError("the ticket system refuses this mail, whenever it is asked")
    if number % 10 == 3 and context.attempt == 1:
        raise TimeoutError("the ticket system took too long, this once")
    return {"words": len(email.text.split()), "attachments": len(email.attachments), "attempt": context.attempt}
