"""`context.once` under broken round trips: what a step returned is kept with its mail, whatever call fails however.

The real code of producer and worker runs in this thread, as in test_crash_points. The handler books a number in a step, fails once
after it, and returns the number at its second attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.common.exceptions import LeaseLost
from src.mail.record import Email
from src.worker.context import Context
from tests.integration.test_crash_points import BREAKS, Stage, Stages
from tests.integration.test_crash_points import stages as stages  # the fixture
from tests.support.account import assert_accounted, read_books
from tests.support.faulty import Crash, Fault, Process, Trips
from tests.support.inline import InlineProducer, InlineWorker
from tests.support.mutants import Mutant

pytestmark = pytest.mark.timeout(900)
DAY = 86_400


def booked(stage: Stage, trips: Trips) -> None:
    """Names the mailbox of these tests."""


@pytest.fixture
def stage(stages: Stages) -> Stage:
    return stages(booked)


class Booking:
    """The handler, and the world outside it: how often each mail was booked. A number is given out once."""

    def __init__(self) -> None:
        self.booked: Counter[str] = Counter()

    def __call__(self, email: Email, context: Context) -> dict[str, Any]:
        def book() -> int:
            self.booked[email.email_id] += 1
            return self.booked[email.email_id]

        number = context.once("book", book)
        if context.attempt == 1:
            raise RuntimeError("after the step")
        return {"booked": number}

    __name__ = "booking"


def work(stage: Stage, trips: Trips, handler: Booking) -> None:
    try:
        InlineWorker(stage.world, Process(trips), handler).run(stage.world.stream_is_empty)
    except Crash:
        return


def tell(stage: Stage, disk: Path, trips: Trips) -> Booking:
    """Three mails, each booked and failed and done; a worker that meets the fault, and one that finishes what it left."""
    stage.world.renew(disk)
    handler = Booking()
    InlineProducer(stage.world, Process(Trips())).run()
    work(stage, trips, handler)
    work(stage, Trips(), handler)
    return handler


def check(stage: Stage, handler: Booking, *, most: int) -> None:
    """Every mail is done with the number that its step returned last, which was asked for `most` times at the most."""
    admin, keys = stage.world.admin, stage.world.keys
    assert_accounted(read_books(admin), [*stage.ids.values()])
    results: Any = admin.xrange(keys.results)
    for _, fields in results:
        email_id = fields["email_id"]
        kept = admin.hget(keys.steps(email_id), "book")
        assert fields["result"] == f'{{"booked":{kept}}}', "the result is what the step returned and Redis kept"
        assert 1 <= handler.booked[email_id] <= most, f"{email_id} was booked {handler.booked[email_id]} times"
        assert 0 < int(str(admin.ttl(keys.steps(email_id)))) <= DAY, "the steps of a done mail end after a day"


def broken(stage: Stage, tmp_path: Path, fault: Fault) -> Iterator[tuple[Trips, Booking]]:
    for at in range(1, 1_000):
        trips = Trips(at, fault)
        handler = tell(stage, tmp_path / f"{fault.name}{at}", trips)
        if not trips.fired:
            return
        yield trips, handler


def test_without_faults_a_step_is_done_once(stage: Stage, tmp_path: Path) -> None:
    check(stage, tell(stage, tmp_path, Trips()), most=1)


@pytest.mark.parametrize("fault", BREAKS, ids=lambda fault: fault.name)
def test_every_round_trip_fails_once_around_a_step(stage: Stage, tmp_path: Path, fault: Fault) -> None:
    """Only a crash between the call and its record repeats the step; a lost request or reply does not."""
    points = repeated = 0
    for trips, handler in broken(stage, tmp_path, fault):
        points += 1
        crashed = fault in (Fault.CRASH_BEFORE, Fault.CRASH_AFTER)
        try:
            check(stage, handler, most=2 if crashed else 1)
        except AssertionError as error:
            raise AssertionError(f"{trips.broken}: {error}") from error
        repeated += max(handler.booked.values()) - 1
    print(f"{fault.value}: {points} points, a step repeated at {repeated} of them")
    assert points > 20
    # Each mail's record is one trip that a crash may come before; the first is two, since the server does not know the script yet.
    assert repeated == {Fault.CRASH_BEFORE: 4, Fault.CRASH_AFTER: 1}.get(fault, 0)


@pytest.mark.parametrize(
    ("mutant", "fault", "violation"),
    [
        (Mutant("step", "redis.call('HSETNX', KEYS[2], ARGV[7], ARGV[8])"), Fault.CRASH_AFTER, "booked"),
        (
            Mutant("complete", "redis.call('EXPIRE', KEYS[steps], DAY)", "redis.call('PING')"),
            Fault.CRASH_AFTER,
            "end after a day",
        ),
    ],
    ids=str,
)
def test_a_step_that_is_not_kept_is_seen(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Mutant, fault: Fault, violation: str
) -> None:
    """The checker can fail."""
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError, match=violation):
        for _, handler in broken(stage, tmp_path, fault):
            check(stage, handler, most=1)


def test_a_step_is_not_kept_for_a_mail_that_another_worker_has(stage: Stage, tmp_path: Path) -> None:
    """The zombie's step is refused, and its handler is told to stop; the new owner's step counts."""
    stage.world.renew(tmp_path)
    handler = Booking()
    InlineProducer(stage.world, Process(Trips())).run()
    zombie = InlineWorker(stage.world, Process(Trips()), handler)
    zombie.join()
    started = zombie.take()
    work(stage, Trips(), handler)
    for mail in started:
        with pytest.raises(LeaseLost, match="another worker has"):
            zombie.consumer.services(mail).record("tell", "1")
        assert stage.world.admin.hkeys(stage.world.keys.steps(mail.delivery.email_id)) == ["book"]
    assert started
    assert_accounted(read_books(stage.world.admin), [*stage.ids.values()])
