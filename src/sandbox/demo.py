"""`./scripts/demo.sh`: the twins at work on a sandbox Gmail, with failures, a killed worker and a restarted producer.

Every process is a real one, started as a user starts it, with its data in a temporary folder. At the end the sandbox's own ledger
is compared with the results and the dead letters: each mail must stand in exactly one of them, once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from config.settings import SECTIONS
from src.common.embedded import Embedded
from src.common.exceptions import GroupMissing
from src.common.keys import Keys
from src.common.redis_client import Fields, RedisClient

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = "sandbox@gmail.example"
STREAM, GROUP = "email_ingestion_stream", "email_workers"
HANDLER = "src.sandbox.demo_handler:handle"
TICK = 0.1  # seconds between two looks
LINE_EVERY = 1.0  # seconds between two lines where there is no terminal
STUCK_SECONDS = 60.0  # without any change: something is wrong
STOP_SECONDS = 40.0  # a process gets to end after SIGTERM; longer than SHUTDOWN_TIMEOUT

# A demo has no hour to wait: shorter leases and delays than the defaults, nothing else is different.
SETTINGS = {
    "HTTP_PORT": "0",
    "METRICS_PORT": "off",
    "LEASE_SECONDS": "8",
    "MAX_ATTEMPTS": "3",
    "BACKOFF_BASE": "0.5",
    "POLL_INTERVAL": "2",
    "STATS_INTERVAL": "5",
}


@dataclass(frozen=True)
class Fates:
    """What became of the mails of the ledger. `strange`: ids with a result or a dead letter that the ledger does not know."""

    received: int
    done: int
    dead: int
    lost: tuple[str, ...]
    twice: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def hold(self) -> bool:
        return not (self.lost or self.twice or self.strange)

    def __str__(self) -> str:
        equals = "=" if self.received == self.done + self.dead else "!="
        return (
            f"{self.received} received {equals} {self.done} done + {self.dead} dead · "
            f"{len(self.lost)} lost · {len(self.twice)} twice"
        )


def fates(ledger: Sequence[str], results: Iterable[str], letters: Iterable[str]) -> Fates:
    """Compare ids: of the mails delivered, of the entries of the results stream, of the dead letters. Pure."""
    known, finished, buried = set(ledger), Counter(results), Counter(letters)
    return Fates(
        received=len(ledger),
        done=len(known & finished.keys()),
        dead=len(known & (buried.keys() - finished.keys())),
        lost=tuple(sorted(known - finished.keys() - buried.keys())),
        twice=tuple(sorted(email_id for email_id in known if finished[email_id] + buried[email_id] > 1)),
        strange=tuple(sorted((finished.keys() | buried.keys()) - known)),
    )


@dataclass(frozen=True)
class Numbers:
    """Where the mails are now. `waiting`: in the stream and not yet handed to a worker."""

    received: int
    waiting: int
    in_flight: int
    retry: int
    done: int
    dead: int

    @property
    def unfinished(self) -> int:
        return self.waiting + self.in_flight + self.retry

    @property
    def ended(self) -> int:
        return self.done + self.dead

    def shown(self) -> list[tuple[str, int]]:
        names = ("received", "in stream", "in flight", "retry", "done", "dead")
        return list(zip(names, (self.received, self.waiting, self.in_flight, self.retry, self.done, self.dead), strict=True))


class Interrupted(Exception):
    """A signal asked the demo to end."""


class Stuck(Exception):
    """The pipeline does not get on; the text says why."""


class Screen:
    """A live table on a terminal, a line now and then elsewhere; what happens is told in lines in both. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=10, transient=True) if console.is_terminal else None
        self._began = self._told = time.monotonic()
        self._last: Numbers | None = None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:5.1f} s  {text}")

    def show(self, numbers: Numbers) -> None:
        if self._live:
            table = Table(*(name for name, _ in numbers.shown()))
            table.add_row(*(str(value) for _, value in numbers.shown()))
            self._live.update(table)
        elif numbers != self._last and time.monotonic() - self._told >= LINE_EVERY:
            self._told, self._last = time.monotonic(), numbers
            self.say(" · ".join(f"{value} {name}" for name, value in numbers.shown()))


