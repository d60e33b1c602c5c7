"""find, erase, rewrite: every verdict, with all that stands in Redis before and after."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from src.common.archive import Archive, Folder
from src.common.redis_client import Arg, RedisClient
from src.worker import erase
from src.worker.erase import Traces, find, of_mail, of_sender
from tests.support.fake import DAY, DONE, GROUP, Content, Store, present

M1, M2 = "gm:a:1", "gm:a:2"
MEMBER = {DONE: {"1"}}
WAITS: Content = {
    "stream": {"1-0": M1},
    "index": {M1: "S:1-0"},
    "tries": {M1: "1|1|5000"},
    "due": {f"1-0|{M1}"},
    "open": {DAY: "1"},
}
HELD: Content = {
    "stream": {"1-0": M1},
    "pending": {"1-0": ("w1", 1)},
    "index": {M1: "S:1-0"},
    "starts": {M1: "0|1-0:1"},
    "open": {DAY: "1"},
}
DEAD: Content = {"dlq": [(M1, "attempts", "8"), (M2, "attempts", "8")], "index": {M1: "D:1-0", M2: "D:2-0"}, "open": {DAY: "2"}}


@dataclass(frozen=True)
class Case:
    """One mail that is to be erased. `changes`: the parts that are different afterwards."""

    proves: str
    before: Content
    answer: str
    went: dict[str, int] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    unfinished: bool = False


CASES = [
    Case("a mail in a worker's hands is left, whatever is asked for", HELD, "HELD", unfinished=True),
    Case("an unfinished mail is left", WAITS, "LIVE"),
    Case(
        "an unfinished mail that nobody holds leaves everything when that is asked for, and its id counts as processed",
        WAITS,
        "OK",
        {"stream entries": 1},
        {"stream": None, "index": None, "tries": None, "due": None, "open": None, "processed": MEMBER},
        unfinished=True,
    ),
    Case(
        "a dead letter goes, and no other; the counter of its day follows",
        DEAD,
        "OK",
        {"dead letters": 1},
        {"dlq": [(M2, "attempts", "8")], "index": {M2: "D:2-0"}, "open": {DAY: "1"}, "processed": MEMBER},
    ),
    Case(
        "of a mail whose entry someone deleted nothing tells the day: the audit comes first", {"index": {M1: "S:1-0"}}, "DANGLING"
    ),
    Case("of a done mail that nothing else tells of, nothing changes", {"processed": MEMBER}, "OK"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.proves)
def test_erase(store: Store, case: Case) -> None:
    """What the case says; called again it changes nothing more."""
    store.put(case.before)
    mail = find(store.redis, store.keys, of_mail(M1)).get(M1, Traces(M1))
    answer = erase.erase(store.redis, store.keys, GROUP, mail, [], unfinished=case.unfinished, processed_days=1)
    assert answer == (case.answer, Counter(case.went))
    assert store.content() == present({**case.before, **case.changes})
    again = erase.erase(store.redis, store.keys, GROUP, mail, [], unfinished=case.unfinished, processed_days=1)
    assert again == (case.answer, Counter())
    assert store.content() == present({**case.before, **case.changes})


def test_what_a_mail_leaves_beside(store: Store) -> None:
    """Results, steps, mentions in runs go; where its raw mail is stands in the list of what is left to do, with the stream to rewrite."""
    redis, keys = store.redis, store.keys
    for email_id in (M1, M2):
        facts = (
            "mailbox",
            "INBOX",
            "internal_date",
            "2026-01-31T00:00:00Z",
            "raw_ref",
            f"sha256:{email_id}",
            "from",
            f"x{email_id}",
        )
        redis.call("XADD", keys.results, "*", "email_id", email_id, "outcome", "done", "result", "{}", *facts)
    redis.call("HSET", keys.steps(M1), "s", "1")
    redis.call("SADD", keys.run("r"), M1, M2)
    assert erase.runs(redis, keys) == [keys.run("r")]
    assert set(find(redis, keys, of_sender(f"X{M1}"))) == {M1}
    [mail] = find(redis, keys, of_mail(M1)).values()
    verdict, went = erase.erase(redis, keys, GROUP, mail, [keys.run("r")], unfinished=False, processed_days=1)
    assert (verdict, went) == ("OK", Counter({"results": 1, "stored steps": 1, "mentions in reprocess runs": 1}))
    assert store.content() == {"results": [(M2, "done", "{}")], "processed": MEMBER}
    assert redis.call("SMEMBERS", keys.run("r")) in ([M2], {M2})
    assert set(redis.call("SMEMBERS", keys.erasing)) == {f"sha256:{M1}", keys.results}
    assert redis.call("EXISTS", keys.steps(M1)) == 0


def test_a_stream_is_written_anew(store: Store) -> None:
    """The same entries under the same ids, over several pages; a new entry comes after them; nothing is left to do."""
    redis, keys = store.redis, store.keys
    for number in range(1, 251):
        redis.call("XADD", keys.results, f"{number}-0", "email_id", M1, "outcome", str(number), "result", "{}")
    redis.call("XDEL", keys.results, "7-0")
    redis.call("SADD", keys.erasing, keys.results)
    before = redis.entries(keys.results, count=1000)
    assert erase.rewrite(redis, keys) == {}
    assert redis.entries(keys.results, count=1000) == before
    assert len(before) == 249
    assert redis.call("EXISTS", keys.erasing, keys.copy(keys.results)) == 0
    redis.call("XADD", keys.results, "*", "email_id", M2)
    assert redis.length(keys.results) == 250


def test_a_stream_with_readers_is_left(store: Store) -> None:
    """Consumer groups of somebody's own would lose their place: the stream stays as it is, and stays listed."""
    redis, keys = store.redis, store.keys
    redis.call("XADD", keys.results, "1-0", "email_id", M1)
    redis.call("XGROUP", "CREATE", keys.results, "theirs", "0")
    redis.call("SADD", keys.erasing, keys.results)
    assert erase.rewrite(redis, keys) == {keys.results: "GROUPS"}
    assert set(redis.call("SMEMBERS", keys.erasing)) == {keys.results}
    assert len(redis.call("XINFO", "GROUPS", keys.results)) == 1


