"""The reader and the story of a mailbox before a server that withholds, changes its numbering, cannot be had; and a disk that cannot be."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from config.settings import Settings, load_settings
from src.common.circuit_breaker import Breakers, Rules
from src.common.clock import Clock, iso
from src.common.exceptions import ArchiveUnavailable, DiskUnavailable, ImapIncomplete, ImapUnavailable
from src.common.health import Beats, liveness
from src.common.shutdown import Shutdown
from src.imap.imap_client import Folder, Meta
from src.mail.record import Email
from src.producer import reader as reader_module
from src.producer.mailbox import Mailbox, is_down
from src.producer.plan import Marker, State
from src.producer.reader import NotOurs
from src.producer.state_manager import Held, MarkerFile, StateManager
from src.producer.withheld import BREAKS, BREAKS_SECONDS, OLD_SECONDS, Withheld
from tests.support.fake import Store

NOON = datetime(2026, 2, 1, 12, tzinfo=UTC)
HERE = "producer_state:a:INBOX"


class Time(Shutdown):
    """A shutdown whose waits take no time and move the clock instead; `watch` is called for each second that goes by."""

    def __init__(self, watch: Callable[[float], None] = lambda now: None, end: float = 1e9) -> None:
        super().__init__()
        self.now = 0.0
        self._watch, self._end = watch, end
        time = self

        class Moves(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                time.move(timeout or 0.0)
                return self.is_set()

        self.event = Moves()
        self.clock = Clock(wall=lambda: NOON + timedelta(seconds=self.now), monotonic=lambda: self.now)

    def move(self, seconds: float) -> None:
        then = self.now + seconds
        while self.now < then and not self.event.is_set():
            self.now = min(then, self.now + 1.0)
            self._watch(self.now)
            if self.now >= self._end:
                self.request("the test is over")


@dataclass
class Server:
    """A Gmail whose INBOX holds `mails` by their UIDs: (X-GM-MSGID, octets). `silent`: UIDs for which FETCH answers OK and no data;
    `bodiless`: no body; `hidden`: SEARCH UID does not show them. `deadly`: what of which mail ends the session when it is fetched."""

    mails: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    uidvalidity: int = 1
    silent: set[int] = field(default_factory=set)
    bodiless: set[int] = field(default_factory=set)
    hidden: set[int] = field(default_factory=set)
    deadly: set[tuple[str, int]] = field(default_factory=set)
    dates: dict[int, str] = field(default_factory=dict)
    asked_since: Callable[[], None] = lambda: None

    def put(self, *uids: int, id_from: int = 1000) -> None:
        self.mails |= {uid: (str(id_from + uid), b"Subject: mail %d\r\n\r\ntext" % (id_from + uid)) for uid in uids}

    @property
    def folder(self) -> Folder:
        return Folder("INBOX", self.uidvalidity, len(self.mails), gmail=True)

    def uids_from(self, first: int) -> list[int]:
        return sorted(uid for uid in self.mails if uid >= first)

    def uids_since(self, day: date, first: int = 1) -> list[int]:
        self.asked_since()
        return self.uids_from(first)

    def has(self, uid: int) -> bool:
        return uid in self.mails and uid not in self.hidden

    def meta(self, uids: Sequence[int]) -> dict[int, Meta]:
        self._die("meta", uids)
        shown = [uid for uid in uids if uid in self.mails and uid not in self.silent]
        dates = {uid: self.dates.get(uid, iso(NOON)) for uid in shown}
        return {uid: Meta(uid, dates[uid], len(self.mails[uid][1]), self.mails[uid][0], "1", (), b"") for uid in shown}

    def ask_bodies(self, uids: Sequence[int]) -> None:
        """They are given when they are asked for."""

    def bodies(self, uids: Sequence[int]) -> dict[int, bytes]:
        self._die("body", uids)
        return {uid: self.mails[uid][1] for uid in uids if uid in self.mails and uid not in self.bodiless | self.silent}

    def _die(self, what: str, uids: Sequence[int]) -> None:
        if any((what, uid) in self.deadly for uid in uids):
            raise ImapUnavailable("the server closed the connection")

    def head(self, uid: int, limit: int) -> bytes:
        return self.bodies([uid]).get(uid, b"")[:limit]

    def wait(self, seconds: float, stop: Callable[[], bool]) -> bool:
        raise ImapUnavailable("Session expired, please login again.")


class Tokens:
    def access_token(self, *, refuse: str | None = None) -> str:
        return "token"

    def stamp(self) -> object:
        return 1

    def facts(self) -> dict[str, object]:
        return {}


def settings_with(**env: object) -> Settings:
    return load_settings({"INITIAL_SYNC": "all", "RAW_ARCHIVE": "off", **env}, env_file=None)


@dataclass
class House:
    """A producer's mailbox over `store`, its clock and its server."""

    store: Store
    data_dir: Path
    time: Time = field(default_factory=Time)
    server: Server = field(default_factory=Server)
    settings: Settings = field(default_factory=settings_with)
    connecting: Callable[[], None] = lambda: None
    logins: int = 0

    def __post_init__(self) -> None:
        ids = itertools.count()
        self.beats = Beats(self.time.clock)
        self.states = StateManager(self.store.redis, self.store.keys, "a", "INBOX", "p1")
        self.mailbox = Mailbox(
            settings=self.settings,
            account="a",
            name="INBOX",
            states=self.states,
            marker_file=MarkerFile(self.data_dir, "a", "INBOX"),
            tokens=Tokens(),
            connect=lambda secret, alive: self._connected(),
            clock=self.time.clock,
            new_id=lambda: f"id{next(ids)}",
            shutdown=self.time,
            beats=self.beats,
            breaker=Breakers(Rules(), self.time.clock.monotonic, random.Random(1).random).get("IMAP", counts=is_down),
        )
        self.reader = self.mailbox.reader

    def _connected(self) -> nullcontext[Server]:
        self.logins += 1
        self.connecting()
        return nullcontext(self.server)

    def session(self) -> None:
        """What a session does, to the end of its first poll and look back; raises what ends it early."""
        lease = self.states.acquire(30)
        assert not isinstance(lease, Held)
        self.reader.owned(lease)
        state = self.reader.begin(self.server, lease.state)
        self.reader.withheld.settle(self.server)
        self.reader.look_back(self.server, self.reader.poll(self.server, state))

    def incomplete_session(self) -> None:
        with pytest.raises(ImapIncomplete):
            self.session()

    def broken_session(self) -> None:
        with pytest.raises(ImapUnavailable):
            self.session()

    def entries(self) -> list[Email]:
        return [Email(fields) for _, fields in self.store.redis.entries(self.store.keys.stream, count=1000)]

    def stream(self) -> list[tuple[str, str]]:
        """(UID, subject) of each entry."""
        return [(str(email.uid), email.subject) for email in self.entries()]


