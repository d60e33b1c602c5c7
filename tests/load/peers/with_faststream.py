"""FastStream over a Redis Stream, in batches of 100. Run by `faststream run with_faststream:app`."""

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
    client = redis.Redis.from_url(os.environ["BENCH_REDIS"])
    pipe = client.pipeline(transaction=False)
    for number in range(count):
        pipe.xadd("bench", {"__data__": "x" * size})
        if number % 1000 == 999:
            pipe.execute()
    pipe.execute()
    client.xgroup_create("bench", "g", "0")
