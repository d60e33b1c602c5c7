"""Breakers: when they open, who may probe, when they close again. Time and chance are handed in; no test waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from src.common.circuit_breaker import SLICES, Breakers, CircuitBreaker, Permit, Rules
from src.common.exceptions import BreakerOpen, LoginRefused, Permanent, RedisUnavailable, SkipEmail, Transient

RULES = Rules(failures=3, rate=0.5, window=10.0, open_seconds=8.0, open_cap=20.0, probe_seconds=5.0)
LONGEST = 1.0 - 2**-53  # what `random` gives at most


class Bench:
    """A breaker with a clock and a chance of the test's own, and what its listener heard."""

    def __init__(self, rules: Rules = RULES, counts: Callable[[Exception], bool] | None = None) -> None:
        self.now = 1000.0
        self.chance = 0.0  # of a half to whole opening: exactly the half
        self.heard: list[tuple[str, str, str]] = []
        more = {"counts": counts} if counts else {}
        self.breaker = CircuitBreaker(
            "side",
            rules,
            lambda: self.now,
            lambda: self.chance,
            listeners=[lambda *change: self.heard.append(change)],
            **more,
        )

    @property
    def state(self) -> object:
        return self.breaker.snapshot()["state"]

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.breaker.enter().failure()

    def succeed(self, times: int = 1) -> None:
        for _ in range(times):
            self.breaker.enter().success()

    def refused(self) -> float:
        """The seconds that a refused call is told."""
        with pytest.raises(BreakerOpen) as refusal:
            self.breaker.enter()
        assert refusal.value.name == "side"
        return refusal.value.seconds


def test_it_opens_at_the_number_of_failures() -> None:
    """One fewer leaves it closed; a refused call is told how long."""
    bench = Bench()
    bench.fail(2)
    assert bench.state == "CLOSED"
    bench.fail()
    assert bench.state == "OPEN"
    assert bench.refused() == 4.0
    assert bench.heard == [("side", "CLOSED", "OPEN")]


def test_it_stays_closed_below_the_rate() -> None:
    """Three failures among seven calls are less than half, the fourth among eight is not."""
    bench = Bench()
    bench.succeed(4)
    bench.fail(3)
    assert bench.state == "CLOSED"
    bench.fail()
    assert bench.state == "OPEN"


def test_a_success_never_opens_it() -> None:
    """Where old successes leave the window, the rate grows without a failure: nothing opens until one comes."""
    bench = Bench()
    bench.succeed(4)
    bench.now += 6
    bench.fail(3)
    bench.now += 5
    bench.succeed()
    assert bench.state == "CLOSED"
    bench.fail()
    assert bench.state == "OPEN"


def test_failures_leave_the_window() -> None:
    """Two failures now and then are no outage."""
    bench = Bench()
    for _ in range(5):
        bench.fail(2)
        bench.now += RULES.window
    assert bench.state == "CLOSED"
    assert bench.breaker.snapshot()["failures"] == 0


def test_one_probe_after_its_time_and_success_closes_it() -> None:
    """Before the time none; then one, others are refused until it reports; what was counted before is forgotten."""
    bench = Bench()
    bench.fail(3)
    bench.now += 3.9
    assert bench.refused() == pytest.approx(0.1)
    bench.now += 0.1
    probe = bench.breaker.enter()
    assert bench.state == "HALF_OPEN"
    assert bench.refused() == 1.0, "worth asking again soon: the probe may report any moment"
    probe.success()
    assert bench.state == "CLOSED"
    bench.fail(2)
    assert bench.state == "CLOSED"
    assert bench.heard == [("side", "CLOSED", "OPEN"), ("side", "OPEN", "HALF_OPEN"), ("side", "HALF_OPEN", "CLOSED")]


def test_each_failed_probe_doubles_the_time_up_to_the_cap() -> None:
    """And a random half to whole of it is waited; a success starts anew."""
    bench = Bench()
    bench.fail(3)
    waits = []
    for bench.chance in (0.0, LONGEST, 0.5, LONGEST):
        wait = bench.refused()
        waits.append(wait)
        bench.now += wait
        bench.fail()
    assert waits == pytest.approx([4.0, 8.0, 20.0, 15.0]), "half of 8, half of 16, all of 20, three quarters of 20"
    bench.now += bench.refused()
    bench.succeed()
    bench.chance = LONGEST
    bench.fail(3)
    assert bench.refused() == pytest.approx(8.0)


def test_a_probe_that_never_reports_does_not_block_for_ever() -> None:
    """After the probe's time another call is let in; the lost one's report is still taken while it is news, later it is not."""
    bench = Bench()
    bench.fail(3)
    bench.now += 4
    lost = bench.breaker.enter()
    bench.now += RULES.probe_seconds
    second = bench.breaker.enter()
    bench.refused()
    second.failure()
    assert bench.state == "OPEN"
    lost.success()
    assert bench.state == "OPEN", "it is about a time that is over"


