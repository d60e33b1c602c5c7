"""What the worker's threads do in an outage of Redis. None is started here: their bodies run in the test's own thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from config.settings import load_settings
from src.common.redis_client import Arg, RedisClient
from src.common.shutdown import Shutdown
from src.worker.daemon import Worker
from src.worker.processor import load_handlers
from tests.support.fake import Store
from tests.unit.test_consume import HOUR, M2, Direct, Flaky, Time, crashed, ids, publish


@pytest.fixture
def flaky(store: Store) -> Flaky:
    return Flaky(Direct(store.redis))


@pytest.fixture
def worker(store: Store, flaky: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Not running; its clock is a second later at each look."""
    monkeypatch.chdir(tmp_path)
    given = {"STREAM_NAME": store.keys.stream, "CONSUMER_GROUP": "workers", "RECOVERY_TICK": 0.01, "WORKER_BLOCK_MS": 1}
    settings = load_settings(given, env_file=None)
    return Worker(settings, load_handlers(settings.work, ()), (), RedisClient(flaky), Shutdown(), Time().clock)


class Waits(threading.Event):
    """Set at the `most`th wait; each takes no time and is noted."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return len(self.seconds) >= self.most


def test_a_renewal_that_failed_is_tried_again_after_a_second(store: Store, worker: Worker, flaky: Flaky) -> None:
    """A lease is renewed as soon as Redis is back, not at the next turn 20 s later, when others have taken the mail."""
    worker._join()
    publish(store, 1)
    worker.consumer.take(8)
    store.age("1-0", worker.seat.consumer, HOUR)
    worker.stopped = waits = Waits(4)
    flaky.victim = "Renew the leases"
    worker._keep_leases()
    assert waits.seconds == [20.0, 1.0, 20.0, 20.0]
    assert store.idle("1-0") < 60_000


def test_what_is_settled_while_redis_is_flushed_again_and_again_is_let_go(
    store: Store, worker: Worker, flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is nobody's then; in flight for ever it would hold a place, and the end of the worker."""
    worker._join()
    publish(store, 1)
    outcomes = [worker.consumer.handle(started) for started in worker.consumer.take(8)]
    flushes = iter(range(2))
    send = flaky.execute_command

    def flushed(*args: Arg) -> Any:
        if "DONE: result" in str(args[:2]) and next(flushes, None) is not None:
            store.redis.call("FLUSHALL")
        return send(*args)

    monkeypatch.setattr(flaky, "execute_command", flushed)
    worker._settle(outcomes)
    assert next(flushes, None) is None
    assert (worker.consumer.in_flight(), worker.consumer.counts["lost"]) == (0, 1)


def test_a_worker_that_had_to_wait_for_redis_takes_over_nothing_before_its_owner_could_renew_it(
    store: Store, worker: Worker, flaky: Flaky
) -> None:
    """Every lease looks run out then; new mail is read meanwhile."""
    crashed(store, 1)
    publish(store, 2)
    flaky.victim = "Enter the one group"
    worker._join()
    worker.consumer.alone_ready = lambda: True
    assert ids(worker.consumer.take(8)) == [M2]
    assert store.content()["pending"]["1-0"] == ("w0", 1)
    for _ in range(30):
        worker.consumer.take(8)
    assert store.content()["pending"]["1-0"] == (worker.seat.consumer, 2)
