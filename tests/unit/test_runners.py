"""Where handlers run: which mails take a handler's place, and what async handlers do to each other."""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from src.common.clock import SYSTEM
from src.common.shutdown import Shutdown
from src.mail.record import Email
from src.worker.child import Child
from src.worker.consume import Consumer
from src.worker.context import Context
from src.worker.processor import Handlers, Outcome
from src.worker.runners import Runners
from tests.support.consumer import Function, handler_of
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


# async handlers


def of_async(store: Store, function: Function, timeout: float = 600.0) -> tuple[Consumer, Runners, list[Outcome]]:
    """A consumer with an async handler, its runners at work, and where their outcomes go."""
    consumer, outcomes = joined(store), list[Outcome]()
    consumer.handlers = Handlers((), replace(handler_of(function, consumer.work, "async"), timeout=timeout))
    runners = Runners(consumer, outcomes.append, no_child, False, Shutdown(), SYSTEM)
    runners.start()
    return consumer, runners, outcomes


def test_an_async_handler_that_cancels_all_tasks_fails_its_neighbours_and_strands_none(store: Store) -> None:
    """One that waits and one that has not begun: both are tried again, and the canceller is done."""
    begun, all_put = threading.Event(), threading.Event()

    async def handler(email: Email, context: Context) -> None:
        if email.subject == "cancel":
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        else:
            begun.set()
            all_put.wait(20)  # holds the loop, so that the other two begin in one turn of it
            await asyncio.sleep(3600)

    consumer, runners, outcomes = of_async(store, handler)
    publish(store, 1)
    runners.put(consumer.take(8))
    assert begun.wait(20)
    publish(store, 2, subject="cancel")
    publish(store, 3)
    runners.put(consumer.take(8))
    all_put.set()
    until(lambda: len(outcomes) == 3, 10, "each mail has an outcome")
    consumer.settle(outcomes)
    content = store.content()
    assert content["due"] == {"1-0|gm:a:1", "3-0|gm:a:3"}
    assert content["results"] == [("gm:a:2", "done", "{}")]
    assert (consumer.in_flight(), runners.busy) == (0, 0)


def test_a_handler_that_holds_the_loop_after_it_was_given_up_is_noticed(store: Store) -> None:
    """Its cleanup blocks: later mail would never begin, with leases that are renewed for ever."""
    blocks = threading.Event()

    async def handler(email: Email, context: Context) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            blocks.wait(60)

    consumer, runners, outcomes = of_async(store, handler, timeout=0.1)
    publish(store, 1)
    runners.put(consumer.take(8))

    def noticed() -> bool:
        runners.look_for_late()
        return runners.shutdown.requested

    until(noticed, 20, "the worker is told to end")
    blocks.set()
    assert len(outcomes) == 1
    assert "blocks the event loop" in runners.shutdown.reason


async def stops_the_loop() -> None:
    asyncio.get_running_loop().stop()


async def exits() -> None:
    sys.exit(0)


@pytest.mark.parametrize("end", [stops_the_loop, exits])
def test_the_end_of_the_event_loop_is_the_end_of_the_worker(store: Store, end: Any) -> None:
    """No later mail would be handled. In a task that the handler left behind."""
    left = []

    async def handler(email: Email, context: Context) -> None:
        left.append(asyncio.create_task(end()))

    consumer, runners, _ = of_async(store, handler)
    publish(store, 1)
    runners.put(consumer.take(8))
    until(lambda: runners.shutdown.requested, 10, "the worker is told to end")
    assert (runners.shutdown.reason, runners.shutdown.exit_code) == ("thread handler-loop died", 1)
