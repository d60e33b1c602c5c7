"""Finished mail again: every answer of the transition with all that stands in Redis before and after, and which mail is meant."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config.settings import load_settings
from src.common.archive import open_archive
from src.common.exceptions import ScriptRefused
from src.common.keys import Keys
from src.common.shutdown import Shutdown
from src.mail.record import Email
from src.producer import reprocess
from src.producer.reprocess import Finished, Wanted, bring_back, entry_from_archive, judge, results
from src.worker import recovery
from src.worker.delivery import Delivery
from src.worker.idempotency import Done, begin, complete
from tests.support.fake import DAY, DONE, GROUP, Content, Store, fields_of, flat, present

for name in ("_path", "_bulk", "_command"):
    sys.modules[name] = importlib.import_module(f"scripts.{name}")  # its own folder is not on our path
script = importlib.import_module("scripts.reprocess")

M1, M2, M3 = "gm:a:1", "gm:a:2", "gm:a:3"
NOW = datetime(2026, 2, 1, tzinfo=UTC)
KNOWN: Content = {"processed": {DONE: {"1", "2"}}}


@dataclass(frozen=True)
class Case:
    """One call with M1. `changes`: the parts that are different afterwards."""

    proves: str
    answer: str
    before: Content
    changes: dict[str, Any] = field(default_factory=dict)
    most_live: int = 10


CASES = [
    Case(
        "a finished mail is a new, unfinished one: known, counted, no longer processed",
        "OK",
        KNOWN,
        {"processed": {DONE: {"2"}}, "stream": {"#1": M1}, "index": {M1: "S:#1"}, "open": {DAY: "1"}},
    ),
    Case(
        "an unfinished mail is not touched",
        "LIVE",
        {"stream": {"1-0": M1}, "index": {M1: "S:1-0"}, "open": {DAY: "1"}},
    ),
    Case(
        "a dead one is not touched",
        "DEAD",
        {"dlq": [(M1, "why", "1")], "index": {M1: "D:1-0"}, "open": {DAY: "1"}},
    ),
    Case("what was never finished is not published", "UNKNOWN", {"processed": {DONE: {"2"}}}),
    Case("the day counts: the same number under another day is another mail", "UNKNOWN", {"processed": {"a:20260130": {"1"}}}),
    Case(
        "a full stream takes nothing",
        "FULL",
        KNOWN | {"stream": {"1-0": M3}, "index": {M3: "S:1-0"}, "open": {DAY: "1"}},
        most_live=1,
    ),
]


def brought(store: Store, *email_ids: str, run: str = "r", most_live: int = 10) -> list[str]:
    entries = [fields_of(email_id, replays="1") for email_id in email_ids]
    return list(bring_back(store.redis, store.keys, run, entries, most_live=most_live))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.proves)
def test_bring_back(store: Store, case: Case) -> None:
    store.put(case.before)
    assert brought(store, M1, most_live=case.most_live) == [case.answer]
    assert store.content() == present(case.before | case.changes)


def test_the_same_run_brings_a_mail_back_once_whatever_became_of_it(store: Store) -> None:
    """The reply was lost and the mail was finished before the call was repeated; another run does it again."""
    store.put(KNOWN)
    seat = store.seat()
    assert brought(store, M1) == ["OK"]
    assert brought(store, M1) == ["ALREADY"]
    recovery.join(seat)
    [(entry, fields)] = store.redis.read_new(store.keys.stream, GROUP, "w1", count=10, block_ms=1)
    mail = Delivery(entry, 1, fields)
    assert [answer.verdict for answer in begin(seat, [mail], solo=False, poison=3, now=NOW)] == ["GO"]
    assert complete(seat, [Done(mail, "done", "{}")], processed_days=1, results_max=10, results_days=1) == ["OK"]
    assert store.content() == KNOWN | {"results": [(M1, "done", "{}")]}
    assert brought(store, M1) == ["ALREADY"]
    assert store.content() == KNOWN | {"results": [(M1, "done", "{}")]}
    assert brought(store, M1, run="another") == ["OK"]


def test_its_steps_are_done_anew(store: Store) -> None:
    """What `context.once` kept of the first life is forgotten, that of a mail that stays finished is not."""
    store.put(KNOWN)
    for email_id in (M1, M2, M3):
        store.redis.call("HSET", store.keys.steps(email_id), "step", "{}")
    assert brought(store, M1, M3) == ["OK", "UNKNOWN"]
    assert [store.redis.call("EXISTS", store.keys.steps(email_id)) for email_id in (M1, M2, M3)] == [0, 1, 1]


def test_each_mail_of_a_batch_has_its_own_answer(store: Store) -> None:
    """OK, UNKNOWN and FULL over two days; a mail named twice comes back once."""
    store.put(KNOWN)
    store.redis.call("SADD", "stream:processed:a:20260130", "4")
    entries = [fields_of(M1), fields_of(M1), fields_of(M3), fields_of("gm:a:4", day="2026-01-30"), fields_of(M2)]
    assert bring_back(store.redis, store.keys, "r", entries, most_live=2) == ["OK", "ALREADY", "UNKNOWN", "OK", "FULL"]
    assert store.content()["stream"] == {"#1": M1, "#2": "gm:a:4"}
    assert bring_back(store.redis, store.keys, "r", [], most_live=2) == []


def test_a_mail_too_wide_is_refused_before_anything_is_written(store: Store) -> None:
    """The one before it in the batch is not brought back either: the call can be repeated without it."""
    store.put(KNOWN)
    wide = fields_of(M2) | {f"name{number}": "value" for number in range(1000)}
    with pytest.raises(ScriptRefused):
        bring_back(store.redis, store.keys, "r", [fields_of(M1), wide], most_live=10)
    assert store.content() == KNOWN


def test_a_run_is_remembered_for_a_week(store: Store) -> None:
    store.put(KNOWN)
    brought(store, M1)
    assert 604_700 <= store.redis.call("TTL", store.keys.run("r")) <= 604_800


def finished(email_id: str = M1, **changes: Any) -> Finished:
    values = {
        "email_id": email_id,
        "outcome": "done",
        "handler": "classify",
        "mailbox": "INBOX",
        "uid": 7,
        "internal_date": "2026-01-31T00:00:00Z",
        "sender": "Ann <ann@example.org>",
        "raw_ref": "",
    }
    return Finished(**(values | changes))


def test_judging_changes_nothing_and_says_what_would_be_answered(store: Store) -> None:
    """A dry run: OK, LIVE, DEAD, UNKNOWN."""
    before: Content = KNOWN | {
        "stream": {"1-0": M3},
        "index": {M3: "S:1-0", "gm:a:4": "D:1-0"},
        "dlq": [("gm:a:4", "why", "1")],
        "open": {DAY: "2"},
    }
    store.put(before)
    assert judge(store.redis, store.keys, [finished(f"gm:a:{n}") for n in (1, 3, 4, 5)]) == ["OK", "LIVE", "DEAD", "UNKNOWN"]
    assert judge(store.redis, store.keys, []) == []
    assert store.content() == before


def test_what_the_results_say(store: Store) -> None:
    """Over several pages, the oldest first; entries of older versions and of somebody else do no harm."""
    for number in range(1, 2101):
        store.redis.call(
            "XADD", store.keys.results, f"{number}-0", "email_id", f"gm:a:{number}", "outcome", "done", "result", "{}"
        )
    entry = {"outcome": "skipped", "handler": "h", "mailbox": "INBOX", "uid": "x", "internal_date": "2026-01-31T00:00:00Z"}
    store.redis.call("XADD", store.keys.results, "3000-0", *flat({"email_id": M1, "from": "Ann", "raw_ref": "r", **entry}))
    store.redis.call("XADD", store.keys.results, "3000-1", "hello", "world")
    found = list(results(store.redis, store.keys))
    assert [mail.email_id for mail in found[:2100]] == [f"gm:a:{number}" for number in range(1, 2101)]
    assert found[2100:] == [Finished(M1, "skipped", "h", "INBOX", 0, "2026-01-31T00:00:00Z", "Ann", "r")]
    assert found[0].account == "a"


JANUARY = Wanted(date(2026, 1, 30), date(2026, 1, 31))


@pytest.mark.parametrize(
    ("wanted", "mail", "takes"),
    [
        (JANUARY, finished(), True),
        (JANUARY, finished(outcome="skipped"), True),
        (JANUARY, finished(outcome="discarded"), False),
        (JANUARY, finished(internal_date="2026-01-30T00:00:00Z"), True),
        (JANUARY, finished(internal_date="2026-01-31T23:59:59Z"), True),
        (JANUARY, finished(internal_date="2026-01-29T23:59:59Z"), False),
        (JANUARY, finished(internal_date="2026-02-01T00:00:00Z"), False),
        (JANUARY, finished(internal_date=""), False),
        (Wanted(JANUARY.since, JANUARY.until, account="A"), finished(), True),
        (Wanted(JANUARY.since, JANUARY.until, account="b"), finished(), False),
        (Wanted(JANUARY.since, JANUARY.until, sender="ANN@example.org"), finished(), True),
        (Wanted(JANUARY.since, JANUARY.until, sender="@example.org"), finished(), True),
        (Wanted(JANUARY.since, JANUARY.until, sender="@ample.org"), finished(), False),
        (Wanted(JANUARY.since, JANUARY.until, sender="bob@example.org"), finished(), False),
        (Wanted(JANUARY.since, JANUARY.until, sender="ann@example.org"), finished(sender="ann@example.org"), True),
        (Wanted(JANUARY.since, JANUARY.until, sender="bob@x.org"), finished(sender="<bob@x.org> <ann@example.org>"), False),
        (Wanted(JANUARY.since, JANUARY.until, handler="classify"), finished(), True),
        (Wanted(JANUARY.since, JANUARY.until, handler="sql"), finished(), False),
    ],
)
def test_which_mail_is_meant(wanted: Wanted, mail: Finished, takes: bool) -> None:
    """Days, both included; account, sender (address or domain), handler; never what was given up."""
    assert wanted.takes(mail) is takes


def test_days_as_they_stand_in_the_keys() -> None:
    """Over the end of a month."""
    assert Wanted(date(2026, 1, 31), date(2026, 2, 1)).days == ["20260131", "20260201"]
    assert Keys("s").processed_day("a", "20260131") == Keys("s").processed("a", "2026-01-31T05:00:00Z")


def test_an_entry_from_the_archive_says_what_it_lacks() -> None:
    """The handler gets the mail under its old id, with a word about what only IMAP knows."""
    raw = b"From: Ann <ann@example.org>\r\nSubject: again\r\n\r\nhello\r\n"
    fields = entry_from_archive(finished(raw_ref="sha256:" + "0" * 64), raw, new_id="c", now=NOW)
    email = Email(fields)
    assert (email.email_id, email.account, email.mailbox, email.uid) == (M1, "a", "INBOX", 7)
    assert (email.subject, email.text, email.raw_ref, email.size) == ("again", "hello", "sha256:" + "0" * 64, len(raw))
    assert email.defects == (reprocess.WITHOUT_IMAP,)
    assert (fields["replays"], Delivery("1-0", 1, fields).foreign) == ("1", "")


def test_large_mails_from_the_archive_are_not_held_all_at_once(store: Store, tmp_path: Path) -> None:
    """Five of 3 MB in two groups, each closed at FETCH_BYTES; all are in the stream, and what the archive lacks is left for IMAP."""
    settings = load_settings({"DATA_DIR": tmp_path, "STREAM_NAME": store.keys.stream}, env_file=None)
    archive = open_archive(None, tmp_path)
    assert archive
    raws = [b"Subject: %d\r\nContent-Type: application/pdf\r\n\r\n" % number + bytes(3_000_000) for number in range(5)]
    archived = [finished(f"gm:a:{number}", raw_ref=ref) for number, ref in enumerate(archive.put_all(raws), start=1)]
    missing = finished("gm:a:6", raw_ref="sha256:" + "0" * 64)
    store.put({"processed": {DONE: {str(number) for number in range(1, 7)}}})
    plan = SimpleNamespace(archived=[*archived, missing], lacking=set())
    run = script.Run(settings, store.redis, None, plan, argparse.Namespace(run="r", rate=None), Shutdown())
    groups: list[int] = []
    run._keep = lambda raws: groups.append(len(raws))
    run._from_archive()
    assert groups == [3, 2]
    assert list(store.content()["index"]) == [mail.email_id for mail in archived]
    assert plan.lacking == {("a", "6")}
