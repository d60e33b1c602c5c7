"""What the commands that act on many mails share: words for ages and rates, asking first, pacing, a line of progress."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import date, timedelta

import _path  # noqa: F401  # before the project's own modules
from src.common.clock import Clock
from src.common.exceptions import ConfigurationError
from src.common.shutdown import Shutdown

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
PAGE = 100
SAY_SECONDS = 10.0


def age(text: str) -> timedelta:
    """`90s`, `30m`, `2h`, `3d`."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no age like 30m, 2h or 3d")
    return timedelta(seconds=int(match[1]) * UNITS[match[2]])


def rate(text: str) -> float:
    """`5/s`, `100/m`, `1000/h`, as mails a second."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)/([smh])", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is no rate like 5/s or 100/m")
    return float(match[1]) / UNITS[match[2]]


def day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no date like 2026-01-31") from None


def positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return int(text)


def counted(number: int, thing: str) -> str:
    """`1 dead letter`, `2 dead letters`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def agreed(question: str, *, yes: bool) -> bool:
    """Whether a person at the terminal (or `--yes`) says so. Raises ConfigurationError where there is nobody to ask."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"{question} There is no terminal to ask at, nothing was changed. To do it: "
            f"python scripts/{shlex.join([sys.argv[0].rpartition('/')[2], *sys.argv[1:], '--yes'])}"
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def report(summary: Mapping[str, object], *lines: str) -> None:
    """The end of a command: `lines` on a terminal, else `summary` as one JSON line."""
    if sys.stdout.isatty():
        print("\n".join(line for line in lines if line))
    else:
        print(json.dumps(summary, ensure_ascii=False))


class Pace:
    """At most `rate` mails a second (None: as fast as it goes), in pages small enough for it."""

    def __init__(self, rate: float | None, shutdown: Shutdown, clock: Clock) -> None:
        self.page = PAGE if rate is None else max(1, min(PAGE, int(rate)))
        self._rate, self._shutdown, self._clock = rate, shutdown, clock
        self._due = clock.monotonic()

    def wait(self, done: int) -> bool:
        """After a page of `done` mails: until the next may begin. True if somebody asked to stop."""
        if self._rate is not None:
            self._due = max(self._due, self._clock.monotonic() - 1.0) + done / self._rate
            return self._shutdown.wait(max(0.0, self._due - self._clock.monotonic()))
        return self._shutdown.requested


class Progress:
    """On stderr: one line that changes on a terminal, else a line from time to time."""

    def __init__(self, total: int, clock: Clock) -> None:
        self._total, self._clock = total, clock
        self._done = 0
        self._said = clock.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if sys.stderr.isatty():
            print(f"\r{self._done} of {self._total}", end="", file=sys.stderr, flush=True)
        elif self._clock.monotonic() - self._said >= SAY_SECONDS:
            self._said = self._clock.monotonic()
            print(f"{self._done} of {self._total}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._done and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
