"""Celery with Redis as its broker, results ignored, late acknowledgement (its at-least-once). Run by `celery -A with_celery worker`."""

import os

from celery import Celery

app = Celery("bench", broker=os.environ["BENCH_REDIS"])
app.conf.update(task_ignore_result=True, task_acks_late=True, worker_hijack_root_logger=False)


@app.task(name="no_op")
def no_op(text: str) -> None:
    """Returns at once."""


def fill(count: int, size: int) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        for _ in range(count):
            no_op.apply_async(("x" * size,), producer=producer)
