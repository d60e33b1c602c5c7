"""FastStream over a Redis Stream, in batches of 100. Run by `faststream run with_faststream:app`."""

import asyncio
import os

import redis
from faststream import FastStream
from faststream.redis import RedisBroker, StreamSub

broker = RedisBroker(os.environ["BENCH_REDIS"])
app = FastStream(broker)


@broker.subscriber(stream=StreamSub("bench", group="g", consumer="c", batch=True, max_records=100, last_id=">"))
async def no_op(batch: list[str]) -> None:
    """Returns at once."""


def fill(count: int, size: int) -> None:
    asyncio.run(_publish(count, size))
    redis.Redis.from_url(os.environ["BENCH_REDIS"]).xgroup_create("bench", "g", "0")


async def _publish(count: int, size: int) -> None:
    async with broker:
        for first in range(0, count, 50):
            await asyncio.gather(*(broker.publish("x" * size, stream="bench") for _ in range(first, min(first + 50, count))))
