"""/metrics, METRICS_PORT and /targets of real daemons: every metric moves, a scrape never waits for Redis, who is killed is no target."""

from __future__ import annotations

import json
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.registry import SILENT_SECONDS, Seen, registered
from src.monitoring.metrics import BOTH, CONTENT_TYPE, PRODUCER, WORKER, Declared
from src.sandbox.server import Sandbox
from tests.integration.test_worker_faults import published
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import free_port
from tests.support.servers import RedisServer
from tests.support.wait import until

STREAM = "email_ingestion_stream"
DAY_SECONDS = 86_400
HANDLER = """
from contextlib import suppress
from src.common.exceptions import RetryLater
from tests.support.handlers import obey
from pathlib import Path

def handle(email, context):
    if email.subject == "call" and not Path("mended").exists():
        with suppress(ConnectionError), context.breaker("crm"):
            raise ConnectionError("the CRM is down")
        with context.breaker("crm"):
            pass
    if email.subject == "later" and context.attempt == 1:
        raise RetryLater(600)
    return obey(email, context)
"""

Labels = frozenset[tuple[str, str]]


class Scraped:
    """What a daemon's /metrics has said so far. `values`: (metric, labels) → the values it had; a histogram by its count."""

    def __init__(self, port: int, page: str = "metrics") -> None:
        self.url = f"http://127.0.0.1:{port}/{page}"
        self.values: dict[tuple[str, Labels], list[float]] = {}
        self.names: set[str] = set()

    def look(self) -> bool:
        """Scrape once; False while nobody listens yet."""
        try:
            with urllib.request.urlopen(self.url, timeout=20) as answer:
                assert answer.headers["Content-Type"] == CONTENT_TYPE
                text = answer.read().decode()
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            return False
        for family in text_string_to_metric_families(text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            self.names.add(name)
            counted = f"{name}_count" if family.type == "histogram" else name
            for sample in family.samples:
                if sample.name == counted:
                    seen = self.values.setdefault((name, frozenset(sample.labels.items())), [])
                    if not seen or seen[-1] != sample.value:
                        seen.append(sample.value)
        return True

    def last(self, name: str, **labels: str) -> float | None:
        """The value at the last look, of the one series that has these labels (among others)."""
        found = [
            values[-1] for (metric, own), values in self.values.items() if metric == name and labels.items() <= dict(own).items()
        ]
        assert len(found) <= 1, f"{name} {labels}: {len(found)} series"
        return found[0] if found else None

    def wait(self, name: str, condition: Callable[[float], bool], **labels: str) -> float:
        """Scrape until the value fulfils `condition`."""

        def fulfilled() -> bool:
            value = self.last(name, **labels) if self.look() else None
            return value is not None and condition(value)

        until(fulfilled, DEADLINE, f"{name} {labels} (last {self.values.get((name, frozenset(labels.items())))})")
        value = self.last(name, **labels)
        assert value is not None
        return value

    def moved(self, declared: tuple[Declared, ...]) -> set[str]:
        """The gauges of which one series had two values, the counters and histograms, which begin at 0, that counted something."""
        gauges = {metric.name for metric in declared if metric.kind == "gauge"}
        return {name for (name, _), values in self.values.items() if (len(values) > 1 if name in gauges else values[-1] > 0)}


@pytest.fixture
def durable(sandbox: Sandbox, tmp_path: Path) -> Iterator[Pipeline]:
    """Into a Valkey of its own, which tests stop and configure."""
    with RedisServer("valkey", appendonly=True) as server:
        (tmp_path / "mine.py").write_text(HANDLER)
        yield Pipeline(sandbox, server, tmp_path, WORKER_HANDLER="mine.py:handle")


def is_(wanted: float) -> Callable[[float], bool]:
    return lambda value: value == wanted


def above(least: float) -> Callable[[float], bool]:
    return lambda value: value > least


def names(declared: tuple[Declared, ...]) -> set[str]:
    return {metric.name for metric in declared}


def look_silent(pipeline: Pipeline, role: str) -> None:
    """The daemons of this role have not been heard of for longer than a living one is silent: what stands there a while after a kill."""
    key = Keys(STREAM).daemons
    for name, entry in pipeline.client.hgetall(key).items():
        beat, _, content = entry.partition("|")
        if json.loads(content)["role"] == role:
            pipeline.client.hset(key, name, f"{int(beat) - round((SILENT_SECONDS + 5) * 1000)}|{content}")


def test_every_metric_of_both_daemons_moves(durable: Pipeline, sandbox: Sandbox) -> None:
    """Mail in every state, each kind of fault, two producers of different settings: no metric keeps one value; mail is accounted for."""
    pipeline = durable
    first, second = Scraped(free_port()), Scraped(free_port())
    one, heir = Scraped(free_port()), Scraped(free_port())
    inbox = {"mailbox": "INBOX"}
    common = {"BREAKER_FAILURES": "1", "BREAKER_WINDOW": "1", "BREAKER_OPEN_SECONDS": "0.5", "BREAKER_OPEN_CAP": "0.5"}
    reading = {"MAILBOXES": "INBOX,Work", "INITIAL_SYNC": "since:2d", "RELIST_INTERVAL": "2", "POLL_INTERVAL": "0.2", **common}
    pipeline.deliver("old", days_ago=5, expected=False)
    pipeline.deliver("first")
    sandbox.deliver(pipeline.account, b"Subject: in a folder\r\n\r\n", mailbox="Work")
    pipeline.delivered.append(f"gm:{pipeline.account}:{sandbox.ledger()[-1].gm_msgid}")

    with pipeline.producer(HTTP_PORT=port_of(first), **reading) as producer:
        first.wait("email_stream_live_mails", is_(2))
        first.wait("email_producer_passed_mails", is_(1), **inbox)
        first.wait("email_daemons", is_(1), role="producer", state="alive")

        # intake, with nobody at work
        pipeline.deliver("one", "fail 1", "permanent", "later")
        first.wait("email_stream_live_mails", is_(6))
        first.wait("email_stream_unread_mails", is_(6))
        first.wait("email_producer_published_total", is_(5), **inbox)
        first.wait("email_stream_oldest_age_seconds", above(0))
        assert first.last("email_producer_fetched_total", **inbox) == 5
        read = [first.last("email_producer_fetched_bytes_total", mailbox=mailbox) or 0 for mailbox in ("INBOX", "Work")]
        assert min(read) > 0
        assert first.last("email_producer_quota_used_bytes") == sum(read)
        sandbox.copy(pipeline.account, 2, "Work")
        first.wait("email_producer_known_total", is_(1), mailbox="Work")
        sandbox.faults.bye(times=2)
        first.wait("email_producer_reconnects_total", above(0), reason="session_over", **inbox)

        # work
        pipeline.deliver("hold gate", "call")
        held = pipeline.delivered[-2]
        with pipeline.worker(HTTP_PORT=port_of(one), LEASE_SECONDS="2", **common) as worker:
            one.wait("email_worker_started_total", above(0))
            one.wait("email_worker_retried_total", above(1))
            one.wait("email_worker_dead_total", is_(1), error="Permanent")
            given_up = [pipeline.delivered[4]]
            one.wait("email_worker_postponed_total", above(0))
            one.wait("email_breaker_state", is_(1), breaker="crm", state="open")
            one.wait("email_worker_reading", is_(0))
            (pipeline.tmp / "mended").touch()
            one.wait("email_worker_done_total", is_(5))
            one.wait("email_worker_reading", is_(1))
            one.wait("email_worker_handler_seconds", above(6), handler="mine.py:handle")
            one.wait("email_worker_oldest_in_flight_seconds", above(0.1))
            first.wait("email_stream_in_flight_mails", is_(1))
            first.wait("email_stream_waiting_mails", is_(1))
            first.wait("email_stream_dead_letters", is_(1))
            first.wait("email_stream_results", is_(5))

            # a copy is dropped; a mail that is no longer ours is lost; what was deleted by hand is found
            [fields] = [fields for fields in pipeline.books().stream.values() if fields["email_id"] == held]
            pipeline.client.xadd(STREAM, fields)
            one.wait("email_worker_duplicates_total", is_(1))
            [consumer] = pipeline.client.xinfo_consumers(STREAM, "email_workers")
            pipeline.client.xgroup_delconsumer(STREAM, "email_workers", consumer["name"])
            pipeline.open_gate("gate")
            one.wait("email_worker_leases_lost_total", is_(1))
            one.wait("email_worker_in_flight_mails", is_(0))
            pipeline.deliver("hold never")
            pipeline.wait_for_begun(pipeline.delivered[-1:])
            pipeline.client.xdel(STREAM, entry_of(pipeline, pipeline.delivered[-1]))
            first.wait("email_stream_unaccounted_mails", above(0))
            first.wait("email_stream_unaccounted_mails", is_(0))

            # the worker dies with a mail in its hands; another one takes it over
            pipeline.open_gate("never")
            pipeline.deliver("hold again")
            pipeline.wait_for_begun(pipeline.delivered[-1:])
            worker.kill9()
        look_silent(pipeline, "worker")
        first.wait("email_daemons", is_(1), role="worker", state="silent")
        pipeline.open_gate("again")
        with pipeline.worker(
            HTTP_PORT=port_of(heir), LEASE_SECONDS="2", STATS_INTERVAL="0.2", DLQ_DAYS=str(0.1 / DAY_SECONDS), **common
        ):
            heir.wait("email_worker_recovered_total", above(0))
            heir.wait("email_worker_expired_total", is_(1))

            # Redis: full, away, with room
            used = int(pipeline.client.info("memory")["used_memory"])
            pipeline.client.config_set("maxmemory", int(used * 1.05))
            first.wait("email_producer_paused", is_(1))
            first.wait("email_producer_mailbox_state", is_(1), state="PAUSED", **inbox)
            pipeline.client.config_set("maxmemory", used * 100)
            first.wait("email_producer_paused", is_(0))
            pipeline.redis.kill9()
            for daemon in (first, heir):
                daemon.wait("email_redis_up", is_(0))
                daemon.wait("email_breaker_state", is_(1), breaker="Redis", state="open")
            pipeline.redis.start()
            for daemon in (first, heir):
                daemon.wait("email_redis_up", is_(1))
            later = pipeline.delivered[5]
            pipeline.wait_for_books(lambda books: set(pipeline.delivered) - {later} <= books.fates(), "all but one are settled")
            for daemon in (first, heir):
                daemon.look()
        assert producer.terminate() == 0
    first_moved = first.moved(PRODUCER)

    # the limits are settings: another producer has others
    other = {"STREAM_MAXLEN": "77", "DLQ_MAX": "7", "DAILY_BYTES": "7000000"}
    with pipeline.producer(HTTP_PORT=port_of(second), **{**reading, **other}):
        limits = {"email_stream_max_mails": 77, "email_stream_dead_letters_max": 7, "email_producer_quota_limit_bytes": 7e6}
        for name, value in limits.items():
            second.wait(name, is_(value))
            assert first.last(name) != value
    assert (one.last("email_build_info", role="worker"), first.last("email_build_info", role="producer")) == (1, 1)
    assert first.last("email_producer_passed_mails", **inbox) == 1  # since its first poll

    proved_apart = {*limits, "email_build_info", "email_producer_passed_mails"}
    assert names(PRODUCER) - first_moved - proved_apart == set()
    assert names(WORKER) - one.moved(WORKER) - heir.moved(WORKER) - proved_apart == set()
    for scraped, declared in ((first, PRODUCER), (one, WORKER)):
        assert {name for name in scraped.names if not name.startswith("process_")} == names(declared)
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total"} <= first.names
    assert names(BOTH) <= one.names & first.names
    pipeline.assert_accounted(waiting=[later], discarded=given_up)


def port_of(scraped: Scraped) -> str:
    return scraped.url.rpartition(":")[2].partition("/")[0]


def entry_of(pipeline: Pipeline, email_id: str) -> str:
    [entry] = [entry for entry, fields in pipeline.books().stream.items() if fields["email_id"] == email_id]
    return entry


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    ("handler", "calls", "env"),
    [
        ("obey", 2, {}),
        ("obey", 2, {"WORKER_ISOLATION": "process"}),
        ("obey_async", 2, {}),
        ("obey_batch", 1, {}),
        ("obey", 2, {"HANDLER_TIMEOUT": "0.3", "MAX_ATTEMPTS": "1", "WORKER_CONCURRENCY": "2"}),
    ],
    ids=["thread", "process", "async", "batch", "given up"],
)
def test_calls_of_handlers_are_timed_wherever_they_run(pipeline: Pipeline, handler: str, calls: int, env: dict[str, str]) -> None:
    """One observation a call, a batch being one; also of a call that is given up, which took its time-out at least."""
    given_up = "HANDLER_TIMEOUT" in env
    published(pipeline, *(["hold gate"] * 2 if given_up else ["one", "two"]))
    scraped, spec = Scraped(free_port()), f"tests.support.handlers:{handler}"
    with pipeline.worker("--handler", spec, HTTP_PORT=port_of(scraped), **env):
        scraped.wait("email_worker_handler_seconds", is_(calls), handler=spec)
        text = get(scraped.url)[1]
        took = float(re.search(r"^email_worker_handler_seconds_sum\S+ (\S+)$", text, re.M)[1])  # type: ignore[index]
        assert took > (0.6 if given_up else 0.0)
        scraped.wait("email_worker_dead_total", is_(2), error="HandlerTimeout") if given_up else pipeline.wait_until_settled()
        pipeline.open_gate("gate")
    pipeline.assert_accounted(dead=dict.fromkeys(pipeline.delivered, "attempts") if given_up else {})


