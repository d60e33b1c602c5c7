"""The story of a delivery: what a consumer takes, begins, settles and hands back. No thread, no process: the store and a clock."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from config.settings import load_settings
from src.common.clock import Clock
from src.common.exceptions import BreakerOpen, GroupMissing, Permanent, RedisUnavailable, RetryLater
from src.common.redis_client import Arg, Fields, RedisClient, Transport
from src.mail.record import Email
from src.worker import recovery
from src.worker.consume import MOST_AT_ONCE, Consumer
from src.worker.context import Context
from src.worker.delivery import Delivery, Seat
from src.worker.dlq import Failure
from src.worker.processor import Started, settled
from tests.support.consumer import consumer_of
from tests.support.fake import DAY, DONE, GROUP, Store, fields_of

M1, M2, M3 = "gm:a:1", "gm:a:2", "gm:a:3"
HOUR = 3_600_000


class Time:
    """A clock that a test moves. Each look at it is a moment later, so that every turn of a consumer is a new tick."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 1.0
        return self.seconds

    @property
    def clock(self) -> Clock:
        return Clock(wall=lambda: datetime(2026, 2, 1, tzinfo=UTC), monotonic=self.monotonic)


def handler(email: Email, context: Context) -> dict[str, Any] | None:
    """The subject says what becomes of the mail."""
    if email.subject == "retry":
        raise OSError("not now")
    if email.subject == "bury":
        raise Permanent("never")
    return {"uid": email.uid}


def joined(store: Store, name: str = "w1", *, redis: RedisClient | None = None, **settings: object) -> Consumer:
    given = {"RECOVERY_TICK": 0.01, "WORKER_BLOCK_MS": 1, "LEASE_SECONDS": 60, **settings}
    loaded = load_settings(given, env_file=None)
    seat = Seat(redis or store.redis, store.keys, GROUP, name)
    recovery.join(store.seat(name))
    return consumer_of(seat, loaded, handler, Time().clock)


def publish(store: Store, *numbers: int, subject: str = "done") -> None:
    """Unread mails `number` as publish puts them: entry, index, count of the day."""
    for number in numbers:
        store.add(f"{number}-0", fields_of(f"gm:a:{number}", subject=subject))
        store.redis.call("HSET", store.keys.index, f"gm:a:{number}", f"S:{number}-0")
        store.redis.call("HINCRBY", store.keys.open, DAY, 1)


def ids(started: list[Started]) -> list[str]:
    return [mail.delivery.email_id for mail in started]


def settle(consumer: Consumer, started: list[Started]) -> None:
    consumer.settle([consumer.handle(mail) for mail in started])


class Flaky:
    """A transport that loses the request or the reply of the next call whose name or script holds `victim`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.victim = ""
        self.lost = "request"

    def execute_command(self, *args: Arg) -> Any:
        if not self.victim or self.victim not in str(args[:2]):
            return self._transport.execute_command(*args)
        self.victim = ""
        if self.lost == "reply":
            self._transport.execute_command(*args)
        raise redis.ConnectionError("lost")

    def close(self) -> None:
        self._transport.close()


@pytest.fixture
def flaky(store: Store) -> Iterator[Flaky]:
    yield Flaky(Direct(store.redis))


class Direct:
    """A client's calls as a transport; scripts by their text, so that `Flaky` can tell them apart."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    def execute_command(self, *args: Arg) -> Any:
        if args[0] == "EVALSHA":
            raise redis.exceptions.NoScriptError("NOSCRIPT")
        return self._client.call(*args)

    def close(self) -> None:
        return


# from the stream to its end


