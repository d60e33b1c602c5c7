"""The real code of both daemons in the thread of the test, without their threads: what they do is a list of round trips.

Nothing waits for long: waits of the code under test last a millisecond, retries are due at once, and time, where it only
counts turns, moves a second a look. Leases alone run on the server's real clock.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path

import redis

from config.settings import Settings, load_settings
from src.common.archive import Archive, open_archive, ref_of
from src.common.circuit_breaker import Breakers, Rules
from src.common.clock import SYSTEM, Clock
from src.common.exceptions import GroupMissing, Permanent, Transient
from src.common.health import Beats
from src.common.keys import Keys
from src.common.redis_client import RedisClient, Transport
from src.common.retry import retry_on_redis_error
from src.common.shutdown import Shutdown
from src.imap.connection import ImapEndpoint
from src.imap.imap_client import ImapMailbox
from src.mail.record import Email
from src.producer.mailbox import Mailbox, is_down
from src.producer.reader import Keep, Session, keep_nothing
from src.producer.state_manager import MarkerFile, StateManager
from src.worker import recovery
from src.worker.context import Context
from src.worker.delivery import Seat
from src.worker.dlq import Failure
from src.worker.idempotency import Done
from src.worker.processor import Started
from tests.support.consumer import Function, consumer_of
from tests.support.faulty import FaultySession, FaultyStore, FaultyTransport, Process

MAILBOX = "INBOX"
LEASE = 0.05  # seconds, of workers and producers
ROOM = 8  # handlers of a worker
MOST_TURNS = 500  # each waits a millisecond at least: many leases, then it is clear that a process hangs

SETTINGS = {
    "INITIAL_SYNC": "all",
    "PRODUCER_BATCH_SIZE": 2,
    "PRODUCER_LEASE": LEASE,
    "LEASE_SECONDS": LEASE,
    "RECOVERY_TICK": 0.001,
    "WORKER_BLOCK_MS": 1,
    "INCOMPLETE_WAIT": 0.001,
    "RAW_ARCHIVE": "off",
}


class Hangs(AssertionError):
    """A process goes on and on without an end."""


class _Moment(threading.Event):
    """An event that is waited for a millisecond at most."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0.001 if timeout is None else min(timeout, 0.001))


