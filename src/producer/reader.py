"""From one mailbox into the stream: plan, fetch, parse, publish, and what is remembered on disk beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from typing import Literal, Protocol

from config.settings import Settings
from src.common import tracing
from src.common.archive import PUBLISH_SECONDS
from src.common.batch import split
from src.common.clock import Clock, iso
from src.common.correlation import correlated, traceparent_of
from src.common.exceptions import ArchiveUnavailable
from src.common.timing import NO_STOPWATCH, Stopwatch
from src.imap.imap_client import Folder, Meta
from src.mail.parse import parse, stub
from src.mail.record import Envelope, Record, gmail_email_id, hashed_email_id, header_email_id, in_mailbox_scope, to_fields
from src.producer import plan
from src.producer.plan import Marker, State
from src.producer.progress import Progress
from src.producer.pulse import Pulse
from src.producer.repair import Findings, no_checkup
from src.producer.state_manager import Identity, Lease, Mail, MarkerFile, StateManager
from src.producer.withheld import Withheld

log = logging.getLogger(__name__)

STUB_BYTES = 65_536
WINDOW = 1000  # mails that are looked at together
FETCH_BYTES = 8 << 20  # most bytes of bodies in one FETCH
PUBLISH_BYTES = 1 << 20  # most bytes of records in one publish: a script over more holds the server too long
LAST = 10  # mails at the end of a folder that tell its newest INTERNALDATE
LATE, LATE_SPAN = 1_000, 5_000  # how many mails are looked at again, within how many UIDs
AHEAD_SECONDS = 5.0  # between two looks for new mail while old mail is read
ARCHIVE_SECONDS = 5.0  # between two tries of an archive that is full or away
GATE_SECONDS = 1.0  # between two looks whether intake goes on
MARKER_SECONDS = 10.0  # how far the marker may lag behind where nothing is at stake


class Session(Protocol):
    """What is needed of `src.imap.imap_client.ImapMailbox`."""

    @property
    def folder(self) -> Folder: ...
    def uids_from(self, first: int) -> list[int]: ...
    def uids_since(self, day: date, first: int = 1) -> list[int]: ...
    def has(self, uid: int) -> bool: ...
    def meta(self, uids: Sequence[int]) -> dict[int, Meta]: ...
    def ask_bodies(self, uids: Sequence[int]) -> None: ...
    def bodies(self, uids: Sequence[int]) -> dict[int, bytes]: ...
    def head(self, uid: int, limit: int) -> bytes: ...
    def wait(self, seconds: float, stop: Callable[[], bool]) -> bool: ...


class CheckupCall(Protocol):
    """What is needed of `src.producer.repair.Checkup`."""

    def __call__(self, *, anew: bool) -> Findings: ...


Judge = Callable[[State, int, str, str], bool]  # (state, UID, INTERNALDATE, forgotten before) → is it to be published
Keep = Callable[[Sequence[bytes]], Callable[[], list[str]]]  # see `src.producer.archiver.Archiver.keep`


def keep_nothing(raws: Sequence[bytes]) -> Callable[[], list[str]]:
    """Where there is no archive."""
    return lambda: [""] * len(raws)


class NotOurs(Exception):
    """Another producer owns the mailbox, or the state is not the one we read: own it anew before going on."""


@dataclass
class Reader:
    """Reads one mailbox through whatever session it is given. `new_id`: a fresh random id.

    `keep`: takes raw mail into the archive. `gate`: why nothing may be taken in now, "" if it may. `checkup`: mends what in Redis only
    someone else can have broken. `paused`: why intake waits, "" if it does not; `only_old`: new mail does not wait. `resync`: the
    requests to look again (`StateManager.request_look`), "" for none. `unaccounted`: how many mails the
    last look back found known nowhere although they count, or deleted from Redis by hand; they are published at once. For /status:
    `last_uid`, `waiting` (mails listed without a fate yet), `contact` (when the server last answered, monotonic), `rereading` (Redis had
    forgotten the mailbox).
    For /metrics: `fetched` mails and `fetched_bytes` of bodies, `passed` (see `State`; None before the first poll), `looks_back`; the
    stopwatches time each FETCH of bodies and each publish of mails.
    Methods raise what RedisClient and the session raise, and NotOurs.
    """

    settings: Settings
    account: str
    name: str
    states: StateManager
    marker_file: MarkerFile
    clock: Clock
    new_id: Callable[[], str]
    pulse: Pulse
    progress: Progress
    keep: Keep = keep_nothing
    gate: Callable[[], str] = lambda: ""
    checkup: CheckupCall = no_checkup
    fetching: Stopwatch = NO_STOPWATCH
    publishing: Stopwatch = NO_STOPWATCH
    paused: str = ""
    only_old: bool = False
    last_uid: int = 0
    waiting: int = 0
    contact: float | None = None
    rereading: bool = False
    published: int = 0
    known: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    passed: int | None = None
    unaccounted: int = 0
    looks_back: int = 0
    resync: str = ""
    epoch: int = 0
    _ahead: int = 0
    _next_look_ahead: float = 0.0
    _next_look_back: float = 0.0
    _found: int = 0
    _checked: bool = False
    _spent: tuple[date | None, int] = (None, 0)
    _newest: str = ""
    _marker: Marker | None = None
    _marker_written: float = 0.0

    def __post_init__(self) -> None:
        self.withheld = Withheld(self.pulse.title, self.clock)

    # how to begin

    def begin(self, session: Session, state: State | None) -> State:
        """Decide how to begin, and record it if anything is new: before the first mail of a read is published."""
        folder = session.folder
        self._next_look_back = 0.0
        self.withheld.numbered(folder.uidvalidity)
        if state is not None and state.uidvalidity == folder.uidvalidity:
            self.rereading = state.first_complete and state.last_uid < state.horizon
            if self._marker is None:
                self.remember(state, force=True)
            return state
        listed = session.uids_from(1)
        highest = listed[-1] if listed else 0
        newest = self._newest_of(session, listed)
        if self._marker is None:
            self._marker = self.marker_file.read()
        opened = plan.opening(
            state,
            self._marker,
            uidvalidity=folder.uidvalidity,
            exists=len(listed),
            highest=highest,
            newest=newest,
            threshold=plan.first_threshold(self.settings.mail.initial_sync, self.clock.wall()),
            traces=self.pulse.ask_redis(self.states.traces) if state is None and self._marker is None else None,
        )
        day = plan.search_day(opened.state)
        dated = session.uids_since(day) if day else listed
        log.info(
            "%s: %s (%d of %d mails to look at)",
            self.pulse.title,
            opened.why,
            len(dated) if opened.state.horizon else 0,
            len(listed),
        )
        if opened.kind == "first":
            self._newest = newest
        self._ahead = 0
        self.rereading = opened.kind == "lost"
        self.remember(opened.state, force=True)
        self._publish([], state, opened.state)
        return opened.state

    def _newest_of(self, session: Session, listed: Sequence[int]) -> str:
        """The newest INTERNALDATE of the last mails that the server tells of, "" where it tells of none."""
        for end in range(len(listed), 0, -LAST):
            last = self.withheld.least_doubtful(listed[max(0, end - LAST) : end])
            metas = self.withheld.fetched("data", last, partial(session.meta, last))
            if metas:
                return max(meta.internal_date for meta in metas.values())
            if not self.withheld.tried(last):
                self.withheld.missed("data", last)
        return ""

    def owned(self, lease: Lease) -> None:
        """The mailbox is ours. Where Redis knows less than the disk an older copy of it came back: said, and looked at again."""
        first = self._marker is None
        self._marker = marker = self._marker or self.marker_file.read()
        self.resync, self.epoch = lease.resync, lease.epoch
        if lease.state is None or marker is None:
            return
        older = plan.came_back_older(lease.state, lease.epoch, marker, first=first)
        if older:
            log.warning(
                "%s: Redis came back older (%s): mail since then is read again, effects may repeat", self.pulse.title, older
            )
            self.resync = self.pulse.ask_redis(partial(self.states.request_look, f"{plan.LATE}{plan.look_since(marker)}"))

    # what is new

    def poll(self, session: Session, state: State) -> State:
        """Bring everything above `last_uid` to its fate."""
        self.pulse.turn()
        self.paused = ""
        by_date = state.last_uid < state.horizon
        listed = session.uids_from(state.last_uid + 1)
        day = plan.search_day(state)
        dated = set(session.uids_since(day, state.last_uid + 1)) if day else None
        uids = plan.candidates(state, listed, dated)
        self.answered()
        self.last_uid, self.passed, self.waiting = state.last_uid, state.passed, len(uids)
        start, looked_at = state, set(uids)
        left_out = [uid for uid in listed if uid not in looked_at]
        self.progress.start(len(uids))
        for window in self._windows(uids):
            state = self._read_window(session, state, window, plan.counts, left_out)
            self.last_uid, self.passed, self.waiting = state.last_uid, state.passed, self.waiting - len(window)
            self.progress.advance(len(window))
            if self.pulse.shutdown.requested:
                return state
            self._look_ahead(session, state)
        self.progress.end()
        done = plan.finished(state, listed[-1] if listed else 0, left_out)
        if done != state or state == start:
            self._publish([], state, done)  # also what says that this mailbox was polled, and is still ours
        if by_date:
            log.info("%s: the read by date is complete, %d mails were left out", self.pulse.title, done.passed)
        self.remember(done, force=by_date)
        self.last_uid, self.passed, self.rereading = done.last_uid, done.passed, False
        return done

    def answered(self) -> None:
        """The server has just answered."""
        self.contact = self.clock.monotonic()

    def _look_ahead(self, session: Session, state: State) -> None:
        """While old mail is read, from time to time also what came since: into the stream at once, `last_uid` follows later."""
        now = self.clock.monotonic()
        if state.last_uid >= state.horizon or now < self._next_look_ahead:
            return
        self._next_look_ahead = now + AHEAD_SECONDS
        came = session.uids_from(max(state.horizon, self._ahead) + 1)
        for window in self._windows(came):
            self._read_window(session, state, window, plan.counts, moves=False)
            self._ahead = window[-1]

    def look_back(self, session: Session, state: State) -> None:
        """UIDs may become visible late, and Redis may lose what it knew: look again at the last 1,000, every hour at two days, and as far
        back as someone asked."""
        self._checked = False
        while self.resync:
            request = self.resync.partition(",")[0]
            since = date.fromisoformat(request.removeprefix(plan.LATE))
            found = session.uids_since(plan.before(since))
            log.info("%s: looking again at %d mails since %s", self.pulse.title, len(found), since)
            late = request.startswith(plan.LATE)
            self._read_passed(
                session, state, found, plan.counts_late if late else partial(plan.counts_asked, f"{since}T00:00:00Z")
            )
            if self.pulse.shutdown.requested:
                return
            self.resync = self.pulse.ask_redis(partial(self.states.look_done, request))
        now = self.clock.monotonic()
        if now < self._next_look_back or state.last_uid < state.horizon:
            return
        self._next_look_back = now + self.settings.mail.relist_interval
        found = session.uids_from(max(1, state.last_uid - LATE_SPAN))[-LATE:]
        if self.looks_back % 6 == 5:
            found = sorted({*found, *self._of_two_days(session)})
        self.looks_back += 1
        self._found = 0
        self._read_passed(session, state, found, plan.counts_late)
        if not self.pulse.shutdown.requested:
            self.unaccounted = self._found

    def _of_two_days(self, session: Session) -> set[int]:
        """UIDs of the last two days; where mail was deleted from Redis by hand, of all days that have unfinished mail."""
        deleted = self.pulse.ask_redis(lambda: self.checkup(anew=False)).dangling_of(self.account)
        days = [self.clock.wall().date() - timedelta(days=3)]
        if deleted:
            since = plan.all_open_since(self.pulse.ask_redis(self.states.open_days), self.account, self.name)
            days += [plan.before(since)] if since else []
        return set(session.uids_since(min(days)))

    def _read_passed(self, session: Session, state: State, uids: Sequence[int], judge: Judge) -> None:
        before = self.published
        for window in self._windows([uid for uid in uids if uid <= state.last_uid]):
            if not self.pulse.shutdown.requested:
                self._read_window(session, state, window, judge, moves=False)
        if self.published > before:
            log.warning(
                "%s: %d mails became visible late, were asked for or were deleted from Redis by hand",
                self.pulse.title,
                self.published - before,
            )

    def _windows(self, uids: Sequence[int]) -> list[list[int]]:
        """What is looked at together; alone what sessions broke off at."""
        alone = self.withheld.alone()
        return split(uids, lambda uid: WINDOW if uid in alone else 1, most=WINDOW, most_bytes=WINDOW)

    # a window of mails

    def _read_window(
        self,
        session: Session,
        state: State,
        uids: Sequence[int],
        judge: Judge,
        left_out: Sequence[int] = (),
        *,
        moves: bool = True,
    ) -> State:
        """Publish what is known nowhere among `uids` and counts by `judge`; the state moves with each batch, unless told not to.

        `left_out`: UIDs that are not looked at, ascending; counted as the state moves past them. Ends early where the process is to stop.
        Raises ImapIncomplete behind the contiguous prefix.
        """
        self.pulse.turn()
        asked = [uid for uid in uids if not self.withheld.lacks("line", uid)]
        metas = self.withheld.fetched("data", asked, partial(session.meta, asked))
        self.answered()
        self.withheld.came("data", metas.keys())
        silent = {uid for uid in uids if self.withheld.lacks("data", uid) or self.withheld.lacks("line", uid)}
        if moves:  # elsewhere it has a fate already: another one, by its place alone, would be a second
            metas.update({uid: Meta(uid, "", 0, "", "", (), b"") for uid in silent})
        out = (self.withheld.gone | silent) - metas.keys()
        ready, absent = plan.prefix([uid for uid in uids if uid not in out], metas.keys())
        identities = {uid: self._identity(session.folder, metas[uid]) for uid in ready}
        self._newest = max([self._newest, *(metas[uid].internal_date for uid in ready)])
        fresh, wanted = self._wanted(state, metas, identities, judge, moves=moves)
        if wanted and not moves and not self._checked:  # it may be in the stream, and only the index does not know it any more
            self._checked = True
            self.pulse.ask_redis(lambda: self.checkup(anew=True))
            fresh, wanted = self._wanted(state, metas, identities, judge, moves=moves)
        passed = sorted(fresh - set(wanted))
        if moves:
            self.known += len(ready) - len(fresh)
        elif judge is plan.counts_late:
            self._found += len(wanted)
            self.unaccounted = max(self.unaccounted, self._found)
        most = self.settings.mail.max_message_bytes
        sizes = {uid: min(metas[uid].size, most) for uid in wanted}
        groups = split(wanted, sizes.__getitem__, most=self.settings.mail.batch_size, most_bytes=FETCH_BYTES)
        for group, following in zip(groups, [*groups[1:], []], strict=False):
            if self.pulse.shutdown.requested:
                return state
            self._respect_budget(session, state, group)
            self._respect_gate()
            began, whole = self.clock.wall().timestamp(), self._whole(metas, group)
            bodies = self._bodies(session, whole)
            then = self._whole(metas, following)
            if then and not (self.withheld.in_doubt or self.gate() or self._over_budget(state, following)):
                session.ask_bodies(then)  # it comes while this group is parsed and published
            mails, withheld = self._mails(session, [(metas[uid], identities[uid]) for uid in group], whole, bodies, began)
            until = self.clock.monotonic() + PUBLISH_SECONDS
            for batch in split(mails, lambda mail: mail.size, most=len(group), most_bytes=PUBLISH_BYTES):
                moved = plan.advanced(state, batch[-1].uid, left_out, passed) if moves else state
                state = self._publish(batch, state, moved, session, until)
                self.withheld.came("body", [mail.uid for mail in batch])
            if withheld:
                self.withheld.missed("body", withheld)
        if moves and ready:
            moved = plan.advanced(state, ready[-1], left_out, passed)
            state = self._publish([], state, moved) if moved != state else state
        if absent:
            self.withheld.missed("data", absent)
        return state

    def _wanted(
        self, state: State, metas: Mapping[int, Meta], identities: Mapping[int, Identity], judge: Judge, *, moves: bool
    ) -> tuple[set[int], list[int]]:
        """(UIDs of what is known nowhere, UIDs of what is to be published): of these what counts, and where we look back also what was
        taken in once and deleted from Redis by hand."""
        uids, ours = list(identities), list(identities.values())
        if moves:
            unknown = self.pulse.ask_redis(lambda: self.states.missing(ours, self.account))
            fresh, deleted = {uids[position] for position in unknown}, set[int]()
        else:
            places = self.pulse.ask_redis(lambda: self.states.places(ours, self.account, self.settings.stream.group))
            fresh, deleted = (
                {uid for uid, place in zip(uids, places, strict=True) if place == wanted} for wanted in ("unknown", "dangling")
            )
        forgotten = iso(self.clock.wall() - timedelta(days=self.settings.stream.processed_days))
        counting = {uid for uid in fresh if judge(state, uid, metas[uid].internal_date, forgotten)}
        return fresh, [uid for uid in uids if uid in counting or uid in deleted]

    def _respect_gate(self) -> None:
        """Nothing is fetched that Redis may have no room for: it waits where it is safe, in the mailbox."""
        while why := self.gate():
            self.paused, self.only_old = why, False
            if self.pulse.pause(GATE_SECONDS):
                raise NotOurs("stopped while intake was paused")
            if not self.gate():
                self.paused = ""

    def _respect_budget(self, session: Session, state: State, group: Sequence[int]) -> None:
        """Old mail waits for tomorrow where today's bytes are spent; new mail does not."""
        said = False
        while self._over_budget(state, group):
            if not said:
                said = True
                self.paused, self.only_old = "DAILY_BYTES are spent: old mail waits until midnight UTC, new mail goes on", True
                log.warning("%s: %s", self.pulse.title, self.paused)
            self.gate()  # what was paused by hand is left
            if self.pulse.pause(AHEAD_SECONDS):
                raise NotOurs("stopped while the day's bytes were spent")
            self._look_ahead(session, state)
        if said:
            self.paused = ""

    def _over_budget(self, state: State, group: Sequence[int]) -> bool:
        return group[0] <= state.horizon and self._spent_today() >= self.settings.mail.daily_bytes

    @property
    def bytes_today(self) -> int:
        """Bytes read from the account today, as far as this mailbox knows without asking."""
        return self._spent[1] if self._spent[0] == self.clock.wall().date() else 0

    def _spent_today(self) -> int:
        today = self.clock.wall().date()
        if self._spent[0] != today:
            self._spent = (today, self._spend(0))
        return self._spent[1]

    def _spend(self, size: int) -> int:
        return self.pulse.ask_redis(lambda: self.states.spend(size, self.clock.wall()))

    def _whole(self, metas: Mapping[int, Meta], group: Sequence[int]) -> list[int]:
        """UIDs of the mails that are read whole; the others enter as stubs."""
        most = self.settings.mail.max_message_bytes
        return [uid for uid in group if metas[uid].size <= most and not self.withheld.why(uid)]

    def _bodies(self, session: Session, whole: Sequence[int]) -> dict[int, bytes]:
        self.pulse.turn()
        fetch = partial(self.fetching.time, partial(session.bodies, whole))
        bodies = self.withheld.fetched("body", whole, fetch) if whole else {}
        self.answered()
        size = sum(map(len, bodies.values()))
        self.fetched, self.fetched_bytes = self.fetched + len(bodies), self.fetched_bytes + size
        self._spent = (self.clock.wall().date(), self._spend(size))
        return bodies

    def _mails(
        self,
        session: Session,
        wanted: Sequence[tuple[Meta, Identity]],
        whole: Sequence[int],
        bodies: Mapping[int, bytes],
        began: float,
    ) -> tuple[list[Mail], list[int]]:
        """(the contiguous prefix as mails, the UIDs whose data did not come). `whole`: whose `bodies` were asked for."""
        had = set(bodies) | {meta.uid for meta, _ in wanted if meta.uid not in whole}
        ready, withheld = plan.prefix([meta.uid for meta, _ in wanted], had)
        kept = [uid for uid in ready if uid in bodies]
        raws = [bodies[uid] for uid in kept]
        references = (self.keep if raws else keep_nothing)(raws)  # while the mails are parsed
        parsed = [self._parsed(session, meta, identity, bodies.get(meta.uid), began) for meta, identity in wanted[: len(ready)]]
        raw_refs = dict(zip(kept, self._kept(raws, references), strict=True))
        mails = []
        for envelope, record in parsed:
            whole_record = replace(record, raw_ref=raw_refs.get(envelope.uid, ""))
            mails.append(Mail(envelope.uid, to_fields(envelope, whole_record), envelope.traceparent))
        return mails, withheld

    def _kept(self, raws: Sequence[bytes], references: Callable[[], list[str]]) -> list[str]:
        """The references of raw mails, kept before anything is published; waits while the archive is full or away."""
        said = False
        while True:
            self.pulse.turn()
            try:
                raw_refs = references()
            except ArchiveUnavailable as error:
                self.paused, self.only_old = str(error), False
                if not said:
                    said = True
                    log.error("%s: intake waits: %s", self.pulse.title, error)
                self.gate()
                if self.pulse.pause(ARCHIVE_SECONDS):
                    raise NotOurs("stopped while the archive could not be had") from None
                references = self.keep(raws)
            else:
                if said:
                    self.paused = ""
                    log.info("%s: the archive is there again", self.pulse.title)
                return raw_refs

    def _parsed(
        self, session: Session, meta: Meta, identity: Identity, raw: bytes | None, began: float
    ) -> tuple[Envelope, Record]:
        """`raw`: None where the mail enters as a stub. `began`: when its body was asked for, seconds since 1970."""
        self.pulse.turn()
        why, head = self.withheld.why(meta.uid), b""
        if raw is None and not self.withheld.lacks("line", meta.uid):
            head = self.withheld.fetched("body", [meta.uid], lambda: session.head(meta.uid, STUB_BYTES))
        correlation_id = self.new_id()
        envelope = Envelope(
            account=self.account,
            mailbox=self.name,
            uid=meta.uid,
            uidvalidity=session.folder.uidvalidity,
            internal_date=meta.internal_date,
            size=meta.size,
            email_id=identity.email_id,
            correlation_id=correlation_id,
            ingested_at=iso(self.clock.wall()),
            gm_thrid=meta.gm_thrid,
            gm_labels=meta.gm_labels,
        )
        with (
            correlated(correlation_id),
            tracing.span("fetch", began=began, email_id=identity.email_id, correlation_id=correlation_id) as traceparent,
        ):
            envelope = replace(envelope, traceparent=traceparent or traceparent_of(correlation_id))
            if raw is not None:
                record = parse(raw, envelope)
            else:
                why = why or f"{meta.size} bytes, above MAX_MESSAGE_BYTES={self.settings.mail.max_message_bytes}"
                record = stub(envelope, head or meta.header, why)
            log.debug("%s: UID %d is %s", self.pulse.title, meta.uid, identity.email_id)
        return envelope, record

    def _identity(self, folder: Folder, meta: Meta) -> Identity:
        return identity_of(self.account, self.name, folder, meta, self.settings.mail.dedup_scope)

    # record it

    def _publish(
        self,
        mails: Sequence[Mail],
        expected: State | None,
        state: State,
        session: Session | None = None,
        until: float = float("inf"),
    ) -> State:
        """One batch, once, whatever calls fail; waits while the stream is full, new mail going ahead of old. Raises NotOurs, also where it
        waited beyond `until` (monotonic)."""
        self._cover(mails)
        old = bool(mails) and expected is not None and mails[0].uid <= expected.horizon
        limit = self.settings.stream.maxlen
        most_live = max(1, limit // 10) if old else limit  # so that new mail is never behind old
        batch, said = self.new_id(), False
        traces = [mail.traceparent for mail in mails]
        stopwatch = self.publishing if mails else NO_STOPWATCH
        while True:
            self.pulse.turn()
            with tracing.span("publish", links=traces, mails=len(mails)) if mails else nullcontext():
                answer = self.pulse.ask_redis(
                    lambda: stopwatch.time(
                        lambda: self.states.publish(
                            mails, batch=batch, expected=expected, state=state, now=self.clock.wall(), most_live=most_live
                        )
                    )
                )
            if answer.verdict in ("OK", "ALREADY"):
                added = sum(answer.added) if answer.verdict == "OK" else len(mails)
                self.published += added
                self.known += len(mails) - added
                self.paused = ""
                if said:
                    log.info("%s: the stream has room again", self.pulse.title)
                return state
            if answer.verdict == "FENCED":
                raise NotOurs("another producer took the mailbox over")
            if answer.verdict == "STALE":
                raise NotOurs("Redis holds another state of the mailbox than we read")
            self.paused, self.only_old = f"the stream holds {answer.live} unfinished mails (limit {most_live}): intake waits", old
            if not said:
                said = True
                log.warning("%s: %s", self.pulse.title, self.paused)
            self.gate()
            if self.pulse.pause(1.0):
                raise NotOurs("stopped while the stream was full")
            if old and session is not None and expected is not None:
                self._look_ahead(session, expected)
            if self.clock.monotonic() > until:
                raise NotOurs("the stream was full for long: reading the batch anew, so that its raw mail is kept anew")

    def _cover(self, mails: Sequence[Mail]) -> None:
        """The marker must never be younger than the oldest mail that is about to be unfinished."""
        days = [mail.fields["internal_date"][:10] for mail in mails]
        if days and self._marker and self._marker.oldest and min(days) < self._marker.oldest:
            self._write_marker(replace(self._marker, oldest=min(days)))

    def remember(self, state: State, *, force: bool) -> None:
        """Bring the marker up to date: at once where a read begins or ends, else from time to time."""
        marker, now = self._marker, self.clock.monotonic()
        epoch = self.epoch or (marker.epoch if marker else 0)
        known = marker is not None and (marker.state, marker.epoch) == (state, epoch)
        if marker and not force and (known or now - self._marker_written < MARKER_SECONDS):
            return
        unfinished = plan.oldest_open(self.pulse.ask_redis(self.states.open_days), self.account, self.name)
        newest = min(self._newest, iso(self.clock.wall()))[:10]
        self._write_marker(Marker(state, unfinished or newest or (marker.oldest if marker else ""), epoch))

    def _write_marker(self, marker: Marker) -> None:
        self.marker_file.write(marker)
        self._marker, self._marker_written = marker, self.clock.monotonic()


def identity_of(account: str, mailbox: str, folder: Folder, meta: Meta, scope: Literal["account", "mailbox"]) -> Identity:
    """Gmail's message id; elsewhere the hash of what the server says and the header; where it says nothing, the place."""
    if folder.gmail and meta.gm_msgid:
        email_id = gmail_email_id(account, meta.gm_msgid)
    elif meta.internal_date:
        email_id = header_email_id(account, meta.internal_date, meta.size, meta.header, meta.start)
    else:
        email_id = hashed_email_id(account, b"no data", f"{mailbox}\n{folder.uidvalidity}\n{meta.uid}".encode())
    return Identity(in_mailbox_scope(email_id, mailbox) if scope == "mailbox" else email_id, meta.internal_date)