def test_a_mail_is_taken_handled_and_done(store: Store) -> None:
    """Nothing is left but the processed id and the result."""
    consumer = joined(store)
    publish(store, 1, 2)
    started = consumer.take(8)
    assert (ids(started), consumer.in_flight()) == ([M1, M2], 2)
    settle(consumer, started)
    assert store.content() == {"processed": {DONE: {"1", "2"}}, "results": [(M1, "done", '{"uid":1}'), (M2, "done", '{"uid":2}')]}
    assert consumer.in_flight() == 0
    assert (consumer.counts["started"], consumer.counts["done"]) == (2, 2)


def test_a_failed_mail_comes_back_until_it_is_dead(store: Store) -> None:
    """Its attempts are told to the handler; the dead letter says how many there were."""
    consumer = joined(store, MAX_ATTEMPTS=3, BACKOFF_BASE=0.001)
    publish(store, 1, subject="retry")
    attempts = []
    for _ in range(3):
        [started] = consumer.take(8)
        attempts.append((started.delivery.count, started.attempts))
        settle(consumer, [started])
    assert attempts == [(1, 0), (2, 1), (3, 2)]
    assert consumer.take(8) == []
    assert store.content() == {"index": {M1: "D:#1"}, "dlq": [(M1, "attempts", "3")], "open": {DAY: "1"}}
    assert (consumer.counts["retried"], consumer.counts["dead"], consumer.in_flight()) == (2, 1, 0)


def test_a_delay_that_is_no_number_is_settled(store: Store) -> None:
    """`RetryLater("60")`: in the settler's thread, where an error would end one worker after the other."""
    consumer = joined(store)
    publish(store, 1)
    [started] = consumer.take(8)
    consumer.settle([settled(started, RetryLater("60", "busy"), consumer.terms)])
    assert store.content()["due"] == {f"1-0|{M1}"}


def test_a_batch_is_settled_by_each_mails_own_outcome(store: Store) -> None:
    """Done, retried and dead in one call."""
    consumer = joined(store)
    publish(store, 1)
    publish(store, 2, subject="retry")
    publish(store, 3, subject="bury")
    settle(consumer, consumer.take(8))
    content = store.content()
    assert content["due"] == {f"2-0|{M2}"}
    assert content["dlq"] == [(M3, "permanent", "1")]
    assert content["processed"] == {DONE: {"1"}}
    assert content["index"] == {M2: "S:2-0", M3: "D:#1"}
    assert "pending" not in content
    assert "starts" not in content


def test_no_more_is_taken_than_there_is_room_for(store: Store) -> None:
    """The rest is left to others."""
    consumer = joined(store)
    publish(store, 1, 2, 3)
    assert ids(consumer.take(2)) == [M1, M2]
    assert ids(joined(store, "w2").take(8)) == [M3]


def test_no_more_is_read_than_the_batch_size(store: Store) -> None:
    consumer = joined(store, WORKER_BATCH_SIZE=2)
    publish(store, 1, 2, 3)
    assert [ids(consumer.take(8)) for _ in range(2)] == [[M1, M2], [M3]]


def test_no_more_is_taken_over_in_one_turn_than_a_script_can_name(store: Store) -> None:
    """However many places there are: a refused script would end the reader."""
    consumer, w0 = joined(store), store.seat("w0")
    publish(store, *range(1, MOST_AT_ONCE + 11))
    read = store.redis.read_new(store.keys.stream, GROUP, "w0", count=MOST_AT_ONCE + 10, block_ms=1)
    recovery.release(w0, [Delivery(entry, 1, fields) for entry, fields in read])
    consumer.take(100_000)
    assert consumer.in_flight() == MOST_AT_ONCE
    consumer.take(100_000)
    assert consumer.in_flight() == MOST_AT_ONCE + 10


def test_a_duplicate_is_dropped_and_not_started(store: Store) -> None:
    """A second copy of a mail that is in flight, and a mail that was done."""
    consumer = joined(store)
    publish(store, 1)
    store.add("2-0", fields_of(M1))
    store.add("3-0", fields_of(M3))
    store.redis.call("SADD", f"stream:processed:{DONE}", "3")
    assert ids(consumer.take(8)) == [M1]
    assert store.content()["stream"] == {"1-0": M1}
    assert (consumer.in_flight(), consumer.counts["duplicates"]) == (1, 2)


