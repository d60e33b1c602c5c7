"""begin and complete: every verdict, with all that stands in Redis before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import pytest

from src.worker import recovery
from src.worker.delivery import Delivery
from src.worker.idempotency import Begun, Done, begin, complete
from tests.support.fake import DAY, DONE, GROUP, Content, Store, fields_of, present
from tests.support.wait import until

NOW = datetime(2026, 2, 1, tzinfo=UTC)
M1, M2, M3 = "gm:a:1", "gm:a:2", "gm:a:3"

ONE: Content = {
    "stream": {"1-0": M1},
    "pending": {"1-0": ("w1", 1)},
    "index": {M1: "S:1-0"},
    "open": {DAY: "1"},
}


def begun(store: Store, mails: Sequence[Delivery], *, solo: bool = False, consumer: str = "w1") -> list[Begun]:
    return begin(store.seat(consumer), mails, solo=solo, poison=3, now=NOW)


def completed(store: Store, mails: Sequence[Delivery], *, consumer: str = "w1", result: str = "{}") -> list[str]:
    done = [Done(mail, "done", result) for mail in mails]
    return list(complete(store.seat(consumer), done, processed_days=400, results_max=1000, results_days=7))


@dataclass(frozen=True)
class Case:
    """`changes`: the parts that are different afterwards; None: the part is gone."""

    proves: str
    before: Content
    verdicts: list[Begun]
    changes: dict[str, object] = field(default_factory=dict)
    held: tuple[tuple[str, int], ...] = (("1-0", 1),)
    solo: bool = False

    def after(self) -> Content:
        return present(self.before | self.changes)


GO = Begun("GO", 0)

BEGIN = [
    Case("a mail that is ours starts and is marked", ONE, [GO], {"starts": {M1: "0|1-0:1"}}),
    Case(
        "a first start alone in its process is no suspicion either",
        ONE,
        [GO],
        {"starts": {M1: "0|1-0:1"}},
        solo=True,
    ),
    Case("the same begin again (its reply was lost) says GO and counts nothing", ONE | {"starts": {M1: "0|1-0:1"}}, [GO]),
    Case(
        "the same solo begin again counts once",
        ONE | {"pending": {"1-0": ("w1", 3)}, "starts": {M1: "2|1-0:3"}},
        [GO],
        held=(("1-0", 3),),
        solo=True,
    ),
    Case("failed attempts are told", ONE | {"tries": {M1: "4|9"}}, [Begun("GO", 4)], {"starts": {M1: "0|1-0:1"}}),
    Case(
        "a mail done before is acknowledged, deleted and uncounted",
        ONE | {"processed": {DONE: {"1"}}},
        [Begun("DUP", 0)],
        {"stream": None, "pending": None, "index": None, "open": None},
    ),
    Case(
        "the uncount is of one mail, not of its day",
        ONE | {"open": {DAY: "3"}, "processed": {DONE: {"1"}}},
        [Begun("DUP", 0)],
        {"stream": None, "pending": None, "index": None, "open": {DAY: "2"}},
    ),
    Case(
        "a copy of a mail done before that the index does not name uncounts nothing",
        {"stream": {"1-0": M1}, "pending": {"1-0": ("w1", 1)}, "open": {DAY: "1"}, "processed": {DONE: {"1"}}},
        [Begun("DUP", 0)],
        {"stream": None, "pending": None},
    ),
    Case(
        "a second copy is dropped while the first stands in the stream",
        {
            "stream": {"1-0": M1, "2-0": M1},
            "pending": {"1-0": ("w2", 1), "2-0": ("w1", 1)},
            "index": {M1: "S:1-0"},
            "open": {DAY: "1"},
        },
        [Begun("DUP", 0)],
        {"stream": {"1-0": M1}, "pending": {"1-0": ("w2", 1)}},
        held=(("2-0", 1),),
    ),
    Case(
        "a copy of a dead letter is dropped",
        ONE | {"index": {M1: "D:1-0"}, "dlq": [(M1, "attempts", "8")]},
        [Begun("DUP", 0)],
        {"stream": None, "pending": None},
    ),
    Case(
        "a copy is adopted where the index names an entry that is gone",
        ONE | {"index": {M1: "S:9-0"}},
        [GO],
        {"index": {M1: "S:1-0"}, "starts": {M1: "0|1-0:1"}},
    ),
    Case(
        "a copy is adopted where the index names a dead letter that is gone",
        ONE | {"index": {M1: "D:9-0"}},
        [GO],
        {"index": {M1: "S:1-0"}, "starts": {M1: "0|1-0:1"}},
    ),
    Case(
        "a mail that no index knows is adopted and counted",
        {"stream": {"1-0": M1}, "pending": {"1-0": ("w1", 1)}},
        [GO],
        {"index": {M1: "S:1-0"}, "starts": {M1: "0|1-0:1"}, "open": {DAY: "1"}},
    ),
    Case(
        "of two copies in one batch that no index knows the first is adopted, the second dropped",
        {"stream": {"1-0": M1, "2-0": M1}, "pending": {"1-0": ("w1", 1), "2-0": ("w1", 1)}},
        [GO, Begun("DUP", 0)],
        {
            "stream": {"1-0": M1},
            "pending": {"1-0": ("w1", 1)},
            "index": {M1: "S:1-0"},
            "starts": {M1: "0|1-0:1"},
            "open": {DAY: "1"},
        },
        held=(("1-0", 1), ("2-0", 1)),
    ),
    Case(
        "of two copies in one batch the one that the index names starts, in whatever order they come",
        {
            "stream": {"1-0": M1, "2-0": M1},
            "pending": {"1-0": ("w1", 1), "2-0": ("w1", 1)},
            "index": {M1: "S:2-0"},
            "open": {DAY: "1"},
        },
        [Begun("DUP", 0), GO],
        {"stream": {"2-0": M1}, "pending": {"2-0": ("w1", 1)}, "starts": {M1: "0|2-0:1"}},
        held=(("1-0", 1), ("2-0", 1)),
    ),
    Case(
        "what another consumer holds is LOST and untouched",
        ONE | {"pending": {"1-0": ("w2", 1)}},
        [Begun("LOST", 0)],
    ),
    Case(
        "the same consumer with another delivery count is LOST too",
        ONE | {"pending": {"1-0": ("w1", 2)}},
        [Begun("LOST", 0)],
    ),
    Case("what nobody holds is LOST", ONE, [Begun("LOST", 0)], held=(("9-0", 1),)),
    Case(
        "a zombie cannot drop a mail that was done before: the new owner does",
        ONE | {"pending": {"1-0": ("w2", 2)}, "processed": {DONE: {"1"}}},
        [Begun("LOST", 0)],
    ),
    Case(
        "a mail whose last start never finished does not start beside others",
        ONE | {"pending": {"1-0": ("w1", 2)}, "starts": {M1: "0|1-0:1"}},
        [Begun("SUSPECT", 0)],
        held=(("1-0", 2),),
    ),
    Case(
        "it starts alone, and that is its first counted start",
        ONE | {"pending": {"1-0": ("w1", 2)}, "starts": {M1: "0|1-0:1"}},
        [GO],
        {"starts": {M1: "1|1-0:2"}},
        held=(("1-0", 2),),
        solo=True,
    ),
    Case(
        "a suspect that was handed back stays a suspect",
        ONE | {"pending": {"1-0": ("w1", 3)}, "starts": {M1: "1|"}},
        [Begun("SUSPECT", 0)],
        held=(("1-0", 3),),
    ),
    Case(
        "two solo starts that never finished are not enough to bury",
        ONE | {"pending": {"1-0": ("w1", 4)}, "starts": {M1: "2|1-0:3"}},
        [GO],
        {"starts": {M1: "3|1-0:4"}},
        held=(("1-0", 4),),
        solo=True,
    ),
    Case(
        "three bury it, also when it comes beside others",
        ONE | {"pending": {"1-0": ("w1", 5)}, "starts": {M1: "3|1-0:4"}, "tries": {M1: "2|1"}},
        [Begun("POISON", 2)],
        {
            "stream": None,
            "pending": None,
            "starts": None,
            "tries": None,
            "index": {M1: "D:#1"},
            "dlq": [(M1, "poison", "2")],
        },
        held=(("1-0", 5),),
    ),
    Case(
        "a batch of all verdicts: each mail gets its own",
        {
            "stream": {"1-0": "gm:a:1", "2-0": "gm:a:2", "3-0": "gm:a:3", "4-0": "gm:a:4", "5-0": "gm:a:5", "6-0": "gm:a:1"},
            "pending": {
                "1-0": ("w1", 1),
                "2-0": ("w2", 1),
                "3-0": ("w1", 2),
                "4-0": ("w1", 5),
                "5-0": ("w1", 1),
                "6-0": ("w1", 1),
            },
            "index": {
                "gm:a:1": "S:1-0",
                "gm:a:2": "S:2-0",
                "gm:a:3": "S:3-0",
                "gm:a:4": "S:4-0",
                "gm:a:5": "S:5-0",
            },
            "starts": {"gm:a:3": "1|3-0:1", "gm:a:4": "3|4-0:4"},
            "open": {DAY: "5"},
            "processed": {DONE: {"5"}},
        },
        [GO, Begun("LOST", 0), Begun("SUSPECT", 0), Begun("POISON", 0), Begun("DUP", 0), Begun("DUP", 0)],
        {
            "stream": {"1-0": "gm:a:1", "2-0": "gm:a:2", "3-0": "gm:a:3"},
            "pending": {"1-0": ("w1", 1), "2-0": ("w2", 1), "3-0": ("w1", 2)},
            "index": {"gm:a:1": "S:1-0", "gm:a:2": "S:2-0", "gm:a:3": "S:3-0", "gm:a:4": "D:#1"},
            "starts": {"gm:a:1": "0|1-0:1", "gm:a:3": "1|3-0:1"},
            "dlq": [("gm:a:4", "poison", "0")],
            "open": {DAY: "4"},
        },
        held=(("1-0", 1), ("2-0", 1), ("3-0", 2), ("4-0", 5), ("5-0", 1), ("6-0", 1)),
    ),
]


@pytest.mark.parametrize("case", BEGIN, ids=lambda case: case.proves)
def test_begin(store: Store, case: Case) -> None:
    store.put(case.before)
    mails = [store.held(entry, count, email_id=M1) for entry, count in case.held]
    assert begun(store, mails, solo=case.solo) == case.verdicts
    assert store.content() == case.after()


def test_only_solo_starts_that_never_finish_bury_and_it_takes_three(store: Store) -> None:
    """A mail that kills its process: one start beside others, three alone, then it is dead."""
    store.put(ONE | {"pending": None})
    [(entry, fields)] = store.redis.read_new(store.keys.stream, GROUP, "w0", count=1, block_ms=1)
    mail = Delivery(entry, 1, fields)
    seen = [begun(store, [mail], consumer="w0")[0].verdict]
    for life in range(1, 5):
        consumer = f"w{life}"
        recover = partial(recovery.recover, store.seat(consumer), lease=0, most=10, in_flight=[])
        [mail] = until(recover, 10, "it is idle")
        seen.append(begun(store, [mail], consumer=consumer)[0].verdict)
        if seen[-1] == "SUSPECT":
            seen.append(begun(store, [mail], solo=True, consumer=consumer)[0].verdict)
    assert seen == ["GO", "SUSPECT", "GO", "SUSPECT", "GO", "SUSPECT", "GO", "POISON"]
    assert store.content() == {"index": {M1: "D:#1"}, "dlq": [(M1, "poison", "0")], "open": {DAY: "1"}}


def test_the_poison_letter_keeps_the_mail_and_says_why(store: Store) -> None:
    """The dead letter holds the entry's fields and notes that a person can act on."""
    store.put(ONE | {"pending": {"1-0": ("w1", 5)}, "starts": {M1: "3|1-0:4"}})
    begun(store, [store.held("1-0", 5)])
    [(_, letter)] = store.redis.entries(store.keys.dlq, count=10)
    assert letter == fields_of(M1) | {
        "dead_reason": "poison",
        "dead_error_type": "Poison",
        "dead_error": "started alone, again and again, in a process of its own that did not live to its end",
        "dead_attempts": "0",
        "dead_at": "2026-02-01T00:00:00Z",
        "dead_worker": "w1",
        "dead_first_at": "2026-02-01T00:00:00Z",
    }


