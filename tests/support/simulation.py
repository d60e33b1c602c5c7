"""A run of several processes in which a seed decides everything: who goes on, what breaks, when time passes, what the world does.

Each process is the real code in a thread of its own, and one of them runs at a time: before every round trip it hands the baton back
(`_Turns`), and the seed says who takes the next step and what becomes of it. Leases are an hour long, so that none runs out by
itself; time passes only when the seed says so, by making everything that stands in Redis older (`AN_HOUR_PASSES`).

What a seed does not decide: the ids that the server gives to entries, random nonces, and the words of an error when a session ends.
None of these decides anything in the code under test, so a seed tells the same story again (`Story.digest`).
"""

from __future__ import annotations

import copy
import hashlib
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from config.settings import load_settings
from src.common import redis_client
from src.common.exceptions import Permanent, Transient
from src.common.keys import Keys
from src.common.redis_client import Arg, RedisClient, Transport
from src.common.scripts import LUA
from src.imap.connection import ImapEndpoint
from src.imap.imap_client import ImapMailbox
from src.mail.record import Email, gmail_email_id
from src.producer.repair import recount
from src.sandbox.server import Sandbox
from src.worker import dlq
from src.worker.context import Context
from src.worker.processor import Started
from tests.support.account import GROUP, assert_accounted, read_books
from tests.support.faulty import Crash, Fault, FaultyTransport, Process, Trips
from tests.support.inline import MAILBOX, SETTINGS, Hangs, InlineProducer, InlineWorker, World
from tests.support.servers import RedisServer

HOUR = 3600
ALL_MAIL = "[Gmail]/All Mail"
PRODUCERS = {"producer 1": MAILBOX, "producer 2": MAILBOX, "producer 3": ALL_MAIL}  # the same mails in two folders
WORKERS = ("worker 1", "worker 2", "worker 3")
CRITICAL = {f"redis {name}" for name in ("publish", "begin", "complete", "fail", "release")}
POISON_STARTS = 8  # above MOST_CRASHES + MOST_FROZEN, each of which may leave one start unfinished: no innocent mail is buried
MOST_CRASHES = 3
MOST_FROZEN = 4
MOST_LOST = 6  # requests and replies
MOST_RENUMBERED = 2
MOST_COPIES = 2
MOST_STEPS = 8_000
STILL = 30  # steps without an event after which, in the calm, time passes

# Everything that stands in Redis becomes older: deliveries, the mailbox's lease, due times. Fences are left as they are.
PENDING = """
local rows = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 10000)
if rows.err then rows = {} end  -- no group yet, or forgotten
"""
AN_HOUR_PASSES = f"""
{PENDING}
local ms = tonumber(ARGV[2]) * 1000
for _, row in ipairs(rows) do
  if #redis.call('XRANGE', KEYS[1], row[1], row[1]) == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], row[2], 0, row[1], 'IDLE', string.format('%.0f', row[3] + ms), 'RETRYCOUNT', row[4], 'JUSTID')
  end
end
for i = 3, #KEYS do
  local ends = redis.call('HGET', KEYS[i], 'until')
  if ends then redis.call('HSET', KEYS[i], 'until', string.format('%.0f', ends - ms * 1000)) end
end
for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do redis.call('ZINCRBY', KEYS[2], -ms, member) end
"""


def _names_of_scripts() -> Mapping[str, str]:
    """Digest → name, as the client knows them: of a mutant too."""
    return {redis_client.load(path.stem).sha: path.stem for path in LUA.glob("*.lua")}


class _NoWaiting:
    """A transport whose reads return at once: nothing can come while a process waits, since only one runs at a time."""

    def __init__(self, real: Transport) -> None:
        self._real = real

    def execute_command(self, *args: Arg) -> Any:
        if args[0] == "XREADGROUP" and "BLOCK" in args:
            at = args.index("BLOCK")
            args = args[:at] + args[at + 2 :]
        return self._real.execute_command(*args)

    def close(self) -> None:
        """The real transport is shared: it stays open."""


