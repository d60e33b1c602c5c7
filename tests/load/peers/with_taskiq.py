"""taskiq over a Redis Stream. Run by `taskiq worker with_taskiq:broker --workers 1`."""

import asyncio
import os

from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(os.environ["BENCH_REDIS"], queue_name="bench", consumer_group_name="g", consumer_id="0")


@broker.task
async def no_op(text: str) -> None:
    """Returns at once."""


def fill(count: int, size: int) -> None:
    async def send() -> None:
        await broker.startup()
        for _ in range(count):
            await no_op.kiq("x" * size)
        await broker.shutdown()

    asyncio.run(send())
