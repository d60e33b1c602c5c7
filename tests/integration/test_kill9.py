"""kill -9 of producer and workers under load, again and again: every mail in exactly one place, results exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.wait import until

MAILS = 40  # a round
SEED = 7


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=[pytest.mark.full, pytest.mark.timeout(600)])])
def test_kill9_under_load(pipeline: Pipeline, kills: int) -> None:
    """Each round delivers mail and kills one daemon in the middle of it: producer, first worker, second worker in turn."""
    draw = random.Random(SEED)
    settings = {"PRODUCER_BATCH_SIZE": "4", "LEASE_SECONDS": "2", "PRODUCER_LEASE": "1", "MAX_ATTEMPTS": "4"}
    starts: list[Callable[..., Daemon]] = [pipeline.producer, pipeline.worker, pipeline.worker]
    dead: dict[str, str] = {}
    with ExitStack() as stack:
        running = [stack.enter_context(start(**settings)) for start in starts]
        pipeline.wait_for_first_poll()
        for number in range(kills):
            victim = number % len(starts)
            before = len(pipeline.delivered)
            subjects = [draw.choice(["slow 20", "slow 20", "fine", "fail 1", "fail 2", "permanent"]) for _ in range(MAILS)]
            fresh = pipeline.deliver(*subjects)
            dead |= {email_id: "permanent" for email_id, order in zip(fresh, subjects, strict=True) if order == "permanent"}
            at = draw.randrange(1, MAILS // 2)
            if victim == 0:
                pipeline.wait_for_uid(before + at)
            else:
                wait_for_begun(pipeline, set(fresh), at)
            running[victim].kill9()
            running[victim] = stack.enter_context(starts[victim](**settings))
        pipeline.wait_until_settled(timeout=120)
        assert [daemon.terminate() for daemon in running] == [0, 0, 0]
    assert len(pipeline.delivered) == kills * MAILS
    pipeline.assert_accounted(dead=dead)
    assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:email_count") == str(kills * MAILS)


def wait_for_begun(pipeline: Pipeline, email_ids: set[str], count: int) -> None:
    """Wait until `count` of these mails have been begun."""
    until(lambda: len(email_ids & {line.email_id for line in pipeline.lines("begin")}) >= count, DEADLINE, f"{count} begun")