@pytest.mark.full
def test_a_scrape_never_waits_for_redis(durable: Pipeline) -> None:
    """Stopped, frozen, not there from the start: both daemons answer with what was last known, and the targets stay."""
    durable.deliver("later")
    producer, worker = Scraped(free_port()), Scraped(free_port())
    targets = producer.url.replace("metrics", "targets")
    quick = {"REDIS_SOCKET_TIMEOUT": "30"}
    with durable.producer(HTTP_PORT=port_of(producer), **quick), durable.worker(HTTP_PORT=port_of(worker), **quick):
        producer.wait("email_stream_waiting_mails", is_(1))
        producer.wait("email_daemons", is_(1), role="worker", state="alive")
        known = json.loads(get(targets)[1])
        assert len(known) == 2
        for down, up in ((durable.redis.freeze, durable.redis.thaw), (durable.redis.kill9, durable.redis.start)):
            down()
            for scraped in (producer, worker):
                scraped.wait("email_redis_up", is_(0))
                assert scraped.last("email_redis_used_memory_bytes")
            assert producer.last("email_stream_waiting_mails") == 1
            assert json.loads(get(targets)[1]) == known
            up()
            for scraped in (producer, worker):
                scraped.wait("email_redis_up", is_(1))
    durable.assert_accounted(waiting=durable.delivered)


