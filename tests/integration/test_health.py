"""What the producer says of itself while things go wrong, and what it does about it: real daemons, asked over HTTP.

Each test ends by accounting for every mail.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest  # type: ignore[import-untyped]

from src.common.correlation import traceparent_of
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.registry import Seen, registered
from src.sandbox.server import Sandbox
from tests.integration.test_commands import finished
from tests.support.daemons import ROOT, Daemon
from tests.support.endpoint import Asked
from tests.support.hooks import HookServer, answering
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import free_port
from tests.support.servers import RedisServer
from tests.support.wait import until

BOB = "bob@example.org"
STREAM = "email_ingestion_stream"


@pytest.fixture
def asked() -> Asked:
    return Asked(free_port())


@pytest.fixture
def durable(sandbox: Sandbox, tmp_path: Path) -> Iterator[Pipeline]:
    with RedisServer("valkey", appendonly=True) as server:
        yield Pipeline(sandbox, server, tmp_path)


def producer(pipeline: Pipeline, asked: Asked, *args: str, **env: str) -> Daemon:
    return pipeline.producer(*args, HTTP_PORT=str(asked.port), **env)


def daemons(pipeline: Pipeline) -> list[Seen]:
    with RedisClient.connect(pipeline.redis.url, max_connections=4, socket_timeout=10) as redis:
        return registered(redis, Keys(STREAM))


def test_a_redis_outage_leaves_a_producer_healthy_and_not_ready(durable: Pipeline, asked: Asked) -> None:
    """Killed or frozen: /ready says so and since when, /health stays 200; back, it goes on by itself."""
    durable.deliver("one")
    with producer(durable, asked) as daemon:
        asked.until("ready", 200)
        for down, up in ((durable.redis.kill9, durable.redis.start), (durable.redis.freeze, durable.redis.thaw)):
            down()
            asked.until("ready", 503, r"Redis: no answer for ([5-9]|\d\d) s")
            status, body = asked.get("health")
            assert (status, body["status"]) == (200, "degraded")
            assert "Redis: no answer" in body["why"]
            up()
            asked.until("ready", 200)
        durable.deliver("two")
        durable.wait_for_uid(2)
        assert daemon.output().count("the lease could not be renewed") <= 2, "said once an outage"
        assert daemon.terminate() == 0
    durable.assert_accounted(waiting=durable.delivered)


def test_one_dead_token_among_two_mailboxes(pipeline: Pipeline, sandbox: Sandbox, asked: Asked) -> None:
    """Healthy and ready; /status names the cause and the command, and shows no secret and no mail."""
    pipeline.write_token(BOB)
    sandbox.revoke(BOB)
    pipeline.deliver("for nobody's eyes", body=b"the body of a mail\r\n")
    with producer(pipeline, asked, GMAIL_USERNAME=f"{pipeline.account},{BOB}"):
        asked.until("status", 200, "REAUTH_REQUIRED")
        pipeline.wait_for_uid(1)
        asked.until("ready", 200)
        status, body = asked.get("health")
        assert (status, body["status"]) == (200, "degraded")
        whole = asked.until("status", 200, '"last_uid": 1')
        own, dead = asked.mailbox(pipeline.account), asked.mailbox(BOB)
        assert (own["state"], own["why"], own["lag"], own["published"]) == ("CONNECTED", "", 0, 1)
        assert own["seconds_since_contact"] < DEADLINE
        assert own["account_bytes_today"] > 0
        assert 3000 < own["token"]["expires_in_seconds"] <= 3600
        assert dead["state"] == "REAUTH_REQUIRED"
        assert "invalid_grant: Token has been expired or revoked.); likely: the account has a new password" in dead["why"]
        assert f"run: python producer.py --auth-setup --username {BOB}" in dead["why"]
        assert dead["seconds_since_contact"] is None
        assert whole["redis"]["maxmemory_policy"] == "noeviction"
        assert {name.split()[0] for name in whole["breakers"]} == {"IMAP", "Redis", "token"}
        assert all(breaker["state"] == "CLOSED" for breaker in whole["breakers"].values())
        token = json.loads((pipeline.tmp / "tokens" / f"{pipeline.account}.json").read_text())
        text = json.dumps(whole)
        for secret in (token["token"], token["refresh_token"], token["client_secret"], "the body of a mail", "nobody's eyes"):
            assert secret not in text
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_producer_that_can_read_no_mailbox_is_healthy_and_not_ready(pipeline: Pipeline, sandbox: Sandbox, asked: Asked) -> None:
    """Its only token dies while it runs: a restart would not help; a new consent does, without one."""
    pipeline.deliver("one")
    with producer(pipeline, asked):
        asked.until("ready", 200)
        pipeline.wait_for_uid(1)
        sandbox.revoke(pipeline.account)
        sandbox.faults.bye()
        asked.until("ready", 503, f"{pipeline.account}/INBOX: REAUTH_REQUIRED: .*--auth-setup")
        assert asked.get("health")[0] == 200
        pipeline.write_token(pipeline.account)
        asked.until("ready", 200)
        pipeline.deliver("two")
        pipeline.wait_for_uid(2)
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_mailbox_that_redis_forgot_is_not_ready_until_it_is_read_again(
    pipeline: Pipeline, sandbox: Sandbox, asked: Asked
) -> None:
    """FLUSHALL: REREADING until all of it has its fate, also over a restart in the middle."""
    pipeline.deliver("one", "two", "three")
    finished(pipeline.producer("--once"))
    pipeline.client.flushall()
    for _ in range(2):
        sandbox.faults.ok_without_data([3], bodies_only=True)
        with producer(pipeline, asked, INCOMPLETE_WAIT="600"):
            asked.until("ready", 503, "REREADING: Redis had forgotten this mailbox")
            until(lambda: not sandbox.faults.state(), DEADLINE, "the third mail was withheld")
            assert asked.get("ready")[0] == 503
            assert asked.get("health")[0] == 200
    with producer(pipeline, asked):
        asked.until("ready", 200)
        pipeline.wait_for_uid(3)
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_loop_that_stands_still_is_503(pipeline: Pipeline, asked: Asked) -> None:
    """A token file on a disk that hangs (here: a pipe without a writer) stops one thread: it is named; the others go on."""
    path = pipeline.tmp / "tokens" / f"{BOB}.json"
    os.mkfifo(path, mode=0o600)
    env = {"GMAIL_USERNAME": f"{pipeline.account},{BOB}", "IMAP_TIMEOUT": "0.5"}
    with producer(pipeline, asked, **env) as daemon:
        pipeline.deliver("one")
        pipeline.wait_for_uid(1)
        body = asked.until("health", 503)
        assert body == {"status": "stuck", "why": f"no turn in time: {BOB}/INBOX"}
        pipeline.deliver("two")
        pipeline.wait_for_uid(2)
        daemon.kill9()
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_intake_pauses_at_high_water_and_goes_on_below_low(durable: Pipeline, asked: Asked) -> None:
    """PAUSED in /status and the log, with the reason; the mail waits in its mailbox, new mail too, and then all of it enters."""
    durable.deliver("one")
    with producer(durable, asked) as daemon:
        durable.wait_for_uid(1)
        used = int(durable.client.info("memory")["used_memory"])
        durable.client.config_set("maxmemory", int(used * 1.05))
        asked.until("status", 200, "PAUSED")
        durable.deliver("two")
        asked.until("status", 200, '"lag": 1')
        durable.deliver("three")
        box = asked.mailbox(durable.account)
        assert box["state"] == "PAUSED"
        assert re.search(r"Redis holds \d+\.\d MB, \d+% of its maxmemory; intake goes on below 75%", box["why"])
        assert asked.get("ready")[0] == 503
        code, said = asked.get("health")
        assert (code, said["status"]) == (200, "degraded")
        assert durable.client.xlen(STREAM) == 1
        daemon.wait_for(r"WARNING Redis holds .* of its maxmemory.*Raise maxmemory")
        durable.client.config_set("maxmemory", used * 100)
        durable.wait_for_uid(3)
        daemon.wait_for(r"Redis holds \d+% of its maxmemory: intake goes on")
        asked.until("ready", 200)
    durable.assert_accounted(waiting=durable.delivered)


def test_a_redis_that_evicts_is_refused(durable: Pipeline) -> None:
    """Exit 2 and the line to run, with --once too; ALLOW_EVICTION makes it a warning."""
    durable.client.config_set("maxmemory-policy", "volatile-lru")
    durable.deliver("one")
    for args in ((), ("--once",)):
        output = finished(durable.producer(*args), code=2)
        assert re.search(r"^producer.py: the maxmemory-policy of Redis is volatile-lru: .* redis-cli CONFIG SET", output, re.M)
    assert durable.client.xlen(STREAM) == 0
    output = finished(durable.producer("--once", ALLOW_EVICTION="true"))
    assert "WARNING the maxmemory-policy of Redis is volatile-lru" in output
    durable.assert_accounted(waiting=durable.delivered)


def test_a_redis_that_evicts_and_was_away_at_the_start_ends_the_producer(sandbox: Sandbox, tmp_path: Path) -> None:
    """Exit 2 as soon as it answers, before any mail was published."""
    server = RedisServer("valkey", options={"maxmemory-policy": "allkeys-lru"})
    pipeline = Pipeline(sandbox, server, tmp_path)
    pipeline.deliver("one", expected=False)
    with pipeline.producer() as daemon:
        daemon.wait_for("Redis does not answer yet", DEADLINE)
        with server:
            assert daemon.exit_code(DEADLINE) == 2
            assert "ERROR   the maxmemory-policy of Redis is allkeys-lru" in daemon.output()


def test_daemons_are_registered_with_an_address_that_answers(pipeline: Pipeline, asked: Asked) -> None:
    """While they run; one that ends well takes itself out, one that is killed stays, to be seen as silent."""
    with producer(pipeline, asked) as daemon:
        asked.until("ready", 200)
        [seen] = daemons(pipeline)
        me = seen.daemon
        assert (me.role, me.pid, me.address) == ("producer", daemon.pid, f"http://127.0.0.1:{asked.port}")
        assert seen.alive
        with urllib.request.urlopen(f"{me.address}/status", timeout=20) as answer:
            assert json.load(answer)["name"] == me.name
        assert daemon.terminate() == 0
    assert daemons(pipeline) == []
    with producer(pipeline, asked) as daemon:
        asked.until("ready", 200)
        daemon.kill9()
    assert [seen.daemon.role for seen in daemons(pipeline)] == ["producer"]
    pipeline.assert_accounted()


def test_a_mail_server_that_is_down_is_asked_by_one_mailbox_for_all(pipeline: Pipeline, sandbox: Sandbox, asked: Asked) -> None:
    """Three failures open its breaker: all five mailboxes wait, one tries at each reopening, and all are read when it is back."""
    folders = ["INBOX", "A", "B", "C", "D"]
    for folder in folders[1:]:
        sandbox.deliver(pipeline.account, b"Subject: before\r\n\r\n", mailbox=folder)
        pipeline.delivered.append(f"gm:{pipeline.account}:{sandbox.ledger()[-1].gm_msgid}")
    sandbox.faults.refuse(1_000_000)
    env = {"BREAKER_FAILURES": "3", "BREAKER_OPEN_SECONDS": "0.2", "BREAKER_OPEN_CAP": "0.2", "MAILBOXES": ",".join(folders)}
    with producer(pipeline, asked, **env) as daemon:
        openings = until(lambda: _openings(asked) >= 4 and _openings(asked), DEADLINE, "it opened four times in a row")
        connections = 1_000_000 - sandbox.faults.state()["refuse"]["left"]
        assert connections <= 3 + len(folders) + _openings(asked), f"{openings} openings"
        assert asked.get("health")[0] == 200
        asked.until("ready", 503, r"DISCONNECTED: .*failed again and again \(.+\): it is asked again in")
        assert {box["state"] for box in asked.get("status")[1]["mailboxes"]} <= {"DISCONNECTED", "STARTING"}
        sandbox.faults.clear()
        pipeline.deliver("after")
        until(lambda: pipeline.client.xlen(STREAM) == 5, DEADLINE, "all five folders are read")
        asked.until("status", 200, r'"IMAP [^"]*": {"state": "CLOSED"')
        daemon.wait_for(r"WARNING IMAP 127\.0\.0\.1:\d+ fails again and again: it is left alone for a while")
        daemon.wait_for(r"INFO +IMAP 127\.0\.0\.1:\d+ answers again")
    pipeline.assert_accounted(waiting=pipeline.delivered)


def _openings(asked: Asked) -> int:
    try:
        breakers = asked.get("status")[1]["breakers"]
    except urllib.error.URLError:
        return 0
    return max(int(breaker["opened_in_a_row"]) for name, breaker in breakers.items() if name.startswith("IMAP"))


@pytest.mark.full
def test_a_token_endpoint_that_is_down_is_left_alone(pipeline: Pipeline, sandbox: Sandbox, asked: Asked) -> None:
    """Its breaker opens and /status shows it; nobody is told to consent; when it answers again the mailbox is read."""
    sandbox.expire_tokens()
    sandbox.faults.token_answer(503, "<html>Service Unavailable</html>", times=1_000_000)
    pipeline.deliver("one")
    with producer(pipeline, asked, BREAKER_FAILURES="2", BREAKER_OPEN_SECONDS="2", BREAKER_OPEN_CAP="2") as daemon:
        asked.until("status", 200, r'"token endpoint [^"]*": {"state": "(OPEN|HALF_OPEN)"')
        asked.until("ready", 503, "DISCONNECTED: .*503")
        assert asked.get("health")[0] == 200
        sandbox.faults.clear()
        pipeline.wait_for_uid(1)
        asked.until("ready", 200)
        assert "REAUTH" not in daemon.output()
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_refusals_and_rests_open_no_breaker(pipeline: Pipeline, sandbox: Sandbox, asked: Asked) -> None:
    """Sessions that end with their token, refused logins and throttling are answers, however many."""
    pipeline.deliver("one")
    with producer(pipeline, asked, BREAKER_FAILURES="1", THROTTLED_WAIT="0.05", CONNECTIONS_WAIT="0.05", POLL_INTERVAL="0.1"):
        pipeline.wait_for_uid(1)
        for fault in (
            lambda: sandbox.faults.bye(times=3),
            lambda: sandbox.faults.login_no(times=2),
            lambda: sandbox.faults.answer_no("[THROTTLED] Slow down. (Failure)", 2, "SEARCH"),
            lambda: sandbox.expire_tokens(),
        ):
            fault()
            sandbox.faults.bye(times=1) if not sandbox.faults.state() else None
            until(lambda: not sandbox.faults.state(), DEADLINE, "the fault has struck")
        pipeline.deliver("two")
        pipeline.wait_for_uid(2)
        states = {name: breaker["state"] for name, breaker in asked.get("status")[1]["breakers"].items()}
        assert set(states.values()) == {"CLOSED"}, states
    pipeline.assert_accounted(waiting=pipeline.delivered)


# correlation


def test_every_mail_has_a_trace_context(pipeline: Pipeline) -> None:
    """In its record, from its correlation id; no two alike."""
    pipeline.deliver("one", "two")
    finished(pipeline.producer("--once"))
    entries = pipeline.books().stream.values()
    contexts = [(json.loads(fields["record"])["traceparent"], fields["correlation_id"]) for fields in entries]
    assert len(set(contexts)) == 2
    assert all(traceparent == traceparent_of(correlation_id) for traceparent, correlation_id in contexts)
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_spans_reach_a_collector(pipeline: Pipeline) -> None:
    """OTEL_EXPORTER_OTLP_ENDPOINT alone: a fetch a mail, whose context its record carries, and a publish linked to them."""
    pipeline.deliver("one", "two")
    with HookServer(answering(200, "Content-Type: application/x-protobuf")) as collector:
        finished(pipeline.producer("--once", OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.port}"))
        assert {request.target for request in collector.requests} == {"/v1/traces"}
        spans = [
            span
            for request in collector.requests
            for resource in ExportTraceServiceRequest.FromString(request.body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
    fetched = {(span.trace_id.hex(), span.span_id.hex()) for span in spans if span.name == "fetch"}
    linked = {(link.trace_id.hex(), link.span_id.hex()) for span in spans if span.name == "publish" for link in span.links}
    carried = {tuple(json.loads(fields["record"])["traceparent"].split("-")[1:3]) for fields in pipeline.books().stream.values()}
    assert len(fetched) == 2
    assert fetched == linked == carried
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_collector_that_is_away_holds_nothing_up(pipeline: Pipeline) -> None:
    """The mail enters, the producer ends with 0."""
    pipeline.deliver("one")
    finished(pipeline.producer("--once", OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}"))
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_trace_tells_the_story_of_a_mail(pipeline: Pipeline) -> None:
    """Piped it is JSON: dead with its reason, and the log lines of both daemons; exit 1 for a mail nobody knows."""
    [dead] = pipeline.deliver("permanent")
    with pipeline.producer(LOG_FORMAT="json", LOG_LEVEL="DEBUG"), pipeline.worker(LOG_FORMAT="json") as worker:
        pipeline.wait_until_settled()
        worker.wait_for("is dead after 1 attempt")

    def told(*args: str, code: int) -> Any:
        command = [sys.executable, ROOT / "scripts/trace.py", *args]
        env = {"PATH": os.environ["PATH"], "HOME": str(pipeline.tmp), **pipeline.env}
        ran = subprocess.run(command, cwd=pipeline.tmp, env=env, capture_output=True, text=True, timeout=DEADLINE)
        assert ran.returncode == code, ran.stderr
        return json.loads(ran.stdout)

    logs = [str(path) for path in pipeline.tmp.glob("*.log")]
    found = told(dead, "--log", *logs, code=0)
    assert found["state"] == "dead"
    assert [event["what"] for event in found["events"]] == ["received", "ingested", "dead"]
    lines = [json.loads(line) for line in found["log"]]
    assert f"UID 1 is {dead}" in lines[0]["message"]
    assert f"{dead} is dead after 1 attempt" in lines[-1]["message"]
    assert [line["timestamp"] for line in lines] == sorted(line["timestamp"] for line in lines)
    assert told("gm:nobody@example.org:1", code=1)["state"] == "unknown"
    pipeline.assert_accounted(dead={dead: "permanent"})


def test_a_second_signal_ends_at_once_also_while_redis_is_away(durable: Pipeline, asked: Asked) -> None:
    """Nothing that the new threads do holds it up."""
    with producer(durable, asked) as daemon:
        asked.until("ready", 200)
        durable.redis.freeze()
        daemon.send(signal.SIGTERM)
        daemon.wait_for("stopping: SIGTERM")
        daemon.send(signal.SIGTERM)
        assert daemon.exit_code() == 128 + signal.SIGTERM
        durable.redis.thaw()
    durable.assert_accounted()
