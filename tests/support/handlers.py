"""A handler whose mails say what it does with them, and the journal it leaves on disk.

The first words of the subject are the order:

    fail N      raise in the first N attempts          permanent   raise Permanent
    hold NAME   finish once the file NAME exists       kill N      SIGKILL to the own process, the first time only
    stuck       hold the GIL for ever                              once N other mails are at work in it
    again NAME  raise in the first attempt, then as hold
    break NAME  raise once the file NAME exists, in the first attempt
    slow MS     take that long                     segfault    read at address 0
    exit        os._exit                           eat MB      take so much memory, and keep it for this call
    leftover    leave a thread and a process at work for ten minutes, and a last word to be written at exit
    (else)      finish at once

Journal and files stand in the folder of the journal, which the environment names (JOURNAL).
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import hashlib
import os
import re
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.exceptions import Permanent
from src.mail.record import Email
from src.worker.context import Context
from tests.support.wait import until

PATIENCE = 120.0  # seconds


@dataclass(frozen=True)
class Line:
    """`event`: begin | end | batch (`attempt` is the size of the batch)."""

    event: str
    email_id: str
    attempt: int
    pid: int


def obey(email: Email, context: Context) -> dict[str, Any]:
    """The handler."""
    journal = Path(os.environ["JOURNAL"])
    first = not any(line.email_id == context.idempotency_key for line in read_journal(journal))
    note(journal, "begin", context)
    order, _, rest = email.subject.partition(" ")
    argument = rest.split(" ")[0]
    if order == "fail" and context.attempt <= int(argument):
        raise RuntimeError(f"attempt {context.attempt} fails as ordered")
    if order == "again" and context.attempt == 1:
        raise RuntimeError("the first attempt fails as ordered")
    if order == "permanent":
        raise Permanent("buried as ordered")
    if order == "kill":
        if first:
            until(lambda: at_work(journal, os.getpid()) > int(argument), PATIENCE, f"{argument} others are at work")
        os.kill(os.getpid(), signal.SIGKILL)
    if order in ("hold", "again", "break"):
        until((journal.parent / argument).exists, PATIENCE, f"the file {argument}")
    if order == "break" and first:
        raise RuntimeError("it fails late, as ordered")
    if order == "stuck":
        re.fullmatch(r"(a+)+", "a" * 64 + "b")
    if order == "segfault":
        ctypes.string_at(0)
    if order == "exit":
        os._exit(3)
    if order == "eat":
        assert bytearray(int(argument) << 20)
    if order == "leftover":
        threading.Thread(target=threading.Event().wait, args=(600,)).start()
        pool = ProcessPoolExecutor(1)
        pool.submit(time.sleep, 600)
        [child] = until(lambda: list(pool._processes), PATIENCE, "the pool has a process")
        (journal.parent / "leftover").write_text(str(child))
        atexit.register((journal.parent / "last-word").touch)
    if order == "slow":
        threading.Event().wait(int(argument) / 1000)
    note(journal, "end", context)
    return {"subject": email.subject, "attempt": context.attempt}


async def obey_async(email: Email, context: Context) -> dict[str, Any]:
    """An async handler that knows `hold NAME`, `deaf NAME` (the same, and it will not be cancelled) and `block` (the event loop)."""
    journal = Path(os.environ["JOURNAL"])
    note(journal, "begin", context)
    order, _, rest = email.subject.partition(" ")
    gate = journal.parent / rest.partition(" ")[0]
    if order == "block":
        until(gate.joinpath("never").exists, PATIENCE, "for ever")
    while order in ("hold", "deaf") and not gate.exists():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            if order == "hold":
                raise
    note(journal, "end", context)
    return {"subject": email.subject, "attempt": context.attempt}


def obey_batch(emails: list[Email], contexts: list[Context]) -> list[dict[str, Any] | Exception]:
    """A batch handler: each mail by `obey`; it notes for each how many came with it."""
    journal = Path(os.environ["JOURNAL"])
    verdicts: list[dict[str, Any] | Exception] = []
    for email, context in zip(emails, contexts, strict=True):
        note(journal, "batch", context, len(emails))
        try:
            verdicts.append(obey(email, context))
        except (Permanent, RuntimeError) as error:
            verdicts.append(error)
    return verdicts


def note(journal: Path, event: str, context: Context, number: int | None = None) -> None:
    """`number`: what is noted in the place of the attempt."""
    line = f"{event}\t{context.idempotency_key}\t{number or context.attempt}\t{os.getpid()}\n"
    with journal.open("ab", buffering=0) as file:  # O_APPEND and one write: lines of many processes never mix
        file.write(line.encode())


def read_journal(journal: Path) -> list[Line]:
    """All that was noted so far, in order."""
    if not journal.exists():
        return []
    text = journal.read_text()
    whole = text[: text.rfind("\n") + 1]  # a line that crosses a page may be seen when half of it is written
    rows = [row.split("\t") for row in whole.splitlines()]
    return [Line(event, email_id, int(attempt), int(pid)) for event, email_id, attempt, pid in rows]


def at_work(journal: Path, pid: int) -> int:
    """How many mails process `pid` has begun and not ended."""
    mine = [line.event for line in read_journal(journal) if line.pid == pid]
    return mine.count("begin") - mine.count("end")


def measure_raw(email: Email, context: Context) -> dict[str, Any]:
    """What the archive gives: the raw mail's SHA-256, and each attachment's first bytes."""
    return {
        "sha256": hashlib.sha256(email.raw()).hexdigest(),
        "attachments": [file.open().read(4).decode("latin-1") for file in email.attachments],
    }
