"""Histograms and stopwatches: what is counted, by many threads, and what is not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from src.common.exceptions import RedisUnavailable
from src.common.redis_client import Arg, RedisClient
from src.common.timing import MANY, NO_STOPWATCH, Histogram, Stopwatch

INF = float("inf")


def test_buckets_hold_what_is_at_most_their_bound() -> None:
    """Each bucket counts those below it too; the last one has no bound."""
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.1, 0.0, 0.11, 1.0, 1.5):
        histogram.observe(seconds)
    assert histogram.read() == ([(0.1, 2), (1.0, 4), (INF, 5)], pytest.approx(2.71))
    histogram.observe(0.5, 3)
    assert histogram.read() == ([(0.1, 2), (1.0, 7), (INF, 8)], pytest.approx(4.21)), "three of one length"


def test_nothing_observed_is_all_zero() -> None:
    assert Histogram((0.1,)).read() == ([(0.1, 0), (INF, 0)], 0.0)


def test_no_observation_of_many_threads_is_lost_or_kept_for_ever() -> None:
    """Eight threads that observe while others read: each is counted once; what waits to be counted stays bounded."""
    histogram, each = Histogram((0.5,)), 3 * MANY

    def observe(number: int) -> None:
        for _ in range(each):
            histogram.observe(number % 2)
        histogram.observe(0.0, each)

    with ThreadPoolExecutor(12) as pool:
        work = [pool.submit(observe, number) for number in range(8)]
        while not all(job.done() for job in work):
            histogram.read()
    assert [job.result() for job in work] == [None] * 8
    assert len(histogram._fresh) < MANY
    assert histogram.read() == ([(0.5, 12 * each), (INF, 16 * each)], 4.0 * each)
    for _ in range(MANY - 1):
        histogram.observe(0.0)
    assert len(histogram._fresh) == MANY - 1
    histogram.observe(0.0)
    assert not histogram._fresh


def test_a_stopwatch_times_what_came_to_its_end() -> None:
    """The result is handed on; what raised is not timed, and its error goes on."""
    now, seen = iter([10.0, 12.5, 20.0]), list[float]()
    stopwatch = Stopwatch(lambda: next(now), seen.append)
    assert stopwatch.time(lambda: "result") == "result"
    with pytest.raises(ZeroDivisionError):
        stopwatch.time(lambda: 1 / 0)
    assert seen == [2.5]
    assert NO_STOPWATCH.time(lambda: "result") == "result"


def test_calls_to_redis_are_timed_when_they_are_answered() -> None:
    """Commands and scripts; not XREADGROUP, which waits on purpose, and not a call that was lost."""

    class Transport:
        def execute_command(self, *args: Arg) -> object:
            if args[0] == "XLEN":
                raise redis.ConnectionError("lost")
            return [] if args[0] == "XREADGROUP" else "1"

        def close(self) -> None: ...

    seen = list[float]()
    client = RedisClient(Transport())
    client.stopwatch = Stopwatch(iter(range(100)).__next__, seen.append)
    client.call("GET", "key")
    client.run("join", ["stream"], ["group", "consumer"])
    assert seen == [1, 1]
    client.read_new("stream", "group", "consumer", count=1, block_ms=1)
    with pytest.raises(RedisUnavailable):
        client.length("stream")
    assert seen == [1, 1]