class Actor:
    """One thread of a process (`process`, which several may share): alive until its body returned or the process died.

    `at`: the round trip before which it stands; "idle": none, it has nothing to do.
    """

    def __init__(self, name: str, process: Process, body: Callable[[], None]) -> None:
        self.name = name
        self.process = process
        self.at = "start"
        self.frozen_until = 0
        self.alive = True
        self.error: BaseException | None = None
        self._fault: Fault | None = None
        self._body = body
        self._mine, self._back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def step(self, fault: Fault | None) -> None:
        """Let it take the trip before which it stands, with this fault, up to its next one."""
        self._fault = fault
        self._mine.release()
        self._back.acquire()

    def wait_for_turn(self, at: str) -> Fault | None:
        self.at = at
        self._back.release()
        self._mine.acquire()
        return self._fault

    def idle(self) -> None:
        """A step without a round trip."""
        self.wait_for_turn("idle")
        if self.process.dead:
            raise Crash

    def _run(self) -> None:
        self._mine.acquire()
        try:
            self._body()
        except Crash:
            self.process.doom()
        except BaseException as error:  # noqa: BLE001  # the edge of the thread: the story ends with it
            self.error = error
        self.alive = False
        self._back.release()


class _Turns(Trips):
    """The round trips of one process: before each its running thread waits for its turn, and hears what becomes of the trip."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: dict[str, Actor] = {}
        self._scripts = _names_of_scripts()

    def fault_of_next(self, kind: str, what: str) -> Fault | None:
        command, _, first = what.partition(" ")
        at = self._scripts.get(first, "script") if command == "EVALSHA" else command
        return self.actors[threading.current_thread().name].wait_for_turn(f"{kind} {at}")


@dataclass
class Worker:
    """What the threads of one worker process share. `asked`: it was told to stop. `busy`: deliveries (stream id, count) that were
    started and are not settled."""

    inline: InlineWorker
    ready: deque[Started] = field(default_factory=deque)
    busy: set[tuple[str, int]] = field(default_factory=set)
    asked: bool = False


@dataclass(frozen=True)
class Stage:
    """Servers that many stories share, one after the other. `valkey` is emptied by each, `sandbox` gets an account for each."""

    valkey: RedisServer
    sandbox: Sandbox
    client: RedisClient

    def world(self, account: str, folder: Path) -> World:
        """An empty server and mailbox."""
        sandbox = self.sandbox
        sandbox.add_account(account)
        grant = {
            "grant_type": "refresh_token",
            "client_id": sandbox.client_id,
            "client_secret": sandbox.client_secret,
            "refresh_token": sandbox.tokens.refresh_token(account),
        }
        token = str(sandbox.tokens.grant(grant).body["access_token"])
        endpoint = ImapEndpoint(sandbox.host, sandbox.imap_port, "none", 10.0, None)
        world = World(self.valkey.client(), _NoWaiting(self.client._transport), endpoint, account, token)
        world.settings = load_settings(
            {**SETTINGS, "LEASE_SECONDS": HOUR, "PRODUCER_LEASE": HOUR, "POISON_STARTS": POISON_STARTS}, env_file=None
        )
        world.renew(folder)
        return world


@dataclass
class Story:
    """What seed `seed` tells: `play`, then `check`. Raises AssertionError; `told` are the steps so far, `faults` what went wrong."""

    stage: Stage
    seed: int
    folder: Path
    told: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    effects: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    trips: int = 0

    def __post_init__(self) -> None:
        draw = self.draw = random.Random(self.seed)
        self.account = f"seed{self.seed}.{len(self.stage.sandbox.accounts())}@gmail.example"  # a fresh one each time it is told
        self.world = self.stage.world(self.account, self.folder)
        self.raw = self.stage.valkey.client(decode_responses=False)
        self.keys: Keys = self.world.keys
        self.subjects: dict[str, str] = {}
        self.calm = self.over = False
        self.crashes = self.frozen = self.lost = self.replays = self.copies = 0
        self.quiet = 0  # steps since the last event
        self.finished: set[str] = set()
        self.fences: dict[str, tuple[str, int]] = {}  # stream id → the last (consumer, delivery count) seen
        self.last: Actor | None = None  # who took the last step, and goes on more often than not
        self.snapshot: dict[bytes, bytes] | None = None
        orders = [*["done"] * 6, *["retry"] * 3, "dead", *(["kill"] if draw.random() < 0.3 else [])]
        draw.shuffle(orders)
        self.to_come = orders[5:]
        for subject in orders[:5]:
            self._deliver(subject)
        self.storm = draw.randrange(120, 320)  # steps
        self.forgets = draw.choice(["", "", "", "flush", "rollback"])
        self.workers: dict[str, Worker] = {}
        self.processes = {name: self._start(name) for name in [*PRODUCERS, *WORKERS, "operator"]}

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.told).encode()).hexdigest()[:12]

    # the story

    def play(self) -> None:
        """From the first mail until every process has come to rest."""
        try:
            while living := [actor for actors in self.processes.values() for actor in actors if actor.alive]:
                self._turn(living)
                if self.trips > MOST_STEPS:
                    raise Hangs(
                        f"no end after {MOST_STEPS} steps: {', '.join(f'{actor.name} at {actor.at}' for actor in living)}"
                    )
        finally:
            self._end_all()

    def _turn(self, living: list[Actor]) -> None:
        self.trips += 1
        self.quiet += 1
        if not self.calm:
            self._weather()
            if self.trips > self.storm and not self.to_come:
                self._event("calm")
                self.calm = True
                self.finished.clear()
        elif self.quiet > STILL and not any(worker.inline.consumer.in_flight() for worker in self.workers.values()):
            self._event("an hour passes")
            self._an_hour_passes()
        if self.calm and set(PRODUCERS) <= self.finished and self.world.stream_is_empty():
            self.over = True
        awake = [actor for actor in living if actor.frozen_until <= self.trips]
        if not awake:
            return
        if self.last not in awake or self.draw.random() < 0.3:
            self.last = self.draw.choice(awake)
        actor = self.last
        fault = None if self.calm else self._fault_for(actor)
        if fault is Fault.MEANWHILE:  # it stands still instead
            return
        self.told.append(f"{actor.name}: {actor.at}{f', {fault.value}' if fault else ''}")
        actor.step(fault)
        if actor.error is not None:
            raise actor.error
        if actor.at != "idle":
            self._look_at_fences()
        self._restart(actor.name.partition("/")[0])

    def _restart(self, name: str) -> None:
        """Another process in place of one that died or was stopped."""
        actors = self.processes[name]
        dead = any(actor.process.dead for actor in actors)
        stopped = name in self.workers and self.workers[name].asked and not self.over
        if not (dead or stopped) or (stopped and not dead and any(actor.alive for actor in actors)):
            return
        for actor in actors:
            while actor.alive:
                actor.step(Fault.CRASH_BEFORE)
        self._event(f"{name} starts again")
        self.processes[name] = self._start(name)

    def _end_all(self) -> None:
        for actors in self.processes.values():
            for actor in actors:
                actor.process.doom()
                while actor.alive:
                    actor.step(Fault.CRASH_BEFORE)

    def _event(self, what: str) -> None:
        self.told.append(f"-- {what}")
        self.quiet = 0

    # what goes wrong

    def _fault_for(self, actor: Actor) -> Fault | None:
        """What becomes of its next round trip. Fault.MEANWHILE: it stands still past its lease first."""
        chance = self.draw.random()
        if actor.at in ("start", "idle"):
            return None
        critical = actor.at in CRITICAL
        if critical and chance < (0.03 if actor.at == "redis publish" else 0.3) and self.frozen < MOST_FROZEN:
            self._freeze(actor)
            return Fault.MEANWHILE
        if chance > (0.85 if critical else 0.98):
            kinds = [Fault.CRASH_BEFORE, Fault.CRASH_AFTER, Fault.REQUEST_LOST, Fault.REPLY_LOST, Fault.REPLY_LOST]
            fault = self.draw.choice(kinds)
            if fault in (Fault.REQUEST_LOST, Fault.REPLY_LOST):
                self.lost += 1
                happens = self.lost <= MOST_LOST
            else:
                self.crashes += 1
                happens = self.crashes <= MOST_CRASHES
            if happens:
                self.faults[fault.value] += 1
                return fault
        return None

    def _freeze(self, actor: Actor) -> None:
        """Its whole process stands still while an hour passes, before whatever it was about to do."""
        self.frozen += 1
        thaws = self.trips + self.draw.randrange(100, 600)
        for thread in self.processes[actor.name.partition("/")[0]]:
            thread.frozen_until = thaws
        self.faults["frozen past the lease"] += 1
        self._event(f"{actor.name} stands still before {actor.at} and an hour passes")
        self._an_hour_passes()

    def _weather(self) -> None:
        """What the world does between two steps."""
        chance = self.draw.random()
        if chance < 0.03 and self.to_come:
            self._event("mail arrives")
            self._deliver(self.to_come.pop())
        elif chance < 0.034 and self.faults["uidvalidity"] < MOST_RENUMBERED:
            self.faults["uidvalidity"] += 1
            self._event("the folder is numbered anew")
            self.stage.sandbox.change_uidvalidity(self.account, shuffle=True)
        elif chance < 0.04:
            name = self.draw.choice(WORKERS)
            self.faults["stopped"] += 1
            self._event(f"{name} is told to stop")
            self.workers[name].asked = True
        elif chance < 0.05 and self.copies < MOST_COPIES:
            self._copy_an_entry(move=chance > 0.045)
        elif chance < 0.06 and self.forgets == "flush":
            self._forgot("flush", "Redis forgets everything")
            self.world.admin.flushall()
        elif chance < 0.08 and self.forgets == "rollback":
            if self.snapshot is None:
                self._event("Redis is copied")
                self.snapshot = {key: self.raw.dump(key) for key in self.raw.keys("*")}
            else:
                self._forgot("rollback", "Redis comes back older")
                self.raw.flushall()
                for key, content in self.snapshot.items():
                    self.raw.restore(key, 0, content)

    def _forgot(self, how: str, what: str) -> None:
        self.forgets = ""
        self.faults[how] += 1
        self.fences.clear()
        self._event(what)

    def _copy_an_entry(self, *, move: bool) -> None:
        """Somebody's hand: an entry is put into the stream once more; the first copy stays, or goes if nobody had it yet."""
        admin, stream = self.world.admin, self.keys.stream
        entries = [entry for entry in admin.xrange(stream) if not move or entry[0] not in self.fences]
        if not entries:
            return
        sid, fields = self.draw.choice(entries)
        self.copies += 1
        self.faults["moved" if move else "copied"] += 1
        self._event(f"an entry is {'moved' if move else 'copied'} by hand")
        admin.xadd(stream, fields)
        if move:
            admin.xdel(stream, sid)

    def _an_hour_passes(self) -> None:
        intakes = [self.keys.mailbox(self.account, name).intake for name in set(PRODUCERS.values())]
        self.world.admin.eval(AN_HOUR_PASSES, 2 + len(intakes), self.keys.stream, self.keys.due, *intakes, GROUP, HOUR + 1)

    # what must hold at every step

    def _look_at_fences(self) -> None:
        """Whoever gets an entry gets it with a delivery count that it never had: the fence of nobody before him fits it."""
        admin, keys = self.world.admin, self.keys
        rows = admin.execute_command("EVAL", f"{PENDING} return rows", 1, keys.stream, GROUP)
        now = {str(row[0]): (str(row[1]), int(row[3])) for row in rows}
        for sid, (owner, count) in now.items():
            before = self.fences.get(sid)
            assert before is None or count > before[1] or (owner, count) == before, (
                f"{sid} passes from {before} to {(owner, count)}"
            )
        for sid, (_, count) in self.fences.items():
            now.setdefault(sid, ("", count))  # it waits or is done; its count is remembered
        self.fences = now

    def _starts(self, worker: Worker, started: list[Started], *, in_time: bool) -> None:
        """What `take` gave may be handled: it is held at this moment, by this worker, and was not started by this delivery.

        `in_time`: no lease can have run out since the mail began; between its begin and that of a suspect one may.
        """
        for mail in started:
            sid, fence = mail.delivery.stream_id, (worker.inline.seat.consumer, mail.delivery.count)
            held = self.fences.get(sid, fence) == fence
            assert held or not (in_time or mail.alone), f"{sid} starts with {fence}, but {self.fences[sid]} holds"
            assert (sid, fence[1]) not in worker.busy, f"{sid} starts twice by one delivery"
            worker.busy.add((sid, fence[1]))

    # the processes

    def _start(self, name: str) -> list[Actor]:
        turns = _Turns()
        process = Process(turns)
        if name in PRODUCERS:
            bodies = {name: partial(self._produce, name, process)}
        elif name in WORKERS:
            inline = InlineWorker(self.world, process, partial(self._handle, process), room=3)
            worker = self.workers[name] = Worker(inline)
            bodies = {
                f"{name}/reader": partial(self._read, name, worker),
                f"{name}/settler": partial(self._settle, worker, turns, f"{name}/settler"),
            }
        else:
            bodies = {name: partial(self._operate, process)}
        turns.actors = {thread: Actor(thread, process, body) for thread, body in bodies.items()}
        return list(turns.actors.values())

    def _produce(self, name: str, process: Process) -> None:
        """Reads the mailbox again and again, a new owner each time; each producer has a disk of its own."""
        world = copy.copy(self.world)
        world.data_dir = self.folder / name
        while name not in self.finished:
            to_the_end = self.calm
            InlineProducer(world, process, PRODUCERS[name]).run()
            if to_the_end:
                self.finished.add(name)

    def _read(self, name: str, worker: Worker) -> None:
        """The reader of a worker: what it may handle goes to the settler. Told to stop it hands back what is in flight."""
        inline = worker.inline
        inline.join()
        while not self.over and not worker.asked:
            hours, told = self.faults["frozen past the lease"], len(self.told)
            started = inline.begin()
            self._look_at_fences()
            begins = sum(line.startswith(f"{name}/reader: redis begin") for line in self.told[told:])
            self._starts(worker, started, in_time=begins < 2 or hours == self.faults["frozen past the lease"])
            worker.ready += started
            inline.renew()
        worker.asked = True
        inline.stop()

    def _settle(self, worker: Worker, turns: _Turns, name: str) -> None:
        """Handles and settles, and renews leases where there is nothing to settle."""
        while not worker.asked:
            if worker.ready:
                mails = [worker.ready.popleft() for _ in range(len(worker.ready))]
                worker.inline.settle(mails)
                worker.busy -= {(mail.delivery.stream_id, mail.delivery.count) for mail in mails}
            elif worker.inline.consumer.in_flight():
                worker.inline.renew()
            else:
                turns.actors[name].idle()

    def _handle(self, process: Process, email: Email, context: Context) -> dict[str, Any]:
        self.effects[email.email_id, context.replays, context.attempt] += 1
        if email.subject == "dead":
            raise Permanent("as told")
        if email.subject == "kill":
            process.doom()
        if email.subject == "retry" and context.attempt == 1:
            raise RuntimeError("as told")
        return {"attempt": context.attempt}

    def _operate(self, process: Process) -> None:
        """A person replays what is dead while everything runs, asking twice."""
        client = RedisClient(FaultyTransport(self.world.transport, process))
        while not self.calm and self.replays == 0:
            with suppress(Transient):  # a person tries again
                letters = [letter for letter in dlq.look(client, self.keys) if letter.fields.get("dead_reason") == "permanent"]
                if letters:
                    self.replays += 1
                    dlq.replay(client, self.keys, letters)
                    dlq.replay(client, self.keys, letters)

    def _deliver(self, subject: str) -> None:
        moment = datetime(2026, 1, self.draw.choice([10, 11]), 12, tzinfo=UTC)
        self.stage.sandbox.deliver(self.account, f"Subject: {subject}\r\n\r\nx".encode(), internal_date=moment)
        email_id = gmail_email_id(self.account, self.stage.sandbox.ledger()[-1].gm_msgid)
        self.subjects[email_id] = subject

    # the books

    def check(self) -> None:
        """Every mail in one place, results once, each mailbox read to its end; raises AssertionError."""
        reasons = {"dead": "permanent", "kill": "poison"}
        dead = {email_id: reasons[subject] for email_id, subject in self.subjects.items() if subject in reasons}
        admin, keys = self.world.admin, self.keys
        if self.faults["moved"]:  # and came again through another folder: its first folder's counter is left to the audit
            recount(RedisClient(self.world.transport), keys)
        assert_accounted(read_books(admin), [*self.subjects], dead=dead)
        assert admin.xinfo_stream(keys.results)["entries-added"] == len(self.subjects) - len(dead), "each is done once"
        if not self.replays and not self.copies:
            assert admin.xinfo_stream(keys.stream)["entries-added"] == len(self.subjects), "each enters the stream once"
        counted = 0
        for name in sorted(set(PRODUCERS.values())):
            with ImapMailbox(self.world.endpoint, self.account, name, self.world.token) as session:
                folder = [str(session.folder.uidvalidity), str(session.uids_from(1)[-1])]
            own = keys.mailbox(self.account, name)
            state = admin.mget(own.uidvalidity, own.last_uid)
            assert state == folder, f"intake of {name} ends at {state}, not {folder}"
            counted += int(admin.get(own.email_count) or 0)
        again = self.faults["moved"]  # it is gone from where the index names it: intake may bring it once more
        assert len(self.subjects) <= counted <= len(self.subjects) + again, f"{counted} mails entered the stream"
        never = set(self.subjects) - {email_id for email_id, _, _ in self.effects}
        assert not never, f"no handler ever saw {never}"
        forgot = {"flush", "rollback"} & self.faults.keys()
        if not self.crashes and not self.frozen and not forgot and not self.copies and "kill" not in self.subjects.values():
            assert set(self.effects.values()) == {1}, "a handler ran twice although nobody died and no lease ran out"
