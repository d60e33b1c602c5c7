"""Where handlers run: which mails take a handler's place."""

from __future__ import annotations

import pytest

from src.common.clock import SYSTEM
from src.common.shutdown import Shutdown
from src.worker.child import Child
from src.worker.processor import Outcome
from src.worker.runners import Runners
from tests.support.fake import Store
from tests.support.wait import until
from tests.unit.test_consume import joined, publish


def no_child() -> Child:
    pytest.fail("no process is wanted")


def test_a_mail_that_waits_to_be_settled_takes_no_place(store: Store) -> None:
    """A place is taken from when a mail is put until it was handled, not until Redis knows of it."""
    consumer, outcomes = joined(store), list[Outcome]()
    publish(store, 1, 2, 3)
    runners = Runners(consumer, outcomes.append, no_child, False, Shutdown(), SYSTEM)
    runners.put(consumer.take(8))
    assert runners.busy == 3
    runners.start()
    until(lambda: len(outcomes) == 3 and runners.busy == 0, 10, "all are handled")
    assert consumer.in_flight() == 3
    assert len(store.content()["starts"]) == 3


def test_a_mail_that_runs_alone_takes_no_place(store: Store) -> None:
    """It has its own thread and process: all places are for others."""
    consumer = joined(store)
    publish(store, 1)
    [started] = consumer.take(8)
    runners = Runners(consumer, lambda outcome: None, no_child, False, Shutdown(), SYSTEM)
    runners.put([started._replace(alone=True)])
    assert runners.busy == 0
