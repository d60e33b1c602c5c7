"""Faults at random on real processes, for as long as wanted: `python -m tests.load.soak --minutes 30 [--seed S]`.

Two producers and three workers between a sandbox Gmail and a Valkey with an append-only file, each behind a proxy; mail arrives all the
time; every second or two something goes wrong. At the end nothing goes wrong any more, everything comes to rest, and every mail that was
delivered is accounted for:

- it is done once or dead, in one place only (`tests/support/account.py`), and its result is written once: `kill -9` of Redis loses
  nothing that was answered (the append-only file is written before the answer), so this is one Redis history;
- dead are those whose order says so (`permanent`, `kill`). Another mail may be buried as poison only if its handler was begun more often
  than POISON_STARTS: a mail that was alone in its process each time chaos killed it is not told from one that kills;
- effects outside may repeat (at least once): how many mails ran to the end of their handler more than once is printed, not judged;
- no daemon ends unless something was done to it, or a mail in it said `kill`, or it stood still past its lease.

The seed decides which faults come when; what processes do meanwhile it cannot decide. Exit code 1: the books do not balance.
"""

from __future__ import annotations

import argparse
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import redis

from src.sandbox.server import Sandbox
from tests.load import handler
from tests.support.account import Books, assert_accounted
from tests.support.daemons import Daemon
from tests.support.pipeline import Pipeline
from tests.support.proxy import FaultProxy
from tests.support.servers import RedisServer

LEASE, PRODUCER_LEASE, POISON_STARTS, MAX_ATTEMPTS = 4.0, 3.0, 3, 4
REST = 240.0  # seconds until everything must have come to rest
LINE_EVERY = 10.0
KILL_EVERY = 15.0  # seconds between two mails that kill their process: each costs several workers
NAMES = ("producer-1", "producer-2", "worker-1", "worker-2", "worker-3")
ORDERS = [*["fine"] * 10, "slow 20", "slow 200", "slow 1500", "fail 1", "fail 2", "permanent"]
SETTINGS = {
    "WORKER_HANDLER": "tests.load.handler:soak",
    "LEASE_SECONDS": str(LEASE),
    "PRODUCER_LEASE": str(PRODUCER_LEASE),
    "POISON_STARTS": str(POISON_STARTS),
    "MAX_ATTEMPTS": str(MAX_ATTEMPTS),
    "PRODUCER_BATCH_SIZE": "10",
    "REDIS_SOCKET_TIMEOUT": "3",
    "IMAP_TIMEOUT": "4",
    "RESULTS_MAX": "10000000",
    "SHUTDOWN_TIMEOUT": "5",
    "CONNECTIONS_WAIT": "2",
    "RELIST_INTERVAL": "5",
}


