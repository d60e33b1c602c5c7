"""The metrics: their text to the letter, the bounds of their labels, and that code, table and document name the same ones."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from config.settings import load_settings
from src import VERSION
from src.common.circuit_breaker import Breakers, Rules
from src.common.clock import SYSTEM
from src.common.exceptions import (
    BreakerOpen,
    ConfigurationError,
    ImapIncomplete,
    ImapThrottled,
    ImapUnavailable,
    MailboxMissing,
    Permanent,
    ReauthRequired,
    RedisUnavailable,
)
from src.common.redis_client import RedisClient
from src.common.registry import SILENT_SECONDS, Registration, Seen
from src.common.shutdown import Shutdown
from src.common.timing import Histogram
from src.monitoring import metrics
from src.monitoring.metrics import BOTH, MOST_BREAKERS, PRODUCER, WORKER, Declared, Metrics, Numbers, breaker_states, targets
from src.producer.daemon import Producer
from src.producer.mailbox import REASONS, STATES, Mailbox, reason_of
from src.producer.reader import NotOurs
from src.worker import recovery
from src.worker.consume import MOST_ERRORS
from src.worker.daemon import Worker
from src.worker.processor import load_handlers
from tests.support.consumer import consumer_of
from tests.support.daemons import ROOT
from tests.support.fake import FakeTransport, Store, fields_of

ME = Registration("producer", "host-1-aa", "http://127.0.0.1:8080", "0.1.0", "host", 1, "2026-01-31T00:00:00Z")
WORKER_ = replace(ME, role="worker", name="host-2-bb", address="http://127.0.0.1:8081")
DOCUMENT = ROOT / "docs" / "metrics.md"


def text_of(declared: list[Declared], numbers: Numbers) -> str:
    """The text but for what the process says of itself."""
    whole = Metrics(CollectorRegistry(), declared, lambda: numbers).text().decode()
    return "".join(line for line in whole.splitlines(keepends=True) if "process_" not in line)


def test_the_text_to_the_letter() -> None:
    """Counters, gauges and histograms with their HELP and TYPE, labels escaped; nothing is said of when they were created."""
    took = Histogram((0.25, 1.0))
    for seconds in (0.25, 0.5, 2.0):
        took.observe(seconds)
    declared = [
        Declared("email_a_total", "counter", ("account", "mailbox"), "Mails"),
        Declared("email_b", "gauge", (), "Of now"),
        Declared("email_c_seconds", "histogram", ("handler",), "Calls"),
        Declared("email_d_seconds", "histogram", (), "Other calls"),
    ]
    numbers: Numbers = {
        "email_a_total": {("a@b", 'IN"B\\OX\n'): 3, ("é", ""): 0},
        "email_b": 1.5,
        "email_c_seconds": {("m:f",): took},
        "email_d_seconds": Histogram((1.0,)),
    }
    assert (
        text_of(declared, numbers)
        == """\
