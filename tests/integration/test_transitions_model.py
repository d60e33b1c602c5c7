"""The transitions of the life of a mail, driven at random by their Python callers on a real Valkey, against a model without Redis.

After each step everything that stands in Redis is compared with the model, and the promise is checked on what Redis holds.
Nothing waits: abandoned is what nobody holds right now (a lease of 0), due is what is to be retried after 0 s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from config.settings import StreamSettings
from src.common.keys import Keys, open_field
from src.common.redis_client import RedisClient
from src.mail.record import gmail_email_id, member_of
from src.producer import repair, reprocess
from src.producer.plan import State
from src.producer.state_manager import Identity, Lease, Mail, StateManager
from src.worker import dlq, idempotency, recovery
from src.worker.delivery import Delivery, Seat
from src.worker.dlq import DeadLetter, Failure
from src.worker.idempotency import Done
from tests.support.account import Books, read_books
from tests.support.model import Hand, Model
from tests.support.mutants import Mutant
from tests.support.servers import RedisServer

ACCOUNT, MAILBOX = "model@gmail.example", "INBOX"
GROUP = "email_workers"
WORKERS = ("w0", "w1", "w2")
NOW = datetime(2026, 1, 31, tzinfo=UTC)
HOUR = 3600.0
MOST_LIVE = 10
POISON = 5
LETTERS_SEEN = 12  # how far back replay and discard look: letters that are gone are asked for too
HANDS_SEEN = 24  # how far back a worker that stood still remembers


def mail_fields(number: int) -> dict[str, str]:
    """The stream entry of mail `number`: two days, one account."""
    return {
        "schema": "1",
        "email_id": gmail_email_id(ACCOUNT, str(1_850_000_000_000_000_000 + number)),
        "account": ACCOUNT,
        "mailbox": MAILBOX,
        "uid": str(number),
        "internal_date": f"2026-01-{10 + number % 2}T12:00:00Z",
        "correlation_id": "c",
        "record": "{}",
    }


POOL = [mail_fields(number) for number in range(1, 121)]
DAYS = {fields["email_id"]: open_field(ACCOUNT, MAILBOX, fields["internal_date"]) for fields in POOL}


class LifeOfMail(RuleBasedStateMachine):
    """`hands`: every delivery ever made, held or not: a worker that stood still uses it late. `seen`: mails of the pool published."""

    admin: redis.Redis
    redis: RedisClient

    def __init__(self) -> None:
        super().__init__()
        self.admin.flushall()
        self.keys = Keys("email_ingestion_stream")
        self.seats = {name: Seat(self.redis, self.keys, GROUP, name) for name in WORKERS}
        self.model = Model(DAYS, POISON)
        self.hands: list[Hand] = []
        self.letters: list[DeadLetter] = []
        self.fields: dict[str, dict[str, str]] = {}
        self.highest: Counter[str] = Counter()
        self.ever: set[str] = set()
        self.state: State | None = None
        self.batches = self.seen = 0
        self.states = StateManager(self.redis, self.keys, ACCOUNT, MAILBOX, "owner")
        assert self.states.acquire(HOUR) == Lease(1, None)
        for seat in self.seats.values():
            recovery.join(seat)

    # intake

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """A batch, known and unknown mail mixed; then the same call again, and one that expects what is past."""
        new = POOL[self.seen : self.seen + data.draw(st.integers(0, 3))]
        chosen = [*new, *data.draw(st.lists(self._old_or_next(), max_size=2))]
        mails = [Mail(int(fields["uid"]), fields) for fields in chosen]
        email_ids = [fields["email_id"] for fields in chosen]
        before, self.batches = self.state, self.batches + 1
        state = State(7, self.batches, "", 0, first_complete=True)
        fresh, full = self.model.fresh(email_ids), len(self.model.entries) >= MOST_LIVE

        def ask(batch: str, states: StateManager) -> tuple[str, tuple[bool, ...]]:
            answer = states.publish(mails, batch=batch, expected=before, state=state, now=NOW, most_live=MOST_LIVE)
            return answer.verdict, answer.added

        assert ask("other", StateManager(self.redis, self.keys, ACCOUNT, MAILBOX, "another")) == ("FENCED", ())
        if full and any(fresh):
            assert ask(f"batch {self.batches}", self.states) == ("FULL", ())
            return
        assert ask(f"batch {self.batches}", self.states) == ("OK", tuple(fresh))
        self.state, self.seen = state, self.seen + len(new)
        added = [email_id for email_id, is_new in zip(email_ids, fresh, strict=True) if is_new]
        for email_id, sid in zip(added, self._new_entries(), strict=True):
            self.model.published(email_id, sid)
        assert ask(f"batch {self.batches}", self.states) == ("ALREADY", ())
        assert ask("another batch", self.states) == ("STALE", ())

    @rule(data=st.data(), times=st.integers(0, 2))
    def xadd_by_someone_else(self, data: st.DataObject, times: int) -> None:
        """Copies of a mail, published before or not; or what is no mail at all."""
        fields = data.draw(self._old_or_next())
        for _ in range(times):
            self._note(str(self.admin.xadd(self.keys.stream, fields)), fields["email_id"])  # type: ignore[arg-type]
        if not times:
            sid = str(self.admin.xadd(self.keys.stream, {"hello": "world"}))
            self._note(sid, f"foreign:{sid}")

    def _note(self, sid: str, mail: str) -> None:
        self.model.seen_in_stream(sid, mail)
        assert self._new_entries() == []

    # a worker takes

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), most=st.integers(1, 3))
    def take(self, data: st.DataObject, worker: str, most: int) -> None:
        """New, abandoned or due mail."""
        self._take(data, worker, most)

    def _take(self, data: st.DataObject, worker: str, most: int) -> list[Hand]:
        ways = {"new": self._read_new, "flight": self._recover_any, "due": self._promote}
        way = ways[data.draw(st.sampled_from([place for place in ways if self.model.in_place(place)]))]
        return way(worker, most)

    def _read_new(self, worker: str, most: int) -> list[Hand]:
        found = self.redis.read_new(self.keys.stream, GROUP, worker, count=most, block_ms=1)
        return self._took([Delivery(sid, 1, fields) for sid, fields in found], self.model.read(worker, most))

    @precondition(lambda self: self.model.in_place("flight"))
    @rule(worker=st.sampled_from(WORKERS), most=st.integers(1, 3), lease=st.sampled_from([0.0, HOUR]))
    def recover(self, worker: str, most: int, lease: float) -> None:
        """Not what the worker itself is working on. With a lease of an hour only what was handed back."""
        self._recover(worker, most, self.model.held_by(worker), lease)

    def _recover_any(self, worker: str, most: int) -> list[Hand]:
        """A worker that knows nothing of its own past."""
        return self._recover(worker, most, [], 0.0)

    def _recover(self, worker: str, most: int, busy: list[str], lease: float) -> list[Hand]:
        found = recovery.recover(self.seats[worker], lease=lease, most=most, in_flight=busy)
        return self._took(found, self.model.recover(worker, most, busy, only_handed_back=lease > 0))

    def _promote(self, worker: str, most: int) -> list[Hand]:
        due = self.model.in_place("due")
        found = recovery.promote(self.seats[worker], most=most)
        assert {mail.stream_id for mail in found} <= set(due) and len(found) == min(most, len(due))
        return self._took(found, self.model.promoted(worker, [mail.stream_id for mail in found]))

    def _took(self, found: list[Delivery], expected: list[Hand]) -> list[Hand]:
        assert [(mail.stream_id, mail.count) for mail in found] == [(hand.sid, hand.count) for hand in expected]
        for mail in found:
            assert mail.email_id == self.model.entries[mail.stream_id].mail
            self.fields[mail.stream_id] = mail.fields
        self.hands += expected
        return expected

    # a worker's day

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), solo=st.booleans())
    def turn(self, data: st.DataObject, worker: str, solo: bool) -> None:
        """Take a few mails, begin them, and finish, fail or never finish each."""
        started = self._take_and_begin(data, worker, solo=solo)
        ends = {hand: data.draw(st.sampled_from(["done", "retry", "crash", "postpone", "bury", "never"])) for hand in started}
        self._complete(worker, [hand for hand, end in ends.items() if end == "done"])
        failed = [hand for hand, end in ends.items() if end not in ("done", "never")]
        self._fail(worker, failed, [ends[hand] for hand in failed])

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), solo=st.booleans())
    def turn_cut_short(self, data: st.DataObject, worker: str, solo: bool) -> None:
        """Take a few mails, begin them, and die."""
        self._take_and_begin(data, worker, solo=solo)

    def _take_and_begin(self, data: st.DataObject, worker: str, *, solo: bool) -> list[Hand]:
        taken = self._take(data, worker, 3)
        foreign = [hand for hand in taken if self._mail(hand).startswith("foreign:")]
        self._fail(worker, foreign, ["foreign" for _ in foreign])
        return self._begin(worker, taken, solo=solo)

    @precondition(lambda self: self.hands)
    @rule(worker=st.sampled_from(WORKERS))
    def leave(self, worker: str) -> None:
        """A consumer goes, but never one that holds something."""
        recovery.leave(self.seats[worker])
        names = {consumer["name"] for consumer in self.admin.xinfo_consumers(self.keys.stream, GROUP)}
        assert (worker in names) == bool(self.model.held_by(worker))

    # a worker holds: now, or in the belief that it does

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        worker, hands = self._some_hands(data)
        assert sorted(recovery.renew(self.seats[worker], self._deliveries(hands))) == sorted(self.model.renew(hands))

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker, hands = self._some_hands(data)
        assert recovery.release(self.seats[worker], self._deliveries(hands)) == self.model.release(hands)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), solo=st.booleans())
    def begin(self, data: st.DataObject, solo: bool) -> None:
        worker, hands = self._some_hands(data)
        self._begin(worker, hands, solo=solo)

    def _begin(self, worker: str, hands: list[Hand], *, solo: bool) -> list[Hand]:
        """Those that GO."""
        hands = [hand for hand in hands if not self._mail(hand).startswith("foreign:")]
        mails, started = self._deliveries(hands), []
        answers = idempotency.begin(self.seats[worker], mails, solo=solo, poison=POISON, now=NOW) if mails else []
        for hand, answer in zip(hands, answers, strict=True):
            verdict, attempts = self.model.begin(hand, self._mail(hand), solo=solo)
            assert answer.verdict == verdict, hand
            assert answer.attempts == attempts or verdict == "LOST", hand  # who lost a mail does not ask for its attempts
            if answer.verdict == "GO":
                started.append(replace(hand, started=True))
                self.hands[self.hands.index(hand)] = started[-1]
            elif answer.verdict == "POISON":
                self._buried(hand, "poison")
        return started

    # a worker settles

    @precondition(lambda self: any(hand.started for hand in self.hands))
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        worker, hands = self._some_hands(data, started=True)
        self._complete(worker, hands)

    def _complete(self, worker: str, hands: list[Hand]) -> None:
        done = [Done(mail, "done", "{}") for mail in self._deliveries(hands)]
        if done:
            answers = idempotency.complete(self.seats[worker], done, processed_days=1, results_max=1000, results_days=1)
            assert answers == self.model.complete([(hand, self._mail(hand)) for hand in hands])

    @precondition(lambda self: any(hand.started for hand in self.hands))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        worker, hands = self._some_hands(data, started=True)
        self._fail(worker, hands, [data.draw(st.sampled_from(["retry", "crash", "postpone", "bury"])) for _ in hands])

    def _fail(self, worker: str, hands: list[Hand], verbs: list[str]) -> None:
        failures = [
            Failure(mail, verb, reason=verb)  # type: ignore[arg-type]  # one of Verb
            for mail, verb in zip(self._deliveries(hands), verbs, strict=True)
        ]
        answers = dlq.fail(self.seats[worker], failures, now=NOW) if failures else []
        for hand, verb, answer in zip(hands, verbs, answers, strict=True):
            assert (answer.verdict, answer.attempts) == self.model.fail(hand, self._mail(hand), verb), hand
            if answer.verdict == "DEAD":
                self._buried(hand, verb)

    def _buried(self, hand: Hand, reason: str) -> None:
        """The oldest letter that the model does not know: they come in the order of the batch."""
        letter = next(letter for letter in dlq.look(self.redis, self.keys) if letter.id not in self.model.letters)
        assert (letter.email_id, letter.fields["dead_reason"]) == (self._mail(hand), reason)
        self.model.buried(hand, letter.id, reason)
        self.letters = [*self.letters, letter][-LETTERS_SEEN:]

    # the dead

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        letters = data.draw(st.lists(st.sampled_from(self.letters), min_size=1, max_size=3, unique_by=lambda letter: letter.id))
        expected = ["FOREIGN" if letter.foreign else self.model.replay(letter.id) for letter in letters]
        assert dlq.replay(self.redis, self.keys, letters) == expected
        back = [letter.id for letter, verdict in zip(letters, expected, strict=True) if verdict == "OK"]
        for letter_id, sid in zip(back, self._new_entries(), strict=True):
            self.model.replayed(letter_id, sid)

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        letters = data.draw(st.lists(st.sampled_from(self.letters), min_size=1, max_size=2, unique_by=lambda letter: letter.id))
        answers = dlq.discard(self.redis, self.keys, letters, processed_days=1, results_max=1000)
        assert answers == [self.model.discard(letter.id) for letter in letters]

    @rule(most=st.integers(1, 3))
    def expire(self, most: int) -> None:
        """Everything that is dead by now is old enough (days: less than none)."""
        old_at_once = StreamSettings.model_construct(dlq_days=-1, processed_days=1, results_max=1000)
        given_up = dlq.expire(self.redis, self.keys, old_at_once, most=most)
        assert given_up == self.model.expire(most)

    # the done

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), run=st.sampled_from(["a", "b"]))
    def bring_back(self, data: st.DataObject, run: str) -> None:
        """Mails in whatever state; then the same call again, whose reply was lost."""
        mails = data.draw(st.lists(self._old_or_next(), min_size=1, max_size=3, unique_by=lambda fields: fields["email_id"]))
        entries = [{**fields, "replays": "1"} for fields in mails]
        expected = []
        answers = reprocess.bring_back(self.redis, self.keys, run, entries, most_live=MOST_LIVE)
        made = iter(self._new_entries())
        for fields in mails:
            expected.append(self.model.bring_back(run, fields["email_id"], most_live=MOST_LIVE))
            if expected[-1] == "OK":
                self.model.brought_back(run, fields["email_id"], next(made))
        assert answers == expected
        again = [self.model.bring_back(run, fields["email_id"], most_live=MOST_LIVE) for fields in mails]
        assert reprocess.bring_back(self.redis, self.keys, run, entries, most_live=MOST_LIVE) == again
        assert self._new_entries() == []

    # what someone else breaks is mended

    @precondition(lambda self: self.model.index_of_stream() and not self.model.copies())
    @rule(data=st.data())
    def break_and_mend(self, data: st.DataObject) -> None:
        """One thing by hand that no transition does, then the check that mends it; and the same check again, which finds nothing.

        Where no entry was copied by hand before: which of two copies is adopted is nobody's promise.
        """
        mail = data.draw(st.sampled_from(self.model.index_of_stream()))
        sid = self.model.index[mail][2:]
        entry = self.model.entries[sid]
        ways = {"new": ["hdel", "xdel"], "flight": ["hdel", "xack", "delconsumer"], "due": ["hdel", "xdel", "zrem"]}[entry.place]
        lost, way = [sid], data.draw(st.sampled_from(ways))
        if way == "hdel":
            self.admin.hdel(self.keys.index, mail)
        elif way == "xdel":
            self.admin.xdel(self.keys.stream, sid)
        elif way == "xack":
            self.admin.xack(self.keys.stream, GROUP, sid)
        elif way == "zrem":
            self.admin.zrem(self.keys.due, f"{sid}|{mail}")
        else:
            lost = self.model.held_by(entry.owner)
            self.admin.xgroup_delconsumer(self.keys.stream, GROUP, entry.owner)
        found = repair.examine(self.redis, self.keys, GROUP, mend=True)
        if way in ("hdel", "xdel"):
            lost = []
        assert found.found["lost"] == len(lost) and set(found.dangling) == ({mail} if way == "xdel" else set())
        for gone in lost:
            self.model.put_back(gone, 1000)
        if way == "xdel":
            self._comes_again(mail, sid)

    def _comes_again(self, mail: str, sid: str) -> None:
        fields = next(fields for fields in POOL if fields["email_id"] == mail)
        state = State(7, self.batches, "", 0, first_complete=True) if self.state is None else self.state
        self.batches += 1
        answer = self.states.publish(
            [Mail(int(fields["uid"]), fields)],
            batch=f"again {self.batches}",
            expected=self.state,
            state=state,
            now=NOW,
            most_live=1_000,
        )
        assert (answer.verdict, answer.added) == ("OK", (True,))
        self.state = state
        [new] = self._new_entries()
        self.model.came_again(sid, new)

    # what holds after each step

    @invariant()
    def everything_is_accounted_for(self) -> None:
        books, fences = read_books(self.admin), self._fences()
        self._redis_holds_what_the_model_holds(books, fences)
        self._the_promise_holds(books, fences)
        pool = POOL[: self.seen + 1]
        identities = [Identity(fields["email_id"], fields["internal_date"]) for fields in pool]
        unknown = [position for position, fields in enumerate(pool) if not self.model.known(fields["email_id"])]
        assert self.states.missing(identities, ACCOUNT) == unknown
        assert self.states.places(identities, ACCOUNT, GROUP) == [self.model.place(fields["email_id"]) for fields in pool]
        findings = repair.examine(self.redis, self.keys, GROUP, mend=False)
        assert set(findings.strays) == set(self.model.strays())
        assert (+findings.found - Counter(stray=len(findings.strays)), findings.miscount) == (Counter(), 0), "never a false alarm"

    def _redis_holds_what_the_model_holds(self, books: Books, fences: dict[str, tuple[str, int]]) -> None:
        model = self.model
        assert {sid: fields.get("email_id", f"foreign:{sid}") for sid, fields in books.stream.items()} == {
            sid: entry.mail for sid, entry in model.entries.items()
        }
        assert fences == {sid: (model.entries[sid].owner, model.entries[sid].count) for sid in model.in_place("flight")}
        assert books.due == set(model.in_place("due"))
        assert books.index == model.index
        assert books.starts == {mail: f"{solo}|{tag}" for mail, (solo, tag) in model.starts.items()}
        tries = {mail: value.split("|") for mail, value in books.tries.items()}
        assert {mail: (int(attempts), int(last)) for mail, (attempts, last, _) in tries.items()} == model.tries
        assert all((first != "") == (attempts != "0") for attempts, _, first in tries.values()), "since when a mail fails"
        assert books.open == model.open
        letters = {
            letter: (fields.get("dead_id") or fields["email_id"], fields["dead_reason"]) for letter, fields in books.dead.items()
        }
        assert letters == model.letters
        assert books.done == Counter({mail: times for (mail, outcome), times in model.results.items() if outcome == "done"})
        assert books.discarded == Counter({mail: n for (mail, outcome), n in model.results.items() if outcome == "discarded"})
        assert set(books.processed) == {member_of(mail) for mail in model.processed}

    def _the_promise_holds(self, books: Books, fences: dict[str, tuple[str, int]]) -> None:
        """On what Redis holds alone: each mail ever taken in is in one place, done at most once, counted once, its count never back."""
        live, dead = set(books.stream), {fields["email_id"] for fields in books.dead.values() if "dead_id" not in fields}
        unfinished = {mail for mail, location in books.index.items() if location.startswith("S:") and location[2:] in live}
        done = {mail for mail in DAYS if member_of(mail) in books.processed}
        self.ever |= set(books.index) | done
        assert all([mail in unfinished, mail in dead, mail in done].count(True) == 1 for mail in self.ever), (
            "in exactly one place"
        )
        lives = Counter(done) + self.model.lives
        assert books.done + books.discarded == lives, "a result for each life, exactly once"
        assert len(books.dead) == len(books.reasons), "one letter a mail"
        assert books.open == Counter(DAYS[mail] for mail in unfinished | dead), "open counts what is unfinished or dead"
        assert not books.pending & books.due, "in flight or waiting, not both"
        for sid, (_, count) in fences.items():
            assert count >= self.highest[sid], "the delivery count never goes back"
            self.highest[sid] = count

    # helpers

    def _old_or_next(self) -> st.SearchStrategy[dict[str, str]]:
        """A mail that was published before, or the one that comes next."""
        return st.sampled_from(POOL[max(0, self.seen - 8) : self.seen + 1])

    def _some_hands(self, data: st.DataObject, *, started: bool = False) -> tuple[str, list[Hand]]:
        """A few deliveries of one worker, lately made; those of other workers are not its to use."""
        recent = [hand for hand in self.hands if hand.started or not started][-HANDS_SEEN:]
        worker = data.draw(st.sampled_from(sorted({hand.worker for hand in recent})))
        own = [hand for hand in recent if hand.worker == worker]
        return worker, data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=4, unique=True))

    def _deliveries(self, hands: list[Hand]) -> list[Delivery]:
        return [Delivery(hand.sid, hand.count, self.fields[hand.sid]) for hand in hands]

    def _mail(self, hand: Hand) -> str:
        return self.fields[hand.sid].get("email_id", f"foreign:{hand.sid}")

    def _new_entries(self) -> list[str]:
        """Stream ids that the model does not know, in order."""
        return [sid for sid, _ in self.redis.entries(self.keys.stream, count=1000) if sid not in self.model.entries]

    def _fences(self) -> dict[str, tuple[str, int]]:
        rows = self.admin.xpending_range(self.keys.stream, GROUP, "-", "+", 1000)
        return {str(row["message_id"]): (str(row["consumer"]), int(row["times_delivered"])) for row in rows}


PROFILE = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with RedisServer("valkey", options={"hz": "500"}) as valkey:
        LifeOfMail.admin = valkey.client()
        with RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10.0) as client:
            LifeOfMail.redis = client
            yield


@pytest.mark.usefixtures("server")
def test_transitions_do_what_the_model_says() -> None:
    """Any order of transitions, by workers alive, dead or late, leaves each mail in one place, done once, as the model says."""
    run_state_machine_as_test(LifeOfMail, settings=PROFILE)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("server")
def test_transitions_do_what_the_model_says_for_long() -> None:
    """The same, longer and more often."""
    run_state_machine_as_test(LifeOfMail, settings=settings(PROFILE, max_examples=300, stateful_step_count=60))


MUTANTS = (
    Mutant("publish", "if state[1] ~= ARGV[1] then", "if false then"),
    Mutant("publish", "if uidvalidity ~= ARGV[3] or last_uid ~= ARGV[4] then", "if false then"),
    Mutant("publish", "mails[i].known = located[i]", "mails[i].known = false"),
    Mutant("begin", "if owned[mail.sid] ~= mail.count then", "if false then"),
    Mutant("begin", "mail.done or (location and location ~= here and stands(KEYS[1], KEYS[5], location))", "mail.done"),
    Mutant("begin", "if last == nil or last == tag then", "if true then"),
    Mutant("complete", "if owned[sid] ~= count then", "if false then"),
    Mutant("fail", "if owned[mail.sid] ~= mail.count then", "if false then"),
    Mutant("fail", "if gone or mail.verb ~= 'crash' then", "if true then"),
    Mutant("promote", "'^%d+|(%d+)')) + 1", "'^%d+|(%d+)'))"),
    Mutant("recover", "'IDLE', ARGV[3],", "'IDLE', 0,"),
    Mutant("replay", "redis.call('XDEL', KEYS[5], dead)\n    answer[#answer + 1] = 'OK'", "answer[#answer + 1] = 'OK'"),
    Mutant("discard", "redis.call('SADD', set, ARGV[i + 2]) == 0", "false"),
    Mutant("reprocess", "if redis.call('SISMEMBER', KEYS[4], mail.id) == 1 then", "if false then"),
    Mutant("reprocess", "elseif location then", "elseif false then"),
    Mutant("reprocess", "elseif redis.call('SISMEMBER', mail.set, mail.member) == 0 then", "elseif false then"),
    Mutant("reprocess", "redis.call('SREM', mail.set, mail.member)"),
    Mutant("release", "if owned[sid] == count then", "if true then"),
    Mutant("renew", "owned[ARGV[i]] == ARGV[i + 1] and mine or lost", "mine"),
    Mutant("repair", "if ms > last_ms or (ms == last_ms and seq > last_seq) then return 'unread' end"),
    Mutant("repair", "if redis.call('ZSCORE', due, sid .. '|' .. email_id) then return 'waiting' end"),
    Mutant("repair", "math.max(tonumber(started), tonumber(tried)) + AHEAD", "1"),
    Mutant("repair", "if mend then hand_back(sid, email_id) end"),
    Mutant("publish", "located[i] and stands(KEYS[6], KEYS[9], located[i])", "located[i]"),
    Mutant("publish", "if not mail.counted then", "if true then"),
)
MORE_MUTANTS = (
    Mutant("publish", "or done[i] == 1 end", "end"),
    Mutant("publish", "if fresh > 0 and live >= tonumber(ARGV[13]) then", "if false then"),
    Mutant("begin", "mail.done or (location and", "(location and"),
    Mutant("begin", "adopted[mail.id] = here"),
    Mutant("begin", "elseif solo >= tonumber(ARGV[3]) then", "elseif false then"),
    Mutant("complete", "redis.call('XDEL', KEYS[1], unpack(sids))"),
    Mutant("complete", "redis.call('SADD', KEYS[6 + set], unpack(part))"),
    Mutant("fail", "if mail.verb ~= 'postpone' then", "if true then"),
    Mutant("promote", "redis.call('ZREM', KEYS[3], member)"),
    Mutant("recover", "if not busy[entry[1]] and", "if"),
    Mutant("replay", "elseif location and not here and stands(KEYS[1], KEYS[5], location) then", "elseif location then"),
    Mutant("discard", "if redis.call('HINCRBY', KEYS[3], open, -1) <= 0 then redis.call('HDEL', KEYS[3], open) end"),
    Mutant("discard", "redis.call('HDEL', KEYS[1], email_id)"),
    Mutant("discard", "redis.call('XDEL', KEYS[2], dead)\n    answer[#answer + 1] = verdict", "answer[#answer + 1] = verdict"),
    Mutant("reprocess", "redis.call('HINCRBY', KEYS[3], mail.open, 1)"),
    Mutant("reprocess", "redis.call('SADD', KEYS[4], mail.id)"),
    Mutant("reap", "consumer.pending == 0 and"),
    Mutant("repair", "if mend then redis.call('ZREM', KEYS[5], found[2][i]) end"),
    Mutant("repair", "if not location or (location ~= 'S:' .. sid and", "if location and (location ~= 'S:' .. sid and"),
    Mutant("repair", "not stands(KEYS[1], KEYS[6], location) and not pending", "not pending"),
    Mutant("audit", "if done[i] == 1 then", "if false then"),
)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "mutant", [*MUTANTS, *(pytest.param(mutant, marks=pytest.mark.full) for mutant in MORE_MUTANTS)], ids=str
)
def test_a_guard_taken_out_is_seen(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is a check that can fail: without any one of these lines Redis and the model part."""
    mutant.install(monkeypatch)
    hunt = settings(PROFILE, max_examples=500, derandomize=True, phases=[Phase.generate], print_blob=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(LifeOfMail, settings=hunt)
