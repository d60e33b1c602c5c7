"""The faults that no other file of tests breaks on purpose: real servers, real processes; each test accounts for every mail.

docs/reliability.md, section Faults, says which test stands for which fault.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import pytest

from src.sandbox.server import Sandbox
from tests.integration.test_worker_faults import published
from tests.support.acl import not_under_acl
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import ChildProcess, free_port
from tests.support.proxy import FaultProxy
from tests.support.servers import ENVIRONMENT, SEARCH_PATH, RedisServer, faketime, have_redis, need
from tests.support.wait import until

STREAM = "email_ingestion_stream"
GROUP = "email_workers"
AWAY = "Redis is away or full: "
FAST = {"LEASE_SECONDS": "2", "PRODUCER_LEASE": "1"}

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.fixture(params=["redis", "valkey"])
def binary(request: pytest.FixtureRequest) -> Literal["redis", "valkey"]:
    name: Literal["redis", "valkey"] = request.param
    need(name == "valkey" or have_redis(), "redis-server")
    return name


def times_begun(pipeline: Pipeline) -> Counter[str]:
    return Counter(line.email_id for line in pipeline.lines("begin"))


# processes


def test_a_worker_killed_with_the_mail_it_promoted(pipeline: Pipeline) -> None:
    """The worker that brought due mail back dies with it: another takes it over, as the second attempt that it is."""
    published(pipeline, *(f"again gate {number}" for number in range(6)))
    with pipeline.worker(LEASE_SECONDS="2") as promoter:
        until(
            lambda: {line.email_id for line in pipeline.lines("begin") if line.attempt == 2} == set(pipeline.delivered), DEADLINE
        )
        promoter.kill9()
    pipeline.open_gate("gate")
    with pipeline.worker(LEASE_SECONDS="2"):
        pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert Counter(line.attempt for line in pipeline.lines("begin")) == {1: 6, 2: 12}


@pytest.mark.full
def test_restart_storm(pipeline: Pipeline) -> None:
    """SIGTERM and SIGKILL in turn, to the producer and two workers, each in the middle of a batch: every mail in one place."""
    draw = random.Random(5)
    env = {**FAST, "PRODUCER_BATCH_SIZE": "4", "SHUTDOWN_TIMEOUT": "0.3"}
    with ExitStack() as stack:
        starts = [pipeline.producer, pipeline.worker, pipeline.worker]
        running = [stack.enter_context(start(**env)) for start in starts]
        pipeline.wait_for_first_poll()
        for number in range(12):
            fresh = set(pipeline.deliver(*(draw.choice(["slow 20", "slow 800", "fine", "fail 1"]) for _ in range(20))))
            until(lambda fresh=fresh: len(fresh & set(times_begun(pipeline))) >= 3, DEADLINE, "three are begun")
            victim = number % 3
            if draw.random() < 0.5:
                assert running[victim].terminate() == 0
            else:
                running[victim].kill9()
            running[victim] = stack.enter_context(starts[victim](**env))
        pipeline.wait_until_settled()
        assert [daemon.terminate() for daemon in running] == [0, 0, 0]
    pipeline.assert_accounted()
    assert len(pipeline.delivered) == 240


def test_sigterm_with_a_hundred_mails_in_flight(pipeline: Pipeline) -> None:
    """What can finish does, the rest is free at once and no start of it counts; the time it took is logged."""
    finish = published(pipeline, *(f"hold gate {number}" for number in range(50)))
    rest = published(pipeline, *(f"hold later {number}" for number in range(50)))
    env = {"WORKER_CONCURRENCY": "100", "LEASE_SECONDS": "600"}
    with pipeline.worker(SHUTDOWN_TIMEOUT="2", **env) as worker:
        pipeline.wait_for_begun(pipeline.delivered)
        worker.send(signal.SIGTERM)
        worker.wait_for("stopping: SIGTERM")
        pipeline.open_gate("gate")
        assert worker.exit_code(DEADLINE) == 0
        assert "handed back 50 mails" in worker.output()
        took = re.search(r"stopped after (\d+\.\d) s", worker.output())
    assert took and 2 <= float(took[1]) < DEADLINE
    pipeline.assert_accounted(waiting=rest)
    books = pipeline.books()
    assert (books.starts, books.tries) == ({}, {})
    with pipeline.worker(**env):  # a lease of ten minutes: nobody waits for its end
        until(lambda: all(times_begun(pipeline)[email_id] == 2 for email_id in rest), DEADLINE, "the rest is begun again")
        pipeline.open_gate("later")
        pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert {line.attempt for line in pipeline.lines("begin")} == {1}
    assert all(times_begun(pipeline)[email_id] == 1 for email_id in finish)


def test_a_side_thread_that_dies_ends_the_process(pipeline: Pipeline) -> None:
    """A handler that loads in the worker and not in its process of handlers: exit 1, the traceback in the log, the mail waits."""
    (pipeline.tmp / "mine.py").write_text(
        "import multiprocessing\nassert multiprocessing.parent_process() is None\ndef handle(email, context): pass\n"
    )
    published(pipeline, "one")
    env = {"WORKER_ISOLATION": "process", "WORKER_CONCURRENCY": "1", "SHUTDOWN_TIMEOUT": "0.5"}
    with pipeline.worker("--handler", "mine.py:handle", **env) as worker:
        assert worker.exit_code(DEADLINE) == 1
        assert "thread handler-0 died: the process stops" in worker.output()
        assert "a process for handlers cannot start" in worker.output()
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_thread_that_hangs_ends_the_process(pipeline: Pipeline) -> None:
    """A token file on a disk that hangs (a pipe without a writer), for longer than HANG_TIMEOUT: exit 1, and every stack is shown."""
    other = "bob@example.org"
    os.mkfifo(pipeline.tmp / "tokens" / f"{other}.json", mode=0o600)
    env = {"GMAIL_USERNAME": f"{pipeline.account},{other}", "IMAP_TIMEOUT": "0.5", "HANG_TIMEOUT": "0.5", "SHUTDOWN_TIMEOUT": "1"}
    pipeline.deliver("one")
    with pipeline.producer(**env) as producer:
        pipeline.wait_for_uid(1)
        assert producer.exit_code(DEADLINE) == 1
        assert f"no turn of {other}/INBOX within its limit and HANG_TIMEOUT (0.5 s): the process ends" in producer.output()
        assert re.search(r"Thread 0x\w+ .*most recent call first", producer.output())
        assert "in read_secret" in producer.output(), "where it stands"
    pipeline.deliver("two")
    with pipeline.producer(), pipeline.worker():
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


@pytest.mark.full
def test_a_lock_that_is_never_given_back_ends_the_worker(pipeline: Pipeline) -> None:
    """A handler that takes a lock of the worker for ever: reader, leases and settler stand still, the shutdown too; exit 1 all the same."""
    (pipeline.tmp / "mine.py").write_text(
        "import gc, threading\nfrom src.worker.consume import Consumer\n"
        "def handle(email, context):\n"
        "    [consumer] = [it for it in gc.get_objects() if isinstance(it, Consumer)]\n"
        "    consumer.settled.acquire()\n    threading.Event().wait()\n"
    )
    published(pipeline, "one")
    env = {"HANG_TIMEOUT": "1", "SHUTDOWN_TIMEOUT": "1", "REDIS_SOCKET_TIMEOUT": "1", "LEASE_SECONDS": "600"}
    with pipeline.worker("--handler", "mine.py:handle", **env) as worker:
        assert worker.exit_code(120) == 1
        assert re.search(r"no turn of .*reader.* within its limit and HANG_TIMEOUT", worker.output())
        assert "in _take" in worker.output()
    pipeline.assert_accounted(waiting=pipeline.delivered)


@pytest.mark.full
def test_an_outage_of_redis_and_a_long_handler_are_no_hang(sandbox: Sandbox, tmp_path: Path) -> None:
    """The server is away for longer than limit and HANG_TIMEOUT of every loop of the producer, a handler as long: both go on."""
    with RedisServer("valkey", appendonly=True) as server:
        env = {"IMAP_TIMEOUT": "2", "HANG_TIMEOUT": "0.5", "REDIS_SOCKET_TIMEOUT": "1"}
        pipeline = Pipeline(sandbox, server, tmp_path, **env)
        held = pipeline.deliver("hold gate")
        with pipeline.producer() as producer, pipeline.worker() as worker:
            pipeline.wait_for_begun(held)
            for stop, go in ((server.kill9, server.start), (server.freeze, server.thaw)):
                stop()
                seen = producer.output().count("INBOX: ")
                until(
                    lambda seen=seen: producer.output().count("INBOX: ") >= seen + 8, DEADLINE, "eight lines of counts, 2 s apart"
                )
                assert producer.running()
                assert worker.running()
                go()
            pipeline.open_gate("gate")
            pipeline.deliver("two")
            pipeline.wait_until_settled()
        pipeline.assert_accounted()


# between the daemons and Redis


def test_requests_and_replies_lost(sandbox: Sandbox, valkey: RedisServer, tmp_path: Path) -> None:
    """The line to Redis breaks ten times, now before the request is whole, now before the reply comes: nothing enters or counts twice."""
    with FaultProxy(valkey.port) as proxy:
        pipeline = Pipeline(sandbox, valkey, tmp_path, REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0", **FAST)
        with pipeline.producer(), pipeline.worker() as worker:
            pipeline.wait_for_first_poll()
            for number in range(10):
                direction: Literal["to_client", "to_server"] = "to_client" if number % 2 else "to_server"
                proxy.cut_after(0 if number % 2 else 500 * number, direction)
                pipeline.deliver(*("fail 1" if n == 0 else f"mail {n}" for n in range(5)))
                until(lambda direction=direction: not proxy.cut_is_pending(direction), DEADLINE, "the line breaks")
            pipeline.wait_until_settled()
            assert AWAY in worker.output()
    pipeline.assert_accounted()
    assert valkey.client().get(f"producer_state:{pipeline.account}:INBOX:email_count") == "50"


def test_half_open_connections_to_redis(sandbox: Sandbox, valkey: RedisServer, tmp_path: Path) -> None:
    """Every open connection goes deaf without an end: noticed after REDIS_SOCKET_TIMEOUT, and new ones are used."""
    with FaultProxy(valkey.port) as proxy:
        env = {"REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0", "REDIS_SOCKET_TIMEOUT": "1"}
        pipeline = Pipeline(sandbox, valkey, tmp_path, **env)
        with pipeline.producer() as producer, pipeline.worker() as worker:
            held = pipeline.deliver("hold gate")
            pipeline.wait_for_begun(held)
            proxy.deafen()
            pipeline.open_gate("gate")
            pipeline.deliver("one", "two")
            pipeline.wait_until_settled()
            worker.wait_for(f"{AWAY}Timeout", DEADLINE)
            producer.wait_for(f"{AWAY}Timeout|the lease could not be renewed", DEADLINE)
    pipeline.assert_accounted()


# Redis itself


def test_append_only_file_cut_short(binary: Literal["redis", "valkey"], sandbox: Sandbox, tmp_path: Path) -> None:
    """kill -9, and the end of the file is gone, cut in the middle of a command: what it held is read and done again, the rest is not."""
    with RedisServer(binary, appendonly=True) as server:
        pipeline = Pipeline(sandbox, server, tmp_path, **FAST)
        whole = pipeline.deliver(*(f"mail {number}" for number in range(20)), "fail 1", "permanent")
        with pipeline.producer(), pipeline.worker(LEASE_SECONDS="60"):
            pipeline.wait_until_settled()
            [file] = (server.directory / "appendonlydir").glob("*.incr.aof")
            mark = file.stat().st_size
            [held, *_] = pipeline.deliver("hold gate", *(f"tail {number}" for number in range(20)))
            pipeline.wait_for_begun([held])
            pipeline.wait_for_books(lambda books: len(books.fates()) == 42, "all but the one that is held are settled")
            server.kill9()
            os.truncate(file, mark + (file.stat().st_size - mark) // 3)
            server.start()
            pipeline.open_gate("gate")
            pipeline.wait_until_settled()
            pipeline.wait_for_uid(43)
        pipeline.assert_accounted(dead={whole[21]: "permanent"})
        again = {email_id for email_id, times in times_begun(pipeline).items() if times > 1}
        assert again - {whole[20]}, "some had been lost"
        assert not again & set(whole) - {whole[20]}, "and none that stood in the part that was left"


@contextmanager
def sentinel(primary: RedisServer, directory: Path) -> Iterator[int]:
    """A Sentinel that watches `primary` and decides alone; its port."""
    program, port = shutil.which("redis-server", path=SEARCH_PATH), free_port()
    assert program is not None
    conf = directory / "sentinel.conf"
    conf.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {directory}\nsentinel monitor mails 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds mails 500\nsentinel failover-timeout mails 5000\n"
    )
    process = ChildProcess([program, conf, "--sentinel"], log=directory / "sentinel.log", env=ENVIRONMENT, cwd=directory)
    try:
        yield port
    finally:
        process.kill()


def asked(port: int, *command: str) -> list[str]:
    """What the Sentinel at `port` answers, as lines; [] while it does not."""
    argv = [sys.executable, "-c", "import redis, sys; print(*redis.Redis(port=int(sys.argv[1]), decode_responses=True, "]
    argv[-1] += "protocol=2).execute_command(*sys.argv[2:]), sep='\\n')"
    return subprocess.run([*argv, str(port), *command], capture_output=True, text=True, timeout=DEADLINE).stdout.splitlines()


def test_failover_to_a_replica_that_lacks_the_tail(sandbox: Sandbox, tmp_path: Path) -> None:
    """Sentinel promotes a replica that has not heard of the last mails: they are read and done again, each once in its history."""
    need(have_redis(), "redis-server")
    with ExitStack() as stack:
        primary = stack.enter_context(RedisServer("redis"))
        replica = stack.enter_context(RedisServer("redis"))
        link = stack.enter_context(FaultProxy(primary.port))
        front = stack.enter_context(FaultProxy(primary.port))  # the address that follows the primary: a virtual IP, HAProxy, DNS
        pipeline = Pipeline(sandbox, primary, tmp_path, REDIS_URL=f"redis://127.0.0.1:{front.port}/0", **FAST)
        replica.client().execute_command("REPLICAOF", "127.0.0.1", link.port)
        with pipeline.producer() as producer, pipeline.worker() as worker:
            whole = pipeline.deliver(*(f"mail {number}" for number in range(10)))
            pipeline.wait_until_settled()
            pipeline.wait_for_uid(10)
            until(lambda: replica.client().xlen(f"{STREAM}:results") == 10, DEADLINE, "the replica has them")
            until(
                lambda: replica.client().get(f"producer_state:{pipeline.account}:INBOX:last_uid") == "10", DEADLINE, "all of them"
            )
            link.stall(True)
            [held, *tail] = pipeline.deliver("hold gate", "tail 1", "tail 2", "fail 1")
            pipeline.wait_until_settled_but([held])
            with sentinel(primary, tmp_path) as port:
                until(
                    lambda: any("slave" in line for line in asked(port, "SENTINEL", "REPLICAS", "mails")), DEADLINE, "a replica"
                )
                primary.kill9()
                promoted = str(replica.port)
                until(lambda: promoted in asked(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mails"), DEADLINE, "the failover")
                pipeline.client = replica.client()
                assert pipeline.client.xlen(f"{STREAM}:results") == 10, "the replica lacks the tail"
                front.lead_to(replica.port)
                pipeline.open_gate("gate")
                pipeline.deliver("after")
                pipeline.wait_until_settled()
                pipeline.wait_for_uid(15)
            for daemon in (producer, worker):
                assert AWAY in daemon.output()
                assert daemon.terminate() == 0
    times = times_begun(pipeline)
    assert all(times[email_id] == 1 for email_id in whole)
    assert all(times[email_id] >= 2 for email_id in (held, *tail)), "done again: the promise holds on one Redis history"


@pytest.mark.full
def test_split_brain(sandbox: Sandbox, tmp_path: Path) -> None:
    """An old primary behind a partition goes on taking writes from a producer and a worker; on the history that stays each mail is
    done once, and what was done again is the mail of the split."""
    with ExitStack() as stack:
        old, new = stack.enter_context(RedisServer("valkey")), stack.enter_context(RedisServer("valkey"))
        near, far = stack.enter_context(FaultProxy(old.port)), stack.enter_context(FaultProxy(old.port))
        pipeline = Pipeline(sandbox, old, tmp_path, **FAST)
        here, there = ({"REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0"} for proxy in (near, far))
        new.client().execute_command("REPLICAOF", "127.0.0.1", old.port)
        producer, worker = stack.enter_context(pipeline.producer(**here)), stack.enter_context(pipeline.worker(**here))
        before = pipeline.deliver("one", "two")
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(2)
        standby = stack.enter_context(pipeline.producer(**there))
        standby.wait_for("standing by", DEADLINE)
        stack.enter_context(pipeline.worker(**there))
        until(lambda: new.client().info("replication")["master_sync_in_progress"] == 0, DEADLINE, "the replica follows")
        until(lambda: new.client().xlen(f"{STREAM}:results") == 2, DEADLINE, "the replica has both")

        new.client().execute_command("REPLICAOF", "NO", "ONE")
        far.lead_to(new.port)
        split = pipeline.deliver(*(f"split {number}" for number in range(8)), "fail 1")
        pipeline.wait_until_settled()
        pipeline.client = new.client()
        pipeline.wait_until_settled()

        old.client().execute_command("REPLICAOF", "127.0.0.1", new.port)  # the partition ends: its history goes
        pipeline.deliver("after")
        worker.wait_for(f"{AWAY}.*read only replica", DEADLINE)
        near.lead_to(new.port)
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(12)
        producer.wait_for("standing by|took the mailbox over|another producer", DEADLINE)
        pipeline.assert_accounted()
    times = times_begun(pipeline)
    assert {email_id for email_id in before if times[email_id] == 1} == set(before)
    assert all(times[email_id] >= 2 for email_id in split), "both sides did them"
    assert times[pipeline.delivered[-1]] == 1


def test_a_disk_that_refuses_snapshots(binary: Literal["redis", "valkey"], sandbox: Sandbox, tmp_path: Path) -> None:
    """MISCONF: everything pauses and says so, reads too; when the disk takes a snapshot again both go on by themselves."""
    with RedisServer(binary) as server:
        pipeline = Pipeline(sandbox, server, tmp_path)
        with pipeline.producer() as producer, pipeline.worker() as worker:
            held = pipeline.deliver("hold gate", "fail 1", "one")
            pipeline.wait_for_begun(held)
            pipeline.wait_until_settled_but(held[:1])
            obstacle = server.directory / "dump.rdb"
            obstacle.mkdir()
            server.client().config_set("save", "3600 1")
            server.client().bgsave()
            until(lambda: server.client().info("persistence")["rdb_last_bgsave_status"] == "err", DEADLINE, "the snapshot fails")
            pipeline.open_gate("gate")
            pipeline.deliver("two", "three")
            producer.wait_for(f"{AWAY}MISCONF", DEADLINE)
            worker.wait_for(f"{AWAY}MISCONF", DEADLINE)
            assert server.client().xlen(STREAM) == 1
            obstacle.rmdir()
            server.client().bgsave()
            pipeline.wait_until_settled()
            assert producer.terminate() == 0
            assert worker.terminate() == 0
        pipeline.assert_accounted()


@not_under_acl("a file system is mounted over the folder that holds the users")
def test_a_disk_without_room_for_the_append_only_file(sandbox: Sandbox, tmp_path: Path) -> None:
    """A file system of 1 MB fills up: intake and work pause; with more room both go on, and after kill -9 everything is there."""
    server = RedisServer("valkey", appendonly=True, options={"auto-aof-rewrite-percentage": "0"})
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(server.directory)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system takes root")
    try:
        with server:
            pipeline = Pipeline(sandbox, server, tmp_path, REDIS_URL=server.tcp_url)
            pipeline.deliver(*(f"mail {number}" for number in range(60)), body=b"0123456789abcdef\r\n" * 3000)
            with pipeline.producer(PRODUCER_BATCH_SIZE="4") as producer, pipeline.worker() as worker:
                producer.wait_for(f"{AWAY}MISCONF.*No space left on device", DEADLINE)
                worker.wait_for(f"{AWAY}MISCONF", DEADLINE)
                subprocess.run(["mount", "-o", "remount,size=64m", str(server.directory)], check=True)
                pipeline.wait_until_settled()
                pipeline.wait_for_uid(60)
            server.kill9()
            server.start()
            pipeline.assert_accounted()
    finally:
        subprocess.run(["umount", "-l", str(server.directory)], check=True)
        shutil.rmtree(server.directory, ignore_errors=True)


# clocks


@pytest.mark.full
@pytest.mark.parametrize("steps", [("+1h", "-1h"), ("-1h", "+1h")])
def test_the_clock_of_both_daemons_is_an_hour_wrong(pipeline: Pipeline, steps: tuple[str, str]) -> None:
    """It jumps while they work: leases, retries and tokens go by other clocks, and every mail comes through."""
    need(bool(faketime()), "faketime")
    clock = pipeline.tmp / "clock"
    clock.write_text("+0")
    fake = faketime(file=clock)
    env = {**FAST, **fake, "STATS_INTERVAL": "0.3"}
    with pipeline.producer(**env) as producer, pipeline.worker(**env) as worker:
        for number, step in enumerate(("+0", *steps), start=1):
            pipeline.wait_for_begun(pipeline.deliver("slow 1500"))
            clock.write_text(step)
            for daemon in (producer, worker):
                until(lambda daemon=daemon, number=number: len(hours(daemon)) >= number, DEADLINE, "its clock has jumped")
            pipeline.deliver("fail 1", "one")
            pipeline.wait_until_settled()
        assert producer.terminate() == 0
        assert worker.terminate() == 0
    pipeline.assert_accounted()
    assert Counter(times_begun(pipeline).values()) == {1: 6, 2: 3}


def hours(daemon: Daemon) -> set[str]:
    """The hours of the day at which it wrote its lines, by its own clock."""
    return set(re.findall(r"^(\d\d):\d\d:\d\d ", daemon.output(), re.MULTILINE))


@pytest.mark.parametrize("steps", [("+1h", "+0"), pytest.param(("-1h", "+0"), marks=pytest.mark.full)])
def test_the_clock_of_redis_jumps_by_an_hour(sandbox: Sandbox, tmp_path: Path, steps: tuple[str, str]) -> None:
    """Leases look run out, or without an end, of a producer that died too; blocked reads come late: results once all the same, and nobody
    waits for the hour."""
    need(bool(faketime()), "faketime")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    with RedisServer("valkey", env=faketime(file=clock)) as server:
        env = {**FAST, "REDIS_SOCKET_TIMEOUT": "2"}
        pipeline = Pipeline(sandbox, server, tmp_path, **env)
        with ExitStack() as stack:
            stack.enter_context(pipeline.worker())
            stack.enter_context(pipeline.worker())
            producer = stack.enter_context(pipeline.producer())
            for number, step in enumerate(steps):
                held = pipeline.deliver(f"hold gate{number}", "fail 1", "one")
                pipeline.wait_for_begun(held)
                pipeline.wait_until_settled_but(held[:1])
                producer.kill9()  # its lease may end in an hour, by the clock that comes
                clock.write_text(step)
                until(
                    lambda step=step: round((server.client().time()[0] - time.time()) / 3600) == int(step[:2]),
                    DEADLINE,
                    "it jumped",
                )
                producer = stack.enter_context(pipeline.producer())
                pipeline.deliver("fail 1", "two")
                pipeline.open_gate(f"gate{number}")
                pipeline.wait_until_settled()
        pipeline.assert_accounted()


# IMAP and tokens


@linux_only
def test_the_kernel_watches_an_idle_session(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """While nothing is said for a long poll, a keepalive timer of at most 30 s runs on the connection: a dead peer is noticed."""
    with pipeline.producer(POLL_INTERVAL="600"):
        pipeline.deliver("one")
        pipeline.wait_for_uid(1)

        def timer() -> re.Match[str] | None:
            """`02:<ticks>`: keepalive, and when it fires, of the connection to the sandbox."""
            return re.search(rf":\w+ \w+:{sandbox.imap_port:04X} 01 \w+:\w+ 02:(\w+)", Path("/proc/net/tcp").read_text())

        found = until(timer, DEADLINE, "a keepalive timer")
        assert found is not None
        assert int(found[1], 16) <= 31 * os.sysconf("SC_CLK_TCK")
    pipeline.assert_accounted(waiting=pipeline.delivered)


@pytest.mark.full
def test_the_token_endpoint_fails_in_every_way(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """503, HTML in place of JSON, a connection reset, an answer that comes too late: each is waited for, nobody is told to consent."""
    with FaultProxy(sandbox.http_port) as proxy, pipeline.producer() as producer, pipeline.worker():
        pipeline.wait_for_first_poll()
        token = pipeline.tmp / "tokens" / f"{pipeline.account}.json"
        token.write_text(token.read_text().replace(str(sandbox.http_port), str(proxy.port)))
        faults: list[Callable[[], None]] = [
            lambda: sandbox.faults.token_answer(503),
            lambda: sandbox.faults.token_answer(200, "<html>hi</html>"),
            lambda: proxy.cut_after(0, "to_client"),
            lambda: sandbox.faults.token_stall(22),
        ]
        for number, fault in enumerate(faults):
            fault()
            sandbox.expire_tokens()
            sandbox.cut()
            pipeline.deliver(f"mail {number}")
            pipeline.wait_until_settled()
            assert producer.output().count("the token endpoint is away") == number + 1
        assert "REAUTH" not in producer.output()
    pipeline.assert_accounted()


# third parties in Redis: what the daemons alone guarantee


def test_a_third_party_deletes_entries(pipeline: Pipeline) -> None:
    """XDEL of mail at work: what finishes is done all the same; what fails is told as gone, and read again from the mailbox."""
    with pipeline.producer(RELIST_INTERVAL="0.5"), pipeline.worker() as worker:
        [finishes, fails] = pipeline.deliver("hold gate", "break other")
        pipeline.wait_for_begun([finishes, fails])
        pipeline.client.xdel(STREAM, *pipeline.books().stream)
        pipeline.open_gate("gate")
        pipeline.wait_until_settled([finishes])
        pipeline.open_gate("other")
        worker.wait_for(f"{fails} was deleted from the stream by someone else", DEADLINE)
        pipeline.deliver("after")
        pipeline.wait_until_settled()
        assert worker.running()
    pipeline.assert_accounted()


def test_a_third_party_trims_the_stream(pipeline: Pipeline) -> None:
    """XTRIM of mail that nobody has read: its index entries point to nothing, so the producer's look back brings it again; all is done."""
    published(pipeline, "one", "two")
    pipeline.client.xtrim(STREAM, maxlen=0)
    pipeline.deliver("three", "fail 1")
    with pipeline.producer(), pipeline.worker():
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_a_third_party_deletes_a_consumer(pipeline: Pipeline) -> None:
    """DELCONSUMER of a worker with mail at work: what it finishes does not count, the mail stays in the stream, all other mail is done."""
    [held] = published(pipeline, "hold gate")
    with pipeline.worker() as worker:
        pipeline.wait_for_begun([held])
        [consumer] = pipeline.client.xinfo_consumers(STREAM, GROUP)
        assert pipeline.client.xgroup_delconsumer(STREAM, GROUP, consumer["name"]) == 1
        pipeline.open_gate("gate")
        worker.wait_for("finished after its lease had run out", DEADLINE)
        rest = published(pipeline, "two", "fail 1")
        pipeline.wait_for_books(lambda books: set(rest) <= books.fates(), "all other mail is done")
        assert worker.terminate() == 0
    pipeline.assert_accounted(waiting=[held])
    assert not pipeline.books().pending, "scripts/audit.py finds it so: in the stream, delivered, and nobody's"