def test_a_batch_over_several_days_asks_each_days_set(store: Store) -> None:
    """The processed set is chosen by account and INTERNALDATE day: the same member in another day's set does not count."""
    seat = store.seat()
    recovery.join(seat)
    days = ["2026-01-30", "2026-01-31", ""]
    for number, day in enumerate(days, start=1):
        store.add(f"{number}-0", fields_of(f"gm:a:{number}", day=day))
    for key, member in (("a:20260131", "1"), ("a:20260131", "2"), ("a:undated", "3")):
        store.redis.call("SADD", f"stream:processed:{key}", member)
    read = store.redis.read_new(store.keys.stream, seat.group, "w1", count=10, block_ms=1)
    assert [answer.verdict for answer in begun(store, [Delivery(entry, 1, fields) for entry, fields in read])] == [
        "GO",
        "DUP",
        "DUP",
    ]


TWO: Content = {
    "stream": {"1-0": M1, "2-0": M2},
    "pending": {"1-0": ("w1", 1), "2-0": ("w1", 1)},
    "index": {M1: "S:1-0", M2: "S:2-0"},
    "starts": {M1: "0|1-0:1", M2: "0|2-0:1"},
    "open": {DAY: "2"},
}


def test_complete_leaves_nothing_but_the_processed_id_and_the_result(store: Store) -> None:
    """DONE: entry, index, mark, tries and count are gone; id and result stand."""
    store.put(TWO | {"tries": {M1: "3|1"}})
    assert completed(store, [store.held("1-0"), store.held("2-0")], result='{"a":1}') == ["OK", "OK"]
    assert store.content() == {
        "processed": {DONE: {"1", "2"}},
        "results": [(M1, "done", '{"a":1}'), (M2, "done", '{"a":1}')],
    }


