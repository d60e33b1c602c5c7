"""join, renew, recover, release, promote, reap: all that stands in Redis before and after."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import permutations

import pytest

from src.common.exceptions import ConfigurationError, GroupMissing
from src.worker import recovery
from src.worker.delivery import Delivery, Seat
from src.worker.dlq import Failure, fail
from src.worker.idempotency import begin
from tests.support.fake import DAY, GROUP, Content, Store, fields_of, present

NOW = datetime(2026, 2, 1, tzinfo=UTC)
M1, M2, M3 = "gm:a:1", "gm:a:2", "gm:a:3"
HOUR = 3_600_000

THREE: Content = {
    "stream": {"1-0": M1, "2-0": M2, "3-0": M3},
    "pending": {"1-0": ("w1", 1), "2-0": ("w1", 1), "3-0": ("w2", 4)},
    "index": {M1: "S:1-0", M2: "S:2-0", M3: "S:3-0"},
    "open": {DAY: "3"},
}


def recover(store: Store, consumer: str, *, lease: float = 60, most: int = 10, in_flight: tuple[str, ...] = ()) -> list[Delivery]:
    return recovery.recover(store.seat(consumer), lease=lease, most=most, in_flight=in_flight)


# join


def test_join_makes_the_group_from_the_first_entry_on(store: Store) -> None:
    """A group made at `$` would miss what was published before the first worker came."""
    store.add("1-0", fields_of(M1))
    recovery.join(store.seat("w1"))
    assert store.redis.read_new(store.keys.stream, GROUP, "w1", count=10, block_ms=1) == [("1-0", fields_of(M1))]


def test_join_before_the_first_mail_and_again_is_harmless(store: Store) -> None:
    """Workers may start first, and join again after a lost reply: the group keeps its place."""
    recovery.join(store.seat("w1"))
    store.add("1-0", fields_of(M1))
    store.redis.read_new(store.keys.stream, GROUP, "w1", count=10, block_ms=1)
    recovery.join(store.seat("w1"))
    recovery.join(store.seat("w2"))
    assert store.redis.read_new(store.keys.stream, GROUP, "w2", count=10, block_ms=1) == []
    assert store.consumers() == {"w1", "w2"}
    assert store.content()["pending"] == {"1-0": ("w1", 1)}


def test_a_second_group_is_refused_with_what_to_do(store: Store) -> None:
    """Finished mail is deleted: a second group would miss it. No group is made."""
    recovery.join(store.seat("w1"))
    with pytest.raises(
        ConfigurationError, match=r"CONSUMER_GROUP=other: .*has the group workers.*stream:results.*XGROUP DESTROY"
    ):
        recovery.join(Seat(store.redis, store.keys, "other", "w1"))
    assert len(store.redis.call("XINFO", "GROUPS", store.keys.stream)) == 1


def test_a_stream_name_that_is_another_type_is_refused(store: Store) -> None:
    """The key stays what it was."""
    store.redis.call("SET", store.keys.stream, "mine")
    with pytest.raises(ConfigurationError, match="STREAM_NAME=stream: that key is a string, not a stream"):
        recovery.join(store.seat("w1"))
    assert store.redis.call("GET", store.keys.stream) == "mine"


def test_transitions_on_a_flushed_server_say_that_the_group_is_missing(store: Store) -> None:
    """Then the worker joins again: every transition that needs the group says GroupMissing."""
    seat, mail = store.seat("w1"), Delivery("1-0", 1, fields_of(M1))
    for transition in (
        lambda: recovery.renew(seat, [mail]),
        lambda: recovery.recover(seat, lease=1, most=1, in_flight=[]),
        lambda: recovery.release(seat, [mail]),
        lambda: begin(seat, [mail], solo=False, poison=3, now=NOW),
        lambda: fail(seat, [Failure(mail, "retry")], now=NOW),
    ):
        with pytest.raises(GroupMissing):
            transition()
    assert store.content() == {}


# renew


def test_renew_restarts_the_lease_of_what_is_ours_and_names_what_is_not(store: Store) -> None:
    """Another consumer's, another count's and a deleted entry's lease are lost; nothing but the idle time changes."""
    store.put(THREE)
    store.age("1-0", "w1", HOUR)
    store.age("2-0", "w1", HOUR)
    store.age("3-0", "w2", HOUR)
    mine = [store.held("1-0", 1), store.held("2-0", 7), store.held("3-0", 4), store.held("9-0", 1, email_id=M3)]
    assert recovery.renew(store.seat("w1"), mine) == ["2-0", "3-0", "9-0"]
    assert store.content() == THREE
    assert store.idle("1-0") < 60_000
    assert store.idle("2-0") >= HOUR
    assert store.idle("3-0") >= HOUR


