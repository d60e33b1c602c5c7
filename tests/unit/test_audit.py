"""What the audit says of each mail, and the sentence it makes of all of them."""

from __future__ import annotations

import pytest

from src.producer.audit import DELETED, EVER, FORGOTTEN, LOST, NOWHERE, WITHHELD, Balance, Judged, Sighted, judge, oldest_day
from src.producer.plan import State, all_open_since
from src.producer.state_manager import Identity, Place

BEFORE = "2025-06-01T00:00:00Z"  # what is older may have been forgotten
READ = State(7, 100, "2026-01-10T00:00:00Z", 0, first_complete=True, floor=20)
FIRST = State(7, 10, "2026-01-10T00:00:00Z", 50, first_complete=False)
NEW, OLD = "2026-01-20T12:00:00Z", "2026-01-02T12:00:00Z"


def sighted(place: Place, uid: int = 60, internal_date: str = NEW) -> Sighted:
    return Sighted(uid, Identity("gm:a@b:1", internal_date), place)


@pytest.mark.parametrize(
    ("mail", "state", "fate", "why"),
    [
        (sighted("done"), READ, "done", ""),
        (sighted("unread"), READ, "in the stream", ""),
        (sighted("flight"), READ, "in the stream", ""),
        (sighted("waiting"), READ, "waiting", ""),
        (sighted("dead"), READ, "dead", ""),
        (sighted("lost"), READ, "unaccounted", LOST),
        (sighted("dangling", internal_date=OLD), READ, "unaccounted", DELETED),  # whatever its date: it was ours
        (sighted("unknown"), READ, "unaccounted", NOWHERE),
        (sighted("unknown", internal_date=""), READ, "unaccounted", NOWHERE),
        (sighted("unknown", uid=100), READ, "unaccounted", NOWHERE),
        (sighted("unknown", uid=101), READ, "to come", ""),
        (sighted("unknown", uid=101, internal_date=OLD), READ, "to come", ""),  # above the horizon every mail counts
        (sighted("unknown", internal_date=OLD), READ, "passed", "before 2026-01-10"),
        (sighted("unknown", uid=20), READ, "passed", "not new"),
        (sighted("unknown", internal_date=OLD), State(7, 100, "", 0, True), "unaccounted", NOWHERE),
        (
            sighted("unknown", internal_date="2025-05-31T00:00:00Z"),
            State(7, 100, "", 0, True),
            "passed",
            "older than PROCESSED_DAYS",
        ),
        (sighted("unknown", uid=30), FIRST, "to come", ""),
        (sighted("unknown", uid=30, internal_date=OLD), FIRST, "passed", "before 2026-01-10"),
        (sighted("unknown"), None, "to come", ""),
        (sighted("done"), None, "done", ""),
    ],
)
def test_each_mail_has_one_fate(mail: Sighted, state: State | None, fate: str, why: str) -> None:
    """By its place, and where it has none by what its mailbox passed over."""
    judged = judge(mail, state, forgotten_before=BEFORE)
    assert (judged.uid, judged.fate, judged.why, judged.mail) == (mail.uid, fate, why, mail)


def test_what_else_is_known_of_a_mail() -> None:
    """An entry that no index knows is in the stream; what the results call done is done, though its processed id is gone."""
    unknown = sighted("unknown")
    assert judge(unknown, READ, forgotten_before=BEFORE, strays={"gm:a@b:1"}).fate == "in the stream"
    finished = judge(unknown, READ, forgotten_before=BEFORE, finished={"gm:a@b:1"})
    assert (finished.fate, finished.why) == ("unaccounted", FORGOTTEN)


def test_the_sentence() -> None:
    """Each sum is the number of mails; zeros are left out; one reason stands without its count."""
    balance = Balance("a@b", "INBOX")
    assert balance.sentence() == "a@b/INBOX: 0 in the mailbox = 0 done · 0 unaccounted"
    for fate in ("done", "done", "dead", "in the stream"):
        balance.add(Judged(1, fate))  # type: ignore[arg-type]  # one of Fate
    balance.add(Judged(1, "passed", "not new"))
    assert (
        balance.sentence()
        == "a@b/INBOX: 5 in the mailbox = 2 done + 1 in the stream + 1 dead + 1 passed (not new) · 0 unaccounted"
    )
    balance.add(Judged(2, "passed", "before 2026-01-10"))
    for uid in range(3, 15):
        balance.add(Judged(uid, "unaccounted", NOWHERE))
    balance.since = "2026-01-01"
    assert balance.sentence() == (
        "a@b/INBOX: 18 in the mailbox since 2026-01-01 = 2 done + 1 in the stream + 1 dead + "
        "2 passed (1 before 2026-01-10, 1 not new) + 12 unaccounted"
    )
    assert balance.reasons() == ["12 known nowhere: UID 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, …"]
    assert balance.facts()["unaccounted_why"] == {NOWHERE: 12}


def test_the_day_a_look_must_begin_at() -> None:
    """The oldest; where one has no date, the beginning."""
    mails = [Judged(1, "unaccounted", NOWHERE, sighted("unknown", internal_date=date)) for date in (NEW, OLD)]
    assert oldest_day(mails) == "2026-01-02"
    assert oldest_day([*mails, Judged(1, "unaccounted", WITHHELD)]) == EVER


def test_since_when_mail_is_open() -> None:
    """Of this mailbox alone; undated mail may be of any day."""
    fields = ["a|INBOX|20260103", "a|INBOX|20260101", "a|Sent|20250101", "b|INBOX|20250101"]
    assert str(all_open_since(fields, "a", "INBOX")) == "2026-01-01"
    assert all_open_since(fields, "c", "INBOX") is None
    assert str(all_open_since([*fields, "a|INBOX|undated"], "a", "INBOX")) == EVER