@pytest.fixture
def house(store: Store, tmp_path: Path) -> House:
    return House(store, tmp_path)


# what the server withholds


def test_what_one_numbering_withheld_says_nothing_of_the_next(house: House) -> None:
    """A folder made anew: UIDs that were listed and gone are given to other mails, which are read."""
    house.server.put(*range(1, 14))
    house.server.silent = {11, 12, 13}
    house.incomplete_session()
    house.server.mails, house.server.uidvalidity, house.server.silent = {}, 2, set()
    house.server.put(1, 2, 3, id_from=2000)
    house.session()
    house.server.put(*range(4, 16), id_from=2000)
    house.session()
    assert house.stream()[10:] == [(str(uid), f"mail {2000 + uid}") for uid in range(1, 16)]


def test_a_mail_that_was_gone_for_a_moment_is_read_when_it_shows_again(house: House) -> None:
    """The look back takes it: that nobody saw it twice does not count for ever."""
    house.server.put(1, 2, 3)
    house.server.silent = house.server.hidden = {2}
    house.incomplete_session()
    house.session()
    assert house.stream() == [("1", "mail 1001"), ("3", "mail 1003")]
    house.server.silent = house.server.hidden = set()
    house.session()
    assert house.stream()[2:] == [("2", "mail 1002")]


