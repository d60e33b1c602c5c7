"""The story of one mailbox: own it, connect, read what is new, wait. One thread runs it; it starts none."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from config.settings import Settings
from src.common.circuit_breaker import CircuitBreaker
from src.common.clock import Clock, iso
from src.common.exceptions import (
    BreakerOpen,
    ConfigurationError,
    DiskUnavailable,
    ImapIncomplete,
    ImapThrottled,
    ImapUnavailable,
    IngestionError,
    LoginRefused,
    MailboxMissing,
    ReauthRequired,
    ScriptRefused,
    TokenEndpointUnavailable,
    Transient,
)
from src.common.health import Beats
from src.common.retry import retry_on_imap_error, retry_on_oauth_error
from src.common.shutdown import Shutdown
from src.common.timing import NO_STOPWATCH, Stopwatch
from src.imap.connection import session_over
from src.producer.plan import State
from src.producer.progress import Progress
from src.producer.pulse import Pulse
from src.producer.reader import CheckupCall, Keep, NotOurs, Reader, Session, keep_nothing
from src.producer.repair import no_checkup
from src.producer.state_manager import Held, MarkerFile, StateManager

log = logging.getLogger(__name__)

REAUTH_SECONDS = 3600.0  # what was refused is tried again so much later, unless its file changes
MISCONFIGURED_SECONDS = 60.0
LOOK_SECONDS = 2.0  # between two looks at that file
PAUSE_SECONDS = 1.0  # between two looks whether somebody resumed it
BACKOFF_CAP = 300.0  # longest wait between two sessions that break off, and between two tries to open one
SHORT_SECONDS = 60.0  # a session that broke off sooner counts as one that breaks off again and again
WAITED_FOR = (NotOurs, Transient)  # what is over by itself

STATES = (
    "STARTING",
    "CONNECTED",
    "PAUSED",
    "BACKFILL_PAUSED",
    "REREADING",
    "STANDBY",
    "DISCONNECTED",
    "OVERQUOTA",
    "THROTTLED",
    "CONNECTIONS",
    "REAUTH_REQUIRED",
    "MISCONFIGURED",
    "STOPPED",
)
REASONS = (
    "session_over",
    "broke_off",
    "unreachable",
    "incomplete",
    "overquota",
    "throttled",
    "connections",
    "not_ours",
    "refused",
    "misconfigured",
    "other",
)

SESSION_SECONDS = 1800.0  # a new session sees a new UIDVALIDITY; Gmail ends one after an hour anyway


class Tokens(Protocol):
    """What is needed of `src.auth.credentials.Credentials`."""

    def access_token(self, *, refuse: str | None = None) -> str: ...

    def stamp(self) -> object: ...

    def facts(self) -> dict[str, object]: ...


def is_down(error: Exception) -> bool:
    """What the breaker of an IMAP server counts: it could not be reached or did not speak IMAP. A refused login, a missing folder, a
    request for a pause and the end of a session's time are answers."""
    return isinstance(error, ImapUnavailable) and not session_over(str(error))


def reason_of(error: Exception) -> str:
    """Which of `REASONS` ended a session that ended with `error`."""
    if isinstance(error, ImapThrottled):
        return error.kind.lower()
    if isinstance(error, ImapUnavailable):
        return "session_over" if session_over(str(error)) else "broke_off"
    kinds = {NotOurs: "not_ours", ImapIncomplete: "incomplete", ReauthRequired: "refused"}
    kinds |= {MailboxMissing: "misconfigured", ConfigurationError: "misconfigured"}
    return kinds.get(type(error), "other")


