"""fail, look, replay, discard: every verdict, with all that stands in Redis before and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from config.settings import load_settings
from src.worker import dlq, recovery
from src.worker.delivery import Delivery
from src.worker.dlq import DeadLetter, Failed, Failure, fail
from src.worker.idempotency import Done, begin, complete
from tests.support.fake import DAY, DONE, GROUP, Content, Store, fields_of, flat, present

NOW = datetime(2026, 2, 1, tzinfo=UTC)
M1, M2, M3, M4 = "gm:a:1", "gm:a:2", "gm:a:3", "gm:a:4"

ONE: Content = {
    "stream": {"1-0": M1},
    "pending": {"1-0": ("w1", 2)},
    "index": {M1: "S:1-0"},
    "starts": {M1: "0|1-0:2"},
    "tries": {M1: "3|1|5000"},
    "open": {DAY: "1"},
}
DEAD: Content = {"index": {M1: "D:1-0"}, "dlq": [(M1, "attempts", "8")], "open": {DAY: "1"}}


@dataclass(frozen=True)
class Case:
    """One mail, held by w1 with count 2, that was not finished. `changes`: the parts that are different afterwards."""

    proves: str
    verb: dlq.Verb
    answer: Failed
    changes: dict[str, Any] = field(default_factory=dict)
    before: Content = field(default_factory=lambda: ONE)


FAIL = [
    Case(
        "a retry waits in the due queue, counted, its start finished, its entry still in the stream",
        "retry",
        Failed("RETRY", 4),
        {"pending": None, "starts": None, "tries": {M1: "4|2|5000"}, "due": {f"1-0|{M1}"}},
    ),
    Case(
        "a first failure counts one",
        "retry",
        Failed("RETRY", 1),
        {"pending": None, "starts": None, "tries": {M1: "1|2|now"}, "due": {f"1-0|{M1}"}},
        ONE | {"tries": None},
    ),
    Case(
        "a finished retry clears the suspicion of earlier starts",
        "retry",
        Failed("RETRY", 4),
        {"pending": None, "starts": None, "tries": {M1: "4|2|5000"}, "due": {f"1-0|{M1}"}},
        ONE | {"starts": {M1: "2|1-0:2"}},
    ),
    Case(
        "a crash is a retry whose start stays marked: the mail is a suspect, its next start runs alone",
        "crash",
        Failed("RETRY", 4),
        {"pending": None, "starts": {M1: "3|1-0:2"}, "tries": {M1: "4|2|5000"}, "due": {f"1-0|{M1}"}},
    ),
    Case(
        "a death of its own process weighs four times a start that ended with the worker",
        "crash",
        Failed("RETRY", 4),
        {"pending": None, "starts": {M1: "5|1-0:2"}, "tries": {M1: "4|2|5000"}, "due": {f"1-0|{M1}"}},
        ONE | {"starts": {M1: "2|1-0:2"}},
    ),
    Case(
        "the same crash again (its reply was lost) says ALREADY",
        "crash",
        Failed("ALREADY", 4),
        before=ONE | {"pending": None, "tries": {M1: "4|2|5000"}, "due": {f"1-0|{M1}"}},
    ),
    Case(
        "a postponed mail waits without an attempt counted",
        "postpone",
        Failed("POSTPONED", 3),
        {"pending": None, "starts": None, "tries": {M1: "3|2|5000"}, "due": {f"1-0|{M1}"}},
    ),
    Case(
        "a buried mail stands in the dead letters and still counts as open",
        "bury",
        Failed("DEAD", 4),
        {
            "stream": None,
            "pending": None,
            "starts": None,
            "tries": None,
            "index": {M1: "D:#1"},
            "dlq": [(M1, "why", "4")],
        },
    ),
    Case(
        "another consumer's mail is LOST and untouched",
        "bury",
        Failed("LOST", 3),
        before=ONE | {"pending": {"1-0": ("w2", 2)}},
    ),
    Case(
        "another delivery count is LOST although the consumer is the same",
        "retry",
        Failed("LOST", 3),
        before=ONE | {"pending": {"1-0": ("w1", 3)}},
    ),
    Case(
        "the same call again (its reply was lost) says ALREADY and counts nothing",
        "retry",
        Failed("ALREADY", 4),
        before=ONE | {"pending": None, "starts": None, "tries": {M1: "4|2|5000"}, "due": {f"1-0|{M1}"}},
    ),
]


@pytest.mark.parametrize("case", FAIL, ids=lambda case: case.proves)
def test_fail(store: Store, case: Case) -> None:
    store.put(case.before)
    assert fail(store.seat(), [Failure(store.held("1-0", 2), case.verb, reason="why")], now=NOW) == [case.answer]
    assert store.content() == present(case.before | case.changes)


def test_a_mail_deleted_by_hand_is_gone_and_acknowledged(store: Store) -> None:
    """XDEL while the handler ran: nothing to retry or to bury, nothing stays pending or waiting; the index still tells that it was ours."""
    store.put(ONE)
    mail = store.held("1-0", 2)
    store.redis.call("XDEL", store.keys.stream, "1-0")
    assert [answer.verdict for answer in fail(store.seat(), [Failure(mail, "retry")], now=NOW)] == ["GONE"]
    assert store.content() == {"index": {M1: "S:1-0"}, "open": {DAY: "1"}}


def test_a_copy_deleted_by_hand_takes_nothing_from_the_mail_that_lives(store: Store) -> None:
    """The index names another entry: that one stays known and counted."""
    store.put(ONE | {"stream": {"1-0": M1, "2-0": M1}, "index": {M1: "S:2-0"}})
    mail = store.held("1-0", 2)
    store.redis.call("XDEL", store.keys.stream, "1-0")
    assert [answer.verdict for answer in fail(store.seat(), [Failure(mail, "retry")], now=NOW)] == ["GONE"]
    assert store.content() == {"stream": {"2-0": M1}, "index": {M1: "S:2-0"}, "open": {DAY: "1"}}


def test_a_batch_of_all_verdicts_gives_each_mail_its_own(store: Store) -> None:
    """RETRY, DEAD, LOST and POSTPONED in one call."""
    store.put(
        {
            "stream": {"1-0": M1, "2-0": M2, "3-0": M3, "4-0": M4},
            "pending": {"1-0": ("w1", 1), "2-0": ("w1", 1), "3-0": ("w2", 2), "4-0": ("w1", 1)},
            "index": {M1: "S:1-0", M2: "S:2-0", M3: "S:3-0", M4: "S:4-0"},
            "starts": {M1: "0|1-0:1", M2: "0|2-0:1", M3: "0|3-0:2", M4: "0|4-0:1"},
            "open": {DAY: "4"},
        }
    )
    verbs: list[tuple[str, dlq.Verb]] = [("1-0", "retry"), ("2-0", "bury"), ("3-0", "retry"), ("4-0", "postpone")]
    answers = fail(store.seat(), [Failure(store.held(entry), verb, reason="why") for entry, verb in verbs], now=NOW)
    assert answers == [Failed("RETRY", 1), Failed("DEAD", 1), Failed("LOST", 0), Failed("POSTPONED", 0)]
    assert store.content() == {
        "stream": {"1-0": M1, "3-0": M3, "4-0": M4},
        "pending": {"3-0": ("w2", 2)},
        "index": {M1: "S:1-0", M2: "D:#1", M3: "S:3-0", M4: "S:4-0"},
        "starts": {M3: "0|3-0:2"},
        "tries": {M1: "1|1|now", M4: "0|1|"},
        "due": {f"1-0|{M1}", f"4-0|{M4}"},
        "dlq": [(M2, "why", "1")],
        "open": {DAY: "4"},
    }


@pytest.mark.parametrize(
    ("verb", "verdict"), [("retry", "RETRY"), ("crash", "RETRY"), ("postpone", "POSTPONED"), ("bury", "DEAD")]
)
def test_the_same_delivery_twice_in_one_call_fails_once(store: Store, verb: dlq.Verb, verdict: str) -> None:
    """A Redis that came back older gave it again, and both runs of the handler end together: one attempt, one dead letter."""
    store.put(ONE)
    once = Failure(store.held("1-0", 2), verb, reason="why")
    assert [answer.verdict for answer in fail(store.seat(), [once, once], now=NOW)] == [verdict, "ALREADY"]
    twice = store.content()
    store.redis.call("FLUSHALL")
    store.put(ONE)
    fail(store.seat(), [once], now=NOW)
    assert store.content() == twice


def test_the_delay_is_counted_from_the_servers_clock(store: Store) -> None:
    """Worker clocks may differ: the due time is TIME plus the delay in ms."""
    store.put(ONE)
    [seconds, _] = store.redis.call("TIME")
    fail(store.seat(), [Failure(store.held("1-0", 2), "retry", delay=1000.5)], now=NOW)
    score = float(store.redis.call("ZSCORE", store.keys.due, f"1-0|{M1}"))
    assert int(seconds) * 1000 + 1_000_500 <= score <= int(seconds) * 1000 + 1_060_500


def test_the_dead_letter_keeps_the_mail_and_says_why(store: Store) -> None:
    """All fields as they were; old notes of an earlier death are replaced; long texts are cut."""
    seat = store.seat()
    recovery.join(seat)
    store.add("1-0", fields_of(M1, replays="1") | {"dead_reason": "old", "dead_extra": "old"})
    store.redis.read_new(store.keys.stream, GROUP, "w1", count=1, block_ms=1)
    failure = Failure(
        store.held("1-0"), "bury", reason="permanent", error_type="ValueError", error="e" * 5000, traceback="t" * 9000
    )
    fail(seat, [failure], now=NOW)
    [letter] = dlq.look(store.redis, store.keys)
    assert letter.fields == fields_of(M1, replays="1") | {
        "dead_reason": "permanent",
        "dead_error_type": "ValueError",
        "dead_error": "e" * 2000,
        "dead_traceback": "t" * 8000,
        "dead_attempts": "1",
        "dead_at": "2026-02-01T00:00:00Z",
        "dead_worker": "w1",
        "dead_handler": "",
        "dead_first_at": "2026-02-01T00:00:00Z",
    }
    assert (letter.foreign, letter.email_id) == (False, M1)


@pytest.mark.parametrize(
    "moment",
    ["1970-01-01T00:00:00Z", "2000-02-29T23:59:59Z", "2026-01-31T08:09:10Z", "2026-12-31T23:59:59Z", "2100-03-01T00:00:01Z"],
)
def test_the_first_failure_keeps_its_time_until_the_grave(store: Store, moment: str) -> None:
    """What `tries` holds as ms stands in the letter as a date, whatever failed since."""
    first = round(datetime.fromisoformat(moment).timestamp() * 1000) + 999
    store.put(ONE)
    store.redis.call("HSET", store.keys.tries, M1, f"3|1|{first}")
    fail(store.seat(), [Failure(store.held("1-0", 2), "bury", reason="why", handler="classify")], now=NOW)
    [letter] = dlq.look(store.redis, store.keys)
    assert letter.fields["dead_first_at"] == moment
    assert letter.fields["dead_at"] == "2026-02-01T00:00:00Z"
    assert letter.fields["dead_handler"] == "classify"


def test_retries_keep_the_time_of_the_first_failure(store: Store) -> None:
    """A second failure, and a crash, change the count and not the time; a postponed start sets none."""
    seat = store.seat()
    store.put(ONE | {"tries": None})
    expected: list[tuple[dlq.Verb, str]] = [("postpone", "0"), ("retry", "1"), ("crash", "2"), ("postpone", "2"), ("retry", "3")]
    since = set()
    mail = store.held("1-0", 2)
    for verb, attempts in expected:
        fail(seat, [Failure(mail, verb)], now=NOW)
        counted, _, first = store.redis.hash(store.keys.tries)[M1].split("|")
        assert (counted, first != "") == (attempts, attempts != "0")
        since |= {first} - {""}
        [mail] = recovery.promote(seat, most=1)
    assert len(since) == 1


def test_an_error_that_quotes_lone_surrogates_is_recorded(store: Store) -> None:
    """A file name or a header in its text: the mail beside it is settled too, nothing dies."""
    store.put(ONE)
    failure = Failure(store.held("1-0", 2), "bury", reason="permanent", error="no \udcff.txt", traceback="in \ud800")
    assert fail(store.seat(), [failure], now=NOW) == [Failed("DEAD", 4)]
    [letter] = dlq.look(store.redis, store.keys)
    assert (letter.fields["dead_error"], letter.fields["dead_traceback"]) == ("no ?.txt", "in ?")


# foreign entries


def test_three_foreign_entries_are_three_dead_letters(store: Store) -> None:
    """Nothing of ours knows them: no index, no count; each is buried with the reason under its own id."""
    recovery.join(store.seat())
    for number in (1, 2, 3):
        store.add(f"{number}-0", {"hello": "world"})
    read = store.redis.read_new(store.keys.stream, GROUP, "w1", count=10, block_ms=1)
    failures = [
        Failure(mail, "foreign", reason="foreign", error=mail.foreign)
        for mail in (Delivery(entry, 1, fields) for entry, fields in read)
    ]
    assert {answer.verdict for answer in fail(store.seat(), failures, now=NOW)} == {"DEAD"}
    assert store.content() == {"dlq": [(f"foreign:{number}-0", "foreign", "1") for number in (1, 2, 3)]}
    assert all(letter.foreign for letter in dlq.look(store.redis, store.keys))


def test_a_foreign_entry_with_more_fields_than_lua_can_pass_on_is_buried(store: Store) -> None:
    """9,000 pairs: the first thousand are kept, the mail beside it is settled too."""
    recovery.join(store.seat())
    store.add("1-0", {f"name{number}": "value" for number in range(9000)})
    store.add("2-0", fields_of(M2))
    read = store.redis.read_new(store.keys.stream, GROUP, "w1", count=10, block_ms=1)
    wide, mail = [Delivery(entry, 1, fields) for entry, fields in read]
    answers = fail(store.seat(), [Failure(wide, "foreign", reason="foreign"), Failure(mail, "bury", reason="why")], now=NOW)
    assert [answer.verdict for answer in answers] == ["DEAD", "DEAD"]
    first, second = dlq.look(store.redis, store.keys)
    assert first.email_id == "foreign:1-0"
    assert len([name for name in first.fields if name.startswith("name")]) == 1000
    assert second.fields["record"] == "{}"
    assert "stream" not in store.content()


def test_foreign_letters_cannot_be_replayed_but_discarded(store: Store) -> None:
    """A replay would bring it back as a foreign entry for ever."""
    store.put(DEAD)
    foreign = {"hello": "world", "dead_reason": "foreign", "dead_attempts": "1", "dead_id": "foreign:7-0"}
    store.redis.call("XADD", store.keys.dlq, "2-0", *flat(foreign))
    letters = dlq.look(store.redis, store.keys)
    assert dlq.replay(store.redis, store.keys, letters[::-1]) == ["FOREIGN", "OK"]
    assert store.content() == {
        "stream": {"#1": M1},
        "index": {M1: "S:#1"},
        "dlq": [("foreign:7-0", "foreign", "1")],
        "open": {DAY: "1"},
    }
    assert discarded(store, letters[1:]) == ["OK"]
    assert "dlq" not in store.content()
    assert "results" not in store.content()


# look


def test_look_pages_through_the_dead_letters_in_order_of_death(store: Store) -> None:
    """`after` is inclusive; nothing is changed."""
    store.put({"dlq": [(f"gm:a:{number}", "why", "1") for number in (1, 2, 3)]})
    before = store.content()
    assert [letter.email_id for letter in dlq.look(store.redis, store.keys, count=2)] == [M1, M2]
    assert [letter.email_id for letter in dlq.look(store.redis, store.keys, after="2-0")] == [M2, M3]
    assert store.content() == before


# replay


def replayed(store: Store, letters: list[DeadLetter]) -> list[str]:
    return dlq.replay(store.redis, store.keys, letters)


def test_a_replayed_letter_is_a_new_mail_with_a_fresh_count(store: Store) -> None:
    """Attempts and suspicion are forgotten, the notes are gone, how often it came back is told."""
    store.put(DEAD | {"starts": {M1: "3|1-0:4"}, "tries": {M1: "7|9"}})
    assert replayed(store, dlq.look(store.redis, store.keys)) == ["OK"]
    assert store.content() == {"stream": {"#1": M1}, "index": {M1: "S:#1"}, "open": {DAY: "1"}}
    [(_, fields)] = store.redis.entries(store.keys.stream, count=10)
    assert fields == fields_of(M1, replays="1")


def test_replaying_twice_makes_one_mail(store: Store) -> None:
    """The reply was lost, or two people replay the same letter."""
    store.put(DEAD)
    letters = dlq.look(store.redis, store.keys)
    assert replayed(store, letters) == ["OK"]
    after = store.content()
    assert replayed(store, letters) == ["NONE"]
    assert replayed(store, letters * 2) == ["NONE", "NONE"]
    assert store.content() == after


def test_a_replayed_mail_is_handled_and_not_taken_for_a_duplicate(store: Store) -> None:
    """begin says GO, complete says OK; a second death and replay counts two."""
    store.put(DEAD)
    for times in (1, 2):
        replayed(store, dlq.look(store.redis, store.keys))
        [(entry, fields)] = store.redis.read_new(store.keys.stream, GROUP, "w1", count=10, block_ms=1)
        mail = Delivery(entry, 1, fields)
        assert mail.replays == times
        [answer] = begin(store.seat(), [mail], solo=False, poison=3, now=NOW)
        assert (answer.verdict, answer.attempts) == ("GO", 0)
        if times == 1:
            fail(store.seat(), [Failure(mail, "bury", reason="again")], now=NOW)
    done = Done(mail, "done", "{}")
    assert complete(store.seat(), [done], processed_days=1, results_max=10, results_days=1) == ["OK"]
    assert store.content() == {"processed": {DONE: {"1"}}, "results": [(M1, "done", "{}")]}


def test_a_letter_whose_mail_lives_is_removed_not_replayed(store: Store) -> None:
    """The index names an entry: two of it would be two effects."""
    store.put({"stream": {"1-0": M1}, "index": {M1: "S:1-0"}, "dlq": [(M1, "old", "1")], "open": {DAY: "1"}})
    assert replayed(store, dlq.look(store.redis, store.keys)) == ["STALE"]
    assert store.content() == {"stream": {"1-0": M1}, "index": {M1: "S:1-0"}, "open": {DAY: "1"}}


def test_a_letter_whose_mail_was_done_is_removed_not_replayed(store: Store) -> None:
    """Its id stands among the processed ones."""
    store.put({"dlq": [(M1, "old", "1")], "processed": {DONE: {"1"}}})
    assert replayed(store, dlq.look(store.redis, store.keys)) == ["STALE"]
    assert store.content() == {"processed": {DONE: {"1"}}}


def test_each_letter_of_a_batch_is_replayed_by_its_own_verdict(store: Store) -> None:
    """OK, NONE and STALE in one call, over two days."""
    store.put(
        {
            "dlq": [(M1, "why", "1"), (M2, "why", "1"), (M3, "why", "1")],
            "index": {M1: "D:1-0", M2: "D:2-0", M3: "D:3-0"},
            "open": {DAY: "3"},
        }
    )
    letters = dlq.look(store.redis, store.keys)
    store.redis.call("XDEL", store.keys.dlq, "2-0")
    store.add("9-0", fields_of(M3))
    store.redis.call("HSET", store.keys.index, M3, "S:9-0")
    assert replayed(store, letters) == ["OK", "NONE", "STALE"]
    assert store.content() == {
        "stream": {"9-0": M3, "#1": M1},
        "index": {M1: "S:#1", M2: "D:2-0", M3: "S:9-0"},
        "open": {DAY: "3"},
    }


def test_a_letter_known_to_no_index_is_replayed_and_counted(store: Store) -> None:
    """Whatever lost the index entry: the mail comes back, known and counted as unfinished."""
    store.put({"dlq": [(M1, "old", "1")]})
    assert replayed(store, dlq.look(store.redis, store.keys)) == ["OK"]
    assert store.content() == {"stream": {"#1": M1}, "index": {M1: "S:#1"}, "open": {DAY: "1"}}


def test_a_letter_is_replayed_where_the_index_names_an_entry_that_is_gone(store: Store) -> None:
    """The letter is the only copy of its mail: it is not removed, and counted once."""
    store.put({"dlq": [(M1, "old", "1")], "index": {M1: "S:9-0"}, "open": {DAY: "1"}})
    assert replayed(store, dlq.look(store.redis, store.keys)) == ["OK"]
    assert store.content() == {"stream": {"#1": M1}, "index": {M1: "S:#1"}, "open": {DAY: "1"}}


def test_a_stale_letter_leaves_no_index_entry_and_no_count(store: Store) -> None:
    """Its mail was done elsewhere although the index named the letter."""
    store.put(DEAD | {"processed": {DONE: {"1"}}, "open": {DAY: "2"}})
    assert replayed(store, dlq.look(store.redis, store.keys)) == ["STALE"]
    assert store.content() == {"processed": {DONE: {"1"}}, "open": {DAY: "1"}}


# discard


def discarded(store: Store, letters: list[DeadLetter]) -> list[str]:
    return dlq.discard(store.redis, store.keys, letters, processed_days=400, results_max=1000)


def test_a_discarded_letter_is_done_for_good(store: Store) -> None:
    """Known as processed, so that nothing publishes it again; a result says so; no count is left."""
    store.put(DEAD)
    assert discarded(store, dlq.look(store.redis, store.keys)) == ["OK"]
    assert store.content() == {"processed": {DONE: {"1"}}, "results": [(M1, "discarded", "{}")]}
    assert store.redis.call("TTL", f"stream:processed:{DONE}") > 399 * 86_400


def test_discarding_twice_writes_once(store: Store) -> None:
    """The reply was lost: NONE, one result, no count below zero."""
    store.put(DEAD | {"open": {DAY: "2"}})
    letters = dlq.look(store.redis, store.keys)
    assert discarded(store, letters) == ["OK"]
    after = store.content()
    assert after["open"] == {DAY: "1"}
    assert discarded(store, letters) == ["NONE"]
    assert store.content() == after


def test_discard_after_replay_leaves_the_replayed_mail(store: Store) -> None:
    """The letter is gone, the mail lives."""
    store.put(DEAD)
    letters = dlq.look(store.redis, store.keys)
    replayed(store, letters)
    after = store.content()
    assert discarded(store, letters) == ["NONE"]
    assert store.content() == after


def test_a_letter_whose_mail_lives_cannot_discard_it(store: Store) -> None:
    """The index names an entry: its id must not count as processed, or the living mail would be dropped. The letter goes."""
    lives: Content = {"stream": {"1-0": M1}, "index": {M1: "S:1-0"}, "open": {DAY: "1"}}
    store.put(lives | {"dlq": [(M1, "old", "1")]})
    assert discarded(store, dlq.look(store.redis, store.keys)) == ["STALE"]
    assert store.content() == lives


def test_a_letter_whose_mail_was_done_is_no_second_result(store: Store) -> None:
    """Its id stands among the processed ones already: nothing is written, index entry and count go."""
    store.put(DEAD | {"processed": {DONE: {"1"}}})
    assert discarded(store, dlq.look(store.redis, store.keys)) == ["STALE"]
    assert store.content() == {"processed": {DONE: {"1"}}}


@pytest.mark.parametrize("index", [None, {M1: "S:9-0"}], ids=["none", "dangling"])
def test_a_letter_known_to_no_index_is_discarded(store: Store, index: dict[str, str] | None) -> None:
    """Whatever lost the index entry: its id counts as processed, the letter is gone, no count falls below what stands."""
    store.put({"dlq": [(M1, "old", "1")], "index": index, "open": {DAY: "1"} if index else None})
    assert discarded(store, dlq.look(store.redis, store.keys)) == ["OK"]
    assert store.content() == {"processed": {DONE: {"1"}}, "results": [(M1, "discarded", "{}")]}


def test_discarding_forgets_the_steps_of_the_mail(store: Store) -> None:
    """What `context.once` kept for M1 goes with it, that of another mail stays."""
    store.put({"dlq": [(M1, "why", "1"), (M2, "why", "1")], "index": {M1: "D:1-0", M2: "D:2-0"}, "open": {DAY: "2"}})
    for email_id in (M1, M2):
        store.redis.call("HSET", store.keys.steps(email_id), "step", "{}")
    assert discarded(store, dlq.look(store.redis, store.keys)[:1]) == ["OK"]
    assert [store.redis.call("EXISTS", store.keys.steps(email_id)) for email_id in (M1, M2)] == [0, 1]


def test_nothing_to_replay_or_discard_asks_nothing(store: Store) -> None:
    assert replayed(store, []) == []
    assert discarded(store, []) == []
    assert store.content() == {}


def test_a_letter_too_wide_to_replay_is_refused_and_stays(store: Store) -> None:
    """Written by somebody else into the dead letters: nothing is lost, the one beside it comes back."""
    store.put(DEAD)
    wide = fields_of(M2) | {f"name{number}": "value" for number in range(9000)}
    store.redis.call("XADD", store.keys.dlq, "2-0", *flat(wide), "dead_reason", "why", "dead_attempts", "1")
    letters = dlq.look(store.redis, store.keys)
    assert replayed(store, letters) == ["OK", "FOREIGN"]
    assert store.content()["dlq"] == [(M2, "why", "1")]


def test_a_letter_without_a_mail_in_it_can_be_looked_at_and_discarded(store: Store) -> None:
    """Somebody's own XADD into the dead letters holds up nobody."""
    store.redis.call("XADD", store.keys.dlq, "2-0", "hello", "world")
    [letter] = dlq.look(store.redis, store.keys)
    assert (letter.foreign, letter.email_id) == (True, "foreign:2-0")
    assert replayed(store, [letter]) == ["FOREIGN"]
    assert discarded(store, [letter]) == ["OK"]
    assert store.redis.length(store.keys.dlq) == 0


