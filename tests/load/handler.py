"""The handlers of the load test, the soak and the benchmark. What happens to a mail is decided by mail and attempt, whoever runs it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from src.common.exceptions import Permanent
from src.mail.record import Email
from src.worker.context import Context

FOR_GOOD = 0.1  # of the failures
_NEVER = threading.Event()  # waiting for it is how a handler takes its time


def load(email: Email, context: Context) -> dict[str, float]:
    """Takes LOAD_MS, fails with the chance LOAD_FAIL, a tenth of that for good. Its result says when it came to its end."""
    milliseconds, chance = float(os.environ["LOAD_MS"]), float(os.environ["LOAD_FAIL"])
    if milliseconds:
        threading.Event().wait(milliseconds / 1000)
    drawn = hashlib.sha256(f"{context.idempotency_key} {context.attempt}".encode()).digest()
    luck = int.from_bytes(drawn[:6]) / 2**48
    if luck < chance * FOR_GOOD:
        raise Permanent("buried as ordered")
    if luck < chance:
        raise RuntimeError("fails as ordered")
    note("end", context)
    return {"attempt": context.attempt, "at": time.time()}


def soak(email: Email, context: Context) -> dict[str, int]:
    """The subject is the order: `fail N`: in the first N attempts; `permanent`; `kill`: SIGKILL to the own process; `slow MS`."""
    order, _, argument = email.subject.partition(" ")
    note("begin", context)
    if order == "fail" and context.attempt <= int(argument):
        raise RuntimeError("fails as ordered")
    if order == "permanent":
        raise Permanent("buried as ordered")
    if order == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "slow":
        threading.Event().wait(int(argument) / 1000)
    note("end", context)
    return {"attempt": context.attempt}


def note(event: str, context: Context) -> None:
    """One line in the journal, by one write: lines of many processes never mix."""
    os.write(_journal(), f"{event}\t{context.idempotency_key}\n".encode())


@cache
def _journal() -> int:
    return os.open(os.environ["LOAD_JOURNAL"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def read(journal: Path) -> dict[str, Counter[str]]:
    """Event → email_id → how often."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for line in journal.read_text().splitlines() if journal.exists() else ():
        event, _, email_id = line.partition("\t")
        found[event][email_id] += 1
    return found


def no_op(email: Email, context: Context) -> None:
    """Returns at once."""


async def wait_20_ms(email: Email, context: Context) -> None:
    """As a handler that asks something on the net."""
    await asyncio.sleep(0.02)


def wait_20_ms_in_a_thread(email: Email, context: Context) -> None:
    """The same for threads."""
    _NEVER.wait(0.02)