def test_known_mail_that_is_withheld_when_looked_at_again_enters_no_second_time(house: House) -> None:
    """Its fate is recorded; asked for three times in looks back, it is left alone until the server gives it."""
    house.server.put(1, 2, 3)
    house.session()
    house.server.silent = {2}
    for _ in range(3):
        house.incomplete_session()
    house.session()
    house.server.silent = set()
    house.session()
    assert house.stream() == [("1", "mail 1001"), ("2", "mail 1002"), ("3", "mail 1003")]


def test_mail_that_entered_by_its_place_enters_whole_once_the_server_gives_it(house: House) -> None:
    """A stub without any data has an id of its own; the mail itself comes when it can, not as a second stub."""
    house.server.put(1, 2)
    house.server.silent = {2}
    for _ in range(3):
        house.incomplete_session()
    house.session()
    house.session()
    assert house.stream() == [("1", "mail 1001"), ("2", "")]
    house.server.silent = set()
    house.session()
    house.session()
    assert house.stream()[2:] == [("2", "mail 1002")]
    assert [bool(entry.truncated) for entry in house.entries()] == [False, True, False]


@pytest.mark.parametrize("lack", ["silent", "bodiless"])
def test_hiccups_that_were_got_over_do_not_add_up(house: House, lack: str) -> None:
    """Three tries mean three in a row: a mail that was given meanwhile is no stub at the third."""
    for uid in (1, 2, 3, 4):
        house.server.put(uid)
        setattr(house.server, lack, {uid})
        house.incomplete_session()
        house.incomplete_session()
        setattr(house.server, lack, set())
        house.session()
    assert house.stream() == [(str(uid), f"mail {1000 + uid}") for uid in (1, 2, 3, 4)]
    assert house.reader.withheld == Withheld("a/INBOX", house.time.clock, _numbering=1)


def test_a_folder_whose_only_mail_is_withheld_is_begun_all_the_same(house: House) -> None:
    """Its date would tell where a first read begins: without one all mail counts, and this one enters as a stub."""
    house.server.put(1)
    house.server.silent = {1}
    for _ in range(3):
        house.incomplete_session()
    house.session()
    house.server.put(2)
    house.session()
    assert house.stream() == [("1", ""), ("2", "mail 1002")]


# what a session breaks off at


@pytest.mark.parametrize("what", ["meta", "body"])
def test_a_mail_that_ends_every_session_holds_no_other_up(house: House, what: str) -> None:
    """After three sessions each mail is fetched alone, those before it come; after twenty in an hour it is a stub, those behind it come."""
    house.server.put(1, 2, 3)
    house.server.deadly = {(what, 2)}
    for _ in range(4):
        house.broken_session()
    assert house.stream() == [("1", "mail 1001")]
    for _ in range(BREAKS):
        house.broken_session()
    house.time.now += BREAKS_SECONDS
    house.broken_session()
    house.session()
    assert house.stream() == [("1", "mail 1001"), ("2", ""), ("3", "mail 1003")]
    assert house.entries()[1].defects == ("the session broke off again and again while this mail was fetched",)
    house.server.put(4)
    house.session()
    assert house.stream()[3:] == [("4", "mail 1004")]


@pytest.mark.parametrize("what", ["meta", "body"])
def test_a_bad_line_makes_no_stub(house: House, what: str) -> None:
    """However often sessions break off: what is fetched in the end is whole, and its failures are forgotten."""
    house.server.put(1, 2, 3)
    for _ in range(3):
        house.server.deadly = {(what, 2)}
        for _ in range(BREAKS + 5):
            house.broken_session()
        house.server.deadly = set()
        house.time.now += BREAKS_SECONDS
        house.session()
        house.server.mails.pop(3)
        house.store.redis.call("FLUSHALL")
        house.mailbox.marker_file.write(Marker(State(1, 0, "", 3, first_complete=False), ""))
        house.reader._marker = None
        house.server.put(3)
    house.session()
    assert house.stream() == [(str(uid), f"mail {1000 + uid}") for uid in (1, 2, 3)]
    assert house.reader.withheld == Withheld("a/INBOX", house.time.clock, _numbering=1)