# what expires


def aged(store: Store, days: list[float]) -> None:
    """A dead letter of mail n that died days[n - 1] days ago by the server's clock."""
    now = int(store.redis.call("TIME")[0]) * 1000
    for number, ago in sorted(enumerate(days, start=1), key=lambda item: -item[1]):
        letter, email_id = f"{round(now - ago * 86_400_000)}-{number}", f"gm:a:{number}"
        notes = {"dead_reason": "why", "dead_attempts": "1"}
        store.redis.call("XADD", store.keys.dlq, letter, *flat(fields_of(email_id, **notes)))
        store.redis.call("HSET", store.keys.index, email_id, f"D:{letter}")
        store.redis.call("HINCRBY", store.keys.open, DAY, 1)


def expired(store: Store, most: int = 100) -> int:
    return dlq.expire(store.redis, store.keys, load_settings(env_file=None).stream, most=most)


def test_what_is_older_than_its_days_is_given_up_as_discarded(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Letters of 91 and 90.01 days go and count as processed, those of 89.9 and 1 stay; it is said once."""
    aged(store, [91, 90.01, 89.9, 1])
    assert expired(store) == 2
    content = store.content()
    assert [email_id for email_id, _, _ in content["dlq"]] == [M3, M4]
    assert content["processed"] == {DONE: {"1", "2"}}
    assert content["results"] == [(M1, "discarded", "{}"), (M2, "discarded", "{}")]
    assert content["open"] == {DAY: "2"}
    assert expired(store) == 0
    assert [record.message for record in caplog.records] == [
        "2 dead letters are older than DLQ_DAYS=90: they are given up, their mail will not come back"
    ]


def test_one_call_gives_up_no_more_than_it_may(store: Store) -> None:
    """Three old letters, two at a time."""
    aged(store, [100, 101, 102])
    assert [expired(store, most=2) for _ in range(3)] == [2, 1, 0]


# finding letters


def test_letters_are_found_by_letter_id_and_by_mail(store: Store) -> None:
    """Also a foreign one, which stands in no index; what is not there is left out, two names of one letter are both answered."""
    store.put({"dlq": [(M1, "why", "1"), (M2, "why", "1")], "index": {M1: "D:1-0", M2: "D:2-0", M3: "S:3-0"}})
    store.redis.call("XADD", store.keys.dlq, "3-0", "hello", "world", "dead_id", "foreign:7-0")
    found = dlq.find(store.redis, store.keys, ["1-0", M1, M2, "foreign:7-0", "9-0", M3, "nonsense"])
    assert {name: letter.id for name, letter in found.items()} == {"1-0": "1-0", M1: "1-0", M2: "2-0", "foreign:7-0": "3-0"}
    assert dlq.find(store.redis, store.keys, []) == {}


def test_letters_that_come_meanwhile_are_left_alone(store: Store) -> None:
    """`letters` ends with the one that was the newest when it began, over pages of any size."""
    store.put({"dlq": [(f"gm:a:{number}", "why", "1") for number in range(1, 251)]})
    seen = []
    for letter in dlq.letters(store.redis, store.keys):
        seen.append(letter.id)
        store.redis.call("XADD", store.keys.dlq, "*", "hello", "world")
    assert seen == [f"{number}-0" for number in range(1, 251)]
