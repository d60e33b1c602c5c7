"""The worker process: its threads, its main loop, its end."""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from config.routes import Route
from config.settings import Settings
from src import VERSION
from src.common import pauses, tracing
from src.common.archive import open_archive
from src.common.batch import Batcher
from src.common.circuit_breaker import Breakers, rules_of
from src.common.clock import Clock, iso
from src.common.exceptions import ArchiveUnavailable, GroupMissing, Transient
from src.common.health import Beats, Page, liveness, readiness, work_reasons
from src.common.keys import Keys
from src.common.redis_client import REDIS_OPEN_SECONDS, RedisClient, is_away
from src.common.registry import News, Registration
from src.common.retry import retry_on_redis_error
from src.common.shutdown import Shutdown
from src.common.timing import ROUND_TRIP, Histogram, Stopwatch
from src.common.watch import Limits, Watch, check_policy
from src.common.watchdog import Watchdog
from src.monitoring import endpoint, metrics, page
from src.monitoring.metrics import Metrics
from src.monitoring.page_look import Onlooker
from src.worker import dlq, numbers, recovery
from src.worker.child import Child
from src.worker.consume import Consumer
from src.worker.delivery import Seat
from src.worker.processor import Handlers, Outcome, Started, Terms
from src.worker.runners import Runners

log = logging.getLogger(__name__)

FIRST_PORT = 8081
RENEW_AGAIN = 1.0  # seconds from a renewal that failed to the next one: in an outage leases go on running out
SLOW_JOIN = 1.0  # seconds: a first answer of Redis that took longer was waited for
GROUP_COMMIT = 0.005  # seconds that a finished mail waits for others to be settled with it


