"""Which loop has stood still for too long, and what is none of it: a process that was stopped, a loop that turns late."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from src.common.clock import Clock
from src.common.health import Beats
from src.common.shutdown import Shutdown
from src.common.watchdog import Watchdog


class Bench:
    """A loop `reader` that turned at 0 and may take 10 s, and a watchdog that waits for 60 s more."""

    def __init__(self) -> None:
        self.now = 0.0
        clock = Clock(wall=lambda: datetime(2026, 1, 1, tzinfo=UTC), monotonic=lambda: self.now)
        self.beats = Beats(clock)
        self.dog = Watchdog(self.beats, 60.0, 5.0, Shutdown(), clock)
        self.turn()

    def turn(self) -> None:
        self.beats.turn("reader", limit=10.0)

    def look(self, *moments: float) -> list[list[str]]:
        found = []
        for self.now in moments:
            found.append(self.dog.look())
        return found


def test_a_loop_is_hung_when_patience_has_passed_since_it_was_seen_late() -> None:
    assert Bench().look(5, 11, 70, 71.5) == [[], [], [], ["reader"]]


def test_a_loop_that_turns_late_is_not_hung_and_begins_anew() -> None:
    bench = Bench()
    assert bench.look(11, 60) == [[], []]
    bench.turn()
    assert bench.look(69, 71.5, 100, 131) == [[], [], [], []]
    assert bench.look(140) == [["reader"]]


def test_a_process_that_was_stopped_for_an_hour_is_not_hung() -> None:
    """Nobody looked meanwhile: the first look after it only begins to count, and then the loop turns."""
    bench = Bench()
    assert bench.look(5, 3605) == [[], []]
    bench.turn()
    assert bench.look(3606) == [[]]


def test_a_loop_that_ended_is_not_hung() -> None:
    bench = Bench()
    bench.look(11)
    bench.beats.ended("reader")
    assert bench.look(100) == [[]]


PROGRAM = """
import sys, threading
from src.common.clock import SYSTEM
from src.common.health import Beats
from src.common.shutdown import Shutdown
from src.common.watchdog import Watchdog
shutdown, beats = Shutdown(), Beats(SYSTEM)
beats.turn("reader", limit=0.0)
shutdown.guard("watchdog", Watchdog(beats, 0.0, {end_within}, shutdown, SYSTEM).run)
shutdown.wait(60)
{then}
sys.exit(shutdown.exit_code)
"""


@pytest.mark.parametrize(("end_within", "then"), [(60, ""), (0.2, "threading.Event().wait(60)")])
def test_the_process_ends_with_1_and_shows_its_stacks_in_good_order_or_not(end_within: float, then: str) -> None:
    """Also where the steps of the shutdown stand still themselves."""
    program = PROGRAM.format(end_within=end_within, then=then)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert ran.returncode == 1
    assert "most recent call first" in ran.stderr
    assert "no turn of reader within its limit and HANG_TIMEOUT (0 s): the process ends" in ran.stderr