@pytest.mark.parametrize("fields", [erase.MOST_FIELDS, erase.MOST_FIELDS + 1, 9_000])
def test_an_entry_of_very_many_fields_ends_nothing(store: Store, fields: int) -> None:
    """A letter of somebody else's that Lua cannot hand on: its stream stays as it is, and listed, and the letter is named; the other one
    is written anew. Once it is taken away, all is done."""
    redis, keys = store.redis, store.keys
    store.put(DEAD)
    redis.call("XADD", keys.dlq, "5-0", *(str(number) for number in range(2 * fields)))
    redis.call("XADD", keys.results, "1-0", "email_id", M1)
    redis.call("SADD", keys.erasing, keys.dlq, keys.results)
    before = redis.entries(keys.dlq, count=9)
    fits = fields == erase.MOST_FIELDS
    assert erase.rewrite(redis, keys) == ({} if fits else {keys.dlq: "5-0"})
    assert redis.entries(keys.dlq, count=9) == before
    assert redis.call("EXISTS", keys.copy(keys.dlq), keys.copy(keys.results)) == 0
    assert set(redis.call("SMEMBERS", keys.erasing)) == (set() if fits else {keys.dlq})
    redis.call("XDEL", keys.dlq, "5-0")
    assert erase.rewrite(redis, keys) == {}
    assert redis.entries(keys.dlq, count=9) == before[:2]


def test_what_is_deleted_while_it_is_written_stays_deleted(store: Store) -> None:
    """A letter that is replayed between two pages does not come back with the copy; a cut at the old end is fine."""
    redis, keys = store.redis, store.keys
    for number in range(1, 6):
        redis.call("XADD", keys.dlq, f"{number}-0", "email_id", M1)
    redis.call("SADD", keys.erasing, keys.dlq)
    places = [keys.dlq, keys.copy(keys.dlq), keys.erasing]
    assert redis.run("rewrite", places, [1, 4, 9]) == ["NEXT"]
    redis.call("XDEL", keys.dlq, "3-0")
    assert redis.run("rewrite", places, [0, 4, 9]) == ["AGAIN"]
    assert [entry for entry, _ in redis.entries(keys.dlq, count=9)] == ["1-0", "2-0", "4-0", "5-0"]
    assert redis.run("rewrite", places, [1, 3, 9]) == ["NEXT"]
    redis.call("XDEL", keys.dlq, "1-0")
    assert redis.run("rewrite", places, [0, 3, 9]) == ["DONE"]
    assert [entry for entry, _ in redis.entries(keys.dlq, count=9)] == ["2-0", "4-0", "5-0"]


class Killed(BaseException):
    """The process ends here."""