def test_a_producer_without_redis_from_the_start_is_scraped(sandbox: Sandbox, tmp_path: Path) -> None:
    """No number is made up for the stream; the producer itself is a target."""
    pipeline = Pipeline(sandbox, RedisServer("valkey"), tmp_path)
    scraped = Scraped(free_port())
    with pipeline.producer(HTTP_PORT=port_of(scraped)):
        scraped.wait("email_redis_up", is_(0))
        assert scraped.last("email_stream_live_mails") is None
        assert scraped.last("email_stream_max_mails") == 100_000
        [target] = json.loads(get(scraped.url.replace("metrics", "targets"))[1])
        assert target["targets"] == [f"127.0.0.1:{port_of(scraped)}"]


def test_a_token_file_on_a_disk_that_hangs_holds_up_no_scrape(pipeline: Pipeline) -> None:
    """A scrape reads no file: the mailbox of that token stands still, the metrics of both are answered."""
    other = "bob@example.org"
    os.mkfifo(pipeline.tmp / "tokens" / f"{other}.json", mode=0o600)
    pipeline.deliver("one")
    scraped = Scraped(free_port())
    with pipeline.producer(HTTP_PORT=port_of(scraped), GMAIL_USERNAME=f"{pipeline.account},{other}") as producer:
        scraped.wait("email_producer_published_total", is_(1), account=pipeline.account)
        assert scraped.last("email_producer_mailbox_state", account=other, state="STARTING") == 1
        assert scraped.last("email_producer_token_expiry_seconds", account=other) is None
        producer.kill9()
    pipeline.assert_accounted(waiting=pipeline.delivered)