def test_complete_again_says_already_and_writes_nothing(store: Store) -> None:
    """The reply was lost and the call repeated: one result, one id."""
    store.put(TWO)
    mails = [store.held("1-0"), store.held("2-0")]
    completed(store, mails)
    before = store.content()
    assert completed(store, mails) == ["ALREADY", "ALREADY"]
    assert store.content() == before


def test_the_same_delivery_twice_in_one_call_is_completed_once(store: Store) -> None:
    """A Redis that came back older gave it again, and both runs of the handler end together: one result, the day counted once."""
    store.put(TWO)
    twice = [store.held("1-0"), store.held("1-0"), store.held("2-0")]
    assert completed(store, twice, result='{"a":1}') == ["OK", "ALREADY", "OK"]
    assert store.content() == {
        "processed": {DONE: {"1", "2"}},
        "results": [(M1, "done", '{"a":1}'), (M2, "done", '{"a":1}')],
    }


def test_an_older_delivery_beside_the_one_that_is_completed_is_lost(store: Store) -> None:
    """Only the same delivery was done before; what an earlier one of it says comes too late."""
    store.put({"stream": {"1-0": M1}, "index": {M1: "S:1-0"}, "open": {DAY: "1"}, "pending": {"1-0": ("w1", 2)}})
    assert completed(store, [store.held("1-0", 2), store.held("1-0", 1)]) == ["OK", "LOST"]
    assert store.content() == {"processed": {DONE: {"1"}}, "results": [(M1, "done", "{}")]}