def test_the_date_of_a_first_read_is_that_of_the_newest_mail_that_can_be_had(house: House) -> None:
    """One of the last ten ends every session: INITIAL_SYNC still means what it says, though an old mail is among them."""
    house.reader.settings = settings_with(INITIAL_SYNC="since:7d")
    house.server.put(*range(1, 11))
    house.server.dates = {1: "2010-01-01T00:00:00Z"}
    house.server.deadly = {("meta", 4)}
    for _ in range(4):
        house.broken_session()
    assert house.store.redis.call("HGET", f"{HERE}:intake", "boundary") == iso(NOON - timedelta(days=7))


def test_what_broke_off_a_day_ago_is_forgotten(house: House) -> None:
    """Mail that was deleted since is never fetched again: bodies are asked for ahead all the same."""
    house.server.put(1, 2)
    house.server.deadly = {("body", 2)}
    house.broken_session()
    house.server.mails.pop(2)
    house.server.deadly = set()
    house.session()
    assert house.reader.withheld.in_doubt
    house.time.now += OLD_SECONDS + 1
    house.session()
    assert not house.reader.withheld.in_doubt


# requests to look again


def test_what_is_asked_for_while_a_look_lasts_is_done_after_it(house: House) -> None:
    """Two shells, two dates: neither request swallows the other, nor the producer's own."""
    house.server.put(1, 2)
    house.session()
    looked_at: list[str] = []

    def asked() -> None:
        looked_at.append(house.states.requested())
        if len(looked_at) == 1:
            StateManager(house.store.redis, house.store.keys, "a", "INBOX", "shell").request_look("2026-01-01")
            house.states.request_look("late:2026-01-15")

    house.server.asked_since = asked
    house.states.request_look("2026-03-01")
    house.session()
    rest = "2026-01-01,late:2026-01-15"
    assert (looked_at, house.states.requested()) == (["2026-03-01", rest, "late:2026-01-15"], "")


# waiting


def test_a_mailbox_that_waits_is_left_when_somebody_pauses_it(house: House) -> None:
    """While the day's bytes are spent, the archive is full, the stream is full: session and lease do not last until that is over."""
    house.server.put(1)
    house.session()

    def paused() -> str:
        raise NotOurs("paused by hand")

    def full() -> list[str]:
        raise ArchiveUnavailable("full")

    reader = house.reader
    reader.gate = paused
    reader._spent = (NOON.date(), 10**12)
    state = State(1, 1, "", 10, first_complete=False)
    with pytest.raises(NotOurs, match="by hand"):
        reader._respect_budget(house.server, state, [2])
    reader.keep = lambda raws: full
    with pytest.raises(NotOurs, match="by hand"):
        reader._kept([b"x"], full)
    reader.settings = replace(reader.settings, stream=reader.settings.stream.model_copy(update={"maxlen": 1}))
    house.server.put(2)
    reader.gate = lambda: ""
    house.store.redis.call("XADD", house.store.keys.stream, "*", "a", "b")
    lease = house.states.acquire(30)
    assert not isinstance(lease, Held) and lease.state is not None
    reader.keep = lambda raws: lambda: [""]
    gates = iter(["", "", ""])
    reader.gate = lambda: next(gates, None) or paused()
    with pytest.raises(NotOurs, match="by hand"):
        reader.poll(house.server, lease.state)


