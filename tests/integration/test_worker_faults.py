"""Workers that die, freeze, stop and are fed what they cannot take; each test accounts for every mail."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from src.common.keys import Keys
from tests.support.daemons import Daemon
from tests.support.handlers import Line
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.wait import until

STREAM = "email_ingestion_stream"


def dlq(pipeline: Pipeline, *args: str) -> str:
    """scripts/dlq.py, as a user runs it; its output."""
    with Daemon("scripts/dlq.py", *args, env=pipeline.env, tmp=pipeline.tmp) as command:
        assert command.exit_code(DEADLINE) == 0, command.output()
        return command.output()


def published(pipeline: Pipeline, *subjects: str) -> list[str]:
    """These mails stand in the stream, put there by a producer that ran once; their email_ids."""
    email_ids = pipeline.deliver(*subjects)
    with pipeline.producer("--once") as producer:
        assert producer.exit_code(DEADLINE) == 0, producer.output()
    return email_ids


def begun(pipeline: Pipeline, email_id: str) -> list[Line]:
    return [line for line in pipeline.lines("begin") if line.email_id == email_id]


def test_worker_killed_with_mail_in_flight(pipeline: Pipeline) -> None:
    """One of three workers is killed with 8 mails at work: the others take them over and finish them, each with one result."""
    published(pipeline, *(f"hold gate {number}" for number in range(8)))
    with pipeline.worker() as victim:
        pipeline.wait_for_begun(pipeline.delivered)
        with pipeline.worker(), pipeline.worker():
            victim.kill9()
            pipeline.open_gate("gate")
            pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert Counter(line.email_id for line in pipeline.lines("begin")) == Counter(pipeline.delivered * 2)
    assert {line.attempt for line in pipeline.lines("begin")} == {1}, "a crash is no failed attempt"


def test_frozen_worker_is_not_believed(pipeline: Pipeline) -> None:
    """A worker is frozen with mail at work, another takes it over; thawed, the first finishes first, and its result is refused."""
    [held] = published(pipeline, "hold gate")
    with pipeline.worker(LEASE_SECONDS="600") as zombie:
        pipeline.wait_for_begun([held])
        zombie.freeze()
        with pipeline.worker(LEASE_SECONDS="2") as heir:
            until(lambda: len(begun(pipeline, held)) == 2, DEADLINE, "the heir begins")
            heir.freeze()
            pipeline.open_gate("gate")
            zombie.thaw()
            zombie.wait_for("finished after its lease had run out", DEADLINE)
            heir.thaw()
            pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_one_mail_that_kills_the_process_among_31(pipeline: Pipeline) -> None:
    """32 mails in flight, one kills the process: the 31 others are done, that one is buried after it ended three processes of its own."""
    others = published(pipeline, *(f"hold gate {number}" for number in range(31)))
    [poison] = published(pipeline, "kill 31")
    settings = {"WORKER_CONCURRENCY": "32", "LEASE_SECONDS": "1.5"}
    with pipeline.worker(**settings) as first:
        assert first.exit_code(DEADLINE) == -signal.SIGKILL
    assert {line.email_id for line in pipeline.lines("begin")} == set(pipeline.delivered), "all 32 were in flight"
    assert not pipeline.lines("end")
    pipeline.open_gate("gate")
    with pipeline.worker(**settings) as heir:
        pipeline.wait_until_settled()
        assert heir.running(), "one letter takes one worker down, not one after the other"
    pipeline.assert_accounted(dead={poison: "poison"})
    assert len(others) == 31
    assert len(begun(pipeline, poison)) == 4, "one start in company, three alone"


@pytest.mark.full
def test_handler_longer_than_the_lease(pipeline: Pipeline) -> None:
    """A handler works for three leases while another worker looks for abandoned mail: it is not handled twice."""
    [held] = published(pipeline, "hold gate")
    with pipeline.worker(LEASE_SECONDS="3"), pipeline.worker(LEASE_SECONDS="3"):
        pipeline.wait_for_begun([held])
        [entry_id] = pipeline.books().stream
        start = pipeline.client.time()[0]
        until(lambda: pipeline.client.time()[0] - start > 9, DEADLINE, "three leases pass")
        [row] = pipeline.client.xpending_range(STREAM, "email_workers", entry_id, entry_id, 1)
        assert row["times_delivered"] == 1
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert len(begun(pipeline, held)) == 1


def test_sigterm_lets_handlers_finish(pipeline: Pipeline) -> None:
    """SIGTERM with mail at work: nothing more is read, what is at work is finished and recorded, exit code 0."""
    [held, unread] = published(pipeline, "hold gate", "hold other-gate")
    with pipeline.worker(WORKER_CONCURRENCY="1") as worker:
        pipeline.wait_for_begun([held])
        worker.send(signal.SIGTERM)
        worker.wait_for("stopping: SIGTERM")
        pipeline.open_gate("gate")
        assert worker.exit_code(DEADLINE) == 0
    pipeline.assert_accounted(waiting=[unread])
    assert begun(pipeline, unread) == []


def test_sigterm_hands_back_what_cannot_finish(pipeline: Pipeline) -> None:
    """What is still at work after SHUTDOWN_TIMEOUT is taken over long before its lease ends, as no failed attempt and no suspect."""
    held = published(pipeline, "hold gate 1", "hold gate 2")
    with pipeline.worker(SHUTDOWN_TIMEOUT="0.5", LEASE_SECONDS="600") as worker:
        pipeline.wait_for_begun(held)
        assert worker.terminate() == 0
        assert "handed back 2 mails" in worker.output()
    assert not pipeline.books().starts
    pipeline.open_gate("gate")
    with pipeline.worker(LEASE_SECONDS="600") as successor:
        pipeline.wait_until_settled()
        assert "it runs alone now" not in successor.output()
    pipeline.assert_accounted()
    assert [line.attempt for line in pipeline.lines("begin")] == [1, 1, 1, 1]


def test_sigterm_does_not_wait_for_mail_that_waits_to_run_alone(pipeline: Pipeline) -> None:
    """Four mails were at work in a process that died; its heir has begun one of them alone when SIGTERM comes: the others go back."""
    published(pipeline, *(f"hold gate {number}" for number in range(4)))
    with pipeline.worker(LEASE_SECONDS="2") as victim:
        pipeline.wait_for_begun(pipeline.delivered)
        victim.kill9()
    with pipeline.worker(LEASE_SECONDS="2", SHUTDOWN_TIMEOUT="600") as heir:
        until(lambda: {line.pid for line in pipeline.lines("begin")} > {victim.pid}, DEADLINE, "one of them runs alone")
        heir.send(signal.SIGTERM)
        heir.wait_for("stopping: SIGTERM")
        pipeline.open_gate("gate")
        assert heir.exit_code(DEADLINE) == 0
        assert "handed back 3 mails" in heir.output()
    assert len(pipeline.books().stream) == 3
    with pipeline.worker():
        pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert len(pipeline.lines("begin")) == 4 + 4


def test_what_handlers_left_at_work_ends_with_the_worker(pipeline: Pipeline) -> None:
    """Neither a thread nor a process pool of theirs keeps a worker alive that has stopped; what is registered with atexit is done."""
    published(pipeline, "leftover")
    with pipeline.worker() as worker:
        pipeline.wait_until_settled()
        assert worker.terminate() == 0
    child = Path("/proc", (pipeline.tmp / "leftover").read_text())
    until(lambda: not child.exists(), DEADLINE, "the process of the pool is gone")
    assert (pipeline.tmp / "last-word").exists()
    pipeline.assert_accounted()


def test_second_signal_ends_the_worker_at_once(pipeline: Pipeline) -> None:
    """The second SIGTERM does not wait for the handler; its mail is taken over after the lease."""
    [held] = published(pipeline, "hold gate")
    with pipeline.worker(SHUTDOWN_TIMEOUT="600") as worker:
        pipeline.wait_for_begun([held])
        worker.send(signal.SIGTERM)
        worker.wait_for("stopping: SIGTERM")
        worker.send(signal.SIGTERM)
        assert worker.exit_code(DEADLINE) == 128 + signal.SIGTERM
    pipeline.open_gate("gate")
    with pipeline.worker():
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_second_signal_ends_the_producer_at_once(pipeline: Pipeline) -> None:
    """The producer hangs in a fetch that will not end: the first SIGTERM waits, the second does not; nothing is lost."""
    sandbox = pipeline.source
    with pipeline.producer(SHUTDOWN_TIMEOUT="600") as producer:
        pipeline.wait_for_first_poll()
        sandbox.faults.stall(600, times=1)  # type: ignore[union-attr]  # a Sandbox
        pipeline.deliver("one")
        until(lambda: not sandbox.faults.state(), DEADLINE, "the producer hangs")  # type: ignore[union-attr]
        producer.send(signal.SIGTERM)
        producer.wait_for("stopping: SIGTERM")
        producer.send(signal.SIGTERM)
        assert producer.exit_code(DEADLINE) == 128 + signal.SIGTERM
    with pipeline.producer(), pipeline.worker():
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_dlq_max(pipeline: Pipeline) -> None:
    """At DLQ_MAX dead letters the worker stops reading and says what to run, intake goes on; after that command it reads again."""
    dead = pipeline.deliver(*["permanent"] * 5)
    with pipeline.producer(), pipeline.worker(DLQ_MAX="5", STATS_INTERVAL="0.2") as worker:
        pipeline.wait_for_books(lambda books: len(books.dead) == 5, "five mails are dead")
        worker.wait_for(r"5 dead letters \(DLQ_MAX=5\): reading stops.*python scripts/dlq.py", DEADLINE)
        waiting = pipeline.deliver(*(f"mail {number}" for number in range(10)))
        pipeline.wait_for_uid(15)
        seen = worker.output().count("not reading: 5 dead letters")
        until(lambda: worker.output().count("not reading: 5 dead letters") > seen + 3, DEADLINE, "it stays so")
        pipeline.assert_accounted(dead=dict.fromkeys(dead, "permanent"), waiting=waiting)
        dlq(pipeline, "discard", "--all", "--yes")
        pipeline.wait_until_settled()
        worker.wait_for("reading again")
    pipeline.assert_accounted(discarded=dead)


def test_foreign_entries_are_buried_with_the_reason(pipeline: Pipeline) -> None:
    """What somebody else put into the stream becomes a dead letter that says why; mail between it comes through."""
    published(pipeline, "one")
    [fields] = pipeline.books().stream.values()
    foreign = {
        "no schema": {"hello": "world"},
        "no valid email_id": fields | {"email_id": "nonsense"},
        "email_id of another account": fields | {"account": "someone@else.example"},
        "internal_date is neither empty nor YYYY-MM-DDTHH:MM:SSZ": fields | {"internal_date": "yesterday"},
    }
    ids = {pipeline.client.xadd(STREAM, content): why for why, content in foreign.items()}
    published(pipeline, "two")
    with pipeline.worker() as worker:
        pipeline.wait_until_settled()
        assert worker.terminate() == 0
    assert {fields["dead_id"]: fields["dead_error"] for fields in pipeline.books().dead.values()} == {
        f"foreign:{entry_id}": why for entry_id, why in ids.items()
    }
    pipeline.assert_accounted(dead={f"foreign:{entry_id}": "foreign" for entry_id in ids})


def test_newer_schema_is_left_alone(pipeline: Pipeline) -> None:
    """An entry of a later schema stays in the stream, not counted as started; the worker says "upgrade" and reads no further."""
    [newer] = published(pipeline, "from the future")
    [(entry_id, fields)] = pipeline.books().stream.items()
    pipeline.client.xdel(STREAM, entry_id)
    future = pipeline.client.xadd(STREAM, fields | {"schema": "99"})
    pipeline.client.hset(Keys(STREAM).index, newer, f"S:{future}")
    with pipeline.worker() as worker:
        worker.wait_for("schema 99, which this worker does not know.*Upgrade this worker", DEADLINE)
        [later] = published(pipeline, "later")
        assert worker.terminate() == 0
    pipeline.assert_accounted(waiting=[newer, later])
    assert not pipeline.books().starts
    assert not pipeline.lines()


def test_second_group_is_refused(pipeline: Pipeline) -> None:
    """A second group on the stream: exit 2 with the ways to fan out or rename; the first group goes on."""
    published(pipeline, "one")
    with pipeline.worker() as worker:
        pipeline.wait_until_settled()
        with pipeline.worker("--group", "reporting") as second:
            assert second.exit_code(DEADLINE) == 2
            assert "already has the group email_workers" in second.output()
            assert f"{STREAM}:results" in second.output()
            assert f"XGROUP DESTROY {STREAM} email_workers" in second.output()
        assert [group["name"] for group in pipeline.client.xinfo_groups(STREAM)] == ["email_workers"]
        published(pipeline, "two")
        pipeline.wait_until_settled()
        assert worker.running()
    pipeline.assert_accounted()


def test_same_consumer_label_twice(pipeline: Pipeline) -> None:
    """Two processes started with the same --consumer have names of their own, so one cannot finish the other's mail."""
    published(pipeline, "hold gate 1", "hold gate 2")
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(pipeline.worker("--consumer", "same", "--concurrency", "1"))
        pipeline.wait_for_begun(pipeline.delivered)
        names = {row["name"] for row in pipeline.client.xinfo_consumers(STREAM, "email_workers")}
        assert len(names) == 2
        assert all(name.startswith("same-") for name in names)
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("tests.support.nowhere:handle", "cannot import tests.support.nowhere"),
        ("tests.support.handlers:nothing", "has no function nothing"),
        ("tests.support.handlers:PATIENCE", "has no function PATIENCE"),
    ],
)
def test_handler_that_cannot_be_loaded(pipeline: Pipeline, spec: str, why: str, tmp_path: Path) -> None:
    """Exit 2 with the reason in one line, before anything is read."""
    published(pipeline, "one")
    with pipeline.worker("--handler", spec) as worker:
        assert worker.exit_code(DEADLINE) == 2
        assert worker.output().splitlines()[-1].startswith(f"worker.py: WORKER_HANDLER={spec}: ")
        assert why in worker.output()
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert not pipeline.books().pending