@pytest.mark.parametrize("owner", [("w2", 1), ("w1", 2)], ids=["another consumer", "another delivery count"])
def test_complete_of_a_zombie_changes_nothing(store: Store, owner: tuple[str, int]) -> None:
    """Neither the entry nor a result: the owner is at work on it."""
    before = TWO | {"pending": {"1-0": owner, "2-0": owner}}
    store.put(before)
    assert completed(store, [store.held("1-0"), store.held("2-0")]) == ["LOST", "LOST"]
    assert store.content() == before


def test_a_zombie_that_claimed_the_entry_back_is_still_fenced(store: Store) -> None:
    """XCLAIM ... JUSTID keeps the delivery count: the consumer is right again, the count is not."""
    store.put(TWO | {"pending": {"1-0": ("w2", 2), "2-0": ("w1", 1)}})
    store.redis.call("XCLAIM", store.keys.stream, GROUP, "w1", 0, "1-0", "JUSTID")
    before = store.content()
    assert before["pending"]["1-0"] == ("w1", 2)
    assert completed(store, [store.held("1-0", 1)]) == ["LOST"]
    assert store.content() == before


def test_each_mail_of_a_batch_is_completed_by_its_own_verdict(store: Store) -> None:
    """OK, LOST and ALREADY in one call; the day's count falls by the completed ones only."""
    store.put(
        {
            "stream": {"1-0": M1, "2-0": M2},
            "pending": {"1-0": ("w1", 1), "2-0": ("w2", 2)},
            "index": {M1: "S:1-0", M2: "S:2-0"},
            "open": {DAY: "2"},
            "processed": {DONE: {"3"}},
        }
    )
    assert completed(store, [store.held("2-0", 1), store.held("3-0", 1, email_id=M3), store.held("1-0", 1)]) == [
        "LOST",
        "ALREADY",
        "OK",
    ]
    assert store.content() == {
        "stream": {"2-0": M2},
        "pending": {"2-0": ("w2", 2)},
        "index": {M2: "S:2-0"},
        "open": {DAY: "1"},
        "processed": {DONE: {"1", "3"}},
        "results": [(M1, "done", "{}")],
    }


