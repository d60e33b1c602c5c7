"""Dramatiq over Redis, one process of eight threads. Run by `dramatiq with_dramatiq -p 1`."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["BENCH_REDIS"]))


@dramatiq.actor(queue_name="bench")
def no_op(text: str) -> None:
    """Returns at once."""


def fill(count: int, size: int) -> None:
    for _ in range(count):
        no_op.send("x" * size)