@dataclass
class Mailbox:
    """`connect`: (access token or password, what it calls while an answer comes) → a session, not yet entered. `new_id`: a fresh random
    id. `breaker`: of the IMAP server, shared by the mailboxes on it. `gate`: why nothing may be taken in now, "" if it may. `pause`: why
    somebody holds this mailbox up since its session began, "" if nobody does. `keep`, `checkup`, `fetching`, `publishing`: see `Reader`.
    `status` and `why`: see `state`. `token`: what was known of the token at the last login. `reconnects`: sessions that ended or could not
    be opened, by `REASONS`. `owns`: we hold its lease, as far as we know: it is to be renewed. `broken`: sessions that broke off soon, one
    after the other."""

    settings: Settings
    account: str
    name: str
    states: StateManager
    marker_file: MarkerFile
    tokens: Tokens
    connect: Callable[[str, Callable[[], None]], AbstractContextManager[Session]]
    clock: Clock
    new_id: Callable[[], str]
    shutdown: Shutdown
    beats: Beats
    breaker: CircuitBreaker
    keep: Keep = keep_nothing
    gate: Callable[[], str] = lambda: ""
    pause: Callable[[], str] = lambda: ""
    checkup: CheckupCall = no_checkup
    fetching: Stopwatch = NO_STOPWATCH
    publishing: Stopwatch = NO_STOPWATCH
    status: str = "STARTING"
    why: str = ""
    owns: bool = False
    broken: int = 0
    entered: float = 0.0
    token: Mapping[str, object] = field(default_factory=dict)
    reconnects: Counter[str] = field(default_factory=Counter)

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
            self.keep,
            self._gate,
            self.checkup,
            self.fetching,
            self.publishing,
        )

    # what /status says of it

    def state(self) -> tuple[str, str]:
        """(state, why): STARTING; CONNECTED; PAUSED (nothing may be taken in, or somebody said so); BACKFILL_PAUSED (old mail waits, new
        mail does not); REREADING; STANDBY; DISCONNECTED; OVERQUOTA, THROTTLED, CONNECTIONS (a rest that the server asked for);
        REAUTH_REQUIRED; MISCONFIGURED; STOPPED."""
        reader, full = self.reader, self.pause() or self.gate()
        if self.status == "STANDBY":
            return "STANDBY", "another producer reads it"
        if self.status != "CONNECTED":
            return self.status, self.why
        if full:
            return "PAUSED", full
        if reader.paused:
            return "BACKFILL_PAUSED" if reader.only_old else "PAUSED", reader.paused
        return ("REREADING", "Redis had forgotten this mailbox") if reader.rereading else ("CONNECTED", "")

    def facts(self) -> dict[str, object]:
        """The mailbox as /status shows it. Nothing is asked of anybody."""
        (state, why), reader = self.state(), self.reader
        silent = None if reader.contact is None else self.clock.monotonic() - reader.contact
        return {
            "account": self.account,
            "mailbox": self.name,
            "state": state,
            "why": why,
            "last_contact": "" if silent is None else iso(self.clock.wall() - timedelta(seconds=silent)),
            "seconds_since_contact": None if silent is None else round(silent, 1),
            "last_uid": reader.last_uid,
            "lag": reader.waiting,
            "published": reader.published,
            "known_already": reader.known,
            "unaccounted": reader.unaccounted,
            "account_bytes_today": reader.bytes_today,
            "token": self.tokens.facts(),
        }

    # own it

    def run(self) -> None:
        """Until the shutdown. What is transient is waited for; a dead token holds this mailbox only."""
        while not self.shutdown.requested:
            self.pulse.turn()
            stamp = self.tokens.stamp()
            try:
                if self._held_up():
                    continue
                state = self._own()
                if not self.shutdown.requested:
                    self._in_session(state, forever=True)
            except (ReauthRequired, MailboxMissing, ConfigurationError) as error:
                self._disabled(error, stamp)
            except (*WAITED_FOR, ScriptRefused) as error:
                self._wait_for(error)
        self.status = "STOPPED"
        self.beats.ended(self.title)
        self.let_go()

    def run_once(self) -> None:
        """Read what is there now and return; what is transient is waited for. Raises what only a person can mend; DiskUnavailable."""
        while not self.shutdown.requested:
            if why := self.pulse.ask_redis(self.states.paused):
                log.warning("%s: not read: %s", self.title, why)
                return None
            try:
                state = self._own(patient=False)
                return self._in_session(state, forever=False) if self.owns else None
            except DiskUnavailable:
                raise
            except WAITED_FOR as error:
                self._wait_for(error)
        return None

    def _wait_for(self, error: Exception) -> None:
        """Say what is in the way, and wait until it may be over."""
        if isinstance(error, NotOurs):
            log.info("%s: %s", self.title, error)
        elif isinstance(error, ImapIncomplete):
            log.warning("%s: %s; asking again", self.title, error)
            self.pulse.pause(self.settings.mail.incomplete_wait)
        elif isinstance(error, ImapThrottled):
            self._rest(error)
        elif isinstance(error, BreakerOpen):
            self._wait_for_reopening(error)
        else:
            self._broke_off(error)

    def _held_up(self) -> bool:
        """Somebody paused it: no session, no lease; after a moment the next look. What Redis knows of it stays as it is."""
        why = self.pause() or self.pulse.ask_redis(self.states.paused)
        if why and self.status != "PAUSED":
            log.warning("%s: %s", self.title, why)
            self.let_go()
        if why:
            self.status, self.why = "PAUSED", why
            self.pulse.pause(PAUSE_SECONDS)
        elif self.status == "PAUSED":
            log.info("%s: resumed", self.title)
            self.status, self.why = "STARTING", ""
        return bool(why)

    def _gate(self) -> str:
        """For the reader, before it fetches: what was paused by hand is left."""
        if self.pause():
            raise NotOurs("its session ends: it was paused by hand")
        return self.gate()

    def _own(self, *, patient: bool = True) -> State | None:
        """Wait until the mailbox is ours; not `patient`: only while its owner gives no sign of life. How far it was read."""
        until, self.entered = "", self.clock.monotonic()  # what breaks off here breaks off soon
        while True:
            answer = self.pulse.ask_redis(lambda: self.states.acquire(self.settings.mail.lease))
            self.owns = not isinstance(answer, Held)
            if not isinstance(answer, Held):
                self.reader.owned(answer)
                return answer.state
            self.status, self.reader.epoch = "STANDBY", 0
            if until and answer.until != until and not patient:  # it was renewed
                log.info("%s: another producer is alive and reads it: left to that one", self.title)
                return None
            if not until:
                log.info(
                    "%s: another producer reads it; standing by, to take over %.0f s after its last sign of life at most",
                    self.title,
                    answer.seconds,
                )
            until = answer.until
            if answer.state is not None:
                self.reader.remember(answer.state, force=False)  # what we take over one day must be known here by then
            if self.pulse.pause(min(answer.seconds + 0.1, 5.0)):
                return None

    def _disabled(self, error: Exception, stamp: object) -> None:
        """No token, a dead one, no such folder: this mailbox waits for a person, the others go on.

        It is let go of meanwhile. `stamp`: of the credentials before the attempt that failed.
        """
        refused = isinstance(error, ReauthRequired)
        status, seconds = ("REAUTH_REQUIRED", REAUTH_SECONDS) if refused else ("MISCONFIGURED", MISCONFIGURED_SECONDS)
        if refused or self.why != str(error):
            log.error("%s: %s: %s", self.title, status, error)
        self.let_go()
        self.status, self.why = status, str(error)
        again = self.clock.monotonic() + seconds
        while self.tokens.stamp() == stamp and self.clock.monotonic() < again:
            if self.pulse.pause(LOOK_SECONDS):
                return

    def let_go(self) -> None:
        """Give its lease up."""
        self.owns = False
        with suppress(IngestionError):  # then a standby waits for the lease to end
            self.states.let_go()

    def _broke_off(self, error: Exception) -> None:
        """Servers end sessions about once an hour: no news. What breaks off again and again gets longer and longer pauses."""
        if self.clock.monotonic() - self.entered > SHORT_SECONDS:
            self.broken = 0
        normal = session_over(str(error)) and not self.broken
        if not normal:
            self._disconnected(error)
        usual = logging.INFO if isinstance(error, ImapUnavailable) else logging.WARNING
        log.log(logging.DEBUG if normal else usual, "%s: %s; connecting again", self.title, error)
        self.pulse.pause(min(0.5 * 2**self.broken, BACKOFF_CAP))
        self.broken = min(self.broken + 1, 16)

    def _wait_for_reopening(self, error: BreakerOpen) -> None:
        """The server fails for every mailbox on it: all wait, one of them tries, and when that one gets in the others follow."""
        self._disconnected(error)
        self.pulse.pause(error.seconds)

    def _disconnected(self, error: Exception) -> None:
        self.status, self.why = "DISCONNECTED", str(error)

    def _rest(self, error: ImapThrottled) -> None:
        mail = self.settings.mail
        seconds = {"OVERQUOTA": mail.overquota_wait, "THROTTLED": mail.throttled_wait, "CONNECTIONS": mail.connections_wait}[
            error.kind
        ]
        log.warning("%s: %s; resting for %.0f s", self.title, error, seconds)
        self.status, self.why = error.kind, str(error)
        self.pulse.pause(seconds)

    # a session

    def _in_session(self, state: State | None, *, forever: bool) -> None:
        try:
            self._session(state, forever=forever)
        except (IngestionError, NotOurs) as error:
            if not isinstance(error, BreakerOpen):  # then nothing was tried
                self.reconnects[reason_of(error)] += 1
            raise
        if not self.shutdown.requested:
            self.reconnects["session_over"] += 1

    def _session(self, state: State | None, *, forever: bool) -> None:
        with self._open() as session:
            self.pulse.turn()
            self.entered = self.clock.monotonic()
            self.status = "CONNECTED"
            self.reader.answered()
            state = self.reader.begin(session, state)
            self.reader.withheld.settle(session)
            ends = self.clock.monotonic() + SESSION_SECONDS
            while not (self.shutdown.requested or self.pause()):
                state = self.reader.poll(session, state)
                self.reader.look_back(session, state)
                self._well()
                if not forever:
                    return
                if self.clock.monotonic() > ends:
                    return
                self.pulse.turn(self.settings.mail.poll_interval)
                session.wait(self.settings.mail.poll_interval, self._is_wanted)
                self.reader.answered()

    def _is_wanted(self) -> bool:
        """Something else than new mail ends the wait for it."""
        return self.shutdown.requested or bool(self.reader.resync) or bool(self.pause())

    def _well(self) -> None:
        if self.why:
            log.info("%s: it is read again", self.title)
        self.why, self.broken = "", 0

    def _open(self) -> AbstractContextManager[Session]:
        """A session that is logged in. A refused login forces one refresh of the token; a password has none."""
        secret = self._secret()
        try:
            return self._entered(secret)
        except LoginRefused as error:
            refusal = error
            log.info("%s: login refused (%s)", self.title, refusal)
        try:
            fresh = self._secret(refuse=secret)
        except ReauthRequired as verdict:
            raise ReauthRequired(f"{verdict}; the IMAP server said: {refusal}") from refusal
        try:
            return self._entered(fresh)
        except LoginRefused as error:
            raise ReauthRequired(
                f"the server refuses a fresh token of {self.account} ({error}); is IMAP switched on? "
                f"Consent again: python producer.py --auth-setup --username {self.account}"
            ) from error

    def _entered(self, secret: str) -> AbstractContextManager[Session]:
        """Connects within the retry, so that leaving the `with` of the caller is all that is left to do.

        Raises BreakerOpen while the server is left alone: that ends the retry, for whoever may try next decides for all.
        """

        @retry_on_imap_error(self.shutdown, BACKOFF_CAP)
        def enter() -> _Entered:
            self.pulse.turn(BACKOFF_CAP)  # the pause after it counts in
            manager = self.connect(secret, self.pulse.turn)
            try:
                return _Entered(manager, self.breaker.call(manager.__enter__))
            except ImapUnavailable as error:
                self.reconnects["unreachable"] += 1
                self._disconnected(error)
                raise

        return enter()

    def _secret(self, refuse: str | None = None) -> str:
        @retry_on_oauth_error(self.shutdown)
        def ask() -> str:
            self.pulse.turn()
            try:
                secret = self.tokens.access_token(refuse=refuse)
                self.token = self.tokens.facts()
                return secret
            except TokenEndpointUnavailable as error:
                self._disconnected(error)
                raise

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