# ports


def test_the_second_port(pipeline: Pipeline) -> None:
    """/metrics and nothing else, on the same host, for the same names; a worker has none unless it is told to."""
    port = free_port()
    with pipeline.producer(METRICS_PORT=str(port)) as producer, pipeline.worker() as worker:
        producer.wait_for(rf"metrics: http://127\.0\.0\.1:{port}/metrics\n")
        assert Scraped(port).look()
        assert json.loads(get(f"http://127.0.0.1:{port}/status")[1]) == {"error": "no such page: /status", "pages": ["/metrics"]}
        assert get(f"http://127.0.0.1:{port}/metrics", Host="evil.example")[0] == 400
        worker.wait_for("reads email_ingestion_stream")
        assert "metrics:" not in worker.output()
        assert producer.terminate() == 0
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
            pass
    with pipeline.worker(METRICS_PORT=str(port)):
        until(Scraped(port).look, DEADLINE, "the worker's second port")
    pipeline.assert_accounted()


def test_a_second_port_that_is_taken_is_a_warning(pipeline: Pipeline) -> None:
    """Said once, with the remedy; mail is read, and the daemon's own port answers /metrics."""
    pipeline.deliver("one")
    scraped = Scraped(free_port())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pipeline.producer(HTTP_PORT=port_of(scraped), METRICS_PORT=port) as producer:
            scraped.wait("email_producer_published_total", is_(1))
            [line] = [line for line in producer.output().splitlines() if "WARNING" in line and "METRICS_PORT" in line]
            assert f"METRICS_PORT={port}: cannot listen" in line and "or METRICS_PORT=off" in line
            assert producer.terminate() == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)


