"""What to read next: for any folder and any state every UID gets one fate, and none before it was listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from src.common.clock import iso
from src.common.keys import open_field
from src.producer import plan
from src.producer.plan import NEVER, Marker, Opening, State

NOW = datetime(2026, 2, 1, 12, tzinfo=UTC)
SINCE = "2026-01-25T12:00:00Z"


# A mailbox as the plan is used by src.producer.mailbox: open, list, search, window by window, finish.

moments = st.datetimes(datetime(2024, 1, 1), datetime(2026, 3, 1)).map(lambda moment: f"{moment:%Y-%m-%dT%H:%M:%S}Z")
folders = st.dictionaries(st.integers(1, 60), moments, max_size=25)
thresholds = st.sampled_from(["", NEVER, SINCE]) | moments


@dataclass
class Reading:
    """What became of each UID: `published`, or `passed` over. `state`: what Redis holds."""

    state: State
    published: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)

    def read(self, folder: dict[int, str], *, window: int, windows: int, forgotten: str = "") -> bool:
        """One poll that is cut off after `windows` windows; whether it came to its end."""
        listed = sorted(uid for uid in folder if uid > self.state.last_uid)
        day = plan.search_day(self.state)
        dated = None if day is None else {uid for uid in listed if server_day(folder[uid]) >= day}
        uids = plan.candidates(self.state, listed, dated)
        left_out = [uid for uid in listed if uid not in uids]
        start, published = self.state.last_uid, len(self.published)
        for first in range(0, len(uids), window):
            if first // window == windows:
                self.leave_out(listed, start, published)
                return False
            judged = uids[first : first + window]
            wanted = [uid for uid in judged if plan.counts(self.state, uid, folder[uid], forgotten)]
            passed = [uid for uid in judged if uid not in wanted]
            for uid in wanted:  # as if each were a batch of its own
                self.published.append(uid)
                self.state = plan.advanced(self.state, uid, left_out, passed)
            self.state = plan.advanced(self.state, judged[-1], left_out, passed)
        self.state = plan.finished(self.state, listed[-1] if listed else 0, left_out)
        self.leave_out(listed, start, published)
        return True

    def leave_out(self, listed: Sequence[int], start: int, published: int) -> None:
        """Those that this poll moved past without publishing them."""
        self.passed += [uid for uid in listed if start < uid <= self.state.last_uid and uid not in self.published[published:]]


def server_day(moment: str) -> date:
    """The day that SEARCH SINCE compares: the server's zone may be a day behind UTC."""
    return datetime.fromisoformat(moment).date() - timedelta(days=1)


def opened(folder: dict[int, str], threshold: str) -> Opening:
    highest = max(folder, default=0)
    return plan.opening(
        None,
        None,
        uidvalidity=7,
        exists=len(folder),
        highest=highest,
        newest=folder.get(highest, ""),
        threshold=threshold,
        traces=None,
    )


@given(folders, thresholds, st.integers(1, 7))
def test_the_first_read_gives_every_uid_exactly_one_fate(folder: dict[int, str], threshold: str, window: int) -> None:
    """Published from the boundary on, passed before it; nothing twice, nothing left."""
    state = opened(folder, threshold).state
    reading = Reading(state)
    assert reading.read(folder, window=window, windows=1000)
    if threshold == NEVER:
        assert (reading.published, reading.passed) == ([], [])
    else:
        assert sorted(reading.published + reading.passed) == sorted(folder)
        assert reading.published == [uid for uid in sorted(folder) if folder[uid] >= state.boundary]
    assert reading.state.last_uid == max(folder, default=0)
    assert (reading.state.horizon, reading.state.first_complete) == (0, True)


@given(folders, thresholds, st.integers(1, 5), st.lists(st.integers(0, 3), max_size=6))
def test_a_read_that_is_cut_off_anywhere_ends_the_same(
    folder: dict[int, str], threshold: str, window: int, cuts: list[int]
) -> None:
    """However often the process dies between two windows: the same mails, each once."""
    state = opened(folder, threshold).state
    whole, pieces = Reading(state), Reading(state)
    whole.read(folder, window=window, windows=1000)
    for windows in cuts:
        if pieces.read(folder, window=window, windows=windows):
            break
    pieces.read(folder, window=window, windows=1000)
    assert pieces.published == whole.published
    assert sorted(pieces.passed) == sorted(whole.passed)
    assert pieces.state == whole.state


