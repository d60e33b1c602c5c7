"""The story of a delivery: take it, begin it, handle it, settle it. No thread is started here; the daemon and the tests bring theirs."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from config.settings import StreamSettings, WorkSettings
from src.common.batch import each_answered
from src.common.circuit_breaker import Breakers
from src.common.clock import Clock
from src.common.error_groups import fingerprint
from src.common.exceptions import ScriptRefused, Transient
from src.common.timing import WAY, Histogram
from src.worker import dlq, idempotency, recovery
from src.worker.delivery import Delivery, Seat, sorted_out
from src.worker.dlq import Failed, Failure
from src.worker.idempotency import DEATH, Begun, Done
from src.worker.processor import Handlers, Outcome, Started, Terms, handle
from src.worker.steps import LocalServices

log = logging.getLogger(__name__)

MOST_AT_ONCE = 500  # mails that are due, and that are abandoned, in one turn: Lua hands at most some 8,000 values on to a command
MOST_ERRORS = 50  # classes of errors that are told apart in `dead`; a handler may raise any number of them
LAST = 100  # outcomes that are remembered; where half of them are deaths of one error group, something is broken


@dataclass
class Consumer:
    """One consumer of the group. Its methods may be called from several threads; each may raise what RedisClient raises.

    `again`: repeats a call of a handler while Redis is away. `alone_ready`: may a suspect begin, that is: does the process in which it
    will run alone stand ready? `pause`: why somebody holds up all workers, "" if nobody does. `dead`: how many mails died, by the class
    of their error (the first `MOST_ERRORS`, then `other`).
    `way`: from a mail's entry into the stream, by the server's clock, until it was recorded as done, by ours.
    """

    seat: Seat
    stream: StreamSettings
    work: WorkSettings
    handlers: Handlers
    terms: Terms
    clock: Clock
    breakers: Breakers
    again: Callable[[Callable[[], Any]], Any]
    alone_ready: Callable[[], bool] = lambda: True
    pause: Callable[[], str] = lambda: ""
    counts: Counter[str] = field(default_factory=Counter)
    dead: Counter[str] = field(default_factory=Counter)
    way: Histogram = field(default_factory=lambda: Histogram(WAY))
    blocked: str = ""

    def __post_init__(self) -> None:
        self.settled = threading.Condition()
        self._in_flight: dict[str, Delivery] = {}
        self._since: dict[str, float] = {}  # when each of them became ours
        self._unbegun: list[Delivery] = []
        self._suspects: deque[Delivery] = deque()
        self._alone: tuple[str, int] | None = None  # (stream id, delivery count) of the suspect that runs
        self._deaths: deque[str] = deque(maxlen=LAST)  # the error group of each dead mail, "" for a done one
        self._dead_at_stop = 0
        self._next_look = 0.0
        self._no_recovery_before = 0.0

    @property
    def renew_every(self) -> float:
        """Seconds between two renewals of the leases."""
        return min(20.0, self.work.lease / 3)

    def in_flight(self) -> int:
        with self.settled:
            return len(self._in_flight)

    def oldest(self) -> float:
        """For how many seconds the mail that is longest in flight has been ours; 0.0 if none is."""
        with self.settled:
            first = min(self._since.values(), default=None)
        return 0.0 if first is None else self.clock.monotonic() - first

    def at_work(self) -> int:
        """How many mails take a handler's place now: not those that wait to run alone or to be begun, nor the one that runs alone."""
        with self.settled:
            return self._running() - bool(self._alone)

    def resting(self) -> bool:
        """No handler has a mail. The caller holds `settled`."""
        return self._running() == 0

    def _running(self) -> int:
        return len(self._in_flight) - len(self._suspects) - len(self._unbegun)

    def redis_was_away(self) -> None:
        """After an outage every lease looks run out: none is taken over before its owner could renew it."""
        self._no_recovery_before = self.clock.monotonic() + self.renew_every

    # take and begin

    def take(self, room: int) -> list[Started]:
        """One turn: up to `room` mails to start now, within `MOST_AT_ONCE`, and a suspect; waits up to the block time for new ones.

        A suspect is a mail whose last start never finished. Suspects run beside all other work, one at a time, in a process of their own:
        when the worker itself dies, only one of them was started in vain.
        """
        started: list[Started] = []
        try:
            started = self._take(room)
            return started + self._begin_suspect()
        except Transient:
            self.redis_was_away()
            if not started:
                raise
            return started  # they are begun, so they run; the suspect waits for the next turn

    def _take(self, room: int) -> list[Started]:
        if room <= 0:
            if not self._unbegun:
                self._wait()
            return self._begin()
        room = min(room, MOST_AT_ONCE)
        if self.clock.monotonic() >= self._next_look and self._look_around():
            self._taken(recovery.promote(self.seat, most=room))
            if self.clock.monotonic() >= self._no_recovery_before:
                self._taken(self._recover(room))
        if self.blocked:
            self._wait()
        elif len(self._unbegun) < room:
            self._taken(self._read_new(room - len(self._unbegun)))
        return self._begin()

    def _read_new(self, most: int) -> list[Delivery]:
        until_look = self._next_look - self.clock.monotonic()
        fresh = self.seat.redis.read_new(
            self.seat.keys.stream,
            self.seat.group,
            self.seat.consumer,
            count=min(most, self.work.batch_size),
            block_ms=1 if self._unbegun or self._suspects else max(1, min(self.work.block_ms, round(until_look * 1000))),
        )
        return [Delivery(stream_id, 1, fields) for stream_id, fields in fresh]

    def has_room(self) -> None:
        """A handler's place is free: a `take` that waits for one ends."""
        with self.settled:
            self.settled.notify_all()

    def _wait(self) -> None:
        """Until something is settled or a place is free, at most a tick."""
        with self.settled:
            self.settled.wait(timeout=min(0.25, self.work.recovery_tick))

    def _look_around(self) -> bool:
        """Once a tick: may we take on work? A person decides, the dead letters, breakers, and a schema that we do not know."""
        self._next_look = self.clock.monotonic() + self.work.recovery_tick
        if self.blocked.startswith("schema"):
            return False
        dead = self.seat.redis.length(self.seat.keys.dlq)
        blocked = self._why_not(dead)
        if blocked and not self.blocked:
            level = logging.WARNING if self.pause() else logging.ERROR
            log.log(level, "%s: reading stops. %s", blocked, self._what_to_do(blocked))
        elif self.blocked and not blocked:
            log.info("reading again (%s)", self.blocked)
        self.blocked = blocked
        return not blocked

    def _why_not(self, dead: int) -> str:
        """Why no mail may be taken now, "" if it may. `dead`: letters in the dead-letter stream."""
        if why := self.pause():
            return why
        if dead >= self.stream.dlq_max:
            return f"{dead} dead letters (DLQ_MAX={self.stream.dlq_max})"
        if dead < self._dead_at_stop:  # someone replayed or discarded: the handler was mended
            self._deaths.clear()
            self._dead_at_stop = 0
        group, deaths = max(Counter(filter(None, self._deaths)).items(), key=lambda item: item[1], default=("", 0))
        if 2 * deaths >= LAST:
            self._dead_at_stop = self._dead_at_stop or dead
            return f"half of the last {LAST} mails died of one error ({group})"
        seconds = self.breakers.all_open()
        return "every breaker is open" if seconds is not None else ""

    def _what_to_do(self, blocked: str) -> str:
        if self.pause():
            return "What is in flight goes on to its end"
        if blocked.startswith("every"):
            return "It goes on by itself when the first one lets a call in"
        return (
            "Look: python scripts/dlq.py groups. Mend the handler and restart the workers, then: "
            "python scripts/dlq.py replay --error …, or clear"
        )

    def _recover(self, room: int) -> list[Delivery]:
        with self.settled:
            mine = list(self._in_flight)
        found = recovery.recover(self.seat, lease=self.work.lease, most=room, in_flight=mine)
        if found:
            self.counts["recovered"] += len(found)
            log.info("recovered %d mails that nobody renewed for %g s", len(found), self.work.lease)
        return found

    def _taken(self, mails: Sequence[Delivery]) -> None:
        """From the moment it is delivered a mail is ours: to renew, and to begin until each was judged, whatever call fails.

        A Redis that came back older may give a delivery again that we have still in hand: that one goes on.
        """
        now = self.clock.monotonic() if mails else 0.0
        with self.settled:
            new = [mail for mail in mails if (held := self._in_flight.get(mail.stream_id)) is None or held.count != mail.count]
            self._in_flight.update((mail.stream_id, mail) for mail in new)
            self._since.update((mail.stream_id, now) for mail in new)
        self._unbegun += new

    def _drop(self, mails: Sequence[Delivery]) -> None:
        with self.settled:
            for mail in mails:
                if self._alone and self._alone == (mail.stream_id, mail.count):
                    self._alone = None
                held = self._in_flight.get(mail.stream_id)
                if held is None or held.count != mail.count:
                    continue  # a late answer about a mail that went to others and came back: what is here now goes on
                del self._in_flight[mail.stream_id], self._since[mail.stream_id]
            self.settled.notify_all()

    def _begin(self) -> list[Started]:
        newer, foreign, ours = sorted_out(self._unbegun)
        if newer:
            self._refuse_newer(newer)
        if foreign:
            self.settle(
                [Failure(mail, "foreign", reason="foreign", error_type="Foreign", error=mail.foreign) for mail in foreign]
            )
        self._unbegun = ours
        answers = each_answered(lambda mails: self._begun(mails, solo=False), ours)
        self._unbegun = []
        started, duplicates = [], self.counts["duplicates"]
        for mail, answer in zip(ours, answers, strict=True):
            if isinstance(answer, Begun) and answer.verdict == "GO":
                started.append(Started(mail, answer.attempts, self.handlers.of(mail.fields)))
            elif isinstance(answer, Begun) and answer.verdict == "SUSPECT":
                self._suspects.append(mail)
            else:
                self._not_started(mail, answer)
        if dropped := self.counts["duplicates"] - duplicates:
            log.info("dropped %d duplicates", dropped)
        self.counts["started"] += len(started)
        return started

    def _begin_suspect(self) -> list[Started]:
        with self.settled:
            if not self._suspects or self._alone:
                return []
        if not self.alone_ready():
            return []
        mail = self._suspects[0]
        [answer] = each_answered(lambda mails: self._begun(mails, solo=True), [mail])
        self._suspects.popleft()
        if isinstance(answer, Begun) and answer.verdict == "GO":
            with self.settled:
                self._alone = (mail.stream_id, mail.count)
            self.counts["started"] += 1
            log.info("%s did not finish its last start: it runs alone now", mail.email_id)
            return [Started(mail, answer.attempts, self.handlers.of(mail.fields), alone=True)]
        self._not_started(mail, answer)
        return []

    def _begun(self, mails: Sequence[Delivery], *, solo: bool) -> list[Begun]:
        poison = DEATH * self.work.poison_starts
        return idempotency.begin(self.seat, mails, solo=solo, poison=poison, now=self.clock.wall())

    def _not_started(self, mail: Delivery, answer: Begun | ScriptRefused) -> None:
        if isinstance(answer, ScriptRefused):
            log.error(
                "Redis refuses to begin %s: %s. It stays in the stream and is tried again after its lease.", mail.email_id, answer
            )
            self.counts["refused"] += 1
        elif answer.verdict == "POISON":
            log.error("%s ended the process that it was alone in, again and again: buried", mail.email_id)
            self._died("Poison")
        elif answer.verdict == "DUP":
            log.debug("duplicate of %s dropped", mail.email_id)
            self.counts["duplicates"] += 1
        else:
            log.debug("%s is no longer ours", mail.email_id)
            self.counts["lost"] += 1
        self._drop([mail])

    def _refuse_newer(self, newer: list[Delivery]) -> None:
        recovery.release(self.seat, newer)
        self._drop(newer)
        self.blocked = f"schema {newer[0].fields['schema']}"
        log.error(
            "an entry of %s, which this worker does not know: it is left alone and reading stops. Upgrade this worker.",
            self.blocked,
        )

    # handle and settle

    def services(self, started: Started) -> LocalServices:
        """What the handler of this mail can ask for."""
        keep = self.stream.processed_days * 86_400
        return LocalServices(self.seat, started.delivery, self.breakers, keep, self.again)

    def handle(self, started: Started) -> Outcome:
        """Run a plain handler on a mail, in this thread."""
        services = self.services(started)
        deadline = self.clock.wall() + timedelta(seconds=started.handler.timeout)
        return self.finished(started, services, handle(started, services, self.terms, deadline))

    def finished(self, started: Started, services: LocalServices, outcome: Outcome) -> Outcome:
        """`outcome`, and whether steps of the mail may stand in Redis: kept now, or in an earlier life of it."""
        mail = started.delivery
        kept = services.kept or started.attempts > 0 or mail.count > 1 or mail.replays > 0
        return outcome._replace(steps=True) if kept and isinstance(outcome, Done) else outcome

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Record what became of mails, each by its own verdict. Safe to repeat after an error."""
        done = [outcome for outcome in outcomes if isinstance(outcome, Done)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        verdicts = each_answered(self._complete, done)
        self._time_done(done, verdicts)
        well = sum(verdict in ("OK", "ALREADY") for verdict in verdicts)
        self.counts["done"] += well
        self._deaths.extend([""] * well)
        if well < len(done):
            for finished, verdict in zip(done, verdicts, strict=True):
                self._log_not_done(finished, verdict)
        self._drop([finished.delivery for finished in done])
        for failure, answer in zip(failures, each_answered(self._fail, failures), strict=True):
            self._log_failed(failure, answer)
        self._drop([failure.delivery for failure in failures])

    def _complete(self, done: Sequence[Done]) -> list[idempotency.Settled]:
        stream = self.stream
        return idempotency.complete(
            self.seat,
            done,
            processed_days=stream.processed_days,
            results_max=stream.results_max,
            results_days=stream.results_days,
        )

    def _fail(self, failures: Sequence[Failure]) -> list[Failed]:
        return dlq.fail(self.seat, failures, now=self.clock.wall())

    def _log_not_done(self, done: Done, verdict: idempotency.Settled | ScriptRefused) -> None:
        email_id = done.delivery.email_id
        if verdict == "LOST":
            self.counts["lost"] += 1
            log.warning(
                "%s was finished after its lease had run out: another worker has it, its effect may be repeated", email_id
            )
        elif isinstance(verdict, ScriptRefused):
            self.counts["refused"] += 1
            log.error("Redis refuses to complete %s: %s. It is tried again after its lease.", email_id, verdict)

    def _time_done(self, done: Sequence[Done], verdicts: Sequence[idempotency.Settled | ScriptRefused]) -> None:
        settled = zip(done, verdicts, strict=True)
        entered = Counter(
            [mail.delivery.stream_id.partition("-")[0] for mail, verdict in settled if verdict in ("OK", "ALREADY")]
        )
        now = self.clock.wall().timestamp()
        for moment, mails in entered.items():  # a batch of the producer has one moment
            self.way.observe(max(0.0, now - int(moment) / 1000), mails)

    def _died(self, error_type: str) -> None:
        self.counts["dead"] += 1
        self.dead[error_type if error_type in self.dead or len(self.dead) < MOST_ERRORS else "other"] += 1

    def _log_failed(self, failure: Failure, answer: Failed | ScriptRefused) -> None:
        email_id, error = failure.delivery.email_id, f"{failure.error_type}: {failure.error}"
        if isinstance(answer, ScriptRefused):
            self.counts["refused"] += 1
            log.error("Redis refuses to record the failure of %s: %s. It is tried again after its lease.", email_id, answer)
        elif answer.verdict == "POSTPONED":
            self.counts["postponed"] += 1
            log.debug("%s is postponed by %.1f s (%s)", email_id, failure.delay, error)
        elif answer.verdict in ("RETRY", "ALREADY"):
            self.counts["retried"] += 1
            log.warning("attempt %d of %s failed (%s), next in %.1f s", answer.attempts, email_id, error, failure.delay)
        elif answer.verdict == "DEAD":
            self._died(failure.error_type)
            if failure.verb != "foreign":
                self._deaths.append(fingerprint(failure.error_type, failure.error, failure.traceback))
            plural = "" if answer.attempts == 1 else "s"
            log.error("%s is dead after %d attempt%s (%s)", email_id, answer.attempts, plural, error)
        elif answer.verdict == "GONE":
            log.error("%s was deleted from the stream by someone else while it was handled", email_id)
        else:
            self.counts["lost"] += 1
            log.warning("%s failed after its lease had run out: another worker has it", email_id)

    # keep and hand back

    def renew(self) -> None:
        """Renew the leases of everything in flight."""
        with self.settled:
            mine = list(self._in_flight.values())
        try:
            lost = recovery.renew(self.seat, mine)
        except Transient:
            self.redis_was_away()
            raise
        for stream_id in lost:
            log.debug("the lease of %s is lost", stream_id)

    def hand_back(self) -> int:
        """Release what is in flight; how many mails that were."""
        with self.settled:
            mine = list(self._in_flight.values())
        released = recovery.release(self.seat, mine)
        self._suspects.clear()
        self._unbegun = []
        self._drop(mine)
        return released
