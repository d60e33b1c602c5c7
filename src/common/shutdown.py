"""One way to stop: an event with a reason, and the steps that follow it in order."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0  # for what is registered with atexit


class Shutdown:
    """Shared by every loop of a process: each waits with `wait`, never with sleep."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.reason = ""
        self.exit_code = 0
        self._steps: list[tuple[int, str, Callable[[], None]]] = []
        self._lock = threading.Lock()

    def request(self, reason: str, exit_code: int = 0) -> None:
        """Ask everything to stop. The first reason stands; the highest exit code wins."""
        with self._lock:
            self.reason = self.reason or reason
            self.exit_code = max(self.exit_code, exit_code)
        self.event.set()

    @property
    def requested(self) -> bool:
        return self.event.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; True if the process is to stop."""
        return self.event.wait(seconds)

    def add_step(self, priority: int, name: str, action: Callable[[], None]) -> None:
        """`action` runs once at the end, in order of `priority` (lowest first). It bounds its own time."""
        self._steps.append((priority, name, action))

    def run_steps(self) -> None:
        for _, name, action in sorted(self._steps, key=lambda step: step[0]):
            log.debug("stopping: %s", name)
            action()

    def on_signals(self) -> None:
        """SIGTERM and SIGINT ask to stop; a second one ends the process at once (what is in flight is recovered by its lease).

        A signal comes between two steps of the main thread, which may hold any lock, that of an event it waits for too: what is to be done
        is done by a thread, and SimpleQueue.put is made for being called there. A process forked by a handler has not that thread: it ends.
        """
        us = os.getpid()
        signals: SimpleQueue[int] = SimpleQueue()

        def note(number: int, frame: FrameType | None) -> None:
            if os.getpid() != us:
                os._exit(128 + number)
            signals.put(number)

        def obey() -> None:
            while True:
                number = signals.get()
                if self.requested:
                    os._exit(128 + number)
                self.request(signal.Signals(number).name)

        self.guard("signals", obey)
        signal.signal(signal.SIGTERM, note)
        signal.signal(signal.SIGINT, note)

    def guard(self, name: str, body: Callable[[], None]) -> threading.Thread:
        """A started daemon thread of `body`; if it dies the process stops with exit code 1."""

        def run() -> None:
            try:
                body()
            except BaseException:  # a thread's edge: nothing above would see it, not even SystemExit
                log.exception("thread %s died: the process stops", name)
                self.request(f"thread {name} died", exit_code=1)

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread


def leave(code: int) -> NoReturn:
    """End the process, once all is in order. Threads and processes that a handler left at work end with it: the interpreter would wait
    for them, while they go on with mail that was handed back."""
    for child in multiprocessing.active_children():
        child.kill()
    last = threading.Thread(target=_last_words, name="leave", daemon=True)
    last.start()
    last.join(LEAVE_SECONDS)
    os._exit(code)


def _last_words() -> None:
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it is gone
            stream.flush()