@given(folders, thresholds, st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.booleans()), max_size=6))
def test_what_is_left_out_is_counted_once(folder: dict[int, str], threshold: str, polls: list[tuple[int, int, bool]]) -> None:
    """`passed` is the number of mails behind last_uid that this numbering's read did not publish: cut off anywhere, walked again."""
    reading = Reading(opened(folder, threshold).state)
    assume(threshold != NEVER)
    for window, windows, renumber in polls:
        reading.read(folder, window=window, windows=windows)
        assert reading.state.passed == len(reading.passed) == len(set(reading.passed))
        if renumber:
            folder = {uid: folder[old] for uid, old in enumerate(sorted(folder), start=1)}
            reading = Reading(renumbering(reading.state, folder).state)
    reading.read(folder, window=2, windows=1000)
    assert reading.state.passed == len(folder) - len(reading.published)


def renumbering(state: State, folder: dict[int, str]) -> Opening:
    """The folder has another UIDVALIDITY."""
    highest = max(folder, default=0)
    newest = folder.get(highest, "")
    return plan.opening(
        state,
        None,
        uidvalidity=state.uidvalidity + 1,
        exists=len(folder),
        highest=highest,
        newest=newest,
        threshold="",
        traces=None,
    )


@given(folders, thresholds, st.lists(moments, max_size=10), st.integers(0, 3))
def test_mail_that_comes_during_or_after_the_first_read_is_published_whatever_its_date(
    folder: dict[int, str], threshold: str, later: list[str], windows: int
) -> None:
    """Above the horizon every mail counts: also one appended with an old date."""
    reading = Reading(opened(folder, threshold).state)
    reading.read(folder, window=3, windows=windows)
    highest = max(folder, default=0)
    new = {highest + number: moment for number, moment in enumerate(later, start=1)}
    reading.read(folder | new, window=3, windows=1000)
    assert set(new) <= set(reading.published)
    assert len(reading.published) == len(set(reading.published))


@given(folders, thresholds)
def test_nothing_above_what_was_listed_gets_a_fate(folder: dict[int, str], threshold: str) -> None:
    """A mail that arrives while the folder is read is not covered by the state."""
    reading = Reading(opened(folder, threshold).state)
    reading.read(folder, window=3, windows=1000)
    assert reading.state.last_uid <= max(folder, default=0)


@given(folders, thresholds)
def test_the_boundary_is_never_after_the_newest_mail(folder: dict[int, str], threshold: str) -> None:
    """Our clock may be ahead of the server's: the next mail must not fall before the boundary."""
    newest = folder.get(max(folder, default=0), "")
    assert opened(folder, threshold).state.boundary <= newest


@given(folders, thresholds, st.integers(0, 4), st.integers(1, 3))
def test_a_walk_under_a_new_uidvalidity_misses_nothing_that_counted(
    folder: dict[int, str], threshold: str, windows: int, window: int
) -> None:
    """Also when the first read was cut off: what counted and was not published yet is published by the walk."""
    reading = Reading(opened(folder, threshold).state)
    reading.read(folder, window=window, windows=windows)
    before = {folder[uid] for uid in reading.published}
    counting = {moment for moment in folder.values() if moment >= reading.state.boundary}
    assume(threshold != NEVER)
    renumbered = {uid: folder[old] for uid, old in enumerate(sorted(folder), start=1)}
    walk = renumbering(reading.state, renumbered)
    assert walk.kind == "walk"
    again = Reading(walk.state)
    again.read(renumbered, window=window, windows=1000)
    assert {renumbered[uid] for uid in again.published} | before >= counting


# opening

STATE = State(7, 40, SINCE, 50, first_complete=False, passed=3)
COMPLETE = replace(STATE, last_uid=60, horizon=0, first_complete=True)