def test_processed_ids_expire_and_the_time_starts_anew_with_each_write(store: Store) -> None:
    """EXPIRE is renewed on write; 400 days."""
    store.put(TWO)
    key = f"stream:processed:{DONE}"
    completed(store, [store.held("1-0")])
    store.redis.call("EXPIRE", key, 10)
    completed(store, [store.held("2-0")])
    assert 400 * 86_400 - 60 <= store.redis.call("TTL", key) <= 400 * 86_400


def filled_results(store: Store, ids: Sequence[str]) -> None:
    for entry in ids:
        store.redis.call("XADD", store.keys.results, entry, "email_id", "old", "outcome", "done", "result", "{}")


@pytest.mark.parametrize(
    ("ids", "most"),
    [([f"{second}000-0" for second in range(1, 301)], 10_000), (["*"] * 300, 10)],
    ids=["older than their days", "more than there may be"],
)
def test_results_are_a_bounded_log(store: Store, ids: list[str], most: int) -> None:
    """By age and by number, in whole nodes of about a hundred; the newest always stands."""
    store.put(TWO)
    filled_results(store, ids)
    complete(store.seat(), [Done(store.held("1-0"), "done", "{}")], processed_days=1, results_max=most, results_days=7)
    assert store.redis.length(store.keys.results) <= 200
    assert store.content()["results"][-1] == (M1, "done", "{}")


def test_results_may_be_kept_for_longer_than_the_clock_counts(store: Store) -> None:
    """A hundred years ago the server's clock was below 0: the trim is no error, which would leave the mail done by half."""
    store.put(TWO)
    done = [Done(store.held("1-0"), "done", "{}")]
    answers = [complete(store.seat(), done, processed_days=1, results_max=1000, results_days=36_500) for _ in range(2)]
    assert answers == [["OK"], ["ALREADY"]]
    assert store.content()["results"] == [(M1, "done", "{}")]


def test_results_within_both_bounds_are_kept(store: Store) -> None:
    store.put(TWO)
    filled_results(store, ["*"] * 300)
    complete(store.seat(), [Done(store.held("1-0"), "done", "{}")], processed_days=1, results_max=1000, results_days=7)
    assert store.redis.length(store.keys.results) == 301


def test_a_batch_of_500_is_completed_in_one_call(store: Store) -> None:
    """The largest batch there is fits Lua's limits and leaves no count behind."""
    seat = store.seat()
    recovery.join(seat)
    for number in range(1, 501):
        store.add(f"{number}-0", fields_of(f"gm:a:{number}", day=f"2026-01-{1 + number % 28:02d}"))
    read = store.redis.read_new(store.keys.stream, seat.group, "w1", count=500, block_ms=1)
    mails = [Delivery(entry, 1, fields) for entry, fields in read]
    assert [answer.verdict for answer in begun(store, mails)] == ["GO"] * 500
    assert completed(store, mails) == ["OK"] * 500
    content = store.content()
    assert set(content) == {"processed", "results"}
    assert sum(map(len, content["processed"].values())) == len(content["results"]) == 500
