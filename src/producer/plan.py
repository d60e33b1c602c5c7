"""What to read next: from what Redis knows, what the marker file knows and what the folder shows. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Literal

from src.common.clock import iso

NEVER = "9999-12-31T00:00:00Z"
LATE = "late:"  # before the date of a request to look again: only for mail that should be known


@dataclass(frozen=True, slots=True)
class State:
    """How far a mailbox was read. Dates are ISO 8601 in UTC, "" the beginning of time.

    Every UID up to `last_uid` has a recorded fate. A UID up to `horizon` counts only if its INTERNALDATE is not before `boundary`
    (it was there when the read began); above it every mail counts. `first_complete`: the first read of the mailbox came to its end.
    `passed`: how many mails of this UIDVALIDITY were left out, by their date or as not new, when `last_uid` moved past them.
    `floor`: UIDs up to this one were left out whatever their date, as far as this UIDVALIDITY goes ("new mail only").
    """

    uidvalidity: int
    last_uid: int
    boundary: str
    horizon: int
    first_complete: bool
    passed: int = 0
    floor: int = 0


@dataclass(frozen=True, slots=True)
class Marker:
    """What the marker file on disk remembers for the day Redis forgets.

    `oldest`: INTERNALDATE day (ISO date) of the oldest mail that was not finished, "" if that may be any. `epoch`: of the last lease that
    was seen, 0 for none; Redis counts it up with each owner of the mailbox.
    """

    state: State
    oldest: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Opening:
    """How a session begins: the state to go on from, and why, for the log."""

    kind: Literal["first", "continue", "walk", "lost"]
    state: State
    why: str


def opening(
    state: State | None,
    marker: Marker | None,
    *,
    uidvalidity: int,
    exists: int,
    highest: int,
    newest: str,
    threshold: str,
    traces: str | None,
) -> Opening:
    """Decide how to begin.

    `exists`: how many mails the folder holds. `highest`, `newest`: UID and INTERNALDATE of the last one (0, "" if it is empty).
    `threshold`: from when the first read takes mail (`first_threshold`). `traces`: oldest day that other keys of this mailbox tell
    of, None if there are none.
    """
    if state is not None and state.uidvalidity == uidvalidity:
        return Opening("continue", state, "")
    if state is not None:
        return Opening(
            "walk",
            replace(state, uidvalidity=uidvalidity, last_uid=0, horizon=highest, passed=0, floor=0),
            f"UIDVALIDITY changed from {state.uidvalidity} to {uidvalidity}: walking the folder, known mail is recognised",
        )
    if marker is not None:
        return _lost(marker, uidvalidity, highest)
    if traces is not None:
        boundary = _day_before(traces)
        return Opening(
            "lost",
            State(uidvalidity, 0, boundary, highest, first_complete=False),
            f"the state is gone from Redis while mail of this mailbox is there: reading again from {boundary[:10] or 'the beginning'}",
        )
    # The server's own dates decide later, never our clock: a boundary after the newest mail would swallow what comes next.
    boundary = threshold if threshold <= newest else newest
    if threshold == NEVER:
        return Opening(
            "first",
            State(uidvalidity, highest, boundary, 0, first_complete=True, passed=exists, floor=highest),
            "first read: new mail only",
        )
    return Opening(
        "first",
        State(uidvalidity, 0, boundary, highest, first_complete=False),
        f"first read: mail since {threshold[:10] or 'ever'}",
    )


def _lost(marker: Marker, uidvalidity: int, highest: int) -> Opening:
    """Redis forgot the mailbox, the disk did not: never start at new."""
    known = marker.state
    boundary = max(known.boundary, _day_before(marker.oldest)) if known.first_complete else known.boundary
    horizon = max(known.last_uid, known.horizon) if known.uidvalidity == uidvalidity else highest
    return Opening(
        "lost",
        State(uidvalidity, 0, boundary, min(horizon, highest), known.first_complete),
        f"the state is gone from Redis: reading again from {boundary[:10] or 'the beginning'}, effects since may repeat",
    )


def came_back_older(state: State, epoch: int, marker: Marker, *, first: bool) -> str:
    """How one sees that Redis knows less than the disk, since an older copy of it came back; "" if it does not.

    `epoch`: of the lease just taken. `first`: it is the first lease of this process, so that it is younger than the marker's.
    """
    if state.uidvalidity == marker.state.uidvalidity and state.last_uid < marker.state.last_uid:
        return f"last_uid {state.last_uid}, {marker.state.last_uid} was reached"
    if epoch < marker.epoch or (first and epoch == marker.epoch):
        return f"epoch {epoch}, {marker.epoch} was reached"
    return ""


def look_since(marker: Marker) -> str:
    """The ISO date from which all mail is looked at again where Redis came back older: what was finished by then needs no look."""
    return _day_before(marker.oldest)[:10] or "1970-01-02"


def first_threshold(initial_sync: str, now: datetime) -> str:
    """INITIAL_SYNC as the INTERNALDATE from which the first read takes mail: "" takes all, NEVER none."""
    if initial_sync == "all":
        return ""
    if initial_sync == "new":
        return NEVER
    since = initial_sync.removeprefix("since:")
    if since.endswith("d"):
        return iso(now - timedelta(days=int(since[:-1])))
    return f"{date.fromisoformat(since).isoformat()}T00:00:00Z"


def _day_before(day: str) -> str:
    return f"{before(date.fromisoformat(day))}T00:00:00Z" if day else ""


def before(day: date) -> date:
    """The day before; of the first day there is, itself: mail may bear any date."""
    return day - timedelta(days=1) if day > date.min else day


def search_day(state: State) -> date | None:
    """The day for SEARCH SINCE that surely shows every mail from the boundary on (the server's zone may be a day off); None: all."""
    if not state.boundary or state.last_uid >= state.horizon:
        return None
    return before(datetime.fromisoformat(state.boundary).date())


def candidates(state: State, listed: Sequence[int], dated: Collection[int] | None) -> list[int]:
    """UIDs to look at, ascending: those above the horizon, and below it those that SEARCH SINCE named (`dated`; None: all)."""
    above = [uid for uid in listed if uid > state.last_uid]
    return above if dated is None else [uid for uid in above if uid > state.horizon or uid in dated]


def counts(state: State, uid: int, internal_date: str, forgotten_before: str) -> bool:
    """Whether a mail that is known nowhere is to be published.

    `forgotten_before`: mail older than this was finished so long ago that its processed id may have expired.
    """
    if uid > state.horizon or not internal_date:
        return True
    if internal_date < state.boundary:
        return False
    return not (state.first_complete and internal_date < forgotten_before)


def counts_late(state: State, uid: int, internal_date: str, forgotten_before: str) -> bool:
    """Whether a mail that is known nowhere is to be published although its UID was passed: it became visible late."""
    if uid <= state.floor or uid > state.last_uid:
        return False
    return not internal_date or max(state.boundary, forgotten_before) <= internal_date


def counts_asked(since: str, state: State, uid: int, internal_date: str, forgotten_before: str) -> bool:
    """Whether a mail that is known nowhere is to be published because someone asked for all mail from `since` on."""
    return uid <= state.last_uid and (not internal_date or internal_date >= since)


def passed_over(state: State, uid: int, internal_date: str, forgotten_before: str) -> str:
    """Why a mail that is known nowhere does not count, for a person; "" if it does: by `counts_late`, above `last_uid` by `counts`."""
    judge = counts if uid > state.last_uid else counts_late
    if judge(state, uid, internal_date, forgotten_before):
        return ""
    if uid <= state.floor:
        return "not new"
    return f"before {state.boundary[:10]}" if internal_date < state.boundary else "older than PROCESSED_DAYS"


def prefix(uids: Sequence[int], present: Collection[int]) -> tuple[list[int], list[int]]:
    """(the leading UIDs that are present, all that are absent): only the contiguous prefix may be published."""
    absent = [uid for uid in uids if uid not in present]
    return ([uid for uid in uids if uid < absent[0]] if absent else list(uids)), absent


def advanced(state: State, last_uid: int, *left_out: Sequence[int]) -> State:
    """The state moved up to `last_uid`. `left_out`: ascending UIDs that are not published; those it moves past count as passed."""
    moved = max(state.last_uid, last_uid)
    passed = sum(bisect_right(uids, moved) - bisect_right(uids, state.last_uid) for uids in left_out)
    return replace(state, last_uid=moved, passed=state.passed + passed)


def finished(state: State, highest: int, *left_out: Sequence[int]) -> State:
    """Everything listed has its fate: the read by date is over, from here on every mail counts."""
    return replace(advanced(state, highest, *left_out), horizon=0, first_complete=True)


def oldest_open(fields: Iterable[str], account: str, mailbox: str) -> str:
    """The oldest day (ISO date) among the fields of `Keys.open` of this mailbox; "" if there is none."""
    start = f"{account}|{mailbox}|"
    days = [field[len(start) :] for field in fields if field.startswith(start)]
    dated = sorted(day for day in days if day.isdigit())
    return f"{dated[0][:4]}-{dated[0][4:6]}-{dated[0][6:]}" if dated else ""


def all_open_since(fields: Collection[str], account: str, mailbox: str) -> date | None:
    """The day from which a look finds every unfinished mail of this mailbox; None where it has none. `fields`: of `Keys.open`."""
    if f"{account}|{mailbox}|undated" in fields:
        return date(1970, 1, 2)
    oldest = oldest_open(fields, account, mailbox)
    return date.fromisoformat(oldest) if oldest else None