@dataclass
class Soak:
    """`orders`: email_id → order. `later`: (moment, what is to be done then). `ends`: what ended a daemon that nobody touched."""

    pipeline: Pipeline
    sandbox: Sandbox
    redis: RedisServer
    to_redis: FaultProxy
    to_imap: FaultProxy
    stack: ExitStack
    draw: random.Random
    say: Callable[[str], None]
    orders: dict[str, str] = field(default_factory=dict)
    running: dict[str, Daemon] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    later: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    ends: list[str] = field(default_factory=list)
    next_kill: float = 0.0

    def __post_init__(self) -> None:
        self.mishaps: dict[str, Callable[[], object]] = {
            "worker SIGKILL": partial(self.signal, "worker", signal.SIGKILL),
            "producer SIGKILL": partial(self.signal, "producer", signal.SIGKILL),
            "worker SIGTERM": partial(self.signal, "worker", signal.SIGTERM),
            "producer SIGTERM": partial(self.signal, "producer", signal.SIGTERM),
            "worker SIGSTOP": partial(self.freeze, "worker", LEASE),
            "producer SIGSTOP": partial(self.freeze, "producer", PRODUCER_LEASE),
            "SIGTERM, then SIGKILL": self.restart_storm,
            "Redis kill -9": self.restart_redis,
            "Redis frozen": self.freeze_redis,
            "CLIENT KILL": self.kill_clients,
            "Redis connections cut": self.to_redis.cut,
            "Redis reply lost": partial(self.cut_after, self.to_redis, "to_client", 300),
            "Redis request lost": partial(self.cut_after, self.to_redis, "to_server", 3_000),
            "Redis held": partial(self.stall, self.to_redis),
            "Redis refused": partial(self.refuse, self.to_redis),
            "IMAP sessions cut": self.sandbox.cut,
            "IMAP reply cut": partial(self.cut_after, self.to_imap, "to_client", 20_000),
            "IMAP request cut": partial(self.cut_after, self.to_imap, "to_server", 200),
            "IMAP held": partial(self.stall, self.to_imap),
            "IMAP refused": partial(self.refuse, self.to_imap),
            "FETCH cut in a literal": lambda: self.sandbox.faults.drop_after_bytes(self.draw.randrange(100, 5_000)),
            "IMAP half open": self.sandbox.faults.half_open,
            "BYE": self.sandbox.faults.bye,
            "garbage": self.sandbox.faults.garbage,
            "news are not pushed": self.sandbox.faults.mute_idle,
            "UIDVALIDITY": lambda: self.sandbox.change_uidvalidity(self.pipeline.account, shuffle=True),
            "token revoked": self.revoke_token,
            "token endpoint 503": self.token_endpoint_away,
            "dead letters replayed": self.replay,
            "mail that kills": self.deliver_killer,
        }

    # the story

    def play(self, seconds: float) -> None:
        """Faults for so long, then rest. Raises AssertionError."""
        for name in NAMES:
            self.start(name)
        self.pipeline.wait_for_first_poll()
        began = told = time.monotonic()
        next_mishap, pause = began, threading.Event()
        while (now := time.monotonic()) - began < seconds:
            self.deliver([self.draw.choice(ORDERS) for _ in range(self.draw.randrange(1, 12))])
            if now >= next_mishap:
                next_mishap = now + self.draw.uniform(0.5, 2.0)
                name = self.draw.choice([*self.mishaps])
                self.faults[name] += 1
                self.mishaps[name]()
            self.turn()
            if now - told > LINE_EVERY:
                told = now
                self.say(
                    f"{now - began:5.0f} s  {len(self.orders)} mails, {self.faults.total()} faults, {self.starts.total()} starts"
                )
            pause.wait(0.2)
        self.say(f"{seconds:5.0f} s  nothing goes wrong any more")
        self.rest()

    def turn(self) -> None:
        """Do what is due, and start again what has ended, as a supervisor would."""
        now = time.monotonic()
        due = [action for moment, action in self.later if moment <= now]
        self.later = [(moment, action) for moment, action in self.later if moment > now]
        for action in due:
            action()
        for name, daemon in [*self.running.items()]:
            if not daemon.running():
                self.judge_end(name, daemon)
                self.start(name)

    def rest(self) -> None:
        """Everything is repaired, what is late is done at once, producers begin afresh (their pauses had grown); then wait."""
        self.sandbox.faults.clear()
        for _, action in self.later:
            action()
        self.later = []
        self.pipeline.write_token(self.pipeline.account)
        for name in NAMES[:2]:
            self.touch(self.running[name]).send(signal.SIGTERM)
        deadline, pause = time.monotonic() + REST, threading.Event()
        wanted = set(self.orders)
        while True:
            self.turn()
            books = self.pipeline.books()
            if wanted <= books.fates() and not books.stream:
                break
            left = [self.orders[email_id] for email_id in wanted - books.fates()]
            assert time.monotonic() < deadline, f"{len(left)} mails have no end after {REST:g} s: {left[:10]}"
            pause.wait(0.5)
        codes = {name: self.touch(daemon).terminate() for name, daemon in self.running.items()}
        assert set(codes.values()) == {0}, f"exit codes after SIGTERM: {codes}"
        assert not self.ends, f"daemons ended by themselves: {self.ends}"

    def check(self) -> str:
        """Account for every mail; what it came to. Raises AssertionError."""
        books, journal = self.pipeline.books(), handler.read(self.pipeline.journal)
        ordered = {"permanent": "permanent", "kill": "poison"}
        dead = {email_id: ordered[order] for email_id, order in self.orders.items() if order in ordered}
        unlucky = {email_id for email_id, reason in books.reasons.items() if reason == "poison" and email_id not in dead}
        few = [email_id for email_id in unlucky if journal["begin"][email_id] <= POISON_STARTS]
        assert not few, f"buried as poison after {[journal['begin'][email_id] for email_id in few]} starts"
        assert_accounted(books, [*self.orders], dead=dead | dict.fromkeys(unlucky, "poison"))
        return self.summary(books, unlucky, sum(1 for times in journal["end"].values() if times > 1))

    def summary(self, books: Books, unlucky: set[str], repeated: int) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(books.reasons.values()).items())
        return (
            f"{len(self.orders)} received = {len(books.done)} done + {len(books.dead)} dead ({reasons}) · 0 lost · 0 twice\n"
            f"{repeated} mails ran to the end of their handler more than once (at least once is the promise); "
            f"{len(unlucky)} innocent mails were buried as poison\n"
            f"{self.starts.total()} starts of daemons, {self.faults.total()} faults: "
            + ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        )

    # mail

    def deliver(self, orders: list[str]) -> None:
        body = b"x" * self.draw.choice([100, 1_000, 20_000]) + b"\r\n"
        self.orders |= dict(zip(self.pipeline.deliver(*orders, body=body), orders, strict=True))

    def deliver_killer(self) -> None:
        if time.monotonic() > self.next_kill:
            self.next_kill = time.monotonic() + KILL_EVERY
            self.deliver(["kill"])

    # daemons

    def start(self, name: str) -> None:
        start = self.pipeline.producer if name.startswith("producer") else self.pipeline.worker
        self.running[name] = self.stack.enter_context(start())
        self.starts[name] += 1

    def judge_end(self, name: str, daemon: Daemon) -> None:
        """An end that nobody brought about is one only if a mail did it (SIGKILL), the watchdog (it stood still past its lease), or a
        consent that was taken back just as the producer began."""
        code = daemon.exit_code()
        watchdog = code == 1 and "Timeout (" in daemon.output()
        killed = name.startswith("worker") and code == -signal.SIGKILL
        revoked = name.startswith("producer") and code == 3 and "refuses the token" in daemon.output()
        if daemon.pid not in self.touched and not (watchdog or killed or revoked):
            self.ends.append(f"{name}: exit code {code}: {daemon.output()[-1500:]}")

    def one(self, kind: str) -> Daemon:
        return self.touch(self.running[self.draw.choice([name for name in NAMES if name.startswith(kind)])])

    def touch(self, daemon: Daemon) -> Daemon:
        self.touched.add(daemon.pid)
        return daemon

    def signal(self, kind: str, number: signal.Signals) -> None:
        self.one(kind).send(number)

    def freeze(self, kind: str, lease: float) -> None:
        daemon = self.one(kind)
        daemon.freeze()
        self.at(self.draw.uniform(0.3, 2.0) * lease, daemon.thaw)

    def restart_storm(self) -> None:
        for name in NAMES:
            daemon = self.touch(self.running[name])
            daemon.send(signal.SIGTERM)
            self.at(self.draw.uniform(0, 0.5), partial(daemon.send, signal.SIGKILL))

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        self.later.append((time.monotonic() + seconds, action))

    # servers

    def restart_redis(self) -> None:
        self.redis.kill9()
        self.redis.start()

    def freeze_redis(self) -> None:
        self.redis.freeze()
        self.at(self.draw.uniform(0.5, 4.0), self.thaw_redis)

    def thaw_redis(self) -> None:
        self.redis.thaw()

    def kill_clients(self) -> None:
        with suppress(redis.RedisError):  # it may be frozen
            self.redis.client(socket_timeout=1).execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def cut_after(self, proxy: FaultProxy, direction: str, most: int) -> None:
        proxy.cut_after(self.draw.randrange(most), direction)  # type: ignore[arg-type]

    def stall(self, proxy: FaultProxy) -> None:
        proxy.stall(True)
        self.at(self.draw.uniform(0.5, 5.0), partial(proxy.stall, False))

    def refuse(self, proxy: FaultProxy) -> None:
        proxy.refuse(True)
        proxy.cut()
        self.at(self.draw.uniform(0.2, 2.0), partial(proxy.refuse, False))

    def revoke_token(self) -> None:
        account = self.pipeline.account
        self.sandbox.revoke(account)
        self.sandbox.expire_tokens()
        self.sandbox.cut()
        self.at(self.draw.uniform(1.0, 4.0), partial(self.pipeline.write_token, account))

    def token_endpoint_away(self) -> None:
        self.sandbox.faults.token_answer(503, times=self.draw.randrange(1, 3))
        self.sandbox.expire_tokens()
        self.sandbox.cut()

    def replay(self) -> None:
        """As a person would: the command, while everything runs; it may fail while Redis is away."""
        env = {"REDIS_URL": self.redis.url, "LOG_FORMAT": "text"}
        self.stack.enter_context(Daemon("scripts/dlq.py", "replay", "--all", env=env, tmp=self.pipeline.tmp))


