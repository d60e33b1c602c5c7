"""How far a read has come: a bar with rate and time left on a terminal, elsewhere a log line every ten seconds."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest

from src.common.clock import SYSTEM, Clock
from src.producer.progress import Progress


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Time:
    """A clock that is set by hand."""

    now: float = 0.0

    def clock(self) -> Clock:
        return Clock(wall=SYSTEM.wall, monotonic=lambda: self.now)


def read(progress: Progress, time: Time, total: int, *, seconds: float) -> None:
    """A read of `total` mails by hundreds, so many seconds long."""
    progress.start(total)
    for _ in range(total // 100):
        time.now += seconds * 100 / total
        progress.advance(100)
    progress.end()


def test_a_log_line_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    """Done, total, rate and time left; a read of 35 s has three of them."""
    caplog.set_level("INFO")
    time = Time()
    read(Progress("ann/INBOX", time.clock()), time, 7_000, seconds=35)
    assert caplog.messages == [
        "ann/INBOX: read 2000 of 7000, 200/s, 25 s left",
        "ann/INBOX: read 4000 of 7000, 200/s, 15 s left",
        "ann/INBOX: read 6000 of 7000, 200/s, 5 s left",
    ]


def test_a_short_read_says_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than 500 mails, however long they take: no line, and no bar on a terminal."""
    caplog.set_level("INFO")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    time = Time()
    read(Progress("ann/INBOX", time.clock()), time, 400, seconds=100)
    assert (caplog.messages, terminal.getvalue()) == ([], "")


def test_a_bar_on_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mailbox, done of total, rate and time left, and no log lines through it; it is taken away when the read ends."""
    caplog.set_level("INFO")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    time = Time()
    progress = Progress("ann/INBOX", time.clock())
    progress.start(1_000)
    for _ in range(5):
        time.now += 1.0
        progress.advance(100)
    assert progress._bar is not None
    progress._bar.refresh()
    shown = terminal.getvalue()
    assert "ann/INBOX" in shown
    assert "500/1000" in shown
    assert "100/s" in shown
    assert "0:00:" in shown, "the time that is left"
    progress.end()
    assert terminal.getvalue().endswith("\x1b[2K"), "the line of the bar is erased"
    assert caplog.messages == []