class HurriedShutdown(Shutdown):
    """Every wait ends after a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.event = _Moment()


def a_second_a_look() -> Clock:
    """A clock whose monotonic time moves with each look: what happens "from time to time" happens at the same step of every run."""
    seconds = count()
    return Clock(wall=SYSTEM.wall, monotonic=lambda: float(next(seconds)))


def hurried_breakers() -> Breakers:
    """Breakers whose time moves a second with each look: they let the next call in."""
    return Breakers(Rules(open_seconds=1.0, open_cap=1.0), a_second_a_look().monotonic, lambda: 0.0)


def obey(email: Email, context: Context) -> dict[str, object]:
    """A handler that does what the subject says: `done`, `retry` (fails once) or `dead`. Its result says what it got to see."""
    if email.subject == "dead":
        raise Permanent("as told")
    if email.subject == "retry" and context.attempt == 1:
        raise RuntimeError("as told")
    raw = ref_of(email.raw()) if email.raw_ref else ""
    return {"attempt": context.attempt, "subject": email.subject, "truncated": email.truncated, "raw": raw}


class World:
    """What processes share: a server, a mailbox, a disk, settings (`env` wins over those of tests; None: the default).

    `admin` looks at the server and is no round trip.
    """

    def __init__(
        self, admin: redis.Redis, transport: Transport, endpoint: ImapEndpoint, account: str, token: str, **env: object
    ) -> None:
        self.admin = admin
        self.transport = transport
        self.endpoint = endpoint
        self.account = account
        self.token = token
        self.data_dir = Path()
        self.settings: Settings = load_settings({**SETTINGS, **env}, env_file=None)
        self.keys = Keys(self.settings.stream.name)

    def renew(self, data_dir: Path) -> None:
        """An empty server that knows no script, and an empty disk."""
        self.admin.flushall()
        self.admin.script_flush()
        self.data_dir = data_dir

    def archive(self) -> Archive | None:
        place = self.settings.run.raw_archive
        return open_archive(place.get_secret_value() if place else None, self.data_dir)

    def stream_is_empty(self) -> bool:
        return bool(self.admin.xlen(self.keys.stream) == 0)

    def access_token(self, *, refuse: str | None = None) -> str:
        """The Tokens of every mailbox: one that is never refused."""
        assert refuse is None
        return self.token

    def stamp(self) -> object:
        return self.token

    def facts(self) -> dict[str, object]:
        return {}


def kept_here(archive: Archive) -> Keep:
    """The archive without its process: mails are kept when somebody waits for it."""
    return lambda mails: partial(archive.put_all, mails)


class InlineProducer:
    """producer.py with one mailbox (`name`). Its lease thread comes whenever the mailbox waits for its IMAP server."""

    def __init__(self, world: World, process: Process, name: str = MAILBOX) -> None:
        clock, redis_client = a_second_a_look(), RedisClient(FaultyTransport(world.transport, process))
        self.states = StateManager(redis_client, world.keys, world.account, name, secrets.token_hex(8))
        self._lease = world.settings.mail.lease
        archive = world.archive()

        def connect(token: str, alive: Callable[[], None]) -> AbstractContextManager[Session]:
            return FaultySession(ImapMailbox(world.endpoint, world.account, name, token, alive), process, self._renew)

        self.mailbox = Mailbox(
            settings=world.settings,
            account=world.account,
            name=name,
            states=self.states,
            marker_file=MarkerFile(world.data_dir, world.account, name),
            tokens=world,
            connect=connect,
            clock=clock,
            new_id=lambda: secrets.token_hex(8),
            shutdown=HurriedShutdown(),
            beats=Beats(clock),
            keep=kept_here(Archive(FaultyStore(archive.store, process))) if archive else keep_nothing,
            breaker=hurried_breakers().get("IMAP", counts=is_down),
        )

    def ask_for(self, day: date) -> None:
        """--resync-from."""
        self.mailbox.pulse.ask_redis(partial(self.states.request_look, day.isoformat()))

    def _renew(self) -> None:
        if self.mailbox.owns:
            with suppress(Transient):
                self.states.acquire(self._lease)

    def run(self) -> None:
        """Read the mailbox to its end and let it go."""
        self.mailbox.run_once()
        self.mailbox.owns = False
        with suppress(Transient):  # then a standby waits for the lease to end
            self.states.let_go()


class InlineWorker:
    """worker.py: its read loop, its handlers, its settler and its lease thread, one after the other. `room`: most mails in hand."""

    def __init__(self, world: World, process: Process, handler: Function = obey, room: int = ROOM) -> None:
        self._world = world
        self._room = room
        self._again = retry_on_redis_error(HurriedShutdown())
        self.seat = Seat(
            RedisClient(FaultyTransport(world.transport, process)),
            world.keys,
            world.settings.stream.group,
            f"worker-{secrets.token_hex(3)}",
        )
        archive = world.archive()
        self.consumer = consumer_of(
            self.seat,
            world.settings,
            handler,
            a_second_a_look(),
            again=lambda call: self._again(call)(),
            fetch_raw=archive.get if archive else None,
        )

    def run(self, until: Callable[[], bool]) -> None:
        """Work until `until` says so, then hand back and leave."""
        self.join()
        for _ in range(MOST_TURNS):
            if until():
                break
            self.settle(self.take())
        else:
            raise Hangs(f"the worker holds {self.consumer.in_flight()} mails and finds no end")
        self.stop()

    def join(self) -> None:
        self._again(recovery.join)(self.seat)

    def take(self) -> list[Started]:
        started = self.begin()
        self.renew()
        return started

    def begin(self) -> list[Started]:
        def take() -> list[Started]:
            try:
                return self.consumer.take(self._room - self.consumer.in_flight())
            except GroupMissing:
                recovery.join(self.seat)
                return []

        return self._again(take)()

    def renew(self) -> None:
        with suppress(Transient):
            self.consumer.renew()

    def settle(self, started: list[Started]) -> None:
        self.record([self.consumer.handle(mail) for mail in started])

    def record(self, outcomes: list[Done | Failure]) -> None:
        def settle() -> None:
            try:
                self.consumer.settle(outcomes)
            except GroupMissing:
                recovery.join(self.seat)
                self.consumer.settle(outcomes)

        self._again(settle)()

    def stop(self) -> None:
        with suppress(Transient):  # then others take what is left after its lease
            self.consumer.hand_back()
            recovery.leave(self.seat)