def interrupted(monkeypatch: pytest.MonkeyPatch, redis: RedisClient, after: int, what: Callable[[], object]) -> None:
    """`what` happens once, after so many pages from now on."""
    run, pages = redis.run, [0]

    def counting(name: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        answer = run(name, keys, args)
        pages[0] += name == "rewrite"
        if pages[0] == after:
            monkeypatch.setattr(redis, "run", run)
            what()
        return answer

    monkeypatch.setattr(redis, "run", counting)


def kill() -> None:
    raise Killed


def test_two_runs_at_once_lose_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run comes in after any page and is killed after any of its own: every entry stands in its stream, nothing is left to do."""
    monkeypatch.setattr(erase, "PAGE", 4)
    redis, keys = store.redis, store.keys
    for number in range(1, 11):
        redis.call("XADD", keys.dlq, f"{2 * number}-0", "email_id", f"letter {number}")
        redis.call("XADD", keys.results, f"{3 * number}-0", "email_id", f"result {number}")
    streams = [keys.dlq, keys.results]
    before = [redis.entries(stream, count=100) for stream in streams]

    for pages, others in product(range(1, 7), range(1, 8)):

        def another(others: int = others) -> None:
            with monkeypatch.context() as inner, suppress(Killed):
                interrupted(inner, redis, others, kill)
                assert erase.rewrite(redis, keys) == {}

        redis.call("SADD", keys.erasing, *streams)
        with monkeypatch.context() as outer:
            interrupted(outer, redis, pages, another)
            assert erase.rewrite(redis, keys) == {}
        assert [redis.entries(stream, count=100) for stream in streams] == before
        assert redis.call("EXISTS", keys.erasing, *map(keys.copy, streams)) == 0


def test_no_copy_holds_what_another_run_has_erased(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest letter is erased while its stream is written anew: the copy goes at once, and the stream is written anew without it."""
    monkeypatch.setattr(erase, "PAGE", 1)
    redis, keys = store.redis, store.keys
    store.put(DEAD)
    redis.call("SADD", keys.erasing, keys.dlq)
    [mail] = find(redis, keys, of_mail(M1)).values()

    def another() -> None:
        assert redis.call("EXISTS", keys.copy(keys.dlq)) == 1
        erase.erase(redis, keys, GROUP, mail, [], unfinished=False, processed_days=1)
        assert redis.call("EXISTS", keys.copy(keys.dlq)) == 0

    interrupted(monkeypatch, redis, 1, another)
    assert erase.rewrite(redis, keys) == {}
    assert [fields["email_id"] for _, fields in redis.entries(keys.dlq, count=9)] == [M2]
    assert redis.call("EXISTS", keys.erasing, keys.copy(keys.dlq)) == 0


def test_what_is_erased_after_the_last_page_is_written_anew_once_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run erases a letter just when this one has swapped: its stream stays listed."""
    redis, keys = store.redis, store.keys
    store.put(DEAD)
    redis.call("SADD", keys.erasing, keys.dlq)
    [mail] = find(redis, keys, of_mail(M1)).values()
    interrupted(monkeypatch, redis, 1, lambda: erase.erase(redis, keys, GROUP, mail, [], unfinished=False, processed_days=1))
    assert erase.rewrite(redis, keys) == {}
    assert set(redis.call("SMEMBERS", keys.erasing)) == {keys.dlq}


def test_raw_mail_that_only_the_archive_knows_is_removed_when_no_producer_can_be_about_to_publish_it(
    store: Store, tmp_path: Path
) -> None:
    """Young, it stays and nothing is listed; old, it goes; what the transition of its mail listed goes however young it is."""
    redis, keys, archive = store.redis, store.keys, Archive(Folder(tmp_path / "raw"))
    began = datetime.now(UTC) + timedelta(seconds=1)
    raw_refs = dict(zip(("young", "old", "listed"), archive.put_all([b"1", b"2", b"3"]), strict=True))
    digest = raw_refs["old"].removeprefix("sha256:")
    moment = began.timestamp() - erase.YOUNG_SECONDS - 1
    os.utime(tmp_path / "raw" / digest[0] / digest, (moment, moment))
    redis.call("SADD", keys.erasing, raw_refs["listed"])
    assert erase.remove_raw(redis, keys, archive, began, set(raw_refs.values())) == (2, 0, 1)
    assert dict(archive.all()) == {raw_refs["young"]: b"1"}
    assert redis.call("EXISTS", keys.erasing) == 0


PLACES = [("HSET", "index", "S:9-0"), ("HSET", "starts", "0|9-0:1"), ("HSET", "tries", "1|1|5000")]


@pytest.mark.parametrize("command", PLACES, ids=lambda command: str(command[1]))
def test_a_mail_that_only_a_mark_names_is_known(store: Store, command: tuple[str, str, str]) -> None:
    """What stands beside the streams may be all that is left of it; of another mail it says nothing."""
    assert not erase.is_known(store.redis, store.keys, M1)
    verb, place, value = command
    store.redis.call(verb, getattr(store.keys, place), M1, value)
    assert erase.is_known(store.redis, store.keys, M1) and not erase.is_known(store.redis, store.keys, M2)


def test_a_mail_of_which_steps_or_a_run_of_reprocess_are_left_is_known(store: Store) -> None:
    store.redis.call("HSET", store.keys.steps(M1), "fetch", "1")
    store.redis.call("SADD", store.keys.run("again"), M2)
    assert erase.is_known(store.redis, store.keys, M1) and erase.is_known(store.redis, store.keys, M2)
    assert not erase.is_known(store.redis, store.keys, "gm:a:3")
