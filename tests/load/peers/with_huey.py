"""Huey over Redis (it takes a task off the list before it runs: a kill loses it). Run by `huey_consumer with_huey.huey -w 4`."""

import os

from huey import RedisHuey

huey = RedisHuey("bench", url=os.environ["BENCH_REDIS"], results=False)


@huey.task()
def no_op(text: str) -> None:
    """Returns at once."""


def fill(count: int, size: int) -> None:
    for _ in range(count):
        no_op("x" * size)