@dataclass
class Demo:
    """The pipeline of one demo. `folder`: where all of it lives. Leaving `run` ends every process that it started."""

    emails: int
    folder: Path
    screen: Screen
    stop: threading.Event
    redis: RedisClient
    redis_url: str
    keys: Keys = field(default_factory=lambda: Keys(STREAM))
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # the story

    def play(self) -> None:
        """Until every mail has its end. Raises Interrupted or Stuck."""
        at_first, say = max(1, self.emails // 5), self.screen.say
        say(f"a sandbox Gmail with {at_first} mails, a Valkey of our own; everything is in {self.folder}")
        self.start_sandbox(at_first)
        self.start_producer("producer-1")
        self.start_worker("worker-1")
        self.start_worker("worker-2")
        self.watch(lambda at: at.ended > 0)

        rest = self.emails - at_first
        seconds = min(10.0, max(3.0, rest / 40))
        say(f"{rest} more mails of {seconds:.0f} s begin to arrive")
        self.deliver(rest, rate=rest / seconds)
        self.watch(lambda at: at.ended >= self.emails / 4 and (self.held_by("worker-1") > 0 or at.unfinished == 0))

        self.kill("worker-1")
        say(f"worker-1 was killed (SIGKILL), mails in its hands: {self.held_by('worker-1')}; worker-3 takes its place")
        self.start_worker("worker-3")
        self.watch(lambda at: at.received >= 0.7 * self.emails)

        self.end("producer-1")
        say("the producer was stopped (SIGTERM) and is started again, while mail goes on arriving")
        self.start_producer("producer-2")
        self.watch(lambda at: at.ended >= self.emails and at.unfinished == 0)
        say("every mail has its end")

    def watch(self, until: Callable[[Numbers], bool]) -> None:
        """Show the numbers until `until` says so. Raises Interrupted; Stuck where a process ended or nothing moves."""
        last, moved = None, time.monotonic()
        while True:
            numbers = self.numbers()
            self.screen.show(numbers)
            if until(numbers):
                return
            if numbers != last:
                last, moved = numbers, time.monotonic()
            elif time.monotonic() - moved > STUCK_SECONDS:
                raise Stuck(f"nothing moved for {STUCK_SECONDS:g} s")
            self.check_processes()
            if self.stop.wait(TICK):
                raise Interrupted

    # its processes

    def start_sandbox(self, emails: int) -> None:
        folder = self.folder / "sandbox"  # where producer.py --sandbox looks for it
        options = ["--state-file", str(folder / "sandbox.json"), "--token-dir", str(folder / "tokens")]
        self.start("sandbox", ["-m", "src.sandbox", "--account", ACCOUNT, "--emails", str(emails), *options])
        while not (folder / "sandbox.json").exists():
            self.check_processes()
            if self.stop.wait(TICK):
                raise Interrupted

    def start_producer(self, name: str) -> None:
        self.start(name, [str(ROOT / "producer.py"), "--sandbox"])

    def start_worker(self, name: str) -> None:
        self.start(name, [str(ROOT / "worker.py"), "--consumer", name, "--handler", HANDLER])

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Its own session, so that Ctrl-C reaches the demo alone; it ends the others in order."""
        with (self.folder / f"{name}.log").open("wb") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,  # not where the user's .env, data/ and tokens/ are
                env=environment(os.environ, self.folder, self.redis_url, self.emails),
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def end(self, *names: str) -> None:
        """SIGTERM, then wait for each; SIGKILL for one that does not end."""
        ending = [self.processes.pop(name) for name in names]
        for process in ending:
            process.terminate()
        for process in ending:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def end_all(self) -> None:
        self.end(*self.processes)

    def end_daemons(self) -> None:
        self.end(*(name for name in self.processes if name != "sandbox"))

    def check_processes(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise Stuck(f"{name} ended with exit code {process.returncode}: {self.last_words(name)}")

    def last_words(self, name: str) -> str:
        """Its last error, else its last line."""
        lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if '"level": "ERROR"' in line]
        return (errors or lines or ["it wrote nothing"])[-1]

    # what it sees

    def numbers(self) -> Numbers:
        by_consumer = self.pending()
        length, in_flight, retry = self.redis.length(self.keys.stream), sum(by_consumer.values()), self.retries()
        return Numbers(
            received=self.sandbox("/ledger?summary=1")["mails"],
            waiting=max(0, length - in_flight - retry),
            in_flight=in_flight,
            retry=retry,
            done=self.redis.length(self.keys.results),
            dead=self.redis.length(self.keys.dlq),
        )

    def retries(self) -> int:
        return int(self.redis.call("ZCARD", self.keys.due))

    def pending(self) -> dict[str, int]:
        """Consumer → how many mails it holds."""
        try:
            summary = self.redis.call("XPENDING", self.keys.stream, GROUP)
        except GroupMissing:  # no worker has joined yet
            return {}
        return {name: int(count) for name, count in summary[3] or ()}

    def held_by(self, worker: str) -> int:
        return sum(count for name, count in self.pending().items() if name.startswith(f"{worker}-"))

    def fates(self) -> Fates:
        """The sandbox's ledger against the results stream and the dead letters."""
        return fates(
            [f"gm:{mail['account']}:{mail['gm_msgid']}" for mail in self.sandbox("/ledger")["mails"]],
            [fields.get("email_id", "") for fields in every(self.redis, self.keys.results)],
            [fields.get("email_id", "") for fields in every(self.redis, self.keys.dlq)],
        )

    def why_dead(self) -> Counter[str]:
        return Counter(fields.get("dead_reason", "") for fields in every(self.redis, self.keys.dlq))

    def deliver(self, count: int, rate: float) -> None:
        if count:
            self.sandbox("/deliver", {"account": ACCOUNT, "generate": {"count": count, "seed": 2, "rate": rate}})

    def sandbox(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://{self.sandbox_address()}{path}", data=data, timeout=30) as answer:
            return json.load(answer)

    def sandbox_address(self) -> str:
        return f"127.0.0.1:{json.loads((self.folder / 'sandbox' / 'sandbox.json').read_text())['http_port']}"

    def health_address(self, name: str) -> str:
        found = re.search(r"http://[\d.:]+/health", (self.folder / f"{name}.log").read_text(errors="replace"))
        return found[0] if found else ""


def environment(caller: Mapping[str, str], folder: Path, redis_url: str, emails: int) -> dict[str, str]:
    """The caller's environment without any setting of ours in it, and the demo's own. Pure."""
    ours = {setting.alias for section in SECTIONS.values() for setting in section.model_fields.values()}
    return {
        **{name: value for name, value in caller.items() if name not in ours},
        **SETTINGS,
        "REDIS_URL": redis_url,
        "DATA_DIR": str(folder),
        "RESULTS_MAX": str(10 * emails),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def every(redis: RedisClient, stream: str) -> Iterator[Fields]:
    """The fields of each entry of a stream, in order."""
    after = "-"
    while page := redis.entries(stream, after, count=1000):
        yield from (fields for _, fields in page)
        after = f"({page[-1][0]}"


def kept(demo: Demo) -> str:
    """What to look at while the demo goes on: commands that work as they stand."""
    ask = f"redis-cli -s {demo.redis_url.removeprefix('unix://')}"
    if not shutil.which("redis-cli"):  # the wheel of the embedded server brings none
        program = (
            "import redis, sys; print(redis.Redis.from_url(sys.argv[1], decode_responses=True).execute_command(*sys.argv[2:]))"
        )
        ask = f'{sys.executable} -c "{program}" {demo.redis_url}'
    deliver = json.dumps({"account": ACCOUNT, "generate": {"count": 20, "seed": 3}})
    return f"""
It goes on running. To look at it, from another terminal:
  the group           {ask} XINFO GROUPS {demo.keys.stream}
  the last results    {ask} XREVRANGE {demo.keys.results} + - COUNT 3
  a dead letter       {ask} XRANGE {demo.keys.dlq} - + COUNT 1
  how far it read     {ask} GET producer_state:{ACCOUNT}:INBOX:last_uid
  health              curl {demo.health_address("producer-2")}   curl {demo.health_address("worker-2")}
  20 more mails       curl -d '{deliver}' {demo.sandbox_address()}/deliver
  all that came       curl '{demo.sandbox_address()}/ledger?summary=1'
  logs                tail -f {demo.folder}/*.log
To stop it: Ctrl-C here, or: kill {os.getpid()}
"""


REAL_ACCOUNT = """
With a real account (what Google wants first: docs/OAUTH2_SETUP.md):
  .venv/bin/python producer.py --auth-setup    asks for your consent, once
  .venv/bin/python producer.py --dry-run       shows what would be read; nothing is written
  .venv/bin/python producer.py                 from the mailbox into the stream
  .venv/bin/python worker.py                   from the stream to your code (--handler package.module:function)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every mail stands in exactly one place. 1: it does not, or nothing moved any more. 130: interrupted."""
    options = _options(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    folder = Path(tempfile.mkdtemp(prefix="email-twins-demo-"))
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)  # what is printed is not rich's markup
    try:
        code = run(options.emails, folder, console, stop, keep=options.keep)
    except Interrupted:
        console.print("interrupted: everything that was started is ended")
        code = 130
    except Stuck as error:
        console.print(f"FAILED: {error}")
        code = 1
    if code == 1:
        console.print(f"The logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def run(emails: int, folder: Path, console: Console, stop: threading.Event, *, keep: bool) -> int:
    """Play the demo and judge it; with `keep` go on until `stop`. Nothing of it runs any more afterwards."""
    with Embedded(folder, tcp=False) as server, RedisClient.connect(server.url, max_connections=4, socket_timeout=30) as redis:
        screen = Screen(console)
        demo = Demo(emails, folder, screen, stop, redis, server.url)
        try:
            with screen:
                demo.play()
                if not keep:
                    demo.end_daemons()
            code = judge(demo.fates(), demo.why_dead(), console.print)
            if keep:
                console.print(kept(demo))
                stop.wait()
        finally:
            demo.end_all()
    return code


def judge(result: Fates, why_dead: Mapping[str, int], tell: Callable[[str], None]) -> int:
    """Tell how it ended; the exit code."""
    for what, email_ids in (("lost", result.lost), ("twice", result.twice), ("of no mail delivered", result.strange)):
        for email_id in email_ids[:20]:
            tell(f"{what}: {email_id}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(why_dead.items()))
    tell(f"dead letters by reason: {reasons or 'none'}")
    if result.hold:
        tell(REAL_ACCOUNT)
    tell(f"\n{result}")
    return 0 if result.hold else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/demo.sh", description="The email twins at work on a sandbox Gmail.")
    parser.add_argument("--emails", type=_emails, default=500, metavar="N", help="how many mails arrive; default: 500")
    parser.add_argument("--keep", action="store_true", help="leave it running at the end and say what to look at")
    return parser.parse_args(arguments)


def _emails(value: str) -> int:
    if not re.fullmatch(r"\d{1,6}", value) or not 1 <= int(value) <= 100_000:
        raise argparse.ArgumentTypeError(f"{value} is no number from 1 to 100000")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
