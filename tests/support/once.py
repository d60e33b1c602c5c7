"""`producer.py --once` within the process of the test: the same objects, without a process to start and without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date

from config.accounts import load_accounts
from config.settings import load_settings
from src.common.clock import SYSTEM, Clock
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.producer.daemon import Producer, accesses
from tests.support.inline import HurriedShutdown, a_second_a_look, hurried_breakers
from tests.support.pipeline import DEADLINE, Pipeline


def read_once(pipeline: Pipeline, *, mailboxes: tuple[str, ...] = (), resync_from: date | None = None, **env: str) -> int:
    """Read what is there now, with the pipeline's settings and `env`; every wait ends at once. The exit code.

    Raises what `Producer.run_once` raises. What is logged goes to caplog.
    """
    return _read(pipeline, mailboxes, resync_from, HurriedShutdown(), SYSTEM, env)


@contextmanager
def reading(pipeline: Pipeline, **env: str) -> Iterator[Future[int]]:
    """`read_once` in a thread, on a clock that goes a second with each look, until the context ends."""
    shutdown = HurriedShutdown()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_read, pipeline, (), None, shutdown, a_second_a_look(), env)
        try:
            yield future
        finally:
            shutdown.request("the test is over")
        future.result(DEADLINE)


def _read(
    pipeline: Pipeline,
    mailboxes: tuple[str, ...],
    resync_from: date | None,
    shutdown: Shutdown,
    clock: Clock,
    env: dict[str, str],
) -> int:
    flags: dict[str, object] = {
        "TOKEN_DIR": pipeline.tmp / "tokens",
        "DATA_DIR": pipeline.tmp / "data",
        **pipeline.env,
        **({"MAILBOXES": mailboxes} if mailboxes else {}),
        **env,
    }
    settings = load_settings(flags, env_file=None)
    breakers = hurried_breakers()
    found = accesses(load_accounts(settings.mail), SYSTEM, breakers=breakers)
    with RedisClient.connect(pipeline.redis.url, max_connections=10, socket_timeout=10) as redis:
        producer = Producer(settings, found, redis, shutdown, clock, breakers)
        if resync_from:
            producer.ask_for(resync_from)
        producer.run_once()
    return shutdown.exit_code
