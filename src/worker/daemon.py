"""The worker process: its threads, its main loop, its end."""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import random
import secrets
import socket
import threading

from config.settings import Settings
from src.common.archive import open_archive
from src.common.batch import Batcher
from src.common.clock import Clock
from src.common.exceptions import ArchiveUnavailable, GroupMissing, Transient
from src.common.health import Beats, liveness
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.retry import retry_on_redis_error
from src.common.shutdown import Shutdown
from src.monitoring import endpoint
from src.worker import recovery
from src.worker.consume import Consumer, Started
from src.worker.delivery import Seat
from src.worker.dlq import Failure
from src.worker.idempotency import Done
from src.worker.processor import Handler

log = logging.getLogger(__name__)

FIRST_PORT = 8081
FAST_HANDLER = 0.010  # seconds: below this a worker reads ahead
GROUP_COMMIT = 0.005  # seconds that a finished mail waits for others to be settled with it


class Worker:
    """Reader → queue → handler threads → settler; beside them one thread renews leases, one proves that the GIL moves."""

    def __init__(self, settings: Settings, handler: Handler, redis: RedisClient, shutdown: Shutdown, clock: Clock) -> None:
        work = settings.work
        name = f"{work.label or socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.settings = settings
        self.shutdown = shutdown
        self.clock = clock
        self.seat = Seat(redis, Keys(settings.stream.name), settings.stream.group, name)
        place = settings.run.raw_archive
        self.archive = open_archive(place.get_secret_value() if place else None, settings.run.data_dir)
        fetch_raw = self.archive.get if self.archive else None
        self.consumer = Consumer(self.seat, settings.stream, work, handler, clock, random.random, fetch_raw)
        self.beats = Beats(clock)
        self.ready: queue.SimpleQueue[Started] = queue.SimpleQueue()
        self.settler: Batcher[Done | Failure] = Batcher(self._settle, most=work.batch_size, seconds=GROUP_COMMIT)
        self.stopped = threading.Event()
        self._handler_seconds = FAST_HANDLER  # moving average; slow until shown fast

    def run(self) -> None:
        """Work until the shutdown is requested, then end in order."""
        shutdown, settings = self.shutdown, self.settings
        retry_on_redis_error(shutdown)(recovery.join)(self.seat)
        listener = endpoint.open_port(settings.run.http_host, settings.run.http_port, FIRST_PORT)
        hosts = endpoint.allowed_hosts(settings.run.http_host, settings.run.http_allowed_hosts)
        pages = {"/health": lambda: liveness(self.beats.seen(), self.clock.monotonic())}
        stop_endpoint = endpoint.serve(listener, pages, hosts, shutdown)
        settler = shutdown.guard("settler", self.settler.run)
        for number in range(settings.work.concurrency):
            shutdown.guard(f"handler-{number}", self._handle_loop)
        shutdown.guard("leases", self._keep_leases)
        shutdown.guard("pulse", self._pulse)
        reader = shutdown.guard("reader", self._read_loop)
        self._look_at_archive()
        log.info("worker %s reads %s as group %s", self.seat.consumer, self.seat.keys.stream, self.seat.group)

        shutdown.add_step(10, "reader", lambda: reader.join(settings.run.shutdown_timeout))
        shutdown.add_step(20, "handlers", self._let_handlers_finish)
        shutdown.add_step(30, "settler", lambda: self._end_settler(settler))
        shutdown.add_step(40, "release", self._release)
        shutdown.add_step(50, "side threads", self.stopped.set)
        shutdown.add_step(60, "endpoint", stop_endpoint)

        while not shutdown.wait(settings.run.stats_interval):
            self._report()
        began = self.clock.monotonic()
        log.info("stopping: %s", shutdown.reason)
        shutdown.run_steps()
        self._report()
        log.info("stopped after %.1f s", self.clock.monotonic() - began)

    def _look_at_archive(self) -> None:
        """Say at once what a handler would find out with its first `email.raw()`."""
        try:
            if self.archive:
                self.archive.check()
        except ArchiveUnavailable as error:
            log.warning("raw mail: %s", error)

    # the loops

    def _read_loop(self) -> None:
        take = retry_on_redis_error(self.shutdown)(self._take)
        while not self.shutdown.requested:
            self.beats.turn("reader", limit=60 + self.settings.redis.socket_timeout)
            room = self._room()
            if room <= 0:
                self._wait_for_room()
                continue
            try:
                for started in take(room):
                    self.ready.put(started)
            except Transient as error:
                log.warning("reading ended: %s", error)

    def _take(self, room: int) -> list[Started]:
        try:
            return self.consumer.take(room)
        except GroupMissing:
            log.warning("the stream or its group is gone (flushed?): joining again")
            recovery.join(self.seat)
            return []

    def _room(self) -> int:
        """Free slots; while handlers are fast, also what they will have finished before the next read returns."""
        fast = self._handler_seconds < FAST_HANDLER
        work = self.settings.work
        return (max(work.concurrency, 3 * work.batch_size) if fast else work.concurrency) - self.consumer.at_work()

    def _wait_for_room(self) -> None:
        with self.consumer.settled:
            self.consumer.settled.wait(timeout=min(0.25, self.settings.work.recovery_tick))

    def _handle_loop(self) -> None:
        while True:
            started = self.ready.get()
            began = self.clock.monotonic()
            self.settler.put(self.consumer.handle(started))
            self._handler_seconds += 0.05 * (self.clock.monotonic() - began - self._handler_seconds)

    def _settle(self, outcomes: list[Done | Failure]) -> None:
        """In the settler's thread. What cannot be settled before the process ends is recovered after its lease."""

        @retry_on_redis_error(self.shutdown)
        def settle() -> None:
            try:
                self.consumer.settle(outcomes)
            except GroupMissing:
                recovery.join(self.seat)
                self.consumer.settle(outcomes)

        try:
            settle()
        except Transient as error:
            log.error(
                "%d finished mails could not be recorded (%s): they are handled again after their lease", len(outcomes), error
            )

    def _keep_leases(self) -> None:
        every = self.consumer.renew_every
        while not self.stopped.wait(every):
            self.beats.turn("leases", limit=60 + self.settings.redis.socket_timeout + every)
            try:
                self.consumer.renew()
            except Transient as error:
                log.warning("leases could not be renewed: %s", error)

    def _pulse(self) -> None:
        """A thread that holds the GIL for a lease starves the renewal: then the process ends and shows where it stood."""
        lease = self.settings.work.lease
        faulthandler.dump_traceback_later(lease, exit=True)  # armed before the first mail is read
        while not self.stopped.wait(lease / 3):
            faulthandler.dump_traceback_later(lease, exit=True)
        faulthandler.cancel_dump_traceback_later()

    # the end

    def _let_handlers_finish(self) -> None:
        consumer = self.consumer
        with consumer.settled:
            consumer.settled.wait_for(lambda: consumer.at_work() == 0, timeout=self.settings.run.shutdown_timeout)

    def _end_settler(self, thread: threading.Thread) -> None:
        self.settler.close()
        thread.join(self.settings.redis.socket_timeout)

    def _release(self) -> None:
        try:
            released = self.consumer.hand_back()
            recovery.leave(self.seat)
        except Transient as error:
            log.warning("what is in flight could not be handed back (%s): others take it after its lease", error)
            return
        if released:
            log.info("handed back %d mails", released)

    def _report(self) -> None:
        counts = self.consumer.counts
        names = ("started", "done", "retried", "dead", "duplicates", "recovered", "lost")
        log.info(
            "so far: %s; in flight %d%s",
            ", ".join(f"{name} {counts[name]}" for name in names),
            self.consumer.in_flight(),
            f"; not reading: {self.consumer.blocked}" if self.consumer.blocked else "",
        )
        try:
            recovery.reap(self.seat)
        except Transient as error:
            log.debug("dead consumers not removed: %s", error)