def test_a_slow_probe_that_succeeds_closes_it() -> None:
    """A side that answers, however slowly, is asked again, although a second probe went out meanwhile."""
    bench = Bench()
    bench.fail(3)
    bench.now += 4
    slow = bench.breaker.enter()
    bench.now += RULES.probe_seconds
    second = bench.breaker.enter()
    slow.success()
    assert bench.state == "CLOSED"
    second.failure()
    assert bench.breaker.snapshot()["failures"] == 0


def test_reports_from_before_the_opening_are_no_news() -> None:
    """A call that began while it was closed neither closes it nor spoils the probe, and none reports twice."""
    bench = Bench()
    early, other = bench.breaker.enter(), bench.breaker.enter()
    bench.fail(3)
    early.success()
    assert bench.state == "OPEN"
    bench.now += 4
    probe = bench.breaker.enter()
    other.failure()
    assert bench.state == "HALF_OPEN"
    probe.success()
    probe.failure()
    assert (bench.state, bench.breaker.snapshot()["calls"]) == ("CLOSED", 0)


def test_a_probe_that_was_not_made_gives_its_turn_to_the_next() -> None:
    """KeyboardInterrupt, and BreakerOpen of another breaker, say nothing about this side."""
    for nothing in (KeyboardInterrupt(), BreakerOpen("other", 5)):
        bench = Bench()
        bench.fail(3)
        bench.now += 4
        with pytest.raises(type(nothing)), bench.breaker.enter():
            raise nothing
        assert bench.state == "HALF_OPEN"
        bench.succeed()
        assert bench.state == "CLOSED"


def test_only_what_counts_is_a_failure() -> None:
    """A verdict on one mail is an answer; by default every other exception is a failure, and the exception passes through."""

    def broken(error: Exception) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    usual, own = Bench(), Bench(counts=lambda error: isinstance(error, RedisUnavailable))
    for bench, errors, failures in (
        (usual, [Permanent("no such customer"), SkipEmail("nothing to do")], 0),
        (usual, [Transient("503"), ValueError("HTML")], 2),
        (own, [Transient("503"), LoginRefused("NO")], 0),
        (own, [RedisUnavailable("gone")], 1),
    ):
        for error in errors:
            with pytest.raises(type(error)):
                bench.breaker.call(broken(error))
        assert bench.breaker.snapshot()["failures"] == failures
    assert usual.breaker.snapshot()["calls"] == 4
    assert usual.breaker.call(lambda: 7) == 7


def test_a_refused_call_is_not_made() -> None:
    """Open means left alone."""
    bench, made = Bench(), []
    bench.fail(3)
    with pytest.raises(BreakerOpen):
        bench.breaker.call(lambda: made.append(1))
    assert made == []


def test_fifty_threads_one_probe() -> None:
    """All ask at the moment the time is over: one call is made, forty-nine are refused."""
    bench = Bench()
    bench.fail(3)
    bench.now += 4
    barrier, outcomes = threading.Barrier(50), []

    def ask() -> None:
        barrier.wait()
        try:
            outcomes.append(bench.breaker.enter())
        except BreakerOpen:
            outcomes.append(None)

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    probes = [outcome for outcome in outcomes if outcome]
    assert (len(outcomes), len(probes)) == (50, 1)
    assert bench.heard[1:] == [("side", "OPEN", "HALF_OPEN")]
    probes[0].success()
    assert bench.state == "CLOSED"


def test_a_refusal_says_how_it_failed_last() -> None:
    """In the sentence that people read; /status does not show it, for a handler's error may quote a mail."""
    bench = Bench()
    for _ in range(3):
        with pytest.raises(RedisUnavailable), bench.breaker.enter():
            raise RedisUnavailable("Connection refused" + "!" * 1000)
    with pytest.raises(
        BreakerOpen, match=r"^side failed again and again \(Connection refused!{182}\): it is asked again in 4 s$"
    ):
        bench.breaker.enter()
    assert "refused" not in str(bench.breaker.snapshot())


