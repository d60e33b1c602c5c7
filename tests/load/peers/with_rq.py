"""RQ, a fork for each job as it comes. Run by `rq worker`."""

import os

import redis
from rq import Queue


def no_op(text: str) -> None:
    """Returns at once."""


def fill(count: int, size: int) -> None:
    jobs = Queue("bench", connection=redis.Redis.from_url(os.environ["BENCH_REDIS"]))
    jobs.enqueue_many([Queue.prepare_data("with_rq.no_op", ("x" * size,), result_ttl=0) for _ in range(count)])