def test_abandoned_mail_is_taken_over_and_a_late_answer_changes_nothing(store: Store) -> None:
    """The zombie's completion is lost, the new owner's counts."""
    zombie, consumer = joined(store, "w1"), joined(store, "w2")
    publish(store, 1)
    late = zombie.take(8)
    store.age("1-0", "w1", HOUR)
    [suspect] = consumer.take(8)
    assert suspect.alone, "its last start never finished"
    settle(zombie, late)
    assert store.content()["pending"] == {"1-0": ("w2", 2)}
    assert (zombie.counts["lost"], zombie.counts["done"], zombie.in_flight()) == (1, 0, 0)
    settle(consumer, [suspect])
    assert store.content() == {"processed": {DONE: {"1"}}, "results": [(M1, "done", '{"uid":1}')]}


def test_a_late_answer_does_not_let_go_of_the_mail_that_came_back(store: Store) -> None:
    """A frozen worker's mail went to another and came back while its first handler still ran: the second delivery is renewed."""
    consumer, other = joined(store, "w1"), joined(store, "w2")
    publish(store, 1)
    [late] = consumer.take(8)
    store.age("1-0", "w1", HOUR)
    [taken_over] = other.take(8)
    other.settle([Failure(taken_over.delivery, "retry", 0.0, "", "ValueError", "x")])
    [again] = taken(consumer)
    settle(consumer, [late])
    assert (consumer.counts["lost"], consumer.in_flight()) == (1, 1)
    settle(consumer, [again])
    assert (consumer.counts["done"], consumer.in_flight()) == (1, 0)


def test_what_is_in_flight_here_is_not_recovered_from_oneself(store: Store) -> None:
    """A handler that outlasts its lease by a hair keeps its mail."""
    consumer = joined(store)
    publish(store, 1)
    consumer.take(8)
    store.age("1-0", "w1", HOUR)
    assert consumer.take(8) == []
    assert store.content()["pending"] == {"1-0": ("w1", 1)}


def test_after_an_outage_nothing_is_recovered_before_its_owner_could_renew_it(store: Store, flaky: Flaky) -> None:
    """Every lease looks run out then; new mail is read meanwhile."""
    owner, consumer = joined(store, "w1"), joined(store, "w2", redis=RedisClient(flaky))
    publish(store, 1)
    owner.take(8)
    store.age("1-0", "w1", HOUR)
    flaky.victim = "XLEN"
    with pytest.raises(RedisUnavailable):
        consumer.take(8)
    publish(store, 2)
    assert ids(consumer.take(8)) == [M2]
    assert store.content()["pending"] == {"1-0": ("w1", 1), "2-0": ("w2", 1)}
    for _ in range(20):
        consumer.take(8)
    assert store.content()["pending"]["1-0"] == ("w2", 2)


def test_a_renewal_that_fails_tells_of_an_outage_too(store: Store, flaky: Flaky) -> None:
    """A worker whose places are all taken asks Redis for nothing else."""
    owner, consumer = joined(store, "w1"), joined(store, "w2", redis=RedisClient(flaky))
    publish(store, 1)
    owner.take(8)
    publish(store, 2)
    consumer.take(1)
    store.age("1-0", "w1", HOUR)
    flaky.victim = "Renew the leases"
    with pytest.raises(RedisUnavailable):
        consumer.renew()
    assert consumer.take(8) == []
    assert store.content()["pending"]["1-0"] == ("w1", 1)


def test_what_waits_to_run_alone_takes_no_handlers_place(store: Store) -> None:
    """Nor does the one that runs alone: at_work is what fills threads; in_flight is what is renewed."""
    crashed(store, 1, 2)
    publish(store, 3)
    consumer = joined(store)
    assert ids(consumer.take(8)) == [M3, M1]
    assert (consumer.in_flight(), consumer.at_work()) == (3, 1)