class Worker:
    """Reader → runners (threads, processes, an event loop) → settler; beside them one thread renews leases, one proves that the GIL moves.

    `drain`: end when no mail is left.
    """

    def __init__(
        self,
        settings: Settings,
        handlers: Handlers,
        routes: Sequence[Route],
        redis: RedisClient,
        shutdown: Shutdown,
        clock: Clock,
        *,
        drain: bool = False,
    ) -> None:
        work = settings.work
        name = f"{work.label or socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.settings = settings
        self.shutdown = shutdown
        self.clock = clock
        self.drain = drain
        self.seat = Seat(redis, Keys(settings.stream.name), settings.stream.group, name)
        place = settings.run.raw_archive
        self.archive = open_archive(place.get_secret_value() if place else None, settings.run.data_dir)
        terms = Terms(random.random, settings.stream.result_max_bytes, self.archive.get if self.archive else None)
        self.breakers = Breakers(rules_of(settings.breakers), clock.monotonic, random.random)  # those that handlers name

        def again(call: Callable[[], Any]) -> Any:
            return retry_on_redis_error(shutdown)(call)()

        self.consumer = Consumer(self.seat, settings.stream, work, handlers, terms, clock, self.breakers, again)
        self.beats = Beats(clock)
        self.settler: Batcher[Outcome] = Batcher(self._settle, most=work.batch_size, seconds=GROUP_COMMIT)
        new_child = partial(Child, settings, routes)
        self.runners = Runners(self.consumer, self.settler.put, new_child, work.isolation == "process", shutdown, clock)
        self.consumer.alone_ready = lambda: not shutdown.requested and self.runners.suspects.ready()
        self.stopped = threading.Event()
        self.joined = False
        self._said_what_is_left = False
        self.began = clock.monotonic()
        self.redis_breaker = redis.breaker = Breakers(rules_of(settings.breakers), clock.monotonic, random.random).get(
            "Redis", counts=is_away, open_cap=REDIS_OPEN_SECONDS
        )
        self.round_trips = Histogram(ROUND_TRIP)
        redis.stopwatch = Stopwatch(clock.monotonic, self.round_trips.observe)
        self.me = Registration("worker", name, "", VERSION, socket.gethostname(), os.getpid(), iso(clock.wall()))
        self.watch: Watch | None = None
        self.onlooker = Onlooker(redis, self.seat.keys, self.seat.group, clock)

    def run(self) -> None:
        """Work until the shutdown is requested, then end in order."""
        shutdown, settings = self.shutdown, self.settings
        check_policy(self.seat.redis, allow_eviction=settings.redis.allow_eviction)
        tracing.configure("email-worker")
        stop_endpoint = self._open_endpoint()
        self._join()
        self.watch = watch = self._watch()
        watch.start(settings.redis.socket_timeout)
        self.consumer.pause = lambda: watch.paused(pauses.WORKERS)
        settler = shutdown.guard("settler", self.settler.run)
        self.runners.start()
        shutdown.guard("late", self._look_for_late)
        shutdown.guard("leases", self._keep_leases)
        shutdown.guard("pulse", self._pulse)
        reader = shutdown.guard("reader", self._read_loop)
        end_within = 2 * settings.run.shutdown_timeout + 4 * settings.redis.socket_timeout
        shutdown.guard("watchdog", Watchdog(self.beats, settings.run.hang_timeout, end_within, shutdown, self.clock).run)
        self._look_at_archive()
        log.info("worker %s reads %s as group %s", self.seat.consumer, self.seat.keys.stream, self.seat.group)

        shutdown.add_step(10, "reader", lambda: reader.join(settings.run.shutdown_timeout))
        shutdown.add_step(20, "handlers", self._let_handlers_finish)
        shutdown.add_step(30, "settler", lambda: self._end_settler(settler))
        shutdown.add_step(35, "processes", self.runners.end)
        shutdown.add_step(55, "registration", watch.stop)
        shutdown.add_step(60, "endpoint", stop_endpoint)
        shutdown.add_step(65, "page", self.onlooker.stop)
        shutdown.add_step(70, "spans", tracing.end)
        # As late as may be: handlers that did not end go on until the process does.
        shutdown.add_step(80, "release", self._release)
        shutdown.add_step(90, "side threads", self.stopped.set)

        while not shutdown.wait(settings.run.stats_interval):
            self._report()
        began = self.clock.monotonic()
        at_work, limit = self.consumer.in_flight(), settings.run.shutdown_timeout
        more = f"; {at_work} in flight have up to {limit:g} s, a second signal ends at once" if at_work else ""
        log.info("stopping: %s%s", shutdown.reason, more)
        shutdown.run_steps()
        self._report()
        log.info("stopped after %.1f s", self.clock.monotonic() - began)

    def _join(self) -> None:
        """Enter the group. Where that had to wait for Redis, the leases of the others ran out meanwhile."""

        @retry_on_redis_error(self.shutdown)
        def join() -> None:
            began = self.clock.monotonic()
            try:
                recovery.join(self.seat)
            except Transient:
                self.consumer.redis_was_away()
                raise
            if self.clock.monotonic() - began > SLOW_JOIN:
                self.consumer.redis_was_away()

        join()
        self.joined = True

    def _look_at_archive(self) -> None:
        """Say at once what a handler would find out with its first `email.raw()`."""
        try:
            if self.archive:
                self.archive.check()
        except ArchiveUnavailable as error:
            log.warning("raw mail: %s", error)

    # what its endpoint says

    def _open_endpoint(self) -> Callable[[], None]:
        """Before Redis is needed: a worker that waits for it says so. Returns what ends it."""
        run = self.settings.run
        listener = endpoint.open_port(run.http_host, run.http_port, FIRST_PORT)
        self.me = replace(self.me, address=endpoint.address_of(listener))
        pages = {"/health": self.health, "/ready": self.ready, "/status": self.status}
        hosts = endpoint.allowed_hosts(run.http_host, run.http_allowed_hosts)
        scrape = endpoint.plain("/metrics", metrics.CONTENT_TYPE, Metrics(CollectorRegistry(), metrics.WORKER, self.numbers).text)
        self.shutdown.add_step(
            60, "metrics", endpoint.serve_metrics(run.http_host, run.metrics_port, scrape, hosts, self.shutdown, asks_again=True)
        )
        self.onlooker.start(self.shutdown)
        looks = page.routes(self.onlooker, self.status, self.news, self.clock, bodies=run.status_page_bodies)
        return endpoint.serve(listener, pages, hosts, self.shutdown, [scrape, *looks])

    def _watch(self) -> Watch:
        redis = self.settings.redis
        limits = Limits(redis.memory_high, redis.memory_low, redis.allow_eviction)
        return Watch(self.seat.redis, self.seat.keys, self.me, limits, self.beats, self.shutdown, self.clock, self.news)

    def health(self) -> Page:
        return liveness(self.beats.seen(), self.clock.monotonic(), self._degraded())

    def ready(self) -> Page:
        away = self.watch.away if self.watch else "not asked yet"
        return readiness(work_reasons(away, joined=self.joined, blocked=self.consumer.blocked))

    def status(self) -> Page:
        consumer, handlers = self.consumer, self.consumer.handlers.all
        return 200, {
            **asdict(self.me),
            "uptime_seconds": round(self.clock.monotonic() - self.began, 1),
            "health": self.health()[1]["status"],
            "ready": self.ready()[1]["ready"],
            "why": self._degraded(),
            "stream": self.seat.keys.stream,
            "group": self.seat.group,
            "handlers": [handler.spec for handler in handlers],
            "isolation": self.settings.work.isolation,
            "in_flight": consumer.in_flight(),
            "oldest_in_flight_seconds": round(consumer.oldest(), 1),
            "counts": dict(consumer.counts),
            "breakers": self.breakers.snapshot(),
            "redis": self.watch.server() if self.watch else {},
        }

    def numbers(self) -> metrics.Numbers:
        """For /metrics. A breaker that a handler calls Redis hides ours, which email_redis_up tells too."""
        breakers = {"Redis": self.redis_breaker.snapshot(), **self.breakers.snapshot()}
        return {
            **numbers.of_work(self.consumer, self.runners, joined=self.joined),
            **metrics.of_both(VERSION, "worker", self.watch, self.round_trips, breakers),
        }

    def news(self) -> News:
        return News(tuple(self._degraded()), {**self.consumer.counts, "in_flight": self.consumer.in_flight()})

    def _degraded(self) -> list[str]:
        """One sentence for each thing that does not go as it should, though a restart would not help. Redis' high water is intake's."""
        found = [text for text in self.watch.degraded if text != self.watch.full] if self.watch else []
        return found + ([f"not reading: {self.consumer.blocked}"] if self.consumer.blocked else [])

    # the loops

    def _read_loop(self) -> None:
        take = retry_on_redis_error(self.shutdown)(self._take)
        while not self.shutdown.requested:
            try:
                self.runners.put(take(self._room()))
                if self.drain:
                    self._end_if_drained()
            except Transient as error:
                log.warning("reading ended: %s", error)

    def _take(self, room: int) -> list[Started]:
        self.beats.turn("reader", limit=60 + self.settings.redis.socket_timeout)  # also while Redis is away
        try:
            return self.consumer.take(room)
        except GroupMissing:
            log.warning("the stream or its group is gone (flushed?): joining again")
            recovery.join(self.seat)
            return []

    def _room(self) -> int:
        """Free places of handlers; while handlers are fast, also what they will have finished before the next read returns.

        What waits to be settled takes no handler's place; a batch of it may wait, no more.
        """
        work, runners = self.settings.work, self.runners
        places = work.concurrency * (work.batch_size if runners.batches else 1)
        if runners.fast:
            places = max(places, 2 * work.batch_size)
        return min(places - runners.busy, places + work.batch_size - self.consumer.at_work())

    def _end_if_drained(self) -> None:
        """Nothing is unfinished, nowhere: neither here nor waiting, nor with another worker. What cannot be drained ends it too."""
        if self.consumer.blocked and not self.consumer.blocked.startswith("every breaker"):
            self.shutdown.request(f"cannot drain the stream: {self.consumer.blocked}", exit_code=1)
        elif self.consumer.in_flight() == 0:
            left = self.seat.redis.length(self.seat.keys.stream)
            if left == 0:
                self.shutdown.request("the stream is drained")
            elif not self._said_what_is_left:
                self._said_what_is_left = True
                log.info(
                    "nothing to do here now, %d unfinished: with other workers (one that died holds its mail for LEASE_SECONDS, %g s), or "
                    "waiting for their next attempt",
                    left,
                    self.settings.work.lease,
                )

    def _look_for_late(self) -> None:
        every = self.settings.work.recovery_tick
        while not self.stopped.wait(every):
            self.beats.turn("late", limit=60 + every)
            self.runners.look_for_late()

    def _settle(self, outcomes: list[Outcome]) -> None:
        """In the settler's thread. What cannot be settled before the process ends is recovered after its lease."""

        @retry_on_redis_error(self.shutdown)
        def settle() -> None:
            self.beats.turn("settler", limit=60 + 4 * self.settings.redis.socket_timeout)
            try:
                self.consumer.settle(outcomes)
            except GroupMissing:
                recovery.join(self.seat)
                settle()  # it may be flushed again meanwhile

        try:
            settle()
        except Transient as error:
            log.error(
                "%d finished mails could not be recorded (%s): they are handled again after their lease", len(outcomes), error
            )
        self.beats.ended("settler")  # until there is more to settle

    def _keep_leases(self) -> None:
        every = self.consumer.renew_every
        failed = False
        while not self.stopped.wait(min(every, RENEW_AGAIN) if failed else every):
            self.beats.turn("leases", limit=60 + self.settings.redis.socket_timeout + every)
            try:
                self.consumer.renew()
                failed = False
            except Transient as error:
                log.log(logging.DEBUG if failed else logging.WARNING, "leases could not be renewed: %s", error)
                failed = True

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
            consumer.settled.wait_for(consumer.resting, timeout=self.settings.run.shutdown_timeout)

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
            self._expire()
        except Transient as error:
            log.debug("dead consumers not removed, or old dead letters not given up: %s", error)

    def _expire(self) -> None:
        """Dead letters that nobody looked at for DLQ_DAYS."""
        given_up = dlq.expire(self.seat.redis, self.seat.keys, self.settings.stream)
        self.consumer.counts["expired"] += given_up
