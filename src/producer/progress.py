"""How far a read has come: a bar on a terminal, else a log line from time to time."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from src.common.clock import Clock

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

log = logging.getLogger(__name__)

SHOWN_FROM = 500  # mails: a shorter read needs no bar
LOG_SECONDS = 10.0


class Progress:
    """Of one mailbox; a read of fewer than `SHOWN_FROM` mails shows nothing."""

    def __init__(self, title: str, clock: Clock) -> None:
        self._title = title
        self._clock = clock
        self._bar: Bar | None = None
        self._task: TaskID
        self._total = self._done = 0
        self._began = self._said = 0.0

    def start(self, total: int) -> None:
        self.end()
        self._total, self._done = total, 0
        self._began = self._said = self._clock.monotonic()
        if total >= SHOWN_FROM and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(self._title, total=total, rate="")
            self._bar.start()

    def advance(self, count: int) -> None:
        self._done += count
        now = self._clock.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:,.0f}/s")
        elif self._total >= SHOWN_FROM and now - self._said >= LOG_SECONDS:
            self._said = now
            left = (self._total - self._done) / rate
            log.info("%s: read %d of %d, %.0f/s, %.0f s left", self._title, self._done, self._total, rate, left)

    def end(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _bar() -> Bar:
    """Rich is imported where there is a terminal: a daemon under a service manager starts without."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