def test_calls_run_side_by_side() -> None:
    """The lock is not held around a call: two threads are inside at once, and a third looks at the state meanwhile."""
    bench = Bench()
    inside = threading.Barrier(3)
    threads = [threading.Thread(target=lambda: bench.breaker.call(lambda: inside.wait(20))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert bench.state == "CLOSED"
    inside.wait(20)
    for thread in threads:
        thread.join()
    assert bench.breaker.snapshot()["calls"] == 2


def test_async_calls_and_a_cancelled_one() -> None:
    """A permit works around an await; a task that is cancelled inside says nothing."""
    bench = Bench()

    async def story() -> None:
        async def ask(event: asyncio.Event) -> None:
            with bench.breaker.enter():
                await event.wait()

        done, never = asyncio.Event(), asyncio.Event()
        good, cancelled = asyncio.create_task(ask(done)), asyncio.create_task(ask(never))
        await asyncio.sleep(0)
        done.set()
        await good
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)

    asyncio.run(story())
    assert bench.breaker.snapshot()["calls"] == 1


# all breakers of a process


def test_breakers_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """One breaker a name, what /status shows, and one log line for the begin and one for the end of an outage, however long."""
    now, heard = [0.0], []
    breakers = Breakers(RULES, lambda: now[0], lambda: 0.0, [lambda *change: heard.append(change)])
    crm, shop = breakers.get("crm"), breakers.get("shop", open_cap=2.0)
    assert breakers.get("crm") is crm is not shop
    caplog.set_level("INFO")
    for _ in range(3):
        crm.enter().failure()
    assert breakers.snapshot() == {
        "crm": {"state": "OPEN", "calls": 0, "failures": 0, "opened_in_a_row": 1, "seconds_until_next_try": 4.0},
        "shop": {"state": "CLOSED", "calls": 0, "failures": 0, "opened_in_a_row": 0, "seconds_until_next_try": 0.0},
    }
    now[0] += 4
    crm.enter().failure("still")
    now[0] += 8
    crm.call(lambda: None)
    assert caplog.messages == ["crm fails again and again: it is left alone for a while", "crm answers again"]
    assert [new for _, _, new in heard] == ["OPEN", "HALF_OPEN", "OPEN", "HALF_OPEN", "CLOSED"]


def test_all_open_is_the_wait_for_the_first() -> None:
    """None while one of them lets a call in, and where there are none."""
    now = [0.0]
    breakers = Breakers(RULES, lambda: now[0], lambda: 0.0)
    assert breakers.all_open() is None
    crm, shop = breakers.get("crm"), breakers.get("shop", open_cap=2.0)
    for _ in range(3):
        crm.enter().failure()
    assert breakers.all_open() is None
    for _ in range(3):
        shop.enter().failure()
    assert breakers.all_open() == 1.0, "the shorter one"
    now[0] += 1.0
    assert breakers.all_open() is None


# any history


class Machine(RuleBasedStateMachine):
    """The breaker beside a model that keeps every report and decides from the whole list each time."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(replace(RULES, failures=2))
        self.bench.now = 1000.0
        self.rules = self.bench.breaker.rules
        self.state = "CLOSED"
        self.reports: list[tuple[float, bool]] = []  # (when, failed) since it closed
        self.opened, self.until = 0, 0.0
        self.era = 0
        self.out: list[tuple[int, Permit]] = []  # permits that have not reported, with the model's era

    def _let_in(self) -> bool:
        return self.state == "CLOSED" or self.bench.now >= self.until

    @rule(seconds=st.one_of(st.floats(0, 1), st.floats(1, 30)), chance=st.floats(0, LONGEST))
    def time_passes(self, seconds: float, chance: float) -> None:
        self.bench.now += seconds
        self.bench.chance = chance

    @rule()
    def a_call_begins(self) -> None:
        if not self._let_in():
            assert 0 < self.bench.refused() <= self.rules.open_cap
            return
        permit = self.bench.breaker.enter()
        if self.state != "CLOSED":
            if self.state == "OPEN":
                self.era += 1
            self.state, self.until = "HALF_OPEN", self.bench.now + self.rules.probe_seconds
        self.out.append((self.era, permit))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(["success", "failure", "failure", "unused"]))
    def a_call_ends(self, data: st.DataObject, outcome: str) -> None:
        era, permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        getattr(permit, outcome)()
        if era != self.era:
            return
        if self.state == "HALF_OPEN":
            if outcome == "success":
                self._become("CLOSED")
                self.opened, self.reports = 0, []
            elif outcome == "failure":
                self._open()
            else:
                self.until = self.bench.now
        elif outcome != "unused":
            self.reports.append((self.bench.now, outcome == "failure"))
            recent = self._recent()
            failures = sum(recent)
            if outcome == "failure" and failures >= self.rules.failures and failures >= self.rules.rate * len(recent):
                self._open()

    @precondition(lambda self: self.out)
    @rule()
    def a_thread_dies_with_its_call(self) -> None:
        self.out.pop()

    def _slice(self, moment: float) -> int:
        return int(moment * SLICES // self.rules.window)

    def _recent(self) -> list[bool]:
        return [failed for when, failed in self.reports if self._slice(self.bench.now) - self._slice(when) < SLICES]

    def _open(self) -> None:
        longest = min(self.rules.open_seconds * 2**self.opened, self.rules.open_cap)
        self.until = self.bench.now + longest * (0.5 + 0.5 * self.bench.chance)
        self.opened += 1
        self.reports = []
        self._become("OPEN")

    def _become(self, state: str) -> None:
        self.state = state
        self.era += 1

    @invariant()
    def it_shows_what_the_model_shows(self) -> None:
        seen = self.bench.breaker.snapshot()
        assert seen["state"] == self.state
        assert (seen["calls"], seen["failures"]) == (len(self._recent()), sum(self._recent()))
        assert (self.bench.breaker.seconds == 0.0) == self._let_in()

    @invariant()
    def every_change_is_one_of_four(self) -> None:
        assert {change[1:] for change in self.bench.heard} <= {
            ("CLOSED", "OPEN"),
            ("OPEN", "HALF_OPEN"),
            ("HALF_OPEN", "OPEN"),
            ("HALF_OPEN", "CLOSED"),
        }
        assert all(one[2] == two[1] for one, two in zip(self.bench.heard, self.bench.heard[1:], strict=False))


TestAnyHistory = Machine.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