# HELP email_a_total Mails
# TYPE email_a_total counter
email_a_total{account="a@b",mailbox="IN\\"B\\\\OX\\n"} 3.0
email_a_total{account="é",mailbox=""} 0.0
# HELP email_b Of now
# TYPE email_b gauge
email_b 1.5
# HELP email_c_seconds Calls
# TYPE email_c_seconds histogram
email_c_seconds_bucket{handler="m:f",le="0.25"} 1.0
email_c_seconds_bucket{handler="m:f",le="1.0"} 2.0
email_c_seconds_bucket{handler="m:f",le="+Inf"} 3.0
email_c_seconds_count{handler="m:f"} 3.0
email_c_seconds_sum{handler="m:f"} 2.75
# HELP email_d_seconds Other calls
# TYPE email_d_seconds histogram
email_d_seconds_bucket{le="1.0"} 0.0
email_d_seconds_bucket{le="+Inf"} 0.0
email_d_seconds_count 0.0
email_d_seconds_sum 0.0
"""
    )


def test_what_is_not_known_is_left_out() -> None:
    """No value is made up for it; it is declared all the same."""
    declared = [Declared("email_a", "gauge", (), "A"), Declared("email_b", "gauge", ("x",), "B")]
    text = text_of(declared, {"email_a": None, "email_b": {}})
    assert text == "# HELP email_a A\n# TYPE email_a gauge\n# HELP email_b B\n# TYPE email_b gauge\n"


def test_the_process_tells_of_itself() -> None:
    """Memory and time, from /proc."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("this machine has no /proc")
    text = Metrics(CollectorRegistry(), [], dict).text().decode()
    assert re.search(r"^process_resident_memory_bytes [1-9]", text, re.M)
    assert re.search(r"^process_cpu_seconds_total [\d.]+$", text, re.M)


# what is declared


def producer() -> Producer:
    settings, client = load_settings({}, env_file=None), RedisClient(FakeTransport())
    return Producer(settings, [], client, Shutdown(), SYSTEM, Breakers(Rules(), SYSTEM.monotonic, random.random))


def worker() -> Worker:
    settings = load_settings({}, env_file=None)
    return Worker(settings, load_handlers(settings.work, ()), (), RedisClient(FakeTransport()), Shutdown(), SYSTEM)


def test_each_daemon_knows_what_it_declares_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it has looked at Redis: then it is not up, nothing is known of the stream, and all that is counted is 0."""
    monkeypatch.chdir(tmp_path)
    for role, daemon, declared in (("producer", producer(), PRODUCER), ("worker", worker(), WORKER)):
        numbers = daemon.numbers()
        assert set(numbers) == {metric.name for metric in declared}
        assert numbers["email_redis_up"] == 0.0
        assert numbers["email_build_info"] == {(VERSION, role): 1.0}
        text = Metrics(CollectorRegistry(), declared, daemon.numbers).text().decode()
        assert not re.search(r"^email_stream_live_mails ", text, re.M)
        assert set(re.findall(r"^email_\w+_(?:total|count|sum)\S* (.*)$", text, re.M)) == {"0.0"}, "all begin at 0"


@pytest.mark.parametrize("metric", [*PRODUCER, *WORKER], ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric: Declared) -> None:
    """A counter ends in _total, a histogram in its base unit; a gauge in neither; no label could hold a sender or an id."""
    assert re.fullmatch(r"email_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    allowed = {"account", "mailbox", "state", "reason", "breaker", "handler", "error", "role", "version"}
    assert set(metric.labels) <= allowed
    assert not metric.meaning.endswith(".")


def test_the_document_has_all_of_them() -> None:
    """docs/metrics.md: a table a role, each row name, type, labels and meaning as the code has them."""
    rows = re.findall(r"^\| `(email_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", DOCUMENT.read_text(), re.M)
    declared = [metric for metric in PRODUCER if metric not in BOTH] + [metric for metric in WORKER if metric not in BOTH]
    expected = [
        (metric.name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.meaning)
        for metric in [*declared, *BOTH]
    ]
    assert rows == expected


# labels are bounded


def test_errors_past_the_first_fifty_are_other(store: Store) -> None:
    """A handler may raise any number of classes; the sum is all that died."""
    settings = load_settings({"MAX_ATTEMPTS": 1, "RECOVERY_TICK": 0.01, "WORKER_BLOCK_MS": 1, "DLQ_MAX": 1000}, env_file=None)

    def handler(email: Any, context: Any) -> None:
        raise type(f"Error{email.subject}", (Permanent,), {})

    seat = store.seat()
    recovery.join(seat)
    consumer = consumer_of(seat, settings, handler, SYSTEM)
    for number in range(MOST_ERRORS + 10):
        store.add(f"{number + 1}-0", fields_of(f"gm:a:{number + 1}", subject=str(number)))
    for _ in range(20):
        consumer.settle([consumer.handle(started) for started in consumer.take(100)])
    store.add("1000-0", fields_of("gm:a:1000", subject="0"))
    for _ in range(3):
        consumer.settle([consumer.handle(started) for started in consumer.take(100)])
    assert consumer.counts["dead"] == MOST_ERRORS + 11
    assert len(consumer.dead) == MOST_ERRORS + 1
    assert (consumer.dead["Error0"], consumer.dead["Error49"], consumer.dead["other"]) == (2, 1, 10)


def test_breakers_past_the_first_fifty_are_one() -> None:
    """It is in the worst state that any of them is in; each other one is in exactly one state."""
    states = {f"b{number}": "CLOSED" for number in range(MOST_BREAKERS)} | {"x": "CLOSED", "y": "HALF_OPEN", "z": "CLOSED"}
    rows = breaker_states({**states, "b1": "OPEN"})
    assert len({name for name, _ in rows}) == MOST_BREAKERS + 1
    shown = {name: state for (name, state), value in rows.items() if value == 1.0}
    assert (shown["b0"], shown["b1"], shown["other"]) == ("closed", "open", "half_open")
    assert sum(value for value in rows.values() if isinstance(value, float)) == MOST_BREAKERS + 1
    assert {state for _, state in rows} == {"closed", "open", "half_open"}


def test_every_state_and_reason_is_known() -> None:
    """What Mailbox.state names stands in STATES, so that one of them is 1 at any time; what ends a session has one of REASONS."""
    named = set(re.findall(r"[A-Z][A-Z_]{5,}", str(Mailbox.state.__doc__)))
    assert named == set(STATES)
    errors = {
        ImapUnavailable("BYE Session expired, please login again."): "session_over",
        ImapUnavailable("connection reset"): "broke_off",
        ImapIncomplete([1]): "incomplete",
        ImapThrottled("OVERQUOTA", "x"): "overquota",
        ImapThrottled("THROTTLED", "x"): "throttled",
        ImapThrottled("CONNECTIONS", "x"): "connections",
        NotOurs("x"): "not_ours",
        ReauthRequired("x"): "refused",
        MailboxMissing("x"): "misconfigured",
        ConfigurationError("x"): "misconfigured",
        RedisUnavailable("x"): "other",
        BreakerOpen("x", 1.0): "other",
    }
    assert {error: reason_of(error) for error in errors} == errors
    assert set(errors.values()) == set(REASONS) - {"unreachable"}


def test_daemons_are_counted_by_role_and_life() -> None:
    """A role that this version does not know makes no label."""
    seen = [Seen(ME, 0.0), Seen(WORKER_, SILENT_SECONDS), Seen(WORKER_, SILENT_SECONDS + 1), Seen(replace(ME, role="evil"), 0.0)]
    assert metrics.daemon_counts(seen) == {
        ("producer", "alive"): 1,
        ("producer", "silent"): 0,
        ("worker", "alive"): 1,
        ("worker", "silent"): 1,
    }


# discovery


def row(address: str, role: str, name: str) -> dict[str, object]:
    return {"targets": [address], "labels": {"job": "email-ingestion", "daemon_role": role, "name": name}}


def test_targets_are_the_daemons_that_live() -> None:
    """This producer in any case; none that is silent, and none without an address."""
    assert targets(ME, []) == [row("127.0.0.1:8080", "producer", "host-1-aa")]
    silent, mute = replace(WORKER_, name="silent"), replace(WORKER_, name="mute", address="")
    seen = [Seen(ME, 1.0), Seen(WORKER_, 1.0), Seen(silent, SILENT_SECONDS + 1), Seen(mute, 1.0)]
    assert targets(ME, seen) == [row("127.0.0.1:8080", "producer", "host-1-aa"), row("127.0.0.1:8081", "worker", "host-2-bb")]


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("http://10.0.0.7:8081", "10.0.0.7:8081"),
        ("http://[::1]:8081", "[::1]:8081"),
        ("http://0.0.0.0:8081", "host:8081"),
        ("http://[::]:8081", "host:8081"),
    ],
)
def test_a_target_can_be_reached(address: str, target: str) -> None:
    """Who listens on every address is reached by the name of its host."""
    assert targets(replace(ME, address=address), [])[0]["targets"] == [target]