# discovery


def test_targets_are_the_daemons_that_live(pipeline: Pipeline) -> None:
    """Each address answers /metrics; one that ends well leaves at the next look, one that is killed when it has been silent for long."""
    port = free_port()

    def targets() -> dict[str, dict[str, str]]:
        return {row["targets"][0]: row["labels"] for row in json.loads(get(f"http://127.0.0.1:{port}/targets")[1])}

    def workers() -> int:
        return sum(labels["daemon_role"] == "worker" for labels in targets().values())

    with pipeline.producer(HTTP_PORT=str(port)) as producer, pipeline.worker() as worker, pipeline.worker() as other:
        producer.wait_for("producer reads")
        until(lambda: workers() == 2, DEADLINE, "both workers are targets")
        by_address = {seen.daemon.address.removeprefix("http://"): seen.daemon for seen in daemons(pipeline)}
        assert targets() == {
            address: {"job": "email-ingestion", "daemon_role": daemon.role, "name": daemon.name}
            for address, daemon in by_address.items()
        }
        for address in by_address:
            status, text = get(f"http://{address}/metrics")
            assert status == 200 and "email_build_info" in text
        assert other.terminate() == 0
        until(lambda: workers() == 1, DEADLINE, "the one that ended is no target any more")
        worker.kill9()
        look_silent(pipeline, "worker")
        until(lambda: workers() == 0, DEADLINE, "the one that was killed is no target any more")
        assert list(targets()) == [f"127.0.0.1:{port}"]


def daemons(pipeline: Pipeline) -> list[Seen]:
    with RedisClient.connect(pipeline.redis.url, max_connections=4, socket_timeout=10) as redis:
        return registered(redis, Keys(STREAM))
