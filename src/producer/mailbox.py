"""The story of one mailbox: own it, connect, read what is new, wait. One thread runs it; it starts none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

from config.settings import Settings
from src.common.clock import Clock
from src.common.exceptions import (
    ConfigurationError,
    ImapIncomplete,
    ImapThrottled,
    ImapUnavailable,
    LoginRefused,
    MailboxMissing,
    ReauthRequired,
    ScriptRefused,
    Transient,
)
from src.common.health import Beats
from src.common.retry import retry_on_imap_error, retry_on_oauth_error
from src.common.shutdown import Shutdown
from src.producer.plan import State
from src.producer.progress import Progress
from src.producer.pulse import Pulse
from src.producer.reader import NotOurs, Reader, Session
from src.producer.state_manager import Held, MarkerFile, StateManager

log = logging.getLogger(__name__)

SESSION_SECONDS = 1800.0  # a new session sees a new UIDVALIDITY; Gmail ends one after an hour anyway


class Tokens(Protocol):
    """What is needed of `src.auth.oauth2_gmail.TokenSource`."""

    def access_token(self, *, refuse: str | None = None) -> str: ...


@dataclass
class Mailbox:
    """`connect`: access token → a session, not yet entered. `new_id`: a fresh random id. `status`: what /status says of it.
    `owns`: we hold its lease, as far as we know: it is to be renewed."""

    settings: Settings
    account: str
    name: str
    states: StateManager
    marker_file: MarkerFile
    tokens: Tokens
    connect: Callable[[str], AbstractContextManager[Session]]
    clock: Clock
    new_id: Callable[[], str]
    shutdown: Shutdown
    beats: Beats
    status: str = "STARTING"
    owns: bool = False

    def __post_init__(self) -> None:
        self.title = f"{self.account}/{self.name}"
        self.pulse = Pulse(self.title, self.beats, self.shutdown, step=5 * self.settings.mail.timeout)
        self.reader = Reader(
            self.settings,
            self.account,
            self.name,
            self.states,
            self.marker_file,
            self.clock,
            self.new_id,
            self.pulse,
            Progress(self.title, self.clock),
        )

    # own it

    def run(self) -> None:
        """Until the shutdown. What is transient is waited for; a dead token holds this mailbox only."""
        while not self.shutdown.requested:
            try:
                state = self._own()
                if not self.shutdown.requested:
                    self._in_session(state, forever=True)
            except NotOurs as error:
                log.info("%s: %s", self.title, error)
            except (ReauthRequired, MailboxMissing, ConfigurationError) as error:
                self._disabled(error)
            except ImapIncomplete as error:
                log.warning("%s: %s; asking again", self.title, error)
                self.pulse.pause(self.settings.mail.incomplete_wait)
            except ImapThrottled as error:
                self._rest(error)
            except (Transient, ScriptRefused) as error:
                log.warning("%s: %s; trying again", self.title, error)
                self.pulse.pause(1.0)
        self.status = "STOPPED"
        self.beats.ended(self.title)
        with suppress(Transient):  # then a standby waits for the lease to end
            self.states.let_go()

    def run_once(self) -> None:
        """Read what is there now and return; what is transient is waited for. Raises what only a person can mend."""
        while not self.shutdown.requested:
            try:
                return self._in_session(self._own(), forever=False)
            except NotOurs as error:
                log.info("%s: %s", self.title, error)
            except ImapIncomplete as error:
                log.warning("%s: %s; asking again", self.title, error)
                self.pulse.pause(self.settings.mail.incomplete_wait)
            except ImapUnavailable as error:
                log.warning("%s: %s; trying again", self.title, error)
                self.pulse.pause(1.0)
        return None

    def _own(self) -> State | None:
        """Wait until the mailbox is ours; how far it was read."""
        said = False
        while True:
            answer = self.pulse.ask_redis(lambda: self.states.acquire(self.settings.mail.lease))
            self.owns = not isinstance(answer, Held)
            if not isinstance(answer, Held):
                self.reader.resync = answer.resync
                self.reader.compare_marker(answer.state)
                return answer.state
            self.status = "STANDBY"
            if not said:
                said = True
                log.info(
                    "%s: another producer reads it; standing by, at most %.0f s after its last sign", self.title, answer.seconds
                )
            if answer.state is not None:
                self.reader.remember(answer.state, force=False)  # what we take over one day must be known here by then
            if self.pulse.pause(min(answer.seconds + 0.1, 5.0)):
                return None

    def _disabled(self, error: Exception) -> None:
        """No token, a dead one, no such folder: this mailbox waits for a person, the others go on."""
        status = "REAUTH_REQUIRED" if isinstance(error, ReauthRequired) else "MISCONFIGURED"
        if self.status != status:
            log.error("%s: %s: %s", self.title, status, error)
        self.status = status
        self.pulse.pause(10.0)

    def _rest(self, error: ImapThrottled) -> None:
        mail = self.settings.mail
        seconds = {"OVERQUOTA": mail.overquota_wait, "THROTTLED": mail.throttled_wait, "CONNECTIONS": mail.connections_wait}[
            error.kind
        ]
        log.warning("%s: %s; resting for %.0f s", self.title, error, seconds)
        self.status = error.kind
        self.pulse.pause(seconds)

    # a session

    def _in_session(self, state: State | None, *, forever: bool) -> None:
        with self._open() as session:
            self.pulse.turn()
            state = self.reader.begin(session, state)
            self.reader.settle_absent(session)
            ends = self.clock.monotonic() + SESSION_SECONDS
            while not self.shutdown.requested:
                state = self.reader.poll(session, state)
                self.reader.look_back(session, state)
                self.status = "CONNECTED"
                if not forever:
                    return
                if self.clock.monotonic() > ends:
                    return
                self.pulse.turn(self.settings.mail.poll_interval)
                session.wait(self.settings.mail.poll_interval, lambda: self.shutdown.requested or bool(self.reader.resync))

    def _open(self) -> AbstractContextManager[Session]:
        """A session that is logged in. A refused login forces one refresh of the token."""
        token = self._token()
        try:
            return self._entered(token)
        except LoginRefused as error:
            log.info("%s: login refused (%s): refreshing the token", self.title, error)
            fresh = self._token(refuse=token)
        try:
            return self._entered(fresh)
        except LoginRefused as error:
            raise ReauthRequired(
                f"the server refuses a fresh token of {self.account} ({error}); is IMAP switched on? "
                f"Consent again: python producer.py --auth-setup --username {self.account}"
            ) from error

    def _entered(self, token: str) -> AbstractContextManager[Session]:
        """Connects within the retry, so that leaving the `with` of the caller is all that is left to do."""

        @retry_on_imap_error(self.shutdown)
        def enter() -> _Entered:
            self.pulse.turn()
            manager = self.connect(token)
            return _Entered(manager, manager.__enter__())

        return enter()

    def _token(self, refuse: str | None = None) -> str:
        @retry_on_oauth_error(self.shutdown)
        def ask() -> str:
            self.pulse.turn()
            return self.tokens.access_token(refuse=refuse)

        return ask()


@dataclass
class _Entered:
    """A context manager that was entered already: leaving it leaves `manager`."""

    manager: AbstractContextManager[Session]
    session: Session

    def __enter__(self) -> Session:
        return self.session

    def __exit__(self, *exc: object) -> None:
        self.manager.__exit__(None, None, None)