def test_the_fence_knows_ids_of_any_length_in_any_order(store: Store) -> None:
    """Ids are numbers, not text: 9-2 stands before 9-10, and that before 10-0 and 100-1."""
    ids = ["9-2", "9-10", "10-0", "100-1"]
    mails = {entry: f"gm:a:{number}" for number, entry in enumerate(ids, start=1)}
    store.put({"stream": mails, "pending": dict.fromkeys(ids, ("w1", 1))})
    for order in permutations(ids):
        assert recovery.renew(store.seat("w1"), [store.held(entry, 1, email_id=mails[entry]) for entry in order]) == []


def test_renewing_nothing_asks_nothing(store: Store) -> None:
    """An idle worker's renewal needs no group."""
    assert recovery.renew(store.seat("w1"), []) == []


def test_what_is_renewed_is_not_recovered(store: Store) -> None:
    """The point of it all: a handler may take longer than its lease."""
    store.put(THREE)
    store.age("1-0", "w1", HOUR)
    recovery.renew(store.seat("w1"), [store.held("1-0")])
    assert recover(store, "w2") == []


# recover


def test_recover_takes_what_nobody_renewed_with_a_higher_count(store: Store) -> None:
    """Others' mail whose lease ran out is the caller's now; the rest stays where it is."""
    store.put(THREE)
    store.age("1-0", "w1", 61_000)
    store.age("2-0", "w1", 30_000)
    store.age("3-0", "w2", 61_000)
    taken = recover(store, "w3")
    assert [(mail.stream_id, mail.count, mail.email_id) for mail in taken] == [("1-0", 2, M1), ("3-0", 5, M3)]
    assert taken[0].fields == fields_of(M1)
    assert store.content() == THREE | {"pending": {"1-0": ("w3", 2), "2-0": ("w1", 1), "3-0": ("w3", 5)}}
    assert recover(store, "w4") == []


def test_recover_skips_what_the_caller_works_on_but_not_what_its_lost_reply_delivered(store: Store) -> None:
    """1-0 is in a handler here; 2-0 stands in our name and never arrived."""
    store.put(THREE)
    for entry, consumer in (("1-0", "w1"), ("2-0", "w1")):
        store.age(entry, consumer, HOUR)
    assert [(mail.stream_id, mail.count) for mail in recover(store, "w1", in_flight=("1-0",))] == [("2-0", 2)]
    assert store.content() == THREE | {"pending": {"1-0": ("w1", 1), "2-0": ("w1", 2), "3-0": ("w2", 4)}}


def test_recover_finds_work_behind_what_the_caller_works_on(store: Store) -> None:
    """With more in flight than it asks for, the first entries must not hide the others."""
    store.put(THREE)
    for entry, consumer in (("1-0", "w1"), ("2-0", "w1"), ("3-0", "w2")):
        store.age(entry, consumer, HOUR)
    assert [mail.stream_id for mail in recover(store, "w1", most=1, in_flight=("1-0", "2-0"))] == ["3-0"]


def test_recover_takes_no_more_than_there_is_room_for(store: Store) -> None:
    """The rest waits for others."""
    store.put(THREE)
    for entry, consumer in (("1-0", "w1"), ("2-0", "w1"), ("3-0", "w2")):
        store.age(entry, consumer, HOUR)
    assert [mail.stream_id for mail in recover(store, "w3", most=2)] == ["1-0", "2-0"]
    assert store.content()["pending"]["3-0"] == ("w2", 4)


def test_recover_lets_go_of_an_entry_that_was_deleted_by_hand(store: Store) -> None:
    """XDEL by a person: there is nothing to hand to a handler, and nothing stays pending."""
    store.put(THREE)
    store.age("1-0", "w1", HOUR)
    store.redis.call("XDEL", store.keys.stream, "1-0")
    assert recover(store, "w3") == []
    assert store.content()["pending"] == {"2-0": ("w1", 1), "3-0": ("w2", 4)}


# release


