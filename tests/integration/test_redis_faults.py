"""Redis forgets, dies, comes late; both daemons are real processes, each test accounts for every mail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from src.sandbox.server import Sandbox
from tests.support.acl import not_under_acl
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import RedisServer, have_redis, need
from tests.support.wait import until

STREAM = "email_ingestion_stream"
NOTHING_ON_DISK = "this Redis keeps nothing on disk"


@pytest.fixture(params=["redis", "valkey"])
def durable(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path: Path) -> Iterator[Pipeline]:
    """Into a server of its own with an append-only file: what was answered survives kill -9."""
    binary: Literal["redis", "valkey"] = request.param
    need(binary == "valkey" or have_redis(), "redis-server")
    with RedisServer(binary, appendonly=True) as server:
        yield Pipeline(sandbox, server, tmp_path)


def test_flushall_while_running(pipeline: Pipeline) -> None:
    """FLUSHALL with mail at work, waiting for its retry, and dead: the producer reads again from its marker, the worker joins again."""
    [held, *_] = pipeline.deliver("hold gate", "fine", "fail 1", "fail 1", "permanent")
    with pipeline.producer() as producer, pipeline.worker() as worker:
        pipeline.wait_for_begun(pipeline.delivered)
        pipeline.wait_for_uid(5)
        pipeline.client.flushall()
        pipeline.deliver("came after")
        producer.wait_for("the state is gone from Redis: reading again", DEADLINE)
        worker.wait_for("joining again", DEADLINE)
        until(
            lambda: len([line for line in pipeline.lines("begin") if line.email_id == held]) == 2, DEADLINE, "it is begun again"
        )
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(6)
        assert producer.terminate() == 0
        assert worker.terminate() == 0
    pipeline.assert_accounted(dead={pipeline.delivered[4]: "permanent"})
    assert [group["pending"] for group in pipeline.client.xinfo_groups(STREAM)] == [0]


def test_flushall_while_idle(pipeline: Pipeline) -> None:
    """FLUSHALL when everything is done: both daemons notice by themselves, what is read again is done again."""
    pipeline.deliver("one", "fail 1")
    with pipeline.producer(), pipeline.worker() as worker:
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(2)
        pipeline.client.flushall()
        worker.wait_for("joining again", DEADLINE)
        pipeline.deliver("came after")
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(3)
    pipeline.assert_accounted()


def test_flushall_while_nothing_runs(pipeline: Pipeline) -> None:
    """Redis was emptied overnight: the producer reads from its marker, never from "new" and never what it once left out."""
    pipeline.deliver("left out", days_ago=4, expected=False)
    same_second = pipeline.deliver("as old as the boundary", days_ago=3)  # left out too; later it could be new, and counts
    with pipeline.producer(INITIAL_SYNC="new") as producer, pipeline.worker():
        pipeline.wait_for_first_poll()
        fresh = pipeline.deliver("three", "four")
        pipeline.wait_until_settled(fresh)
        assert not set(same_second) & pipeline.books().fates()
        assert producer.terminate() == 0
    pipeline.client.flushall()
    pipeline.deliver("came meanwhile")
    with pipeline.producer(INITIAL_SYNC="new") as producer, pipeline.worker():
        producer.wait_for("the state is gone from Redis: reading again", DEADLINE)
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(5)
    pipeline.assert_accounted()


def outages(daemon: Daemon) -> int:
    return daemon.output().count("Redis is away or full")


def wait_for_outage(daemon: Daemon, known: int) -> None:
    """Wait until the daemon has said once more than `known` times that Redis is away."""
    until(lambda: outages(daemon) > known, DEADLINE, "the outage is in the log")


def test_server_gone_and_back(durable: Pipeline) -> None:
    """kill -9 of the server with mail at work and in every state, three times; both daemons wait, say so and go on by themselves."""
    with durable.producer() as producer, durable.worker(MAX_ATTEMPTS="3") as worker:
        for number in range(3):
            gate = f"gate{number}"
            [held, *_] = durable.deliver(f"hold {gate}", "fail 1", "permanent", *(f"mail {n}" for n in range(30)))
            durable.wait_for_begun([held])
            known = [outages(daemon) for daemon in (producer, worker)]
            durable.redis.kill9()
            durable.open_gate(gate)
            durable.deliver(*(f"meanwhile {n}" for n in range(10)))
            wait_for_outage(producer, known[0])
            wait_for_outage(worker, known[1])
            durable.redis.start()
            durable.wait_until_settled()
        assert producer.terminate() == 0
        assert worker.terminate() == 0
    dead = {fields["email_id"]: "permanent" for fields in durable.books().dead.values()}
    assert len(dead) == 3
    durable.assert_accounted(dead=dead)


def test_server_frozen_for_longer_than_a_call_may_take(durable: Pipeline) -> None:
    """The server answers nothing for a while and then does what it was told: no batch enters twice, no result is written twice."""
    slow = {"REDIS_SOCKET_TIMEOUT": "1"}
    with durable.producer(**slow) as producer, durable.worker(**slow) as worker:
        durable.deliver("hold gate", *(f"mail {n}" for n in range(20)))
        durable.wait_for_begun(durable.delivered)
        durable.redis.freeze()
        durable.open_gate("gate")
        durable.deliver(*(f"meanwhile {n}" for n in range(20)))
        producer.wait_for("Redis is away or full", DEADLINE)
        worker.wait_for("Redis is away or full", DEADLINE)
        durable.redis.thaw()
        durable.wait_until_settled()
    durable.assert_accounted()
    assert durable.client.get(f"producer_state:{durable.account}:INBOX:email_count") == "41"


def test_sigterm_while_redis_is_away(durable: Pipeline) -> None:
    """The server dies, SIGTERM comes: both daemons end all the same with exit code 0; what was finished in vain is done again."""
    held = durable.deliver("hold gate 1", "hold gate 2")
    with durable.producer() as producer, durable.worker(SHUTDOWN_TIMEOUT="2") as worker:
        durable.wait_for_begun(held)
        durable.wait_for_uid(2)
        durable.redis.kill9()
        durable.open_gate("gate")
        until(lambda: len(durable.lines("end")) == 2, DEADLINE, "both are finished, and nobody records it")
        assert producer.terminate(DEADLINE) == 0
        assert worker.terminate(DEADLINE) == 0
    durable.redis.start()
    durable.assert_accounted(waiting=held)
    with durable.producer(), durable.worker():
        durable.wait_until_settled()
    durable.assert_accounted()
    assert {line.attempt for line in durable.lines("begin")} == {1}


def test_redis_out_of_memory(durable: Pipeline) -> None:
    """At maxmemory intake waits and says so, while a worker that starts now can join, finish and bury mail; then intake goes on."""
    used = int(durable.client.info("memory")["used_memory"])
    durable.client.config_set("maxmemory-policy", "noeviction")
    durable.client.config_set("maxmemory", used + 3_000_000)
    orders = ["permanent" if number % 20 == 0 else "fail 1" if number % 7 == 0 else "fine" for number in range(120)]
    ids = durable.deliver(*orders, body=b"0123456789abcdef\r\n" * 3000)
    with durable.producer(PRODUCER_BATCH_SIZE="10", MEMORY_HIGH="1") as producer:  # else intake pauses before it comes to that
        producer.wait_for("Redis is away or full: .*maxmemory", DEADLINE)
        read = int(durable.last_uid() or 0)
        assert durable.client.xlen(STREAM) == read < 120, "a refused batch does not enter in part"
        with durable.worker():
            until(lambda: durable.last_uid() == "120" and not durable.client.xlen(STREAM), DEADLINE, "all went through")
    durable.client.config_set("maxmemory", 0)  # at the limit the server also refuses the transaction that reads the books
    dead = {email_id: "permanent" for email_id, order in zip(ids, orders, strict=True) if order == "permanent"}
    durable.assert_accounted(dead=dead)


def test_redis_away_at_start(sandbox: Sandbox, tmp_path: Path) -> None:
    """Both daemons start before Redis: they wait and say so, then work."""
    server = RedisServer("valkey", appendonly=True)
    pipeline = Pipeline(sandbox, server, tmp_path)
    pipeline.deliver("one", "two")
    with pipeline.producer() as producer, pipeline.worker() as worker:
        producer.wait_for("Redis does not answer yet", DEADLINE)
        worker.wait_for("Redis does not answer yet", DEADLINE)
        with server:
            pipeline.wait_until_settled()
            pipeline.assert_accounted()
            assert producer.terminate() == 0
            assert worker.terminate() == 0


def test_daemons_that_wait_for_redis_end_on_sigterm(sandbox: Sandbox, tmp_path: Path) -> None:
    """While Redis is away SIGTERM ends both daemons with exit code 0."""
    pipeline = Pipeline(sandbox, RedisServer("valkey"), tmp_path)
    with pipeline.producer() as producer, pipeline.worker() as worker:
        for daemon in (producer, worker):
            daemon.wait_for("Redis is away or full", DEADLINE)
            assert daemon.terminate() == 0


@not_under_acl("the users may not read CONFIG, and without it nothing is said of snapshots")
def test_persistence_off_is_warned_of(pipeline: Pipeline) -> None:
    """A server that keeps nothing on disk is named at the start of both daemons, with the command that changes it."""
    with pipeline.producer() as producer, pipeline.worker() as worker:
        for daemon in (producer, worker):
            daemon.wait_for(f"WARNING {NOTHING_ON_DISK}.*CONFIG SET appendonly yes", DEADLINE)


def test_persistence_on_is_not_warned_of(durable: Pipeline) -> None:
    """With an append-only file there is no such warning."""
    with durable.producer() as producer, durable.worker() as worker:
        producer.wait_for("producer reads", DEADLINE)
        worker.wait_for("worker .* reads", DEADLINE)
        assert NOTHING_ON_DISK not in producer.output() + worker.output()