def test_no_kept_mail_waits_longer_than_it_may_for_its_place(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mails are kept together and published one by one: what the first one waited counts for the second; then it is kept anew."""
    monkeypatch.setattr(reader_module, "PUBLISH_BYTES", 1)
    monkeypatch.setattr(reader_module, "PUBLISH_SECONDS", 60.0)

    def room(now: float) -> None:
        if now == 50:
            store.redis.call("XTRIM", store.keys.stream, "MAXLEN", 0)

    house = House(store, tmp_path, time=Time(room))
    house.server.put(1)
    house.session()
    reader = house.reader
    reader.settings = replace(reader.settings, stream=reader.settings.stream.model_copy(update={"maxlen": 1}))
    house.server.put(2, 3)
    with pytest.raises(NotOurs, match="full for long"):
        house.session()
    assert [uid for uid, _ in house.stream()] == ["2"]
    assert 50 < house.time.now <= 62


def test_a_server_that_swallows_connections_makes_no_thread_look_stuck(store: Store, tmp_path: Path) -> None:
    """An hour of connects that time out, of two addresses each: /health says 200 all the while, since a restart would not help."""
    seen: set[int] = set()
    time = Time(lambda now: seen.add(liveness(house.beats.seen(), now, [])[0]), end=3600)

    def swallowed() -> None:
        time.move(2 * house.settings.mail.timeout)
        raise ImapUnavailable("timed out")

    house = House(store, tmp_path, time, connecting=swallowed)
    house.mailbox.run()
    assert seen == {200}
    assert time.now >= 3600


@pytest.mark.parametrize("broken", ["write", "read"])
def test_a_marker_that_cannot_be_had_holds_its_mailbox_up_and_is_told(
    store: Store, tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DATA_DIR full, or another user's: the mailbox says so and waits longer and longer; the process and other mailboxes go on."""
    states: list[tuple[str, str]] = []
    house = House(store, tmp_path, Time(lambda now: states.append(house.mailbox.state()), end=600))
    house.server.put(1)
    if broken == "write":
        said = "cannot be written (No space left on device)"

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    else:
        said = "cannot be read (Is a directory)"
        (tmp_path / "markers" / "a" / "INBOX.json").mkdir(parents=True)
    house.mailbox.run()
    assert {state for state, _ in states[5:-1]} == {"DISCONNECTED"}
    assert said in states[-2][1]
    assert house.logins <= 12
    assert 5 < caplog.text.count(said) <= 12, "in longer and longer pauses"
    assert said in caplog.text
    assert house.stream() == []


def test_a_single_read_ends_with_a_marker_that_cannot_be_had(house: House) -> None:
    """--once from cron: an error and an exit code, not a process that waits and keeps the lease from the next one."""
    (house.data_dir / "markers" / "a" / "INBOX.json").mkdir(parents=True)
    with pytest.raises(DiskUnavailable, match="cannot be read"):
        house.mailbox.run_once()


# markers


def test_two_producers_of_one_disk_do_not_spoil_each_others_marker(tmp_path: Path) -> None:
    """Owner and standby write the same file: a reader always finds one of theirs, whole."""
    one, other = MarkerFile(tmp_path, "a", "INBOX"), MarkerFile(tmp_path, "a", "INBOX")
    markers = [Marker(State(1, uid, "", 0, first_complete=True), "2026-01-01") for uid in (1, 2)]
    failures: list[Exception] = []

    def write(file: MarkerFile, marker: Marker) -> None:
        try:
            for _ in range(100):
                file.write(marker)
                assert file.read() in markers
        except Exception as error:  # noqa: BLE001  # told below
            failures.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in zip((one, other), markers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert [path.name for path in (tmp_path / "markers" / "a").iterdir()] == ["INBOX.json"]


def test_a_label_of_any_length_has_a_marker_of_its_own(tmp_path: Path) -> None:
    """Thirty Japanese letters are 270 characters of a quoted file name, more than disks take."""
    marker = Marker(State(1, 5, "", 0, first_complete=True), "2026-01-01")
    name = "領収書" * 30
    MarkerFile(tmp_path, "a", name).write(marker)
    assert MarkerFile(tmp_path, "a", name).read() == marker
    assert MarkerFile(tmp_path, "a", f"{name}二").read() is None