def test_a_lost_lease_is_said_and_the_mail_left_to_its_new_owner(store: Store) -> None:
    """Renewing and failing what another worker took changes nothing of it."""
    zombie = joined(store, "w1")
    publish(store, 1, subject="retry")
    late = zombie.take(8)
    store.age("1-0", "w1", HOUR)
    assert len(recovery.recover(store.seat("w2"), lease=60, most=9, in_flight=[])) == 1
    before = store.content()
    zombie.renew()
    settle(zombie, late)
    assert zombie.hand_back() == 0
    assert store.content() == before
    assert zombie.counts["lost"] == 1


def test_a_mail_deleted_by_hand_while_it_was_handled_is_gone(store: Store) -> None:
    """Its failure is recorded nowhere, there is nothing to retry; its index entry stays, by which the audit brings the mail again."""
    consumer = joined(store)
    publish(store, 1, subject="retry")
    started = consumer.take(8)
    store.redis.call("XDEL", store.keys.stream, "1-0")
    settle(consumer, started)
    assert (consumer.in_flight(), store.content()) == (0, {"index": {M1: "S:1-0"}, "open": {DAY: "1"}})


def test_renewal_covers_all_that_is_in_flight(store: Store) -> None:
    consumer = joined(store)
    publish(store, 1, 2)
    consumer.take(8)
    for entry in ("1-0", "2-0"):
        store.age(entry, "w1", HOUR)
    consumer.renew()
    assert max(store.idle("1-0"), store.idle("2-0")) < 60_000


def test_what_is_handed_back_is_free_at_once(store: Store) -> None:
    """In flight or read and not begun: another worker starts it as if it had never been started."""
    consumer = joined(store)
    publish(store, 1, 2)
    consumer.take(8)
    assert consumer.hand_back() == 2
    assert consumer.in_flight() == 0
    assert "starts" not in store.content()
    assert ids(joined(store, "w2").take(8)) == [M1, M2]


# suspects


def crashed(store: Store, *numbers: int) -> None:
    """Mails that a worker w0 had begun when it died, an hour ago."""
    dead = joined(store, "w0")
    publish(store, *numbers)
    assert len(dead.take(100)) == len(numbers)
    for number in numbers:
        store.age(f"{number}-0", "w0", HOUR)


def test_suspects_run_one_at_a_time_beside_new_mail(store: Store) -> None:
    """When the worker dies, one suspect was started in vain, not all of them; new mail does not wait for them."""
    crashed(store, 1, 2)
    publish(store, 3)
    consumer = joined(store)
    first = consumer.take(8)
    assert [(mail.delivery.email_id, mail.alone) for mail in first] == [(M3, False), (M1, True)]
    assert consumer.take(8) == [], "a second suspect starts beside the first"
    settle(consumer, first[1:])
    assert [(mail.delivery.email_id, mail.alone) for mail in consumer.take(8)] == [(M2, True)]


def test_what_was_begun_runs_though_redis_goes_away_before_the_suspect_begins(store: Store, flaky: Flaky) -> None:
    """The new mail is handed on in that turn, the suspect in the next one."""
    crashed(store, 1)
    publish(store, 2)
    consumer = joined(store, redis=RedisClient(flaky))

    def ready() -> bool:
        flaky.victim = "'SUSPECT'"
        return True

    consumer.alone_ready = ready
    assert ids(consumer.take(8)) == [M2]
    consumer.alone_ready = lambda: True
    assert [(mail.delivery.email_id, mail.alone) for mail in consumer.take(8)] == [(M1, True)]


