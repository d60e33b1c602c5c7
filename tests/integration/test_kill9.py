"""kill -9 of producer and workers under load, again and again: every mail in exactly one place, results exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from src.sandbox.server import Sandbox
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import RedisServer
from tests.support.wait import until

MAILS = 40  # a round
SEED = 7
ORDERS = ("slow 20", "slow 20", "fine", "fail 1", "fail 2", "permanent")
IMPATIENT = {"PRODUCER_BATCH_SIZE": "4", "LEASE_SECONDS": "2", "PRODUCER_LEASE": "1", "MAX_ATTEMPTS": "4"}


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=[pytest.mark.full, pytest.mark.timeout(600)])])
def test_kill9_under_load(pipeline: Pipeline, kills: int) -> None:
    """Each round delivers mail and kills one daemon in the middle of it: producer, first worker, second worker in turn."""
    draw = random.Random(SEED)
    starts: list[Callable[..., Daemon]] = [pipeline.producer, pipeline.worker, pipeline.worker]
    dead: dict[str, str] = {}
    with ExitStack() as stack:
        running = [stack.enter_context(start(**IMPATIENT)) for start in starts]
        pipeline.wait_for_first_poll()
        for number in range(kills):
            victim = number % len(starts)
            before = len(pipeline.delivered)
            fresh = deliver_round(pipeline, draw, dead)
            at = draw.randrange(1, MAILS // 2)
            if victim == 0:
                pipeline.wait_for_uid(before + at)
            else:
                wait_for_begun(pipeline, set(fresh), at)
            running[victim].kill9()
            running[victim] = stack.enter_context(starts[victim](**IMPATIENT))
        pipeline.wait_until_settled(timeout=120)
        assert [daemon.terminate() for daemon in running] == [0, 0, 0]
    assert len(pipeline.delivered) == kills * MAILS
    pipeline.assert_accounted(dead=dead)
    assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:email_count") == str(kills * MAILS)


def deliver_round(pipeline: Pipeline, draw: random.Random, dead: dict[str, str]) -> list[str]:
    """MAILS mails with orders drawn at random; those to be buried are added to `dead`. Their email_ids."""
    orders = [draw.choice(ORDERS) for _ in range(MAILS)]
    fresh = pipeline.deliver(*orders)
    dead |= {email_id: "permanent" for email_id, order in zip(fresh, orders, strict=True) if order == "permanent"}
    return fresh


def wait_for_begun(pipeline: Pipeline, email_ids: set[str], count: int) -> None:
    """Wait until `count` of these mails have been begun."""
    until(lambda: len(email_ids & {line.email_id for line in pipeline.lines("begin")}) >= count, DEADLINE, f"{count} begun")


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_everything_goes_wrong_at_once(sandbox: Sandbox, tmp_path: Path, seed: int) -> None:
    """Two producers, two workers: each round kills a daemon, the Redis server or every IMAP session, or renumbers the folder."""
    draw = random.Random(seed)
    with RedisServer("valkey", appendonly=True) as server, ExitStack() as stack:
        pipeline = Pipeline(sandbox, server, tmp_path, **IMPATIENT)
        starts: list[Callable[[], Daemon]] = [pipeline.producer, pipeline.producer, pipeline.worker, pipeline.worker]
        running = [stack.enter_context(start()) for start in starts]

        def kill(victim: int) -> None:
            running[victim].kill9()
            running[victim] = stack.enter_context(starts[victim]())

        def restart_redis() -> None:
            server.kill9()
            server.start()

        mishaps: list[Callable[[], object]] = [partial(kill, victim) for victim in range(4)]
        mishaps += [restart_redis, sandbox.cut, pipeline.change_uidvalidity, partial(sandbox.faults.drop_after_bytes, 5_000)]
        pipeline.wait_for_first_poll()
        dead: dict[str, str] = {}
        for number in range(24):
            fresh = deliver_round(pipeline, draw, dead)
            wait_for_begun(pipeline, set(fresh), draw.randrange(1, MAILS // 2))
            mishaps[number % len(mishaps)]()
        pipeline.wait_until_settled(timeout=120)
        pipeline.assert_accounted(dead=dead)
        assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:email_count") == str(24 * MAILS)
