"""The metrics of both daemons: which there are, and how what a daemon knows becomes Prometheus' text.

A scrape asks nobody, neither Redis nor a disk: it reads what the daemon has counted and last seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from src.common.registry import Registration, Seen
from src.common.timing import Histogram
from src.common.watch import Watch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_BREAKERS = 50  # told apart; a handler may name any number of them
BREAKER_STATES = ("CLOSED", "HALF_OPEN", "OPEN")  # from well to ill
ROLES, ALIVE = ("producer", "worker"), ("alive", "silent")

Reading = float | Histogram
Rows = dict[tuple[str, ...], Reading]
Numbers = Mapping[str, Reading | Rows | None]
"""Name → its value, or one for each combination of its labels. None: not known, so it is left out."""


@dataclass(frozen=True)
class Declared:
    """A metric. `meaning`: its HELP line."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str


_MAILBOX = ("account", "mailbox")

BOTH = (
    Declared("email_build_info", "gauge", ("version", "role"), "1, with the version of the daemon"),
    Declared("email_redis_up", "gauge", (), "1 while Redis answers, else 0"),
    Declared("email_redis_used_memory_bytes", "gauge", (), "used_memory of Redis when it was last asked"),
    Declared("email_redis_max_memory_bytes", "gauge", (), "maxmemory of Redis, 0 for no limit"),
    Declared(
        "email_redis_roundtrip_seconds",
        "histogram",
        (),
        "Calls to Redis that were answered, without XREADGROUP, which waits for mail on purpose",
    ),
    Declared(
        "email_breaker_state", "gauge", ("breaker", "state"), "1 for the state a circuit breaker is in: closed, open, half_open"
    ),
)

PRODUCER = (
    Declared("email_producer_fetched_total", "counter", _MAILBOX, "Mails whose body was read"),
    Declared("email_producer_fetched_bytes_total", "counter", _MAILBOX, "Bytes of these bodies"),
    Declared("email_producer_published_total", "counter", _MAILBOX, "Mails put into the stream"),
    Declared("email_producer_known_total", "counter", _MAILBOX, "Mails looked at that were known already"),
    Declared(
        "email_producer_reconnects_total",
        "counter",
        (*_MAILBOX, "reason"),
        "IMAP sessions that ended or could not be opened, each followed by a new try",
    ),
    Declared("email_producer_fetch_seconds", "histogram", (), "One FETCH of bodies"),
    Declared("email_producer_publish_seconds", "histogram", (), "One batch of mails into the stream"),
    Declared("email_producer_mailbox_state", "gauge", (*_MAILBOX, "state"), "1 for the state the mailbox is in, as in /status"),
    Declared("email_producer_contact_age_seconds", "gauge", _MAILBOX, "Since the IMAP server last answered"),
    Declared(
        "email_producer_passed_mails", "gauge", _MAILBOX, "Mails passed over by rule (INITIAL_SYNC), as the state counts them"
    ),
    Declared(
        "email_producer_token_expiry_seconds",
        "gauge",
        ("account",),
        "Until the access token of the last login runs out; absent for a password",
    ),
    Declared(
        "email_producer_token_age_seconds", "gauge", ("account",), "Since the consent, as of the last login; absent if not known"
    ),
    Declared("email_producer_quota_used_bytes", "gauge", ("account",), "Read from the account today (UTC), by all its mailboxes"),
    Declared("email_producer_quota_limit_bytes", "gauge", ("account",), "DAILY_BYTES, at which old mail waits for tomorrow"),
    Declared("email_producer_paused", "gauge", (), "1 while intake waits: Redis' memory, STREAM_MAXLEN, the archive"),
    Declared("email_stream_live_mails", "gauge", (), "Unfinished mails"),
    Declared("email_stream_unread_mails", "gauge", (), "Of these: not yet delivered to a worker"),
    Declared("email_stream_in_flight_mails", "gauge", (), "Of these: delivered to a worker"),
    Declared("email_stream_waiting_mails", "gauge", (), "Of these: waiting for their next attempt"),
    Declared("email_stream_oldest_age_seconds", "gauge", (), "Since the oldest unfinished mail was published, 0 for none"),
    Declared("email_stream_max_mails", "gauge", (), "STREAM_MAXLEN, at which intake waits"),
    Declared("email_stream_dead_letters", "gauge", (), "Dead letters"),
    Declared("email_stream_dead_letters_max", "gauge", (), "DLQ_MAX, at which workers stop reading"),
    Declared("email_stream_results", "gauge", (), "Entries of the results stream"),
    Declared(
        "email_stream_unaccounted_mails",
        "gauge",
        (),
        "Mails that the last look back of each mailbox found to stand nowhere; absent before the first one",
    ),
    Declared(
        "email_daemons", "gauge", ("role", "state"), "Registered daemons: alive, or silent (killed or cut off) for up to a day"
    ),
    *BOTH,
)

