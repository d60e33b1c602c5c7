"""The producer process: one thread a mailbox, one that renews all leases; its start, its end."""

from __future__ import annotations

import logging
import secrets
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

from config.settings import Settings
from src.auth.oauth2_gmail import TokenSource, read_token
from src.common.clock import Clock
from src.common.exceptions import ConfigurationError, ReauthRequired, TokenEndpointUnavailable, Transient
from src.common.health import Beats, liveness
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.imap.imap_client import ImapEndpoint, ImapMailbox
from src.monitoring import endpoint
from src.producer.mailbox import Mailbox
from src.producer.state_manager import Held, MarkerFile, StateManager

log = logging.getLogger(__name__)

FIRST_PORT = 8080
SINGLE_TOKEN = "gmail_token.json"  # noqa: S105  # a file name


class NoUsableToken(Exception):
    """No mailbox can be read; the text holds the command that mends it (exit code 3)."""


def token_sources(settings: Settings, clock: Clock, *, keep: bool = True) -> dict[str, TokenSource]:
    """Account → its tokens: `TOKEN_DIR/<account>.json`, or `gmail_token.json` there for one account. `keep`: refreshed
    tokens are written back (a dry run writes nothing).

    Raises NoUsableToken if not one account has a token that can be used.
    """
    folder = settings.mail.token_dir
    accounts = settings.mail.usernames
    problems = []
    if not accounts:
        try:
            accounts = (read_token(folder / SINGLE_TOKEN).account,)
        except ConfigurationError as error:
            problems.append(str(error))
    sources = {}
    usable = 0
    for account in accounts:
        own = folder / f"{account}.json"
        sources[account] = TokenSource(own if own.exists() else folder / SINGLE_TOKEN, account, clock=clock, keep=keep)
        try:
            sources[account].access_token()
            usable += 1
        except TokenEndpointUnavailable as error:
            usable += 1
            log.warning("%s: %s", account, error)
        except (ConfigurationError, ReauthRequired) as error:
            problems.append(str(error))
    if not usable:
        raise NoUsableToken("; ".join(problems))
    return sources


def imap_endpoint(settings: Settings) -> ImapEndpoint:
    mail = settings.mail
    return ImapEndpoint(mail.host, mail.port, mail.security, mail.timeout, str(mail.ca_file) if mail.ca_file else None)


class Producer:
    """`sources`: see `token_sources`. Once it runs each mailbox keeps its troubles to itself."""

    def __init__(
        self, settings: Settings, sources: Mapping[str, TokenSource], redis: RedisClient, shutdown: Shutdown, clock: Clock
    ) -> None:
        self.settings = settings
        self.shutdown = shutdown
        self.clock = clock
        self.beats = Beats(clock)
        self.stopped = threading.Event()
        server, keys = imap_endpoint(settings), Keys(settings.stream.name)

        def mailbox(account: str, name: str, tokens: TokenSource) -> Mailbox:
            return Mailbox(
                settings=settings,
                account=account,
                name=name,
                states=StateManager(redis, keys, account, name, uuid.uuid4().hex),
                marker_file=MarkerFile(Path(settings.run.data_dir), account, name),
                tokens=tokens,
                connect=lambda token: ImapMailbox(server, account, name, token),
                clock=clock,
                new_id=lambda: secrets.token_hex(8),
                shutdown=shutdown,
                beats=self.beats,
            )

        self.mailboxes = [
            mailbox(account, name, tokens) for account, tokens in sources.items() for name in settings.mail.mailboxes
        ]

    def run(self) -> None:
        """Read until the shutdown is requested, then end in order."""
        shutdown, run = self.shutdown, self.settings.run
        listener = endpoint.open_port(run.http_host, run.http_port, FIRST_PORT)
        stop_endpoint = endpoint.serve(listener, lambda: liveness(self.beats.seen(), self.clock.monotonic()), shutdown)
        readers = [shutdown.guard(mailbox.title, mailbox.run) for mailbox in self.mailboxes]
        shutdown.guard("leases", self._keep_leases)
        log.info("producer reads %s into %s", ", ".join(mailbox.title for mailbox in self.mailboxes), self.settings.stream.name)

        shutdown.add_step(10, "mailboxes", lambda: self._join(readers))
        shutdown.add_step(50, "side threads", self.stopped.set)
        shutdown.add_step(60, "endpoint", stop_endpoint)
        while not shutdown.wait(run.stats_interval):
            self._report()
        began = self.clock.monotonic()
        log.info("stopping: %s", shutdown.reason)
        shutdown.run_steps()
        self._report()
        log.info("stopped after %.1f s", self.clock.monotonic() - began)

    def run_once(self) -> None:
        """Read what is there now, each mailbox in turn. Raises NoUsableToken if none could be read for want of a token."""
        self.shutdown.guard("leases", self._keep_leases)
        refused = []
        for mailbox in self.mailboxes:
            try:
                mailbox.run_once()
            except ReauthRequired as error:
                log.error("%s: %s", mailbox.title, error)
                refused.append(str(error))
            finally:
                mailbox.states.let_go()
        self.stopped.set()
        self._report()
        if len(refused) == len(self.mailboxes):
            raise NoUsableToken("; ".join(refused))

    def _keep_leases(self) -> None:
        """Renew the leases of all mailboxes, however long their fetches take; let go of a thread that stands still."""
        every = self.settings.mail.lease / 3
        while not self.stopped.wait(every):
            self.beats.turn("leases", limit=60 + every + self.settings.redis.socket_timeout)
            loops, now = self.beats.seen(), self.clock.monotonic()
            for mailbox in self.mailboxes:
                loop = loops.get(mailbox.title)
                if loop is not None and now - loop.turned <= loop.limit and mailbox.owns:
                    self._renew(mailbox)

    def _renew(self, mailbox: Mailbox) -> None:
        try:
            answer = mailbox.states.acquire(self.settings.mail.lease)
            if isinstance(answer, Held):
                log.warning("%s: the lease is lost to another producer", mailbox.title)
            else:
                mailbox.reader.resync = answer.resync
        except Transient as error:
            log.warning("%s: the lease could not be renewed: %s", mailbox.title, error)

    def _join(self, readers: list[threading.Thread]) -> None:
        deadline = self.clock.monotonic() + self.settings.run.shutdown_timeout
        for reader in readers:
            reader.join(max(0.0, deadline - self.clock.monotonic()))

    def _report(self) -> None:
        for mailbox in self.mailboxes:
            reader = mailbox.reader
            status = "PAUSED" if reader.paused else mailbox.status
            log.info("%s: %s, %d published, %d known already", mailbox.title, status, reader.published, reader.known)
