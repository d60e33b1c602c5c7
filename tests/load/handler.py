"""The handler of the load test: takes LOAD_MS, fails with the chance LOAD_FAIL (a tenth of that for good), and keeps a journal."""

from __future__ import annotations

import hashlib
import os
import threading
from functools import cache

from src.common.exceptions import Permanent
from src.mail.record import Email
from src.worker.processor import Context

FOR_GOOD = 0.1  # of the failures


def handle(email: Email, context: Context) -> dict[str, int]:
    """What happens is decided by mail and attempt alone, whoever runs it how often."""
    milliseconds, chance = float(os.environ["LOAD_MS"]), float(os.environ["LOAD_FAIL"])
    if milliseconds:
        threading.Event().wait(milliseconds / 1000)
    drawn = hashlib.sha256(f"{context.idempotency_key} {context.attempt}".encode()).digest()
    luck = int.from_bytes(drawn[:6]) / 2**48
    if luck < chance * FOR_GOOD:
        raise Permanent("buried as ordered")
    if luck < chance:
        raise RuntimeError("fails as ordered")
    os.write(journal(), f"{context.idempotency_key}\n".encode())  # one write: lines of many processes never mix
    return {"attempt": context.attempt}


@cache
def journal() -> int:
    return os.open(os.environ["LOAD_JOURNAL"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
