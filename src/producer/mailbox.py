"""The story of one mailbox: own it, connect, plan, fetch, parse, publish, wait. One thread runs it; it starts none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Literal, Protocol, TypeVar

from config.settings import Settings
from src.common.batch import split
from src.common.clock import Clock, iso
from src.common.correlation import correlated
from src.common.exceptions import (
    ConfigurationError,
    ImapIncomplete,
    ImapUnavailable,
    LoginRefused,
    MailboxMissing,
    ReauthRequired,
    ScriptRefused,
    Transient,
)
from src.common.health import Beats
from src.common.retry import retry_on_imap_error, retry_on_oauth_error, retry_on_redis_error
from src.common.shutdown import Shutdown
from src.imap.imap_client import Folder, Meta
from src.mail.parse import parse, stub
from src.mail.record import Envelope, gmail_email_id, hashed_email_id, header_email_id, in_mailbox_scope, to_fields
from src.producer import plan
from src.producer.plan import Marker, State
from src.producer.state_manager import Held, Identity, Mail, MarkerFile, StateManager

log = logging.getLogger(__name__)

STUB_BYTES = 65_536
FETCH_BYTES = 8 << 20  # most bytes of bodies in one FETCH
PUBLISH_BYTES = 1 << 20  # most bytes of records in one publish: a script over more holds the server too long
TRIES = 3  # for a mail whose data the server does not give
SESSION_SECONDS = 1800.0  # a new session sees a new UIDVALIDITY; Gmail ends one after an hour anyway
MARKER_SECONDS = 10.0  # how far the marker may lag behind where nothing is at stake

Result = TypeVar("Result")


class Session(Protocol):
    """What is needed of `src.imap.imap_client.ImapMailbox`."""

    folder: Folder

    def uids_from(self, first: int) -> list[int]: ...
    def uids_since(self, day: date, first: int = 1) -> list[int]: ...
    def has(self, uid: int) -> bool: ...
    def meta(self, uids: Sequence[int]) -> dict[int, Meta]: ...
    def bodies(self, uids: Sequence[int]) -> dict[int, bytes]: ...
    def head(self, uid: int, limit: int) -> bytes: ...
    def wait(self, seconds: float, stop: Callable[[], bool]) -> bool: ...


class Tokens(Protocol):
    """What is needed of `src.auth.oauth2_gmail.TokenSource`."""

    def access_token(self, *, refuse: str | None = None) -> str: ...


class NotOurs(Exception):
    """Another producer owns the mailbox, or the state is not the one we read: own it anew before going on."""


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
    published: int = 0
    known: int = 0
    _newest: str = ""
    _marker: Marker | None = None
    _marker_written: float = 0.0
    _tries: dict[int, int] = field(default_factory=dict)
    _given_up: set[int] = field(default_factory=set)
    _gone: set[int] = field(default_factory=set)

    @property
    def title(self) -> str:
        return f"{self.account}/{self.name}"

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
                self._pause(self.settings.mail.incomplete_wait)
            except (Transient, ScriptRefused) as error:
                log.warning("%s: %s; trying again", self.title, error)
                self._pause(1.0)
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
                self._pause(self.settings.mail.incomplete_wait)
            except ImapUnavailable as error:
                log.warning("%s: %s; trying again", self.title, error)
                self._pause(1.0)
        return None

    def _own(self) -> State | None:
        """Wait until the mailbox is ours; how far it was read."""
        said = False
        while True:
            answer = self._ask_redis(lambda: self.states.acquire(self.settings.mail.lease))
            self.owns = not isinstance(answer, Held)
            if not isinstance(answer, Held):
                self._behind_marker(answer.state)
                return answer.state
            self.status = "STANDBY"
            if not said:
                said = True
                log.info(
                    "%s: another producer reads it; standing by, at most %.0f s after its last sign", self.title, answer.seconds
                )
            if answer.state is not None:
                self._remember(answer.state, force=False)  # what we take over one day must be known here by then
            if self._pause(min(answer.seconds + 0.1, 5.0)):
                return None

    def _behind_marker(self, state: State | None) -> None:
        self._marker = self._marker or self.marker_file.read()
        marker = self._marker
        if state is None or marker is None:
            return
        if marker.state.uidvalidity == state.uidvalidity and state.last_uid < marker.state.last_uid:
            log.warning(
                "%s: Redis came back older (last_uid %d, %d was reached): mail since then is read again, effects may repeat",
                self.title,
                state.last_uid,
                marker.state.last_uid,
            )

    def _disabled(self, error: Exception) -> None:
        """No token, a dead one, no such folder: this mailbox waits for a person, the others go on."""
        status = "REAUTH_REQUIRED" if isinstance(error, ReauthRequired) else "MISCONFIGURED"
        if self.status != status:
            log.error("%s: %s: %s", self.title, status, error)
        self.status = status
        self._pause(10.0)

    # a session

    def _in_session(self, state: State | None, *, forever: bool) -> None:
        with self._open() as session:
            self._turn()
            state = self._begin(session, state)
            self._settle_absent(session)
            ends = self.clock.monotonic() + SESSION_SECONDS
            while not self.shutdown.requested:
                state = self._poll(session, state)
                self.status = "CONNECTED"
                if not forever:
                    return
                if self.clock.monotonic() > ends:
                    return
                self._turn(self.settings.mail.poll_interval)
                session.wait(self.settings.mail.poll_interval, lambda: self.shutdown.requested)

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
            self._turn()
            manager = self.connect(token)
            return _Entered(manager, manager.__enter__())

        return enter()

    def _begin(self, session: Session, state: State | None) -> State:
        """Decide how to begin, and record it if anything is new: before the first mail of a read is published."""
        folder = session.folder
        if state is not None and state.uidvalidity == folder.uidvalidity:
            if self._marker is None:
                self._remember(state, force=True)
            return state
        listed = session.uids_from(1)
        highest = listed[-1] if listed else 0
        last = session.meta([highest]) if highest else {}
        newest = last[highest].internal_date if highest in last else ""
        if highest and not newest:
            raise ImapIncomplete([highest])
        if self._marker is None:
            self._marker = self.marker_file.read()
        opened = plan.opening(
            state,
            self._marker,
            uidvalidity=folder.uidvalidity,
            highest=highest,
            newest=newest,
            threshold=plan.first_threshold(self.settings.mail.initial_sync, self.clock.wall()),
            traces=self._ask_redis(self.states.traces) if state is None and self._marker is None else None,
        )
        day = plan.search_day(opened.state)
        dated = session.uids_since(day) if day else listed
        log.info(
            "%s: %s (%d of %d mails to look at)", self.title, opened.why, len(dated) if opened.state.horizon else 0, len(listed)
        )
        if opened.kind == "first":
            self._newest = newest
        self._remember(opened.state, force=True)
        self._publish([], state, opened.state)
        return opened.state

    def _settle_absent(self, session: Session) -> None:
        """Mails whose data the server withheld: gone if the folder does not show them twice, a stub after the last try."""
        for uid, tries in list(self._tries.items()):
            if not session.has(uid) and not session.has(uid):
                log.info("%s: UID %d is gone from the folder", self.title, uid)
                self._gone.add(uid)
                del self._tries[uid]
            elif tries >= TRIES:
                log.error("%s: UID %d was asked for %d times without an answer: it enters as a stub", self.title, uid, tries)
                self._given_up.add(uid)
                del self._tries[uid]

    def _poll(self, session: Session, state: State) -> State:
        """Bring everything above `last_uid` to its fate."""
        self._turn()
        reading_by_date = state.last_uid < state.horizon
        listed = session.uids_from(state.last_uid + 1)
        day = plan.search_day(state)
        dated = set(session.uids_since(day, state.last_uid + 1)) if day else None
        uids = plan.candidates(state, listed, dated)
        start, left_out = state, len(listed) - len(uids)
        size = self.settings.mail.batch_size
        for first in range(0, len(uids), size):
            state = self._read_window(session, state, uids[first : first + size])
            if self.shutdown.requested:
                return state
            if reading_by_date and first // size % 10 == 9:
                log.info("%s: read %d of %d", self.title, first + size, len(uids))
        done = plan.finished(plan.advanced(state, 0, passed=left_out), listed[-1] if listed else 0)
        if done != state or state == start:
            self._publish([], state, done)  # also what says that this mailbox was polled, and is still ours
        if reading_by_date:
            log.info("%s: the read by date is complete, %d mails were left out", self.title, done.passed - start.passed)
        self._remember(done, force=reading_by_date)
        return done

    # a window of mails

    def _read_window(self, session: Session, state: State, uids: Sequence[int]) -> State:
        """Publish what is new among `uids`; the state moves with each batch. Raises ImapIncomplete behind the contiguous prefix."""
        self._turn()
        metas = session.meta(uids)
        metas.update({uid: Meta(uid, "", 0, "", "", (), b"") for uid in uids if uid in self._given_up and uid not in metas})
        ready, absent = plan.prefix([uid for uid in uids if uid not in self._gone], metas.keys())
        identities = {
            uid: identity_of(self.account, self.name, session.folder, metas[uid], self.settings.mail.dedup_scope) for uid in ready
        }
        unknown = self._ask_redis(lambda: self.states.missing(list(identities.values()), self.account))
        self._newest = max([self._newest, *(metas[uid].internal_date for uid in ready)])
        fresh = {ready[position] for position in unknown}
        wanted = [
            uid for uid in ready if uid in fresh and plan.counts(state, uid, metas[uid].internal_date, self._forgotten_before())
        ]
        self.known += len(ready) - len(fresh)
        passed = len(fresh) - len(wanted)
        most = self.settings.mail.max_message_bytes
        sizes = {uid: min(metas[uid].size, most) for uid in wanted}
        for group in split(wanted, sizes.__getitem__, most=len(wanted), most_bytes=FETCH_BYTES):
            mails, withheld = self._fetched(session, [(metas[uid], identities[uid]) for uid in group])
            for batch in split(mails, lambda mail: mail.size, most=len(group), most_bytes=PUBLISH_BYTES):
                state = self._publish(batch, state, plan.advanced(state, batch[-1].uid))
            if withheld:
                self._missed(withheld)
        if ready:
            moved = plan.advanced(state, ready[-1], passed=passed)
            if moved != state:
                state = self._publish([], state, moved)
        if absent:
            self._missed(absent)
        return state

    def _missed(self, uids: list[int]) -> None:
        for uid in uids:
            self._tries[uid] = self._tries.get(uid, 0) + 1
        raise ImapIncomplete(uids)

    def _fetched(self, session: Session, wanted: Sequence[tuple[Meta, Identity]]) -> tuple[list[Mail], list[int]]:
        """(the contiguous prefix as mails, the UIDs whose data did not come)."""
        most = self.settings.mail.max_message_bytes
        whole = [meta.uid for meta, _ in wanted if meta.size <= most and meta.uid not in self._given_up]
        self._turn()
        bodies = session.bodies(whole) if whole else {}
        had = set(bodies) | {meta.uid for meta, _ in wanted if meta.uid not in whole}
        ready, withheld = plan.prefix([meta.uid for meta, _ in wanted], had)
        mails = []
        for meta, identity in wanted[: len(ready)]:
            self._turn()
            raw = bodies.get(meta.uid)
            head = session.head(meta.uid, STUB_BYTES) if raw is None else b""
            mails.append(self._mail(session.folder, meta, identity, raw, head))
        return mails, withheld

    def _mail(self, folder: Folder, meta: Meta, identity: Identity, raw: bytes | None, head: bytes) -> Mail:
        correlation_id = self.new_id()
        envelope = Envelope(
            account=self.account,
            mailbox=self.name,
            uid=meta.uid,
            uidvalidity=folder.uidvalidity,
            internal_date=meta.internal_date,
            size=meta.size,
            email_id=identity.email_id,
            correlation_id=correlation_id,
            ingested_at=iso(self.clock.wall()),
            gm_thrid=meta.gm_thrid,
            gm_labels=meta.gm_labels,
        )
        with correlated(correlation_id):
            if raw is not None:
                record = parse(raw, envelope)
            elif meta.uid in self._given_up:
                record = stub(envelope, head or meta.header, f"the server did not give this mail in {TRIES} tries")
            else:
                reason = f"{meta.size} bytes, above MAX_MESSAGE_BYTES={self.settings.mail.max_message_bytes}"
                record = stub(envelope, head or meta.header, reason)
            log.debug("%s: UID %d is %s", self.title, meta.uid, identity.email_id)
        return Mail(meta.uid, to_fields(envelope, record))

    def _forgotten_before(self) -> str:
        return iso(self.clock.wall() - timedelta(days=self.settings.stream.processed_days))

    # record it

    def _publish(self, mails: Sequence[Mail], expected: State | None, state: State) -> State:
        """One batch, once, whatever calls fail; waits while the stream is full. Raises NotOurs."""
        self._cover(mails, state)
        batch, most_live, said = self.new_id(), self._most_live(state), False
        while True:
            self._turn()
            answer = self._ask_redis(
                lambda: self.states.publish(
                    mails, batch=batch, expected=expected, state=state, now=self.clock.wall(), most_live=most_live
                )
            )
            if answer.verdict in ("OK", "ALREADY"):
                added = sum(answer.added) if answer.verdict == "OK" else len(mails)
                self.published += added
                self.known += len(mails) - added
                if said:
                    log.info("%s: the stream has room again", self.title)
                return state
            if answer.verdict == "FENCED":
                raise NotOurs("another producer took the mailbox over")
            if answer.verdict == "STALE":
                raise NotOurs("Redis holds another state of the mailbox than we read")
            if not said:
                said = True
                log.warning(
                    "%s: the stream holds %d unfinished mails (limit %d): intake waits", self.title, answer.live, most_live
                )
            self.status = "PAUSED"
            if self._pause(1.0):
                raise NotOurs("stopped while the stream was full")

    def _most_live(self, state: State) -> int:
        """Backfill may fill a tenth of the stream, so that new mail is never behind it."""
        limit = self.settings.stream.maxlen
        return max(1, limit // 10) if state.last_uid <= state.horizon and state.horizon else limit

    def _cover(self, mails: Sequence[Mail], state: State) -> None:
        """The marker must never be younger than the oldest mail that is about to be unfinished."""
        days = [mail.fields["internal_date"][:10] for mail in mails]
        if days and self._marker and self._marker.oldest and min(days) < self._marker.oldest:
            self._write_marker(Marker(self._marker.state, min(days)))

    def _remember(self, state: State, *, force: bool) -> None:
        """Bring the marker up to date: at once where a read begins or ends, else from time to time."""
        marker, now = self._marker, self.clock.monotonic()
        if marker and not force and (marker.state == state or now - self._marker_written < MARKER_SECONDS):
            return
        unfinished = plan.oldest_open(self._ask_redis(self.states.open_days), self.account, self.name)
        newest = min(self._newest, iso(self.clock.wall()))[:10]
        self._write_marker(Marker(state, unfinished or newest or (marker.oldest if marker else "")))

    def _write_marker(self, marker: Marker) -> None:
        self.marker_file.write(marker)
        self._marker, self._marker_written = marker, self.clock.monotonic()

    # waiting

    def _ask_redis(self, call: Callable[[], Result]) -> Result:
        @retry_on_redis_error(self.shutdown)
        def ask() -> Result:
            self._turn()
            return call()

        return ask()

    def _token(self, refuse: str | None = None) -> str:
        @retry_on_oauth_error(self.shutdown)
        def ask() -> str:
            self._turn()
            return self.tokens.access_token(refuse=refuse)

        return ask()

    def _pause(self, seconds: float) -> bool:
        self._turn(seconds)
        return self.shutdown.wait(seconds)

    def _turn(self, seconds: float = 0.0) -> None:
        """This thread is alive, and will be heard of again within the time a step may take after `seconds`."""
        self.beats.turn(self.title, limit=seconds + 5 * self.settings.mail.timeout)


@dataclass
class _Entered:
    """A context manager that was entered already: leaving it leaves `manager`."""

    manager: AbstractContextManager[Session]
    session: Session

    def __enter__(self) -> Session:
        return self.session

    def __exit__(self, *exc: object) -> None:
        self.manager.__exit__(None, None, None)


def identity_of(account: str, mailbox: str, folder: Folder, meta: Meta, scope: Literal["account", "mailbox"]) -> Identity:
    """Gmail's message id; elsewhere the hash of what the server says and the header; where it says nothing, the place."""
    if folder.gmail and meta.gm_msgid:
        email_id = gmail_email_id(account, meta.gm_msgid)
    elif meta.internal_date:
        email_id = header_email_id(account, meta.internal_date, meta.size, meta.header, meta.start)
    else:
        email_id = hashed_email_id(account, b"no data", f"{mailbox}\n{folder.uidvalidity}\n{meta.uid}".encode())
    return Identity(in_mailbox_scope(email_id, mailbox) if scope == "mailbox" else email_id, meta.internal_date)