def run(seconds: float, seed: int, folder: Path, say: Callable[[str], None]) -> str:
    """The summary of a soak that balanced. Raises AssertionError."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox())
        server = stack.enter_context(RedisServer("valkey", appendonly=True))
        to_redis = stack.enter_context(FaultProxy(server.socket_path))
        to_imap = stack.enter_context(FaultProxy(sandbox.imap_port))
        env = {**SETTINGS, "REDIS_URL": f"redis://127.0.0.1:{to_redis.port}/0", "IMAP_PORT": str(to_imap.port)}
        pipeline = Pipeline(sandbox, server, folder, **env, LOAD_JOURNAL=str(folder / "journal"))
        soak = Soak(pipeline, sandbox, server, to_redis, to_imap, stack, random.Random(seed), say)
        try:
            soak.play(seconds)
            return soak.check()
        except AssertionError as error:  # not through the daemons' contexts: each would print its last lines
            failure = error
    raise failure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.soak", description=(__doc__ or "").partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30, metavar="M", help="default: 30")
    length.add_argument("--seconds", type=float, metavar="S", help="instead of minutes")
    parser.add_argument("--seed", type=int, metavar="S", help="which faults come when; default: a new one")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else secrets.randbelow(1_000_000)
    seconds = given.seconds or 60 * given.minutes
    print(f"seed {seed}, {seconds:g} s of faults", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        print(run(seconds, seed, folder, partial(print, flush=True)))
    except AssertionError as error:
        print(f"FAILED: {error}\nlogs and journal: {folder}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
