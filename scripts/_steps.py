"""How far a command with steps of its own has come: a bar on a terminal, else a line from time to time. On stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import _path  # noqa: F401  # before the project's own modules
from src.common.clock import Clock

SAY_SECONDS = 10.0
REDRAW_SECONDS = 0.1


class Steps:
    """A context manager; called with what is done, how much of it, and of how much in all (0: not known)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None
        self._step = ""
        self._said = clock.monotonic()

    def __enter__(self) -> Steps:
        if sys.stderr.isatty():
            self._bar.start()
            self._task = self._bar.add_task("waiting for Redis", total=None, done="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, step: str, done: int, total: int) -> None:
        now = self._clock.monotonic()
        if step == self._step and now - self._said < (SAY_SECONDS if self._task is None else REDRAW_SECONDS):
            return
        begins, self._step = step != self._step, step
        if self._task is not None:
            self._said = now
            shown = f"{done:,} of {total:,}" if total else f"{done:,}"
            self._bar.update(self._task, description=step, completed=done, total=total or None, done=shown)
        elif not begins:  # a step that ends within SAY_SECONDS is not worth a line
            self._said = now
            print(f"{step}: {done}{f' of {total}' if total else ''}", file=sys.stderr, flush=True)
