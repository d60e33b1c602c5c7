"""The producer process: one thread a mailbox, one that renews all leases; its start, its end."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry
from starlette.routing import Route

from config.accounts import Account
from config.settings import MailSettings, Settings
from src import VERSION
from src.auth.credentials import Credentials, credentials_of
from src.auth.oauth2_gmail import first_existing, read_token, token_files
from src.common import pauses, tracing
from src.common.archive import open_archive, references
from src.common.circuit_breaker import Breakers
from src.common.clock import Clock, iso
from src.common.exceptions import (
    ConfigurationError,
    DiskUnavailable,
    IngestionError,
    MailboxMissing,
    ReauthRequired,
    ScriptRefused,
    TokenEndpointUnavailable,
    Transient,
)
from src.common.health import Beats, Page, intake_reasons, liveness, readiness
from src.common.keys import Keys
from src.common.redis_client import REDIS_OPEN_SECONDS, RedisClient, is_away
from src.common.registry import News, Registration
from src.common.shutdown import Shutdown
from src.common.timing import ROUND_TRIP, WORK, Histogram, Stopwatch
from src.common.watch import NOT_ASKED, Limits, Watch, check_policy
from src.common.watchdog import Watchdog
from src.imap.connection import ImapEndpoint
from src.imap.imap_client import ImapMailbox
from src.monitoring import endpoint, metrics, page
from src.monitoring.metrics import Metrics
from src.monitoring.page_look import Onlooker
from src.producer import numbers
from src.producer.archiver import Archiver
from src.producer.mailbox import Mailbox, is_down
from src.producer.reader import keep_nothing
from src.producer.repair import Checkup
from src.producer.state_manager import Held, MarkerFile, StateManager

log = logging.getLogger(__name__)

FIRST_PORT = 8080
METRICS_PORT = 9090
SWEEP_SECONDS = 6 * 3600.0  # between two sweeps of the raw archive, whichever process of DATA_DIR they are of
SWEEP_LOOK_SECONDS = 600.0  # between two looks whether one is due
WELL = ("STARTING", "CONNECTED", "STANDBY", "STOPPED")
GMAIL_HOSTS = ("imap.gmail.com", "imap.googlemail.com")


class NoUsableToken(Exception):
    """No mailbox can be read; the text holds the command that mends it (exit code 3)."""


@dataclass(frozen=True)
class Access:
    """An account and how it logs in."""

    account: Account
    credentials: Credentials


def accesses(accounts: Sequence[Account], clock: Clock, *, breakers: Breakers | None = None, keep: bool = True) -> list[Access]:
    """How each account logs in. `breakers`: of a daemon. `keep`: refreshed tokens are written back (a dry run writes nothing).

    Raises NoUsableToken if not one account has something to log in with.
    """
    try:
        named = [account if account.username else _of_token_file(account) for account in accounts]
    except ConfigurationError as error:
        raise NoUsableToken(str(error)) from None
    found = [Access(account, credentials_of(account, clock, breakers=breakers, keep=keep)) for account in named]
    problems = []
    for access in found:
        try:
            access.credentials.access_token()
            return found
        except TokenEndpointUnavailable as error:
            log.warning("%s: %s", access.account.username, error)
            return found
        except (ConfigurationError, ReauthRequired) as error:
            problems.append(str(error))
    raise NoUsableToken("; ".join(problems))


def _of_token_file(account: Account) -> Account:
    return replace(account, username=read_token(first_existing(token_files(account.mail, ""))).account)


def imap_endpoint(mail: MailSettings) -> ImapEndpoint:
    login: Literal["xoauth2", "password"] = "password" if mail.auth_method == "password" else "xoauth2"
    ca_file = str(mail.ca_file) if mail.ca_file else None
    return ImapEndpoint(mail.host, mail.port, mail.security, mail.timeout, ca_file, login)


class Producer:
    """`accesses`: see above. `breakers`: of the whole process. Once it runs each mailbox keeps its troubles to itself."""

    def __init__(
        self,
        settings: Settings,
        accesses: Sequence[Access],
        redis: RedisClient,
        shutdown: Shutdown,
        clock: Clock,
        breakers: Breakers,
    ) -> None:
        self.settings = settings
        self.shutdown = shutdown
        self.clock = clock
        self.beats = Beats(clock)
        self.stopped = threading.Event()
        self._asked_for = ""
        self._unrenewed: set[str] = set()  # mailboxes whose last renewal failed: said once an outage
        self.breakers = breakers
        self.redis = redis
        redis.breaker = breakers.get("Redis", counts=is_away, open_cap=REDIS_OPEN_SECONDS)
        self.keys = keys = Keys(settings.stream.name)
        self.onlooker = Onlooker(redis, keys, settings.stream.group, clock)
        self.fetches, self.publishes, self.round_trips = Histogram(WORK), Histogram(ROUND_TRIP), Histogram(ROUND_TRIP)
        redis.stopwatch = Stopwatch(clock.monotonic, self.round_trips.observe)
        self.watch: Watch | None = None  # under --once nobody asks
        self.began = clock.monotonic()
        place = settings.run.raw_archive.get_secret_value() if settings.run.raw_archive else None
        self.archive = open_archive(place, settings.run.data_dir)
        self.archiver = Archiver(place, settings.run.data_dir)

        checkup = Checkup(redis, keys, settings.stream.group, clock, every=3 * settings.mail.relist_interval)

        def mailbox(access: Access, name: str) -> Mailbox:
            account, mail = access.account.username, access.account.mail
            server = imap_endpoint(mail)
            return Mailbox(
                settings=replace(settings, mail=mail),
                account=account,
                name=name,
                states=StateManager(redis, keys, account, name, uuid.uuid4().hex),
                marker_file=MarkerFile(settings.run.data_dir, account, name),
                tokens=access.credentials,
                connect=lambda secret, alive: ImapMailbox(server, account, name, secret, alive),
                clock=clock,
                new_id=lambda: secrets.token_hex(8),
                shutdown=shutdown,
                beats=self.beats,
                breaker=breakers.get(f"IMAP {server.host}:{server.port}", counts=is_down),
                keep=self.archiver.keep if self.archive else keep_nothing,
                gate=lambda: self.watch.full if self.watch else "",
                pause=lambda: self._paused(pauses.fields_of(account, name)),
                checkup=checkup,
                fetching=Stopwatch(clock.monotonic, self.fetches.observe),
                publishing=Stopwatch(clock.monotonic, self.publishes.observe),
            )

        self.mailboxes = [mailbox(access, name) for access in accesses for name in access.account.mail.mailboxes]
        for access in accesses:
            if access.account.mail.auth_method == "password" and access.account.mail.host in GMAIL_HOSTS:
                log.warning(
                    "%s: Gmail takes app passwords only, for accounts with 2-step verification, and ends them with a new password; "
                    "AUTH_METHOD=oauth2 is the better way",
                    access.account.username,
                )

    def ask_for(self, day: date) -> None:
        """All mail since `day` is looked at again, by whoever reads the mailbox."""
        for mailbox in self.mailboxes:
            mailbox.pulse.ask_redis(partial(mailbox.states.request_look, day.isoformat()))
        self._asked_for = day.isoformat()

    def run(self) -> None:
        """Read until the shutdown is requested, then end in order."""
        shutdown, run = self.shutdown, self.settings.run
        check_policy(self.redis, allow_eviction=self.settings.redis.allow_eviction)
        tracing.configure("email-producer")
        listener = endpoint.open_port(run.http_host, run.http_port, FIRST_PORT)
        me = self._registration(endpoint.address_of(listener))
        self.watch = watch = self._watch(me)
        pages = {"/health": self.health, "/ready": self.ready, "/status": lambda: self.status(me)}
        hosts = endpoint.allowed_hosts(run.http_host, run.http_allowed_hosts)
        scrape = endpoint.plain(
            "/metrics", metrics.CONTENT_TYPE, Metrics(CollectorRegistry(), metrics.PRODUCER, self.numbers).text
        )
        self.onlooker.start(shutdown)
        looks = page.routes(self.onlooker, pages["/status"], self.news, self.clock, bodies=run.status_page_bodies)
        stop_endpoint = endpoint.serve(listener, pages, hosts, shutdown, [scrape, self._targets(me), *looks])
        metrics_port = METRICS_PORT if run.metrics_port is None else run.metrics_port
        ours = run.metrics_port is not None  # else 9090 may be that of a Prometheus that starts again
        stop_metrics = endpoint.serve_metrics(run.http_host, metrics_port, scrape, hosts, shutdown, asks_again=ours)
        watch.start(self.settings.redis.socket_timeout)
        readers = [shutdown.guard(mailbox.title, mailbox.run) for mailbox in self.mailboxes]
        shutdown.guard("leases", self._keep_leases)
        shutdown.guard("sweep", self._keep_sweeping)
        end_within = 2 * run.shutdown_timeout + 4 * self.settings.redis.socket_timeout
        shutdown.guard("watchdog", Watchdog(self.beats, run.hang_timeout, end_within, shutdown, self.clock).run)
        log.info("producer reads %s into %s", ", ".join(mailbox.title for mailbox in self.mailboxes), self.settings.stream.name)

        shutdown.add_step(10, "mailboxes", lambda: self._join(readers))
        shutdown.add_step(20, "archive", self.archiver.end)
        shutdown.add_step(50, "side threads", self.stopped.set)
        shutdown.add_step(55, "registration", watch.stop)
        shutdown.add_step(60, "endpoint", stop_endpoint)
        shutdown.add_step(60, "metrics", stop_metrics)
        shutdown.add_step(65, "page", self.onlooker.stop)
        shutdown.add_step(70, "spans", tracing.end)
        while not shutdown.wait(run.stats_interval):
            self._report()
        began = self.clock.monotonic()
        log.info("stopping: %s", shutdown.reason)
        shutdown.run_steps()
        self._report()
        log.info("stopped after %.1f s", self.clock.monotonic() - began)

    def run_once(self) -> None:
        """Read what is there now, each mailbox in turn; one that cannot be read holds up no other.

        Raises NoUsableToken if none could be read for want of a token, ConfigurationError for those that something else is wrong with,
        DiskUnavailable.
        """
        check_policy(self.redis, allow_eviction=self.settings.redis.allow_eviction)
        tracing.configure("email-producer")
        self.shutdown.guard("leases", self._keep_leases)
        refused: list[str] = []
        wrong: list[str] = []
        full: DiskUnavailable | None = None
        for mailbox in self.mailboxes:
            try:
                if not (self._asked_for and self._is_read_by_another(mailbox)):
                    mailbox.run_once()
            except (ReauthRequired, MailboxMissing, ConfigurationError) as error:
                log.error("%s: %s", mailbox.title, error)
                (refused if isinstance(error, ReauthRequired) else wrong).append(str(error))
            except DiskUnavailable as error:
                log.error("%s: %s", mailbox.title, error)
                full = error
            finally:
                mailbox.let_go()
        if not self.shutdown.requested:
            self._sweep()
        self.stopped.set()
        self.archiver.end()
        self._report()
        tracing.end()
        if len(refused) == len(self.mailboxes):
            raise NoUsableToken("; ".join(refused))
        if wrong:
            raise ConfigurationError("; ".join(wrong))
        if full:
            raise full

    def _is_read_by_another(self, mailbox: Mailbox) -> bool:
        held = isinstance(mailbox.pulse.ask_redis(lambda: mailbox.states.acquire(mailbox.settings.mail.lease)), Held)
        if held:
            log.info("%s: another producer reads it, and looks again at all mail since %s", mailbox.title, self._asked_for)
        return held

    def _paused(self, fields: Sequence[str]) -> str:
        """Why somebody holds up what `fields` name, as far as it was seen: each session begins with asking Redis itself."""
        why = self.watch.paused(*fields) if self.watch else ""
        return "" if why == NOT_ASKED else why

    def _registration(self, address: str) -> Registration:
        host, pid = socket.gethostname(), os.getpid()
        name = f"{host}-{pid}-{secrets.token_hex(3)}"
        return Registration("producer", name, address, VERSION, host, pid, iso(self.clock.wall()))

    def _watch(self, me: Registration) -> Watch:
        redis = self.settings.redis
        limits = Limits(redis.memory_high, redis.memory_low, redis.allow_eviction)
        return Watch(self.redis, self.keys, me, limits, self.beats, self.shutdown, self.clock, self.news)

    # what its endpoint says

    def health(self) -> Page:
        return liveness(self.beats.seen(), self.clock.monotonic(), self._degraded())

    def ready(self) -> Page:
        redis = self.watch.away if self.watch else "not asked yet"
        return readiness(intake_reasons(redis, {mailbox.title: mailbox.state() for mailbox in self.mailboxes}))

    def status(self, me: Registration) -> Page:
        health, ready = self.health()[1], self.ready()[1]
        return 200, {
            **asdict(me),
            "uptime_seconds": round(self.clock.monotonic() - self.began, 1),
            "health": health["status"],
            "ready": ready["ready"],
            "why": self._degraded(),
            "mailboxes": [mailbox.facts() for mailbox in self.mailboxes],
            "breakers": self.breakers.snapshot(),
            "redis": self.watch.server() if self.watch else {},
        }

    def numbers(self) -> metrics.Numbers:
        """For /metrics."""
        seen = self.onlooker.last
        return {
            **numbers.of_mailboxes(self.mailboxes, self.clock, full=bool(self.watch and self.watch.full)),
            **numbers.of_stream(seen.overview, seen.daemons, self.settings.stream),
            "email_producer_fetch_seconds": self.fetches,
            "email_producer_publish_seconds": self.publishes,
            **metrics.of_both(VERSION, "producer", self.watch, self.round_trips, self.breakers.snapshot()),
        }

    def _targets(self, me: Registration) -> Route:
        return endpoint.plain(
            "/targets", "application/json", lambda: json.dumps(metrics.targets(me, self.onlooker.last.daemons)).encode()
        )

    def news(self) -> News:
        return News(tuple(self._degraded()), {"published": sum(mailbox.reader.published for mailbox in self.mailboxes)})

    def _degraded(self) -> list[str]:
        """One sentence for each thing that does not go as it should, though a restart would not help."""
        found = self.watch.degraded if self.watch else []
        for mailbox in self.mailboxes:
            state, why = mailbox.state()
            if state not in WELL and not (self.watch and why == self.watch.full):
                found.append(f"{mailbox.title}: {state}{f': {why}' if why else ''}")
        return found

    # side threads

    def _keep_leases(self) -> None:
        """Renew the leases of all mailboxes, however long their fetches take; let go of a thread that stands still."""
        every = min(mailbox.settings.mail.lease for mailbox in self.mailboxes) / 3
        while not self.stopped.wait(every):
            self.beats.turn("leases", limit=60 + every + self.settings.redis.socket_timeout)
            loops, now = self.beats.seen(), self.clock.monotonic()
            for mailbox in self.mailboxes:
                loop = loops.get(mailbox.title)
                if loop is not None and now - loop.turned <= loop.limit and mailbox.owns:
                    self._renew(mailbox)

    def _renew(self, mailbox: Mailbox) -> None:
        try:
            answer = mailbox.states.acquire(mailbox.settings.mail.lease)
            if isinstance(answer, Held):
                log.warning("%s: the lease is lost to another producer", mailbox.title)
            else:
                mailbox.reader.resync, mailbox.reader.epoch = answer.resync, answer.epoch
            self._unrenewed.discard(mailbox.title)
        except (Transient, ScriptRefused) as error:
            level = logging.DEBUG if mailbox.title in self._unrenewed else logging.WARNING
            log.log(level, "%s: the lease could not be renewed: %s", mailbox.title, error)
            self._unrenewed.add(mailbox.title)

    def _keep_sweeping(self) -> None:
        while not self.stopped.wait(SWEEP_LOOK_SECONDS):
            self._sweep()

    def _sweep(self) -> None:
        """Remove raw mail that nobody needs any more, where that is due."""
        last, now = self.settings.run.data_dir / "swept", self.clock.wall()
        if self.archive is None:
            return
        try:
            if last.exists() and now.timestamp() - last.stat().st_mtime < SWEEP_SECONDS:
                return
            last.touch()  # now: no other begins one meanwhile, and one that fails is not repeated at once
            needed = references(self.redis, self.keys)
            removed = self.archive.sweep(needed, older_than=self.settings.run.raw_retention * 86_400, now=now)
        except (IngestionError, OSError) as error:
            log.warning("raw mail could not be swept: %s", error)
        else:
            log.info("raw mail: %d files removed, %d still needed", removed, len(needed))

    def _join(self, readers: list[threading.Thread]) -> None:
        deadline = self.clock.monotonic() + self.settings.run.shutdown_timeout
        for reader in readers:
            reader.join(max(0.0, deadline - self.clock.monotonic()))

    def _report(self) -> None:
        for mailbox in self.mailboxes:
            reader, (status, _) = mailbox.reader, mailbox.state()
            log.info("%s: %s, %d published, %d known already", mailbox.title, status, reader.published, reader.known)