def begin(state: State | None, marker: Marker | None, **changes: object) -> Opening:
    facts: dict[str, object] = {
        "uidvalidity": 7,
        "exists": 80,
        "highest": 90,
        "newest": "2026-02-01T00:00:00Z",
        "threshold": SINCE,
        "traces": None,
    }
    return plan.opening(state, marker, **(facts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("last_uid", "epoch", "first", "why"),
    [
        pytest.param(40, 9, True, "", id="further than the marker, a younger owner"),
        pytest.param(30, 6, True, "", id="as far as the marker, the next owner"),
        pytest.param(30, 5, False, "", id="the owner who wrote the marker"),
        pytest.param(29, 6, True, "last_uid 29, 30 was reached", id="read less far"),
        pytest.param(30, 5, True, "epoch 5, 5 was reached", id="a new owner with a number that was given before"),
        pytest.param(40, 4, False, "epoch 4, 5 was reached", id="an owner younger than the one we saw"),
    ],
)
def test_a_redis_that_knows_less_than_the_disk(last_uid: int, epoch: int, first: bool, why: str) -> None:
    """An older copy came back: seen by how far it was read, or by how many owners it counted."""
    marker = Marker(replace(COMPLETE, last_uid=30), "2026-01-28", 5)
    assert plan.came_back_older(replace(COMPLETE, last_uid=last_uid), epoch, marker, first=first) == why
    assert plan.came_back_older(replace(COMPLETE, last_uid=1, uidvalidity=8), 6, marker, first=True) == "", "another numbering"


def test_what_is_looked_at_again_where_redis_came_back_older() -> None:
    """All mail since the day before the oldest that was unfinished; all of it where that is not known."""
    assert plan.look_since(Marker(COMPLETE, "2026-01-28")) == "2026-01-27"
    assert plan.look_since(Marker(COMPLETE, "")) == "1970-01-02"


OPENINGS = [
    pytest.param(begin(STATE, None), "continue", STATE, id="a known state goes on as it stands"),
    pytest.param(begin(STATE, Marker(COMPLETE, "")), "continue", STATE, id="Redis is believed before the marker"),
    pytest.param(
        begin(STATE, None, uidvalidity=8),
        "walk",
        State(8, 0, SINCE, 90, first_complete=False),
        id="UIDVALIDITY changed in the first read: walk, the boundary stays",
    ),
    pytest.param(
        begin(COMPLETE, None, uidvalidity=8),
        "walk",
        State(8, 0, SINCE, 90, first_complete=True),
        id="UIDVALIDITY changed after it: walk",
    ),
    pytest.param(
        begin(None, None),
        "first",
        State(7, 0, SINCE, 90, first_complete=False),
        id="nothing known: the first read, from the threshold on",
    ),
    pytest.param(
        begin(None, None, threshold=NEVER),
        "first",
        State(7, 90, "2026-02-01T00:00:00Z", 0, first_complete=True, passed=80, floor=90),
        id="new mail only: nothing to read, complete at once",
    ),
    pytest.param(
        begin(None, None, highest=0, newest=""),
        "first",
        State(7, 0, "", 0, first_complete=False),
        id="an empty folder has no boundary",
    ),
    pytest.param(
        begin(None, None, newest="2026-01-20T00:00:00Z"),
        "first",
        State(7, 0, "2026-01-20T00:00:00Z", 90, first_complete=False),
        id="a threshold after the newest mail is drawn back to it",
    ),
    pytest.param(
        begin(None, Marker(COMPLETE, "2026-01-28")),
        "lost",
        State(7, 0, "2026-01-27T00:00:00Z", 60, first_complete=True),
        id="Redis forgot, the disk did not: from the oldest unfinished day minus one",
    ),
    pytest.param(
        begin(None, Marker(COMPLETE, "2026-01-02")),
        "lost",
        State(7, 0, SINCE, 60, first_complete=True),
        id="but not from before the first read's boundary",
    ),
    pytest.param(
        begin(None, Marker(COMPLETE, "")),
        "lost",
        State(7, 0, SINCE, 60, first_complete=True),
        id="no oldest day known: from the boundary",
    ),
    pytest.param(
        begin(None, Marker(STATE, "2026-01-28")),
        "lost",
        State(7, 0, SINCE, 50, first_complete=False),
        id="the first read was not complete: from its boundary, below its horizon",
    ),
    pytest.param(
        begin(None, Marker(COMPLETE, "2026-01-28"), uidvalidity=8),
        "lost",
        State(8, 0, "2026-01-27T00:00:00Z", 90, first_complete=True),
        id="forgotten and renumbered: by date through the whole folder",
    ),
    pytest.param(
        begin(None, None, traces="2026-01-28"),
        "lost",
        State(7, 0, "2026-01-27T00:00:00Z", 90, first_complete=False),
        id="no marker either, but other keys tell of it: never start at new",
    ),
    pytest.param(
        begin(None, None, traces="", threshold=NEVER),
        "lost",
        State(7, 0, "", 90, first_complete=False),
        id="they tell no day: from the beginning",
    ),
]


@pytest.mark.parametrize(("opening", "kind", "state"), OPENINGS)
def test_opening(opening: Opening, kind: str, state: State) -> None:
    assert (opening.kind, opening.state) == (kind, state)
    assert bool(opening.why) == (kind != "continue")


# single questions


@pytest.mark.parametrize(
    ("initial_sync", "threshold"),
    [
        ("all", ""),
        ("new", NEVER),
        ("since:7d", "2026-01-25T12:00:00Z"),
        ("since:0d", "2026-02-01T12:00:00Z"),
        ("since:2026-01-31", "2026-01-31T00:00:00Z"),
    ],
)
def test_first_threshold(initial_sync: str, threshold: str) -> None:
    assert plan.first_threshold(initial_sync, NOW) == threshold


def test_the_first_day_there_is_has_no_day_before_it() -> None:
    """Mail may bear any INTERNALDATE, and somebody may ask for all mail since then."""
    first = "0001-01-01T00:00:00Z"
    assert iso(datetime(1, 1, 1, tzinfo=UTC)) == first
    assert plan.search_day(State(1, 0, first, 5, first_complete=False)) == date(1, 1, 1)
    assert plan.look_since(Marker(State(1, 0, "", 5, first_complete=True), "0001-01-01")) == "0001-01-01"
    assert plan.before(date(1, 1, 2)) == date(1, 1, 1)


@pytest.mark.parametrize(
    ("state", "day"),
    [
        pytest.param(STATE, date(2026, 1, 24), id="a day before the boundary: the server's zone may be a day off"),
        pytest.param(replace(STATE, last_uid=50), None, id="at the horizon every mail counts"),
        pytest.param(replace(STATE, boundary=""), None, id="no boundary: all"),
    ],
)
def test_search_day(state: State, day: date | None) -> None:
    assert plan.search_day(state) == day


@pytest.mark.parametrize(
    ("listed", "dated", "looked_at"),
    [
        pytest.param([10], None, [], id="the last message again, which a search n:* always names: it has its fate"),
        pytest.param([9, 10, 11, 60], None, [11, 60], id="all above last_uid"),
        pytest.param([11, 12, 50, 51], {12}, [12, 51], id="up to the horizon only what SEARCH SINCE named"),
    ],
)
def test_candidates(listed: list[int], dated: set[int] | None, looked_at: list[int]) -> None:
    assert plan.candidates(replace(STATE, last_uid=10, horizon=50), listed, dated) == looked_at


@pytest.mark.parametrize(
    ("uid", "internal_date", "first_complete", "counts"),
    [
        pytest.param(50, SINCE, False, True, id="at the boundary"),
        pytest.param(50, "2026-01-25T11:59:59Z", False, False, id="a second before it"),
        pytest.param(51, "1970-01-01T00:00:00Z", False, True, id="above the horizon, however old"),
        pytest.param(50, "", False, True, id="without a date: rather twice than never"),
        pytest.param(50, "2026-01-26T00:00:00Z", True, False, id="finished so long ago that its id may be forgotten"),
        pytest.param(50, "2026-01-26T00:00:00Z", False, True, id="as old, but the first read never came to it"),
        pytest.param(50, "2026-01-27T00:00:00Z", True, True, id="young enough to be remembered if it was done"),
    ],
)
def test_counts(uid: int, internal_date: str, first_complete: bool, counts: bool) -> None:
    state = replace(STATE, first_complete=first_complete)
    assert plan.counts(state, uid, internal_date, "2026-01-27T00:00:00Z") is counts


@pytest.mark.parametrize(
    ("uid", "internal_date", "late"),
    [
        pytest.param(31, "2026-01-27T00:00:00Z", True, id="passed, and young enough"),
        pytest.param(31, "", True, id="without a date: rather twice than never"),
        pytest.param(31, "2026-01-26T23:59:59Z", False, id="its processed id may be forgotten"),
        pytest.param(30, "2026-01-31T00:00:00Z", False, id="left out on purpose (new mail only)"),
        pytest.param(41, "2026-01-31T00:00:00Z", False, id="not passed yet: the read will come to it"),
    ],
)
def test_counts_late(uid: int, internal_date: str, late: bool) -> None:
    """A mail that became visible below last_uid."""
    state = replace(STATE, floor=30)
    assert plan.counts_late(state, uid, internal_date, "2026-01-27T00:00:00Z") is late


def test_a_late_mail_before_the_boundary_stays_passed() -> None:
    """The first read left it out by its date."""
    assert not plan.counts_late(STATE, 31, "2026-01-25T11:59:59Z", "2025-01-01T00:00:00Z")
    assert plan.counts_late(STATE, 31, SINCE, "2025-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("uid", "internal_date", "asked"),
    [
        (40, "2026-01-10T00:00:00Z", True),
        (40, "", True),
        (40, "2026-01-09T23:59:59Z", False),
        (41, "2026-01-31T00:00:00Z", False),
    ],
)
def test_counts_asked(uid: int, internal_date: str, asked: bool) -> None:
    """--resync-from reaches behind boundary, floor and retention, but not ahead of the read."""
    state = replace(STATE, floor=40)
    assert plan.counts_asked("2026-01-10T00:00:00Z", state, uid, internal_date, "2026-01-27T00:00:00Z") is asked


@given(st.lists(st.integers(1, 50), unique=True).map(sorted), st.sets(st.integers(1, 50)))
def test_only_the_contiguous_prefix_is_ready(uids: list[int], present: set[int]) -> None:
    """Behind a mail that did not come nothing may be published, or the state would pass over it."""
    ready, absent = plan.prefix(uids, present)
    assert absent == [uid for uid in uids if uid not in present]
    assert ready == uids[: len(ready)]
    assert set(ready) <= present
    assert ready == uids if not absent else uids[len(ready)] == absent[0]


days = st.dates(date(1990, 1, 1), date(2030, 1, 1))
names = st.sampled_from(["a", "a|INBOX", "INBOX", "INBOX|x", "b", "[Gmail]/All Mail"])


@given(st.lists(st.tuples(names, names, days | st.none())), names, names)
def test_the_oldest_open_day_is_of_this_mailbox_only(
    mails: list[tuple[str, str, date | None]], account: str, mailbox: str
) -> None:
    """Undated mail has no day; another mailbox's name may begin like ours."""
    assume(not any("|" in other or "|" in account for other, _, _ in mails))
    fields = [open_field(owner, folder, f"{day}T00:00:00Z" if day else "") for owner, folder, day in mails]
    mine = [day for owner, folder, day in mails if day and (owner, folder) == (account, mailbox)]
    assert plan.oldest_open(fields, account, mailbox) == (min(mine).isoformat() if mine else "")


@given(st.integers(0, 100), st.integers(0, 100), st.sets(st.integers(1, 100)).map(sorted))
def test_the_state_never_goes_back(last_uid: int, reached: int, left_out: list[int]) -> None:
    """Neither in a batch nor at the end of a read; what it moves past counts as passed, and nothing else."""
    state = replace(STATE, last_uid=last_uid)
    passed = 3 + len([uid for uid in left_out if last_uid < uid <= reached])
    moved = replace(state, last_uid=max(last_uid, reached), passed=passed)
    assert plan.advanced(state, reached, left_out) == moved
    assert plan.finished(state, reached, left_out) == replace(moved, horizon=0, first_complete=True)