def test_released_mail_is_claimable_at_once_and_its_start_does_not_count(store: Store) -> None:
    """After SIGTERM another worker takes it in its next tick, and starts it as any other mail."""
    store.put(THREE | {"starts": {M1: "0|1-0:1", M2: "0|2-0:1", M3: "0|3-0:4"}})
    assert recovery.release(store.seat("w1"), [store.held("1-0"), store.held("2-0"), store.held("3-0", 4)]) == 2
    assert store.content() == THREE | {"starts": {M3: "0|3-0:4"}}
    taken = recover(store, "w3")
    assert [(mail.stream_id, mail.count) for mail in taken] == [("1-0", 2), ("2-0", 2)]
    answers = begin(store.seat("w3"), taken, solo=False, poison=3, now=NOW)
    assert [answer.verdict for answer in answers] == ["GO", "GO"]


def test_a_released_suspect_stays_a_suspect_with_one_solo_start_less(store: Store) -> None:
    """Its earlier start never finished; this one was ended by us and is not held against it."""
    store.put(THREE | {"pending": {"1-0": ("w1", 3), "2-0": ("w1", 2)}, "starts": {M1: "2|1-0:3", M2: "1|2-0:2"}})
    assert recovery.release(store.seat("w1"), [store.held("1-0", 3), store.held("2-0", 2)]) == 2
    assert store.content()["starts"] == {M1: "1|", M2: "0|"}
    taken = recover(store, "w2")
    assert [a.verdict for a in begin(store.seat("w2"), taken, solo=False, poison=3, now=NOW)] == ["SUSPECT", "SUSPECT"]
    assert [a.verdict for a in begin(store.seat("w2"), taken[:1], solo=True, poison=3, now=NOW)] == ["GO"]
    assert store.content()["starts"][M1] == "2|1-0:4"


def test_a_release_between_read_and_begin_leaves_an_earlier_start_alone(store: Store) -> None:
    """The mark tells of another delivery: it is not ours to take away."""
    store.put(THREE | {"pending": {"1-0": ("w1", 2)}, "starts": {M1: "1|1-0:1"}})
    assert recovery.release(store.seat("w1"), [store.held("1-0", 2)]) == 1
    assert store.content()["starts"] == {M1: "1|1-0:1"}


def test_release_of_what_is_no_longer_ours_changes_nothing(store: Store) -> None:
    """A zombie that stops must not make the owner's mail claimable."""
    before = THREE | {"pending": {"1-0": ("w2", 2), "2-0": ("w1", 2), "3-0": ("w2", 4)}, "starts": {M1: "0|1-0:2", M2: "0|2-0:2"}}
    store.put(before)
    assert recovery.release(store.seat("w1"), [store.held("1-0", 1), store.held("2-0", 1)]) == 0
    assert store.content() == before
    assert recover(store, "w3") == []
    assert recovery.release(store.seat("w1"), []) == 0


# promote

WAITS: Content = {
    "stream": {"1-0": M1, "2-0": M2},
    "index": {M1: "S:1-0", M2: "S:2-0"},
    "tries": {M1: "1|3", M2: "2|7"},
    "due": {f"1-0|{M1}", f"2-0|{M2}"},
    "open": {DAY: "2"},
}


def test_promote_takes_what_is_due_with_a_higher_count_than_it_ever_had(store: Store) -> None:
    """The count never goes back: else a zombie of an earlier delivery would be fenced in again."""
    store.put(WAITS)
    taken = recovery.promote(store.seat("w1"), most=10)
    assert [(mail.stream_id, mail.count, mail.email_id) for mail in taken] == [("1-0", 4, M1), ("2-0", 8, M2)]
    assert taken[1].fields == fields_of(M2)
    assert store.content() == present(WAITS | {"pending": {"1-0": ("w1", 4), "2-0": ("w1", 8)}, "due": None})


def test_promote_leaves_what_is_not_due_and_what_there_is_no_room_for(store: Store) -> None:
    """Due times are the server's; `most` bounds one call."""
    store.put(WAITS)
    store.redis.call("ZADD", store.keys.due, 4_000_000_000_000, f"1-0|{M1}")
    assert [mail.stream_id for mail in recovery.promote(store.seat("w1"), most=10)] == ["2-0"]
    assert recovery.promote(store.seat("w1"), most=10) == []
    store.redis.call("ZADD", store.keys.due, 0, f"1-0|{M1}")
    assert recovery.promote(store.seat("w1"), most=0) == []
    assert store.content()["due"] == {f"1-0|{M1}"}