def test_a_suspect_begins_when_its_process_stands_ready(store: Store) -> None:
    """Not before: a worker that is killed while that process starts has started nothing in vain."""
    crashed(store, 1)
    consumer = joined(store)
    ready = False
    consumer.alone_ready = lambda: ready
    assert consumer.take(8) == consumer.take(8) == []
    assert store.content()["starts"] == {M1: "0|1-0:1"}
    ready = True
    assert ids(consumer.take(8)) == [M1]
    assert store.content()["starts"] == {M1: "1|1-0:2"}


def test_a_late_answer_of_a_suspect_lets_the_next_one_start(store: Store) -> None:
    """Its lease was lost, the mail failed elsewhere and came back here while it still ran: the mail runs once it has answered."""
    crashed(store, 1)
    consumer, other = joined(store, "w1"), joined(store, "w2")
    [late] = taken(consumer)
    store.age("1-0", "w1", HOUR)
    [taken_over] = taken(other)
    other.settle([Failure(taken_over.delivery, "crash", 0.0, "", "ProcessDied", "x")])
    assert consumer.take(8) == [], "it is back, a suspect, and waits for the one that runs"
    settle(consumer, [late])
    assert [(mail.delivery.count, mail.alone) for mail in taken(consumer)] == [(4, True)]


def test_a_suspect_starts_where_no_thread_is_free(store: Store) -> None:
    """It takes no handler's place: handlers that hang do not hold it."""
    crashed(store, 1)
    consumer = joined(store)
    consumer.alone_ready = lambda: False
    consumer.take(8)
    consumer.alone_ready = lambda: True
    assert ids(consumer.take(0)) == [M1]


def test_a_mail_that_ends_its_own_process_is_buried_after_three_deaths(store: Store) -> None:
    """Each is an attempt with its backoff; the mail stays a suspect between them."""
    crashed(store, 1)
    consumer = joined(store)
    for death in range(1, 4):
        [suspect] = taken(consumer)
        assert (suspect.alone, suspect.attempts) == (True, death - 1)
        consumer.settle([Failure(suspect.delivery, "crash", 0.0, "", "ProcessDied", "signal 11")])
        assert store.content()["starts"][M1].startswith(f"{4 * death}|")
    for _ in range(5):
        assert consumer.take(8) == []
    assert store.content()["dlq"] == [(M1, "poison", "3")]


def taken(consumer: Consumer) -> list[Started]:
    """What the next turns of it start."""
    for _ in range(10):
        if started := consumer.take(8):
            return started
    raise AssertionError("nothing starts")


def test_a_mail_in_flight_when_other_things_kill_the_worker_is_no_poison(store: Store) -> None:
    """Ten workers die while it runs alone beside them: it is done at last. A mail that kills each of them dies after twelve."""
    publish(store, *range(1, 33))
    crashes = 0
    while left_alone := store.content().get("stream"):
        assert crashes < 40, left_alone
        consumer = joined(store, f"w{crashes}")
        while store.content().get("stream"):
            started = consumer.take(32)
            innocent = [mail for mail in started if mail.delivery.email_id != "gm:a:7" and not (mail.alone and crashes < 10)]
            if len(innocent) < len(started):
                crashes += 1
                break
            settle(consumer, started)
        for entry, (owner, _) in store.content().get("pending", {}).items():
            store.age(entry, owner, HOUR)
    content = store.content()
    assert content["dlq"] == [("gm:a:7", "poison", "0")]
    assert sorted(result[0] for result in content["results"]) == sorted(f"gm:a:{n}" for n in range(1, 33) if n != 7)
    assert set(content) == {"dlq", "results", "processed", "index", "open"}


# when reading stops