WORKER = (
    Declared("email_worker_started_total", "counter", (), "Attempts begun"),
    Declared("email_worker_done_total", "counter", (), "Mails done"),
    Declared("email_worker_retried_total", "counter", (), "Attempts that failed and will be repeated"),
    Declared("email_worker_postponed_total", "counter", (), "Attempts put off without counting, behind an open breaker"),
    Declared("email_worker_dead_total", "counter", ("error",), "Mails buried, by the class of their last error"),
    Declared("email_worker_duplicates_total", "counter", (), "Deliveries dropped because their mail was done before"),
    Declared(
        "email_worker_leases_lost_total", "counter", (), "Mails that were another worker's by the time they were settled or begun"
    ),
    Declared("email_worker_recovered_total", "counter", (), "Mails taken over that nobody had renewed"),
    Declared("email_worker_expired_total", "counter", (), "Dead letters given up after DLQ_DAYS"),
    Declared("email_worker_handler_seconds", "histogram", ("handler",), "One call of a handler; with a batch it is one call"),
    Declared("email_worker_intake_to_done_seconds", "histogram", (), "From a mail's entry into the stream until it was done"),
    Declared("email_worker_in_flight_mails", "gauge", (), "Mails in this worker's hands"),
    Declared("email_worker_oldest_in_flight_seconds", "gauge", (), "How long the oldest of them has been, 0 for none"),
    Declared("email_worker_reading", "gauge", (), "1 while it takes on mail, 0 while it does not (see not reading in /status)"),
    *BOTH,
)


class Metrics(Collector):
    """The metrics `declared`, and those of the process, over `registry`. `numbers`: what the daemon knows, asked at each scrape."""

    def __init__(self, registry: CollectorRegistry, declared: Collection[Declared], numbers: Callable[[], Numbers]) -> None:
        self._registry = registry
        self._declared = declared
        self._numbers = numbers
        ProcessCollector(registry=registry)
        registry.register(self)

    def text(self) -> bytes:
        """What GET /metrics answers, as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        return [_family(metric, None) for metric in self._declared]

    def collect(self) -> Iterable[Metric]:
        numbers = self._numbers()
        return [_family(metric, numbers[metric.name]) for metric in self._declared]


def _family(metric: Declared, found: Reading | Rows | None) -> Metric:
    rows: Rows = {} if found is None else found if isinstance(found, dict) else {(): found}
    if metric.kind == "histogram":
        return _histogram(metric, rows)
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in rows.items():
        assert not isinstance(value, Histogram)
        family.add_metric(labels, value)
    return family


def _histogram(metric: Declared, rows: Rows) -> Metric:
    family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in rows.items():
        assert isinstance(value, Histogram)
        buckets, total = value.read()
        family.add_metric(labels, [("+Inf" if bound == float("inf") else str(bound), count) for bound, count in buckets], total)
    return family


# what several numbers have in common


def of_both(
    version: str, role: str, watch: Watch | None, round_trips: Histogram, breakers: Mapping[str, Mapping[str, object]]
) -> Numbers:
    """The numbers of `BOTH`. `breakers`: name → its snapshot. `watch`: None before it looks."""
    memory = watch.memory if watch else None
    return {
        "email_build_info": {(version, role): 1.0},
        "email_redis_up": float(watch is not None and not watch.away),
        "email_redis_used_memory_bytes": memory.used if memory else None,
        "email_redis_max_memory_bytes": memory.limit if memory else None,
        "email_redis_roundtrip_seconds": round_trips,
        "email_breaker_state": breaker_states({name: str(snapshot["state"]) for name, snapshot in breakers.items()}),
    }


def breaker_states(states: Mapping[str, str]) -> Rows:
    """1 for the state that each breaker is in, 0 for the others. Past `MOST_BREAKERS` they are one, `other`, as the worst of them is."""
    named = dict(list(states.items())[:MOST_BREAKERS])
    if len(states) > MOST_BREAKERS:
        named["other"] = max(list(states.values())[MOST_BREAKERS:], key=BREAKER_STATES.index)
    return {(name, state.lower()): float(state == current) for name, current in named.items() for state in sorted(BREAKER_STATES)}


def daemon_counts(daemons: Collection[Seen]) -> Rows:
    """How many registered daemons of each role are alive, and silent."""
    counted = Counter({(role, state): 0 for role in ROLES for state in ALIVE})
    for seen in daemons:
        if seen.daemon.role in ROLES:
            counted[seen.daemon.role, "alive" if seen.alive else "silent"] += 1
    return {labels: float(count) for labels, count in counted.items()}


def targets(me: Registration, daemons: Collection[Seen]) -> list[dict[str, object]]:
    """GET /targets, for Prometheus' http_sd: this producer, and every daemon that was alive when Redis was last asked.

    `daemon_role` is no `role`, which some of our metrics have as a label of their own.
    """
    alive = {seen.daemon.name: seen.daemon for seen in daemons if seen.alive and seen.daemon.address}
    return [
        {
            "targets": [_reachable(daemon)],
            "labels": {"job": "email-ingestion", "daemon_role": daemon.role, "name": daemon.name},
        }
        for daemon in {me.name: me, **alive}.values()
    ]


def _reachable(daemon: Registration) -> str:
    """host:port of its endpoint; one that listens on every address is reached by its host's name."""
    place = urlsplit(daemon.address).netloc
    for every in ("0.0.0.0:", "[::]:"):  # nothing is bound here
        if place.startswith(every):
            return f"{daemon.host}:{place.removeprefix(every)}"
    return place
