"""One way to stop, and the retries that end with it."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from src.common.exceptions import ImapUnavailable, Permanent, RedisFull, RedisUnavailable, TokenEndpointUnavailable
from src.common.retry import (
    Decorator,
    retry_on_imap_error,
    retry_on_network_error,
    retry_on_oauth_error,
    retry_on_redis_error,
)
from src.common.shutdown import Shutdown


def test_the_first_reason_stands_and_the_highest_exit_code_wins() -> None:
    shutdown = Shutdown()
    assert (shutdown.requested, shutdown.wait(0), shutdown.exit_code) == (False, False, 0)
    shutdown.request("SIGTERM")
    shutdown.request("thread x died", exit_code=1)
    shutdown.request("again", exit_code=0)
    assert (shutdown.requested, shutdown.wait(3600)) == (True, True)
    assert (shutdown.reason, shutdown.exit_code) == ("SIGTERM", 1)


def test_a_wait_ends_when_a_stop_is_requested() -> None:
    """Every loop waits here: none sleeps through a stop."""
    shutdown = Shutdown()
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(shutdown.wait(3600)), daemon=True)
    waiter.start()
    shutdown.request("enough")
    waiter.join(20)
    assert answers == [True]


def test_steps_run_in_order_of_priority() -> None:
    """Not in the order in which they were added; equal ones in that."""
    shutdown = Shutdown()
    ran: list[str] = []
    for priority, name in ((30, "release"), (10, "reader"), (60, "endpoint"), (30, "after release")):
        shutdown.add_step(priority, name, lambda name=name: ran.append(name))  # type: ignore[misc]
    shutdown.run_steps()
    assert ran == ["reader", "release", "after release", "endpoint"]


@pytest.mark.parametrize("error", [IndexError("x"), SystemExit(0), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_thread_that_dies_stops_the_process_with_exit_code_1(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """The traceback is logged: nothing above would see it."""

    def body() -> None:
        raise error

    shutdown = Shutdown()
    thread = shutdown.guard("leases", body)
    thread.join(20)
    assert (shutdown.reason, shutdown.exit_code) == ("thread leases died", 1)
    assert type(error).__name__ in caplog.text


def test_a_thread_that_ends_stops_nothing() -> None:
    shutdown = Shutdown()
    shutdown.guard("short", lambda: None).join(20)
    assert not shutdown.requested


PROGRAM = """
from src.common.shutdown import Shutdown
shutdown = Shutdown()
shutdown.on_signals()
print("ready", flush=True)
shutdown.wait(60)
print(shutdown.reason, flush=True)
{then}
raise SystemExit(shutdown.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    """Clean end: exit code 0, and the reason is the signal's name."""
    program = PROGRAM.format(then="")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
        assert process.wait(20) == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    """Even where the end takes its time: exit code 128 + signal, as a shell says it."""
    program = PROGRAM.format(then="import threading; threading.Event().wait(60)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT


LOCKED = """
import signal
from src.common.shutdown import Shutdown
shutdown = Shutdown()
shutdown.on_signals()
with shutdown._lock, shutdown.event._cond:
    signal.raise_signal(signal.SIGTERM)
print(shutdown.wait(20), shutdown.reason)
"""


def test_a_signal_within_a_wait_holds_nothing_up() -> None:
    """The main thread holds the locks of the event that it waits for when the signal comes: it goes on, and is told."""
    ended = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, timeout=20)
    assert ended.stdout == "True SIGTERM\n", ended.stderr


FORKED = """
import os, signal, time
from src.common.shutdown import Shutdown
shutdown = Shutdown()
shutdown.on_signals()
ready, here = os.pipe()
child = os.fork()
if child == 0:
    os.write(here, b"x")
    time.sleep(10)
    os._exit(0)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shutdown.requested)
"""


def test_a_signal_ends_what_a_handler_forked() -> None:
    """multiprocessing.Pool ends its processes by SIGTERM and waits for them; the worker is not meant."""
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=20)
    assert ended.stdout == "143 False\n", ended.stderr


# the four decorators


class NotedWaits(threading.Event):
    """Waits are noted, not served."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return self.is_set()


class Quick(Shutdown):
    def __init__(self) -> None:
        super().__init__()
        self.event: NotedWaits = NotedWaits()

    @property
    def waits(self) -> list[float]:
        return self.event.waits


DECORATORS: list[tuple[Callable[[Shutdown], Decorator], list[Exception], float]] = [
    (retry_on_redis_error, [RedisUnavailable("away"), RedisFull("OOM")], 5.0),
    (retry_on_imap_error, [ImapUnavailable("away")], 300.0),
    (retry_on_network_error, [ConnectionResetError("away"), TimeoutError("late")], 60.0),
    (retry_on_oauth_error, [TokenEndpointUnavailable("503")], 10.0),
]
NAMES = ["redis", "imap", "network", "oauth"]


@pytest.mark.parametrize(("decorator", "errors", "cap"), DECORATORS, ids=NAMES)
def test_a_call_is_repeated_until_it_succeeds(
    decorator: Callable[[Shutdown], Decorator], errors: list[Exception], cap: float
) -> None:
    """A hundred failures of its kind, then the answer; no wait is longer than the cap."""
    shutdown = Quick()
    left = [errors[number % len(errors)] for number in range(100)]

    @decorator(shutdown)
    def call(answer: int) -> int:
        if left:
            raise left.pop()
        return answer

    assert call(7) == 7
    assert len(shutdown.waits) == 100
    assert 0 <= min(shutdown.waits) <= max(shutdown.waits) <= cap
    assert sum(shutdown.waits) > cap


@pytest.mark.parametrize(("decorator", "errors", "cap"), DECORATORS, ids=NAMES)
def test_what_cannot_be_mended_is_raised_at_once(
    decorator: Callable[[Shutdown], Decorator], errors: list[Exception], cap: float
) -> None:
    """Another kind of error, and a revoked token, are not repeated."""
    shutdown = Quick()

    @decorator(shutdown)
    def call() -> None:
        raise Permanent("never")

    with pytest.raises(Permanent):
        call()
    assert shutdown.waits == []


@pytest.mark.parametrize(("decorator", "errors", "cap"), DECORATORS, ids=NAMES)
def test_the_last_error_is_raised_when_the_process_stops(
    decorator: Callable[[Shutdown], Decorator], errors: list[Exception], cap: float
) -> None:
    """No tenacity.RetryError, and no further try."""
    shutdown = Quick()
    tries = []

    @decorator(shutdown)
    def call() -> None:
        tries.append(1)
        if len(tries) == 3:
            shutdown.request("SIGTERM")
        raise errors[0]

    with pytest.raises(type(errors[0])):
        call()
    assert len(tries) == 3


def test_a_long_outage_is_said_a_few_times_only(caplog: pytest.LogCaptureFixture) -> None:
    """The first try, the tenth, then every fiftieth: a night without Redis does not fill the disk."""
    shutdown = Quick()
    left = [RedisUnavailable("away")] * 120

    @retry_on_redis_error(shutdown)
    def call() -> None:
        if left:
            raise left.pop()

    with caplog.at_level(logging.WARNING):
        call()
    assert [record.message.rsplit("(", 1)[1] for record in caplog.records] == ["try 1)", "try 10)", "try 50)", "try 100)"]
