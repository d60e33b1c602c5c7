"""Handlers that die, hang and eat: in threads, in processes and on the event loop; each test accounts for every mail."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.test_worker_faults import begun, published
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.wait import until


def alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(pipeline: Pipeline, email_id: str) -> list[int]:
    """In which processes handlers began with this mail."""
    return [line.pid for line in begun(pipeline, email_id)]


def mails_done(pipeline: Pipeline, worker: Daemon, *email_ids: str) -> None:
    pipeline.wait_for_books(lambda books: set(email_ids) <= set(books.done), "the innocent mails are done")
    assert worker.running()


@pytest.mark.parametrize("order", ["segfault", *(pytest.param(order, marks=pytest.mark.full) for order in ("exit", "kill 0"))])
def test_a_letter_that_ends_its_process_takes_one_worker_down_and_no_more(pipeline: Pipeline, order: str) -> None:
    """In threads the first start ends the worker; its heir starts the letter in a process of its own, three times, and lives on."""
    [letter] = published(pipeline, order)
    with pipeline.worker(LEASE_SECONDS="1.5") as first:
        assert first.exit_code(DEADLINE) != 0
    with pipeline.worker(LEASE_SECONDS="1.5") as heir:
        pipeline.wait_until_settled()
        after = published(pipeline, "one", "two")
        mails_done(pipeline, heir, *after)
        assert len(set(pids(pipeline, letter)) - {first.pid, heir.pid}) == 3
    pipeline.assert_accounted(dead={letter: "poison"})
    [dead] = pipeline.books().dead.values()
    assert dead["dead_attempts"] == "3"


def test_a_letter_that_holds_the_gil_takes_one_worker_down_and_no_more(pipeline: Pipeline) -> None:
    """The worker is ended by its watchdog; in the process of its own the letter is killed after HANDLER_TIMEOUT, each time."""
    [letter] = published(pipeline, "stuck")
    settings = {"LEASE_SECONDS": "1.5", "HANDLER_TIMEOUT": "0.5"}
    with pipeline.worker(**settings) as first:
        assert first.exit_code(DEADLINE) == 1
        assert "Timeout (0:00:01.500000)!" in first.output(), "where it stood is shown"
    with pipeline.worker(**settings) as heir:
        pipeline.wait_until_settled()
        mails_done(pipeline, heir, *published(pipeline, "one"))
        alone = set(pids(pipeline, letter)) - {first.pid}
        assert (len(alone), [pid for pid in alone if alive(pid)]) == (3, [])
    pipeline.assert_accounted(dead={letter: "poison"})


def test_a_letter_that_eats_memory_fails_alone(pipeline: Pipeline) -> None:
    """With HANDLER_MEMORY_MB it is a MemoryError in its process: the attempt fails like any other, the worker does not grow."""
    [letter] = published(pipeline, "eat 3000")
    settings = {"WORKER_ISOLATION": "process", "HANDLER_MEMORY_MB": "1024", "MAX_ATTEMPTS": "2", "WORKER_CONCURRENCY": "1"}
    with pipeline.worker(**settings) as worker:
        pipeline.wait_until_settled()
        mails_done(pipeline, worker, *published(pipeline, "one"))
    pipeline.assert_accounted(dead={letter: "attempts"})
    [dead] = pipeline.books().dead.values()
    assert dead["dead_error_type"] == "MemoryError"
    assert len(set(pids(pipeline, letter))) == 1, "the process goes on"


def test_in_processes_a_handler_that_dies_takes_no_other_along(pipeline: Pipeline) -> None:
    """Eight are at work beside it: they finish where they are, the worker lives, the letter is buried after three deaths alone."""
    others = published(pipeline, *(f"hold gate {number}" for number in range(7)))
    [letter] = published(pipeline, "segfault")
    with pipeline.worker(WORKER_ISOLATION="process") as worker:
        pipeline.wait_for_begun(pipeline.delivered)
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
        assert worker.running()
        assert not {line.pid for line in pipeline.lines()} & {worker.pid}
    pipeline.assert_accounted(dead={letter: "poison"})
    assert Counter(len(begun(pipeline, other)) for other in others) == {1: 7}
    assert len(begun(pipeline, letter)) == 4


def test_in_processes_what_takes_too_long_is_killed_and_tried_again(pipeline: Pipeline) -> None:
    """The process is gone, the attempt counts, the reason stands in the dead letter; nothing hangs behind it."""
    [letter] = published(pipeline, "hold never")
    settings = {"WORKER_ISOLATION": "process", "HANDLER_TIMEOUT": "0.5", "MAX_ATTEMPTS": "2", "WORKER_CONCURRENCY": "1"}
    with pipeline.worker(**settings) as worker:
        pipeline.wait_until_settled()
        mails_done(pipeline, worker, *published(pipeline, "one"))
        assert [alive(pid) for pid in pids(pipeline, letter)] == [False, False]
    pipeline.assert_accounted(dead={letter: "attempts"})
    [dead] = pipeline.books().dead.values()
    assert (dead["dead_error_type"], dead["dead_error"]) == ("HandlerTimeout", "took longer than 0.5 s")


def test_in_threads_what_takes_too_long_is_given_up_and_said(pipeline: Pipeline) -> None:
    """It counts as a failed attempt, another worker may have the mail, and where the thread stands is in the log and the letter."""
    [letter] = published(pipeline, "hold gate")
    with pipeline.worker(HANDLER_TIMEOUT="0.5", MAX_ATTEMPTS="2", WORKER_CONCURRENCY="2") as worker:
        pipeline.wait_until_settled()
        mails_done(pipeline, worker, *published(pipeline, "one"))
        worker.wait_for("A thread cannot be stopped: it goes on")
        assert "tests/support/handlers.py" in worker.output()
        pipeline.open_gate("gate")
        until(lambda: worker.output().count("has ended after all") == 2, DEADLINE, "both threads end")
        assert worker.terminate() == 0
    pipeline.assert_accounted(dead={letter: "attempts"})
    [dead] = pipeline.books().dead.values()
    assert dead["dead_error_type"] == "HandlerTimeout"
    assert "tests/support/handlers.py" in dead["dead_traceback"]


def test_a_worker_whose_threads_all_hang_ends(pipeline: Pipeline) -> None:
    """More handlers hang than it has threads: only a new process helps, and its supervisor starts one."""
    published(pipeline, "hold never 1", "hold never 2", "hold never 3")
    with pipeline.worker(HANDLER_TIMEOUT="0.3", WORKER_CONCURRENCY="2", SHUTDOWN_TIMEOUT="1") as worker:
        assert worker.exit_code(DEADLINE) == 1
        assert "handlers hang in threads that cannot be stopped" in worker.output()
    books = pipeline.books()
    assert set(books.fates()) | {fields["email_id"] for fields in books.stream.values()} == set(pipeline.delivered)


@pytest.mark.parametrize("order", ["hold gate", "stuck"])
def test_a_process_for_handlers_ends_with_its_worker(pipeline: Pipeline, order: str) -> None:
    """The worker is killed: what its process does is stopped by the kernel, even where it holds the GIL, before the lease ends."""
    [letter] = published(pipeline, order)
    with pipeline.worker(WORKER_ISOLATION="process", LEASE_SECONDS="600") as worker:
        pipeline.wait_for_begun([letter])
        [child] = pids(pipeline, letter)
        assert child != worker.pid
        worker.send(signal.SIGKILL)
        until(lambda: not alive(child), DEADLINE, "the process is gone")
    pipeline.assert_accounted(waiting=[letter])


def test_sigterm_to_the_whole_group_lets_handlers_in_processes_finish(pipeline: Pipeline) -> None:
    """As service managers and Ctrl-C send it: the worker decides, what is at work is finished, and no process stays behind."""
    [letter] = published(pipeline, "hold gate")
    with pipeline.worker(WORKER_ISOLATION="process", WORKER_CONCURRENCY="2") as worker:
        pipeline.wait_for_begun([letter])
        [child] = pids(pipeline, letter)
        worker.send_group(signal.SIGTERM)
        worker.wait_for("stopping: SIGTERM")
        pipeline.open_gate("gate")
        assert worker.exit_code(DEADLINE) == 0
        assert not alive(child)
    pipeline.assert_accounted()
    assert len(begun(pipeline, letter)) == 1


def test_what_processes_cannot_finish_in_time_is_handed_back(pipeline: Pipeline) -> None:
    """SIGTERM, and the handler does not end: its process is killed, the mail goes to others, no attempt and no suspect."""
    [letter] = published(pipeline, "hold gate")
    with pipeline.worker(WORKER_ISOLATION="process", LEASE_SECONDS="600", SHUTDOWN_TIMEOUT="0.5") as worker:
        pipeline.wait_for_begun([letter])
        assert worker.terminate() == 0
        assert "handed back 1 mails" in worker.output()
        assert not alive(pids(pipeline, letter)[0])
    books = pipeline.books()
    assert (books.starts, books.tries) == ({}, {})
    pipeline.open_gate("gate")
    with pipeline.worker(LEASE_SECONDS="600"):
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


# async


ASYNC = "tests.support.handlers:obey_async"


def threads(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Threads:")]
    return int(line.split()[1])


def test_a_thousand_async_handlers_wait_at_once_in_one_process(pipeline: Pipeline) -> None:
    """All have begun before any may end, and there is no thread for each."""
    published(pipeline, *(f"hold gate {number}" for number in range(1000)))
    with pipeline.worker(WORKER_HANDLER=ASYNC, WORKER_CONCURRENCY="1000") as worker:
        pipeline.wait_for_begun(pipeline.delivered)
        assert not pipeline.lines("end")
        assert threads(worker.pid) < 30
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
        assert worker.terminate() == 0
    pipeline.assert_accounted()
    assert len(pipeline.lines("begin")) == 1000


def test_an_async_handler_that_takes_too_long_is_cancelled(pipeline: Pipeline) -> None:
    """Also one that will not be cancelled holds nobody else."""
    slow = published(pipeline, "hold never", "deaf never")
    with pipeline.worker(WORKER_HANDLER=ASYNC, HANDLER_TIMEOUT="0.5", MAX_ATTEMPTS="1") as worker:
        pipeline.wait_until_settled()
        mails_done(pipeline, worker, *published(pipeline, "one"))
        assert worker.terminate() == 0
    pipeline.assert_accounted(dead=dict.fromkeys(slow, "attempts"))
    assert {fields["dead_error_type"] for fields in pipeline.books().dead.values()} == {"HandlerTimeout"}


def test_an_async_handler_that_blocks_the_loop_ends_the_worker(pipeline: Pipeline) -> None:
    """It holds every mail on the loop: the worker says so and ends, its heir has the rest."""
    [blocker] = published(pipeline, "block")
    with pipeline.worker(WORKER_HANDLER=ASYNC, HANDLER_TIMEOUT="0.5", SHUTDOWN_TIMEOUT="0.5") as worker:
        assert worker.exit_code(DEADLINE) == 1
        assert "blocks the event loop" in worker.output()
    pipeline.assert_accounted(waiting=[blocker])


# batches


def test_a_batch_handler_gets_many_mails_at_once_and_each_its_verdict(pipeline: Pipeline) -> None:
    """40 mails in one call; the one that fails comes again alone, the one that is permanent is dead."""
    published(pipeline, *(f"mail {number}" for number in range(38)))
    [failing, permanent] = published(pipeline, "fail 1", "permanent")
    with pipeline.worker(WORKER_HANDLER="tests.support.handlers:obey_batch"):
        pipeline.wait_until_settled()
    pipeline.assert_accounted(dead={permanent: "permanent"})
    sizes = Counter(line.attempt for line in pipeline.lines("batch"))
    assert sizes == {40: 40, 1: 1}
    assert [line.email_id for line in pipeline.lines("batch") if line.attempt == 1] == [failing]