def test_half_of_the_last_hundred_dead_of_one_error_stop_the_reading(store: Store) -> None:
    """The worker says so and leaves the rest in the stream, until someone takes letters away."""
    consumer = joined(store)
    publish(store, *range(1, 41))
    settle(consumer, consumer.take(100))
    publish(store, *range(41, 91), subject="bury")
    publish(store, 91)
    settle(consumer, consumer.take(50))
    for _ in range(5):
        assert consumer.take(8) == []
    assert consumer.blocked == "half of the last 100 mails died of one error (Permanent in test_consume.py:handler)"
    assert store.content()["stream"] == {"91-0": "gm:a:91"}
    [(letter, _)] = store.redis.entries(store.keys.dlq, count=1)
    store.redis.call("XDEL", store.keys.dlq, letter)
    assert ids(taken(consumer)) == ["gm:a:91"]


def test_dead_of_many_errors_do_not(store: Store) -> None:
    """49 of one group and as many of another: each mail has its own trouble."""
    consumer = joined(store)
    publish(store, *range(1, 99))
    started = consumer.take(98)
    consumer.settle(
        [
            Failure(mail.delivery, "bury", 0.0, "permanent", "ValueError" if number % 2 else "KeyError", "x")
            for number, mail in enumerate(started)
        ]
    )
    publish(store, 99)
    assert ids(taken(consumer)) == ["gm:a:99"]


def test_reading_stops_while_every_breaker_is_open(store: Store) -> None:
    """Postponing mail after mail would only turn it round; a mail that met an open breaker has no attempt less."""
    consumer = joined(store, BREAKER_OPEN_SECONDS=1000)
    crm = consumer.breakers.get("crm")
    for _ in range(5):
        crm.enter().failure()
    publish(store, 1)
    for _ in range(5):
        assert consumer.take(8) == []
    assert consumer.blocked == "every breaker is open"
    consumer.breakers.get("books")
    [started] = taken(consumer)
    consumer.settle([settled(started, BreakerOpen("crm", 30.0), consumer.terms)])
    content = store.content()
    assert content["tries"] == {M1: "0|1|"}
    assert content["due"] == {f"1-0|{M1}"}
    assert consumer.counts["postponed"] == 1


