"""Round trips that break on purpose: a transport, an IMAP session and an archive's store that count each call and fail the one
they are told to.

Processes of a run live in one interpreter. Each has its own `Process`, through which all its round trips go; the trips of a
run are numbered together by `Trips`, from 1.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from enum import Enum
from functools import partial
from typing import Any, NoReturn, Self, TypeVar

import redis

from src.common.archive import File, Store
from src.common.exceptions import ImapUnavailable
from src.common.redis_client import Arg, Transport
from src.imap.imap_client import Folder, ImapMailbox, Meta

Reply = TypeVar("Reply")


class Crash(BaseException):
    """The process died here. As a BaseException it passes everything that handles errors."""


class Fault(Enum):
    """What becomes of a round trip. After a crash the process does nothing any more; the other faults it survives."""

    CRASH_BEFORE = "crash before"
    CRASH_AFTER = "crash after"
    REQUEST_LOST = "request lost"
    REPLY_LOST = "reply lost"
    MEANWHILE = "meanwhile"  # the process stands still before it while something else happens


class Trips:
    """Counts the round trips of a run of these `kinds` and breaks number `at`. `meanwhile`: what happens under Fault.MEANWHILE."""

    def __init__(
        self,
        at: int = 0,
        fault: Fault = Fault.MEANWHILE,
        meanwhile: Callable[[], None] = lambda: None,
        kinds: Sequence[str] = ("redis", "imap", "archive"),
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.broken = ""
        self._at = at
        self._kinds = kinds
        self._fault = fault
        self._counting = threading.Lock()  # the archive writes several files at once
        self.meanwhile = meanwhile

    @property
    def fired(self) -> bool:
        return bool(self.broken)

    def fault_of_next(self, kind: str, what: str) -> Fault | None:
        with self._counting:
            self.counts[kind] += kind in self._kinds
            if kind not in self._kinds or self.counts.total() != self._at:
                return None
            self.broken = f"{self._fault.value} at trip {self._at}: {kind} {what}"
            return self._fault


class Process:
    """The way out of one process: alive until it meets its crash."""

    def __init__(self, trips: Trips) -> None:
        self._trips = trips
        self._dead = False

    def trip(self, kind: str, what: str, send: Callable[[], Reply], lost: Exception) -> Reply:
        """`send()`, unless this is the trip that breaks. `lost`: what the caller sees of a lost request or reply."""
        if self._dead:
            raise Crash
        match self._trips.fault_of_next(kind, what):
            case Fault.CRASH_BEFORE:
                self._die()
            case Fault.CRASH_AFTER:
                _unheard(send)
                self._die()
            case Fault.REQUEST_LOST:
                raise lost
            case Fault.REPLY_LOST:
                _unheard(send)
                raise lost
            case Fault.MEANWHILE:
                self._trips.meanwhile()
        return send()

    @property
    def dead(self) -> bool:
        return self._dead

    def doom(self) -> None:
        """It dies before its next round trip."""
        self._dead = True

    def _die(self) -> NoReturn:
        self._dead = True
        raise Crash


def _unheard(send: Callable[[], object]) -> None:
    with suppress(Exception):  # also an error is a reply
        send()


class FaultyTransport:
    """A Transport of one process: each command is a round trip."""

    def __init__(self, real: Transport, process: Process) -> None:
        self._real = real
        self._process = process

    def execute_command(self, *args: Arg) -> Any:
        what = " ".join(str(arg)[:40] for arg in args[:2])
        return self._process.trip(
            "redis", what, lambda: self._real.execute_command(*args), redis.ConnectionError("lost on purpose")
        )

    def close(self) -> None:
        """The real transport is shared: it stays open."""


class FaultySession:
    """An ImapMailbox of one process: entering it and each call are round trips. A failed one ends the session, as it does there.

    `beside`: what another thread of the process does while this one waits for the answer.
    """

    folder: Folder

    def __init__(self, real: ImapMailbox, process: Process, beside: Callable[[], None]) -> None:
        self._real = real
        self._process = process
        self._beside = beside

    def __enter__(self) -> Self:
        self.folder = self._ask("login", self._real.__enter__).folder
        return self

    def __exit__(self, *_: object) -> None:
        self._real.__exit__(None, None, None)

    def uids_from(self, first: int) -> list[int]:
        return self._ask("uids_from", lambda: self._real.uids_from(first))

    def uids_since(self, day: date, first: int = 1) -> list[int]:
        return self._ask("uids_since", lambda: self._real.uids_since(day, first))

    def has(self, uid: int) -> bool:
        return self._ask("has", lambda: self._real.has(uid))

    def meta(self, uids: Sequence[int]) -> dict[int, Meta]:
        return self._ask("meta", lambda: self._real.meta(uids))

    def ask_bodies(self, uids: Sequence[int]) -> None:
        """No round trip: `bodies` waits for the answer. It has come before anything else happens, or it would be the server's speed
        that decides whether it does."""
        self._real.ask_bodies(uids)
        with self._real._speaking():
            pass

    def bodies(self, uids: Sequence[int]) -> dict[int, bytes]:
        return self._ask("bodies", lambda: self._real.bodies(uids))

    def head(self, uid: int, limit: int) -> bytes:
        return self._ask("head", lambda: self._real.head(uid, limit))

    def wait(self, seconds: float, stop: Callable[[], bool]) -> bool:
        return self._ask("wait", lambda: self._real.wait(seconds, stop))

    def _ask(self, what: str, send: Callable[[], Reply]) -> Reply:
        try:
            reply = self._process.trip("imap", what, send, ImapUnavailable("lost on purpose"))
            self._beside()
        except (ImapUnavailable, Crash):
            self._real.__exit__(None, None, None)
            raise
        return reply


class FaultyStore:
    """The store of an archive as one process reaches it: each file is a trip."""

    def __init__(self, real: Store, process: Process) -> None:
        self._real = real
        self._process = process

    @property
    def place(self) -> str:
        return self._real.place

    def put(self, files: Sequence[File]) -> None:
        for file in files:
            self._ask("put", partial(self._real.put, [file]))

    def begun(self) -> bool:
        return self._real.begun()

    def read(self, path: str) -> bytes | None:
        return self._real.read(path)

    def files(self) -> Iterator[tuple[str, float]]:
        return self._real.files()

    def refresh(self, path: str, now: float) -> None:
        self._real.refresh(path, now)

    def remove_older(self, path: str, moment: float) -> bool:
        return self._real.remove_older(path, moment)

    def _ask(self, what: str, send: Callable[[], Reply]) -> Reply:
        return self._process.trip("archive", what, send, OSError(errno.ENOSPC, "full on purpose"))
