"""The twins under load, with real processes: `python -m tests.load.load_test --emails 10000`.

Mail arrives at --rate in a mailbox of the sandbox (or Dovecot); a producer and some workers carry it through a handler, on a Valkey
with an append-only file. Everything lives in a temporary folder. Latency is from the moment before a mail is put into the mailbox to
the moment its result or dead letter is written, by the server's clock: after the handler, with the acknowledgement.

Exit code 1: a mail was lost or doubled, or the floor was missed: 100 mails/s, 1 s on average. The floor is judged over the mails that
neither failed by order nor were in the hands of a killed worker; the others are shown beside them. `--rate 0` delivers as fast as the
mailbox takes it: then latency is only the length of the queue and is not judged.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from src.common.keys import Keys
from src.mail.record import gmail_email_id
from src.sandbox.demo import Fates, fates
from src.sandbox.generator import generate
from src.sandbox.server import Sandbox
from tests.load import handler
from tests.load.measure import peak_mb
from tests.load.plot import Line, Panel, draw
from tests.support.account import GROUP
from tests.support.daemons import Daemon
from tests.support.pipeline import Pipeline
from tests.support.servers import Dovecot, RedisServer

FLOOR_RATE, FLOOR_LATENCY = 100.0, 1.0  # mails a second, seconds
LEASE = 8  # seconds: what a killed worker held is taken over after it (the default is 60)
LOOK_EVERY = 0.25
LINE_EVERY = 5.0  # seconds between two lines where there is no terminal
STUCK = 120.0  # seconds without any change: something is lost
KEYS = Keys("email_ingestion_stream")


@dataclass(frozen=True)
class Options:
    """`rate`: mails a second, 0: as fast as can be. `fail_rate`: chance of an attempt. `kill`: how many SIGKILLs."""

    emails: int
    rate: float
    workers: int
    handler_ms: float
    fail_rate: float
    kill: int
    server: str
    seed: int


@dataclass
class Run:
    """What was seen. Moments are Unix time in seconds. `held`: mails in the hands of a worker when it was killed. `lags`: (moment,
    stream length). `handled_at`: when the handler of a done mail came to its end. `memory`: daemon → most MB. `attempts`: of done mails.
    `handled`: how often each handler came to its end."""

    options: Options
    arrived: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    attempts: dict[str, int] = field(default_factory=dict)
    handled_at: dict[str, float] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    lags: list[tuple[float, int]] = field(default_factory=list)
    kills: list[tuple[float, str]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    handled: Counter[str] = field(default_factory=Counter)
    fates: Fates | None = None

    @property
    def undisturbed(self) -> list[str]:
        """Mails that are judged: done at the first attempt, never in the hands of a killed worker."""
        return [email_id for email_id in self.arrived if self.attempts.get(email_id) == 1 and email_id not in self.held]

    def latencies(self, email_ids: Sequence[str]) -> list[float]:
        return sorted(self.ended[email_id] - self.arrived[email_id] for email_id in email_ids if email_id in self.ended)

    def rate_until(self, email_ids: Sequence[str]) -> float:
        """Mails a second, all that came to their end, from the first arrival until the last of `email_ids` did."""
        last = max((self.ended[email_id] for email_id in email_ids if email_id in self.ended), default=0.0)
        ended = sum(1 for moment in self.ended.values() if moment <= last)
        return ended / (last - min(self.arrived.values())) if ended else 0.0


# the run


def run(options: Options, console: Console, folder: Path) -> Run:
    """Deliver, kill, wait until every mail has its end or nothing moves any more."""
    seen = Run(options)
    source: Sandbox | Dovecot = Sandbox() if options.server == "sandbox" else Dovecot()
    with source, RedisServer("valkey", appendonly=True) as redis, ExitStack() as daemons:
        pipeline = Pipeline(
            source,
            redis,
            folder,
            WORKER_HANDLER="tests.load.handler:load",
            LOAD_MS=str(options.handler_ms),
            LOAD_FAIL=str(options.fail_rate),
            LOAD_JOURNAL=str(folder / "handled"),
            LEASE_SECONDS=str(LEASE),
            RESULTS_MAX=str(10 * options.emails),
            STREAM_MAXLEN=str(max(100_000, 2 * options.emails)),
            BACKOFF_CAP="2",
            RECOVERY_TICK="1",
            WORKER_BLOCK_MS="2000",
            LOG_FORMAT="json",
        )
        running = {"producer": daemons.enter_context(pipeline.producer())}
        for number in range(1, options.workers + 1):
            running[f"worker-{number}"] = daemons.enter_context(pipeline.worker("--consumer", f"worker-{number}"))
        for daemon in running.values():
            daemon.wait_for("health: ")
        pipeline.wait_for_first_poll()

        feeder = threading.Thread(target=feed, args=(pipeline, seen, mails(pipeline, options)), daemon=True)
        with progress(console, options.emails) as show:
            feeder.start()
            watch(pipeline, seen, running, daemons, show)
        feeder.join()
        codes = {name: daemon.terminate() for name, daemon in running.items()}
        read_ends(pipeline, seen)
        if any(codes.values()):
            console.print(f"exit codes after SIGTERM: {codes}")
    seen.handled = handler.read(folder / "handled")["end"]
    return seen


def mails(pipeline: Pipeline, options: Options) -> list[Callable[[], str]]:
    """One call a mail that puts it into the mailbox and returns its email_id. Made beforehand: writing them takes time."""
    account, source = pipeline.account, pipeline.source
    if isinstance(source, Dovecot):
        body = b"Lorem ipsum dolor sit amet, consectetur adipisici elit.\r\n" * 80
        return [lambda number=number: pipeline.deliver(f"mail {number}", body=body)[0] for number in range(options.emails)]  # type: ignore[misc]

    def put(raw: bytes) -> str:
        source.deliver(account, raw)
        return gmail_email_id(account, source.ledger()[-1].gm_msgid)

    return [lambda raw=sample.raw: put(raw) for sample in generate(options.seed, options.emails)]  # type: ignore[misc]


def feed(pipeline: Pipeline, seen: Run, puts: Sequence[Callable[[], str]]) -> None:
    """In a thread of its own: one mail after the other, at the rate."""
    pause, began, rate = threading.Event(), time.monotonic(), seen.options.rate
    for number, put in enumerate(puts):
        if rate:
            pause.wait(max(0.0, began + number / rate - time.monotonic()))
        moment = time.time()
        seen.arrived[put()] = moment


def watch(
    pipeline: Pipeline,
    seen: Run,
    running: dict[str, Daemon],
    daemons: ExitStack,
    show: Callable[[int, int, int], None],
) -> None:
    """Look at it from time to time, kill workers, until every mail has its end or nothing moved for STUCK seconds."""
    client, options, draw_ = pipeline.client, seen.options, random.Random(seen.options.seed)
    kill_at = sorted(draw_.uniform(0.1, 0.9) * options.emails for _ in range(options.kill))
    names, last, moved, pause = options.workers, (-1, -1), time.monotonic(), threading.Event()
    while True:
        live, done, dead = client.xlen(KEYS.stream), client.xlen(KEYS.results), client.xlen(KEYS.dlq)
        seen.lags.append((time.time(), live))
        for name, daemon in running.items():
            seen.memory[name] = max(seen.memory.get(name, 0.0), peak_mb(daemon.pid))
            assert daemon.running(), f"{name} ended by itself:\n{daemon.output()[-2000:]}"
        show(len(seen.arrived), done, dead)
        if (done, dead) != last:
            last, moved = (done, dead), time.monotonic()
        if (done + dead >= options.emails and not live) or time.monotonic() - moved > STUCK:
            return
        while kill_at and done + dead >= kill_at[0]:
            kill_at.pop(0)
            victim = draw_.choice([name for name in running if name.startswith("worker")])
            deadline = time.monotonic() + 2
            while not held_by(pipeline, victim) and time.monotonic() < deadline:  # with mail in its hands, if it can be had
                pause.wait(0.001)
            running.pop(victim).kill9()
            held = held_by(pipeline, victim)
            seen.kills.append((time.time(), f"{victim} killed, {len(held)} in hand"))
            seen.held |= held
            names += 1
            running[f"worker-{names}"] = daemons.enter_context(pipeline.worker("--consumer", f"worker-{names}"))
        pause.wait(LOOK_EVERY)


def held_by(pipeline: Pipeline, label: str) -> set[str]:
    """The mails that stand in the name of a worker."""
    rows = pipeline.client.xpending_range(KEYS.stream, GROUP, "-", "+", 100_000)
    mine = [str(row["message_id"]) for row in rows if str(row["consumer"]).startswith(f"{label}-")]
    entries = [entry for sid in mine for entry in pipeline.client.xrange(KEYS.stream, sid, sid)]
    return {fields["email_id"] for _, fields in entries}


def read_ends(pipeline: Pipeline, seen: Run) -> None:
    """What the results and the dead letters say: when (the ids are the server's time), at which attempt."""
    results, letters = pipeline.client.xrange(KEYS.results), pipeline.client.xrange(KEYS.dlq)
    for entry_id, fields in [*letters, *results]:
        seen.ended[fields["email_id"]] = int(entry_id.partition("-")[0]) / 1000
    seen.dead = {fields["email_id"] for _, fields in letters}
    said = {fields["email_id"]: json.loads(fields["result"]) for _, fields in results}
    seen.attempts = {email_id: result["attempt"] for email_id, result in said.items()}
    seen.handled_at = {email_id: result["at"] for email_id, result in said.items()}
    seen.fates = fates(
        [*seen.arrived], [fields["email_id"] for _, fields in results], [fields["email_id"] for _, fields in letters]
    )


@contextmanager
def progress(console: Console, emails: int) -> Iterator[Callable[[int, int, int], None]]:
    """show(arrived, done, dead): a bar on a terminal, elsewhere a line now and then."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=emails)
            yield lambda arrived, done, dead: bar.update(
                task, completed=done + dead, description=f"{arrived} arrived · {done} done · {dead} dead"
            )
        return
    began = told = time.monotonic()

    def line(arrived: int, done: int, dead: int) -> None:
        nonlocal told
        if time.monotonic() - told >= LINE_EVERY:
            told = time.monotonic()
            console.print(f"{told - began:5.0f} s  {arrived} arrived · {done} done · {dead} dead")

    yield line


# what it comes to


def spread(latencies: Sequence[float]) -> dict[str, float]:
    """Seconds, of sorted values."""
    if not latencies:
        return {"average": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0, "most": 0.0}
    part = {f"p{p}": latencies[min(len(latencies) - 1, len(latencies) * p // 100)] for p in (50, 95, 99)}
    return {"average": statistics.fmean(latencies), **part, "most": latencies[-1]}


def summary(seen: Run) -> dict[str, object]:
    options, judged = seen.options, set(seen.undisturbed)
    failed = [email_id for email_id in seen.arrived if email_id not in judged and email_id not in seen.held]
    found = seen.fates
    assert found is not None
    return {
        "options": asdict(options),
        "floor": {"mails_per_second": FLOOR_RATE, "average_seconds": FLOOR_LATENCY},
        "mails_per_second": {"all": seen.rate_until([*seen.arrived]), "judged": seen.rate_until([*judged])},
        "latency_seconds": {
            "judged": {"mails": len(judged), **spread(seen.latencies([*judged]))},
            "failed by order": {"mails": len(failed), **spread(seen.latencies(failed))},
            "held by a killed worker": {"mails": len(seen.held), **spread(seen.latencies([*seen.held]))},
        },
        "memory_mb": seen.memory,
        "kills": [what for _, what in seen.kills],
        "accounting": {
            "received": found.received,
            "done": found.done,
            "dead": found.dead,
            "lost": list(found.lost),
            "twice": list(found.twice),
            "handlers_that_ran_again": sum(times - 1 for times in seen.handled.values()),
        },
    }


def verdicts(seen: Run) -> list[str]:
    """What is wrong; nothing: the run passed."""
    found, judged, wrong = seen.fates, seen.undisturbed, []
    assert found is not None
    if not found.hold:
        wrong.append(f"{len(found.lost)} lost, {len(found.twice)} twice, {len(found.strange)} strange")
    if seen.rate_until(judged) < FLOOR_RATE:
        wrong.append(f"{seen.rate_until(judged):.0f} mails/s, below {FLOOR_RATE:.0f}")
    latency = spread(seen.latencies(judged))["average"]
    if seen.options.rate and latency > FLOOR_LATENCY:
        wrong.append(f"{latency:.2f} s on average, above {FLOOR_LATENCY:.0f}")
    return wrong


def report(seen: Run) -> str:
    options, judged = seen.options, seen.undisturbed
    disturbed = [email_id for email_id in seen.arrived if email_id not in set(judged) and email_id not in seen.held]
    rows = [
        ("done at once", judged),
        ("failed by order", disturbed),
        ("held by a killed worker", [*seen.held]),
    ]
    out = [
        f"throughput  {seen.rate_until([*seen.arrived]):,.0f} mails/s in all, {seen.rate_until(judged):,.0f} mails/s until the last "
        "that was done at once",
        f"latency     {'':26}{'mails':>7}{'average':>10}{'p50':>9}{'p95':>9}{'p99':>9}{'most':>9}",
    ]
    for name, email_ids in rows:
        if email_ids:
            of = spread(seen.latencies(email_ids))
            values = "".join(f"{of[part]:>{width - 2}.3f} s" for part, width in zip(of, (10, 9, 9, 9, 9), strict=True))
            out.append(f"            {name:<26}{len(email_ids):>7}{values}")
    out.append("memory      " + ", ".join(f"{name} {most:.0f} MB" for name, most in seen.memory.items()))
    out += [f"            {what}" for _, what in seen.kills]
    again = sum(times - 1 for times in seen.handled.values())
    out.append(f"accounting  {seen.fates}; handlers that ran to their end again after a kill: {again}")
    wrong = verdicts(seen)
    floor = f"{FLOOR_RATE:.0f} mails/s" + (f", {FLOOR_LATENCY:.0f} s on average" if options.rate else "; latency is not judged")
    return "\n".join([*out, f"FAILED: {'; '.join(wrong)}" if wrong else f"passed (floor: {floor})"])


def plot(seen: Run) -> str:
    began = min(seen.arrived.values())
    lines = []
    for name, colour, moments in (("arrived", "#9aa5b1", seen.arrived), ("done or dead", "#2471a3", seen.ended)):
        counted = Counter(int(moment - began) for moment in moments.values())
        lines.append(Line(name, colour, [(second + 0.5, counted[second]) for second in range(max(counted, default=0) + 1)]))
    by_second: dict[int, list[float]] = {}
    for email_id, moment in seen.arrived.items():
        if email_id in seen.ended:
            by_second.setdefault(int(moment - began), []).append(1000 * (seen.ended[email_id] - moment))
    parts = [(second + 0.5, spread(sorted(values))) for second, values in sorted(by_second.items())]
    latency = [
        Line(name, colour, [(second, of[part]) for second, of in parts])
        for name, colour, part in (("slowest", "#e8a87c", "most"), ("95 %", "#ca6f1e", "p95"), ("half", "#2471a3", "p50"))
    ]
    options = seen.options
    rate = f"{options.rate:g}/s" if options.rate else "as fast as they come in"
    subtitle = (
        f"{rate}, {options.workers} workers, handler {options.handler_ms:g} ms, {100 * options.fail_rate:g} % fail. {seen.fates}"
    )
    return draw(
        f"{options.emails:,} mails from {options.server}",
        subtitle,
        [
            Panel("Throughput", "mails per second", lines),
            Panel(
                "Lag",
                "unfinished mails",
                [Line("stream length", "#1e8449", [(max(0.0, t - began), n) for t, n in seen.lags], filled=True)],
            ),
            Panel("Latency by second of arrival", "milliseconds (log)", latency, log=True),
        ],
        [(moment - began, what) for moment, what in seen.kills],
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.load.load_test", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--emails", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument(
        "--rate", type=float, default=150, metavar="R", help="mails a second; 0: as fast as they come in; default: 150"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--handler-ms", type=float, default=0, metavar="MS", help="what a handler takes; default: 0")
    parser.add_argument(
        "--fail-rate", type=float, default=0, metavar="P", help="chance that an attempt fails (a tenth of them for good)"
    )
    parser.add_argument("--kill", type=int, default=0, metavar="K", help="SIGKILL to a random worker K times; replaced at once")
    parser.add_argument("--server", choices=["sandbox", "dovecot"], default="sandbox")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of mails and kills; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="throughput, lag and latency over time")
    return parser.parse_args()


def main() -> int:
    given = vars(arguments())
    files = {name: given.pop(name) for name in ("json", "svg")}
    options, console = Options(**given), Console(highlight=False, soft_wrap=True)
    console.print(
        f"{options.emails} mails from {options.server}, "
        f"{f'{options.rate:g} a second' if options.rate else 'as fast as they come in'}, {options.workers} workers, "
        f"handler {options.handler_ms:g} ms, {100 * options.fail_rate:g} % fail, {options.kill} kills (lease {LEASE} s), "
        f"seed {options.seed}"
    )
    with tempfile.TemporaryDirectory(prefix="load-", ignore_cleanup_errors=True) as folder:
        seen = run(options, console, Path(folder))
    console.print(report(seen))
    if files["json"]:
        files["json"].write_text(json.dumps(summary(seen), indent=2) + "\n")
    if files["svg"]:
        files["svg"].write_text(plot(seen))
    return 1 if verdicts(seen) else 0


if __name__ == "__main__":
    sys.exit(main())