# what is no mail of ours, and what we must not touch


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hello": "world"}, "no schema"),
        (fields_of(M1, schema="x"), "no schema"),
        (fields_of(M1, schema="²"), "no schema"),
        (fields_of(M1, schema="9" * 5000), "no schema"),
        (fields_of("nonsense"), "no valid email_id"),
        (fields_of("gm:a:99999999999999999999999"), "no valid email_id"),
        (fields_of("gm:b:1"), "email_id of another account"),
        (fields_of(M1, internal_date="yesterday"), "internal_date is neither empty nor YYYY-MM-DDTHH:MM:SSZ"),
        (fields_of(M1, internal_date="٢٠٢٦-01-31T00:00:00Z"), "internal_date is neither empty nor YYYY-MM-DDTHH:MM:SSZ"),
        ({name: text for name, text in fields_of(M1).items() if name != "record"}, "no mailbox or record"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_foreign_entry_is_buried_with_the_reason_and_holds_nobody(store: Store, fields: Fields, reason: str) -> None:
    """The mail behind it starts in the same turn."""
    consumer = joined(store)
    store.add("1-0", fields)
    publish(store, 2)
    assert ids(consumer.take(8)) == [M2]
    [(_, letter)] = store.redis.entries(store.keys.dlq, count=10)
    assert (letter["dead_id"], letter["dead_reason"], letter["dead_error"]) == ("foreign:1-0", "foreign", reason)
    assert store.content()["stream"] == {"2-0": M2}
    assert "index" in store.content()


@pytest.mark.parametrize("replays", ["²", "9" * 5000, "-1", "x"], ids=lambda replays: replays[:2])
def test_replays_that_are_no_number_are_none(store: Store, replays: str) -> None:
    """The mail is handled like any other."""
    consumer = joined(store)
    store.add("1-0", fields_of(M1, replays=replays))
    settle(consumer, consumer.take(8))
    assert store.content()["results"] == [(M1, "done", '{"uid":1}')]


def test_unknown_fields_are_ignored(store: Store) -> None:
    """A later minor version of the producer."""
    consumer = joined(store)
    store.add("1-0", fields_of(M1, flavour="new"))
    assert ids(consumer.take(8)) == [M1]


def test_a_newer_schema_is_left_alone_and_reading_stops(store: Store) -> None:
    """Never buried: it is claimable at once by a worker that knows it; what came with it is still handled."""
    consumer = joined(store)
    publish(store, 1)
    store.add("2-0", fields_of(M2, schema="2"))
    started = consumer.take(8)
    assert ids(started) == [M1]
    assert consumer.blocked == "schema 2"
    settle(consumer, started)
    publish(store, 3)
    assert [consumer.take(8) for _ in range(3)] == [[], [], []]
    assert (consumer.in_flight(), store.content()["stream"]) == (0, {"2-0": M2, "3-0": M3})
    assert store.idle("2-0") >= HOUR
    assert [mail.stream_id for mail in recovery.recover(store.seat("w2"), lease=60, most=9, in_flight=[])] == ["2-0"]


# the dead letters' limit


def test_at_dlq_max_reading_stops_and_goes_on_when_there_is_room(store: Store) -> None:
    """It says what to run; nothing is read, recovered or promoted meanwhile, so nothing more can die."""
    consumer = joined(store, DLQ_MAX=2)
    publish(store, 1, 2, subject="bury")
    settle(consumer, consumer.take(8))
    publish(store, 3)
    assert [consumer.take(8) for _ in range(3)] == [[], [], []]
    assert consumer.blocked == "2 dead letters (DLQ_MAX=2)"
    assert "pending" not in store.content()
    [(letter, _), _] = store.redis.entries(store.keys.dlq, count=10)
    store.redis.call("XDEL", store.keys.dlq, letter)
    assert ids(consumer.take(8)) == [M3]
    assert consumer.blocked == ""


# calls that fail


@pytest.mark.parametrize("lost", ["request", "reply"])
@pytest.mark.parametrize("victim", ["XREADGROUP", "the last step before a handler starts"], ids=["read", "begin"])
def test_a_call_lost_on_the_way_in_loses_no_mail(store: Store, flaky: Flaky, victim: str, lost: str) -> None:
    """What was delivered is begun in the next turn, or recovered when its reply was lost; each mail starts once here."""
    consumer = joined(store, redis=RedisClient(flaky), LEASE_SECONDS=2)
    publish(store, 1, 2)
    flaky.victim, flaky.lost = victim, lost
    with pytest.raises(RedisUnavailable):
        consumer.take(8)
    for entry in store.content().get("pending", {}):
        store.age(entry, "w1", HOUR)
    started = consumer.take(8)
    assert ids(started) == [M1, M2]
    settle(consumer, started)
    assert store.content() == {"processed": {DONE: {"1", "2"}}, "results": [(M1, "done", '{"uid":1}'), (M2, "done", '{"uid":2}')]}


@pytest.mark.parametrize("lost", ["request", "reply"])
@pytest.mark.parametrize("victim", ["-- DONE:", "-- fail, postpone, bury"], ids=["complete", "fail"])
def test_settling_is_safe_to_repeat(store: Store, flaky: Flaky, victim: str, lost: str) -> None:
    """One result, one attempt, nothing in flight."""
    consumer = joined(store, redis=RedisClient(flaky))
    publish(store, 1)
    publish(store, 2, subject="retry")
    outcomes = [consumer.handle(mail) for mail in consumer.take(8)]
    flaky.victim, flaky.lost = victim, lost
    with pytest.raises(RedisUnavailable):
        consumer.settle(outcomes)
    consumer.settle(outcomes)
    assert store.content() == {
        "stream": {"2-0": M2},
        "index": {M2: "S:2-0"},
        "tries": {M2: "1|1|now"},
        "due": {f"2-0|{M2}"},
        "open": {DAY: "1"},
        "processed": {DONE: {"1"}},
        "results": [(M1, "done", '{"uid":1}')],
    }
    assert consumer.in_flight() == 0


def test_a_delivery_that_is_given_again_goes_on_and_does_not_begin_twice(store: Store) -> None:
    """Redis came back as it was before it delivered a mail that is at work here: one handler, one result."""
    consumer = joined(store)
    publish(store, 1, 2)
    started = consumer.take(8)
    store.redis.call("XGROUP", "DESTROY", store.keys.stream, GROUP)
    recovery.join(consumer.seat)
    publish(store, 3)
    assert ids(consumer.take(8)) == [M3]
    assert consumer.in_flight() == 3
    settle(consumer, started)
    assert store.content()["results"] == [(M1, "done", '{"uid":1}'), (M2, "done", '{"uid":2}')]
    assert consumer.in_flight() == 1


def test_a_flushed_server_says_that_the_group_is_missing(store: Store) -> None:
    """The daemon joins again and goes on."""
    consumer = joined(store)
    store.redis.call("FLUSHALL")
    with pytest.raises(GroupMissing):
        consumer.take(8)
    recovery.join(consumer.seat)
    publish(store, 1)
    assert ids(consumer.take(8)) == [M1]


def test_a_mail_that_redis_refuses_to_begin_does_not_hold_the_others(store: Store) -> None:
    """Mail by mail: the others start, it stays in the stream, not in flight, for another try after its lease."""
    consumer = joined(store)
    store.redis.call("SET", "stream:processed:a:20260130", "somebody's text where a processed set belongs")
    store.add("1-0", fields_of(M1, day="2026-01-30"))
    publish(store, 2)
    assert ids(consumer.take(8)) == [M2]
    assert (consumer.in_flight(), consumer.counts["refused"]) == (1, 1)
    assert [entry for entry, _ in deliveries(store)] == ["1-0", "2-0"]
    assert store.redis.call("XPENDING", store.keys.stream, GROUP, "1-0", "1-0", 1)[0][1] == "w1"


def test_a_mail_that_redis_refuses_to_complete_does_not_hold_the_others(store: Store) -> None:
    """Its completion is refused; the one beside it is done; it is free to be tried again after its lease."""
    consumer = joined(store)
    store.add("1-0", fields_of(M1, day="2026-01-30"))
    publish(store, 2)
    started = consumer.take(8)
    store.redis.call("SET", "stream:processed:a:20260130", "text")
    settle(consumer, started)
    assert (consumer.in_flight(), consumer.counts["refused"], consumer.counts["done"]) == (0, 1, 1)
    assert store.redis.call("SMEMBERS", f"stream:processed:{DONE}") == ["2"]
    assert [mail.email_id for _, mail in deliveries(store)] == [M1]


def deliveries(store: Store) -> list[tuple[str, Delivery]]:
    return [(entry, Delivery(entry, 1, fields)) for entry, fields in store.redis.entries(store.keys.stream, count=10)]


def test_a_pause_by_hand_stops_reading_and_nothing_else(store: Store) -> None:
    """New, due and abandoned mail stays where it is; what is in flight is settled. Resumed, all of it is taken."""
    consumer, held = joined(store, BACKOFF_BASE=0.001), [""]
    consumer.pause = lambda: held[0]
    publish(store, 1)
    publish(store, 2, subject="retry")
    started = consumer.take(8)
    held[0] = "paused by hand since 2026-01-31T00:00:00Z"
    publish(store, 3)
    settle(consumer, started)
    assert [consumer.take(8) for _ in range(3)] == [[], [], []]
    assert (consumer.blocked, consumer.in_flight()) == (held[0], 0)
    assert store.content()["results"] == [(M1, "done", '{"uid":1}')]
    held[0] = ""
    assert sorted(mail for _ in range(3) for mail in ids(consumer.take(8))) == [M2, M3]
    assert consumer.blocked == ""