def test_two_workers_promote_a_mail_once(store: Store) -> None:
    """The due queue is emptied by the same script that claims."""
    store.put(WAITS)
    assert len(recovery.promote(store.seat("w1"), most=10)) == 2
    assert recovery.promote(store.seat("w2"), most=10) == []


def test_promote_passes_over_what_was_deleted_by_hand(store: Store) -> None:
    """No entry, no attempt, nothing becomes pending; that the mail was ours stays known, so it comes again."""
    store.put(WAITS)
    store.redis.call("XDEL", store.keys.stream, "1-0")
    assert [mail.stream_id for mail in recovery.promote(store.seat("w1"), most=10)] == ["2-0"]
    content = store.content()
    assert content["index"] == {M1: "S:1-0", M2: "S:2-0"} and "due" not in content
    assert content["pending"] == {"2-0": ("w1", 8)}


def test_the_count_grows_through_every_change_of_hands(store: Store) -> None:
    """read, recover, fail, promote, recover, fail, promote: 1 to 5, and no earlier owner is let in again."""
    store.put({"stream": {"1-0": M1}, "pending": {"1-0": ("w0", 1)}, "index": {M1: "S:1-0"}, "open": {DAY: "1"}})
    counts = [1]
    for life in (1, 2):
        store.age("1-0", f"w{life - 1}", HOUR)
        [mail] = recover(store, f"w{life}")
        counts.append(mail.count)
        [answer] = fail(store.seat(f"w{life}"), [Failure(mail, "retry")], now=NOW)
        assert answer.verdict == "RETRY"
        [mail] = recovery.promote(store.seat(f"w{life}"), most=1)
        counts.append(mail.count)
    assert counts == [1, 2, 3, 4, 5]
    assert store.content()["pending"] == {"1-0": ("w2", 5)}
    for old in counts[:-1]:
        assert recovery.renew(store.seat("w2"), [store.held("1-0", old)]) == ["1-0"]


# leave and reap


def test_leave_keeps_a_consumer_that_holds_mail(store: Store) -> None:
    """XGROUP DELCONSUMER would lose its pending entries."""
    store.put(THREE)
    recovery.join(store.seat("w3"))
    recovery.leave(store.seat("w1"))
    recovery.leave(store.seat("w3"))
    assert store.consumers() == {"w1", "w2"}
    assert store.content() == THREE


def test_leave_removes_nobody_else(store: Store) -> None:
    """Another worker that holds nothing right now is alive."""
    recovery.join(store.seat("w1"))
    recovery.join(store.seat("w2"))
    recovery.leave(store.seat("w1"))
    assert store.consumers() == {"w2"}


def test_reap_spares_the_busy_and_the_recent(store: Store) -> None:
    """Only who holds nothing and has not asked for an hour goes; w1 and w2 hold mail, w3 has just come."""
    store.put(THREE)
    recovery.join(store.seat("w3"))
    assert recovery.reap(store.seat("w3")) == 0
    assert store.consumers() == {"w1", "w2", "w3"}
    reaped = store.redis.run("reap", [store.keys.stream], [GROUP, 0, ""])
    assert reaped == 1
    assert store.consumers() == {"w1", "w2"}
    assert store.content() == THREE


# many


def test_more_mail_than_a_script_can_name_is_renewed_and_handed_back(store: Store) -> None:
    """`unpack` in Lua ends at some 8,000 values: the thread that renews the leases would die of it."""
    seat, most = store.seat("w1"), 8_100
    recovery.join(seat)
    add = "for i = 1, tonumber(ARGV[1]) do redis.call('XADD', KEYS[1], i .. '-0', 'email_id', 'gm:a:' .. i) end"
    store.redis.call("EVAL", add, 1, store.keys.stream, most)
    mails = [
        Delivery(entry, 1, fields)
        for entry, fields in store.redis.read_new(store.keys.stream, GROUP, "w1", count=most, block_ms=1)
    ]
    store.age("1-0", "w1", HOUR)
    store.age(f"{most}-0", "w1", HOUR)
    assert recovery.renew(seat, mails) == []
    assert max(store.idle("1-0"), store.idle(f"{most}-0")) < 60_000
    assert recovery.release(seat, mails) == most
    assert min(store.idle("1-0"), store.idle(f"{most}-0")) >= HOUR
