"""A mailbox that is paused by hand while it is read: the real code of the producer, in this thread, over a sandbox and a real Valkey."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from src.producer.state_manager import Lease, StateManager
from tests.integration.test_crash_points import Stage, Stages
from tests.integration.test_crash_points import stages as stages  # the fixture
from tests.support.account import assert_accounted, read_books
from tests.support.faulty import Process, Trips
from tests.support.inline import MAILBOX, InlineProducer

HELD = "paused by hand since 2026-01-31T08:00:00Z"


def paused_on_the_way(stage: Stage, trips: Trips) -> None:
    """Names the mailbox of these tests."""


@pytest.fixture
def stage(stages: Stages, tmp_path: Path) -> Stage:
    """Three mails, read by two."""
    found = stages(paused_on_the_way)
    found.world.renew(tmp_path)
    return found


def test_a_pause_in_the_middle_of_a_read_ends_it_before_the_next_fetch(stage: Stage) -> None:
    """The two mails that were published stay so, with the state behind them; resumed, the third follows, and none twice."""
    producer = InlineProducer(stage.world, Process(Trips()))
    mailbox = producer.mailbox
    mailbox.pause = lambda: HELD if mailbox.reader.published else ""
    producer.run()
    books = read_books(stage.world.admin)
    assert [fields["uid"] for fields in books.stream.values()] == ["1", "2"]
    assert stage.world.admin.get(stage.world.keys.mailbox(stage.world.account, MAILBOX).last_uid) == "2"
    mailbox.pause = lambda: ""
    producer.run()
    assert_accounted(read_books(stage.world.admin), [*stage.ids.values()], waiting=[*stage.ids.values()])


def test_a_paused_mailbox_is_let_go_of_and_read_again_when_resumed(stage: Stage) -> None:
    """While it is held up it says so and why, has no session and no lease; then it goes on by itself."""
    producer = InlineProducer(stage.world, Process(Trips()))
    mailbox, seen = producer.mailbox, []

    def pause() -> str:
        seen.append(mailbox.status)
        if seen.count("PAUSED") == 5:
            assert mailbox.state() == ("PAUSED", HELD)
            other = StateManager(mailbox.states._redis, stage.world.keys, stage.world.account, MAILBOX, "another")
            assert isinstance(other.acquire(10), Lease)
            other.let_go()
        if mailbox.reader.published == 3:
            mailbox.shutdown.request("enough")
        return HELD if mailbox.reader.published and seen.count("PAUSED") < 10 else ""

    mailbox.pause = pause
    mailbox.run()
    assert [status for status, _ in groupby(seen)] == ["STARTING", "CONNECTED", "PAUSED", "CONNECTED"]
    assert_accounted(read_books(stage.world.admin), [*stage.ids.values()], waiting=[*stage.ids.values()])
