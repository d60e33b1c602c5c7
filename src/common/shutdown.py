"""One way to stop: an event with a reason, and the steps that follow it in order."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)


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
        """SIGTERM and SIGINT ask to stop; a second one ends the process at once (what is in flight is recovered by its lease)."""
        signal.signal(signal.SIGTERM, self._signalled)
        signal.signal(signal.SIGINT, self._signalled)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.request(signal.Signals(number).name)

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
