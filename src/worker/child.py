"""A process of its own in which handlers run: it can be killed, and what kills it takes nothing else along.

The worker hands it one job at a time over a pipe; `context.once` and `context.breaker` are asked back over the same pipe. It
ignores SIGTERM and SIGINT, which a service manager or a terminal sends to all of a group: the worker decides when it ends. When
the worker itself dies, the kernel ends it by SIGIO, whatever it is doing: its mail is about to be somebody else's.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection, wait
from typing import Any

from config.routes import Route
from config.settings import Settings
from src.common import logging_config, tracing
from src.common.archive import open_archive
from src.common.exceptions import BreakerOpen, ConfigurationError, LeaseLost
from src.worker.context import Services
from src.worker.delivery import Delivery
from src.worker.processor import Outcome, Started, Terms, handle, handle_async, handle_batch, load_handlers

log = logging.getLogger(__name__)

_asking = threading.Lock()  # a handler may ask from several threads

START_SECONDS = 60.0  # to import and prepare the handlers
SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit the locks of threads that are not there


@dataclass(frozen=True)
class Job:
    """Mails for one call of a handler. `number`: its place in `Handlers.all`, which is the same on both sides."""

    mails: tuple[tuple[Delivery, int], ...]
    number: int
    deadline: datetime


@dataclass(frozen=True)
class Ended:
    """The process ended, or was ended, before it was done. `why` in words."""

    why: str
    timed_out: bool = False


class Child:
    """The worker's end of one such process. Used by one thread."""

    def __init__(self, settings: Settings, routes: Sequence[Route]) -> None:
        self._connection, theirs = SPAWN.Pipe()
        lifeline, self._lifeline = SPAWN.Pipe(duplex=False)
        self._process = SPAWN.Process(target=_main, args=(theirs, lifeline, settings, tuple(routes)), name="handlers")
        self._process.start()
        theirs.close()
        lifeline.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def ready(self) -> Ended | None:
        """Wait until the handlers are loaded; what happened if they are not."""
        try:
            if not self._answers(START_SECONDS):
                return self._stuck(f"its handlers were not loaded within {START_SECONDS:.0f} s")
            self._connection.recv()
            return None
        except (EOFError, OSError):
            return self._ended()

    def run(self, job: Job, services: Sequence[Services], seconds: float, now: Callable[[], float]) -> list[Outcome] | Ended:
        """Let it handle a job, for `seconds` at most; `services` one a mail. After Ended this child is of no more use.

        `now`: monotonic seconds.
        """
        ends = now() + seconds
        try:
            self._connection.send(job)
            while True:
                if not self._answers(max(0.0, ends - now())):
                    return self._stuck(f"it took longer than {seconds:g} s and was killed")
                message: Any = self._connection.recv()
                if isinstance(message, list):
                    return message
                self._connection.send(_asked(services, *message))
        except (EOFError, OSError):
            return self._ended()

    def end(self) -> None:
        """End it at once, from any thread: the one that uses it gets to see Ended."""
        self._process.kill()

    def kill(self) -> None:
        """End it at once; nothing of it is left."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._lifeline.close()

    def _answers(self, seconds: float) -> bool:
        return bool(wait([self._connection], seconds))

    def _stuck(self, why: str) -> Ended:
        self.kill()
        return Ended(why, timed_out=True)

    def _ended(self) -> Ended:
        self._process.join(1.0)  # the pipe may be closed a moment before the process is gone
        code = self._process.exitcode
        self.kill()
        if code is None:
            return Ended("it closed its pipe")
        if code >= 0:
            return Ended(f"its process ended with exit code {code}")
        return Ended(f"its process was ended by signal {-code} ({signal.strsignal(-code)})")


def _asked(services: Sequence[Services], number: int, method: str, arguments: tuple[Any, ...]) -> Any:
    """What one of the mail's Services says to a call from the child; an error is handed over as it is."""
    try:
        return getattr(services[number], method)(*arguments)
    except (BreakerOpen, LeaseLost) as error:
        return error
    except Exception as error:  # noqa: BLE001  # the edge of a remote call: whatever it is, the handler over there gets to see it
        return RuntimeError(f"{type(error).__name__}: {error}")


# the other end


@dataclass
class Line:
    """The pipe, for one job: until its outcomes are sent. What a thread that a handler left behind asks later would be answered for a
    mail of the next job."""

    connection: Connection
    closed: bool = False

    def ask(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        with _asking:
            if self.closed:
                raise LeaseLost(f"the handler of this mail has ended: what it left running asks for {method!r} too late")
            self.connection.send((number, method, arguments))
            answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self, outcomes: list[Outcome]) -> None:
        with _asking:
            self.closed = True
            self.connection.send(outcomes)


@dataclass(frozen=True)
class Remote:
    """The Services of one mail of the job, asked over the pipe. `number`: the mail's place in the job."""

    line: Line
    number: int

    def recall(self, step: str) -> str | None:
        return self._ask("recall", step)  # type: ignore[no-any-return]  # what the worker's Services say

    def record(self, step: str, result: str) -> None:
        self._ask("record", step, result)

    def enter(self, breaker: str) -> int:
        return self._ask("enter", breaker)  # type: ignore[no-any-return]  # it came over a pipe

    def leave(self, permit: int, failed: bool | None) -> None:
        self._ask("leave", permit, failed)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self.line.ask(self.number, method, arguments)


def _main(connection: Connection, lifeline: Connection, settings: Settings, routes: tuple[Route, ...]) -> None:
    """The process: load, then one job after the other until the pipe is closed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # SIG_IGN would be handed on to what a handler starts
    _end_with(lifeline)
    logging_config.configure(settings.run.log_format, settings.run.log_level)
    tracing.configure("email-worker")
    place = settings.run.raw_archive
    archive = open_archive(place.get_secret_value() if place else None, settings.run.data_dir)
    try:
        handlers = load_handlers(settings.work, routes).all
    except ConfigurationError as error:
        log.error("a process for handlers cannot start: %s", error)
        return
    if settings.work.handler_memory_mb:
        most = settings.work.handler_memory_mb << 20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    terms = Terms(random.random, settings.stream.result_max_bytes, archive.get if archive else None)
    connection.send("ready")
    while True:
        try:
            job: Job = connection.recv()
        except (EOFError, OSError):
            return
        batch = [Started(delivery, attempts, handlers[job.number]) for delivery, attempts in job.mails]
        line = Line(connection)
        services = [Remote(line, number) for number in range(len(batch))]
        line.close(_run(batch, services, terms, job.deadline))


def _run(batch: list[Started], services: list[Remote], terms: Terms, deadline: datetime) -> list[Outcome]:
    [kind] = {started.handler.kind for started in batch}
    if kind == "batch":
        return handle_batch(batch, services, terms, deadline)
    if kind == "async":
        return [asyncio.run(handle_async(batch[0], services[0], terms, deadline))]
    return [handle(batch[0], services[0], terms, deadline)]


def _end_with(lifeline: Connection) -> None:
    """Let the kernel send SIGIO, which ends this process, when the other end of `lifeline` is closed: the worker is gone."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    handle = lifeline.fileno()
    fcntl.fcntl(handle, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # it was closed before the kernel was told
        os._exit(1)
