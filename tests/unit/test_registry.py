"""Which daemons there are: heartbeats, silence, leaving; on fakeredis and Valkey, and at maxmemory."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import pytest

from src import VERSION
from src.common import registry
from src.common.exceptions import RedisFull
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.registry import FORGET_SECONDS, SILENT_SECONDS, News, Registration, registered
from tests.support.daemons import ROOT
from tests.support.fake import Store
from tests.support.servers import RedisServer

PRODUCER = Registration("producer", "host-1-aa", "http://127.0.0.1:8080", "0.1.0", "host", 1, "2026-01-31T00:00:00Z")
WORKER = replace(PRODUCER, role="worker", name="host-2-bb", pid=2, address="http://127.0.0.1:8081")


def test_the_version_is_that_of_the_project() -> None:
    """The one in pyproject.toml."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def age(store: Store, daemon: Registration, seconds: float) -> None:
    """The last heartbeat of `daemon` was so long ago."""
    now = int(store.redis.call("TIME")[0])
    entry = json.dumps(vars(daemon))
    store.redis.call("HSET", store.keys.daemons, daemon.name, f"{int((now - seconds) * 1000)}|{entry}")


def test_daemons_are_seen_until_they_leave(store: Store) -> None:
    """By role and name, however often they beat."""
    for daemon in (WORKER, PRODUCER, WORKER):
        registry.register(store.redis, store.keys, daemon)
    found = registered(store.redis, store.keys)
    assert [seen.daemon for seen in found] == [PRODUCER, WORKER]
    assert all(seen.alive and seen.silent < 10 for seen in found)
    registry.leave(store.redis, store.keys, PRODUCER)
    registry.leave(store.redis, store.keys, PRODUCER)
    assert [seen.daemon for seen in registered(store.redis, store.keys)] == [WORKER]


def test_a_silent_daemon_is_seen_as_silent_for_a_day(store: Store) -> None:
    """By the server's clock; the next heartbeat of anybody removes what is older than a day."""
    dead, old = replace(WORKER, name="dead"), replace(WORKER, name="old")
    age(store, dead, SILENT_SECONDS + 10)
    age(store, old, FORGET_SECONDS + 10)
    registry.register(store.redis, store.keys, PRODUCER)
    found = {seen.daemon.name: seen for seen in registered(store.redis, store.keys)}
    assert set(found) == {PRODUCER.name, "dead"}
    assert (found[PRODUCER.name].alive, found["dead"].alive) == (True, False)
    assert SILENT_SECONDS < found["dead"].silent < SILENT_SECONDS + 60


def test_a_heartbeat_carries_news_within_bounds(store: Store) -> None:
    """Reasons and counts; what is too much of them is cut. What a later version adds is passed over, what an earlier one lacks is empty."""
    news = News(("it rains",) * 30 + ("x",), {"done": 3})
    registry.register(store.redis, store.keys, PRODUCER, replace(news, why=("y" * 9_999, *news.why)))
    [seen] = registered(store.redis, store.keys)
    assert (len(seen.news.why), len(seen.news.why[0]), seen.news.why[1], seen.news.counts) == (20, 500, "it rains", {"done": 3})
    beat = f"{store.redis.call('TIME')[0]}000|"
    store.redis.call("HSET", store.keys.daemons, "new", beat + json.dumps({**vars(PRODUCER), "name": "new", "mood": "good"}))
    assert [(one.daemon.name, one.news) for one in registered(store.redis, store.keys) if one.daemon != PRODUCER] == [
        ("new", News())
    ]


def test_entries_of_another_version_are_left_out(store: Store) -> None:
    """They do not keep the others from being seen."""
    registry.register(store.redis, store.keys, PRODUCER)
    for name, entry in {"a": "garbage", "b": "1|{}", "c": "x|{}", "d": "1|[1]"}.items():
        store.redis.call("HSET", store.keys.daemons, name, entry)
    assert [seen.daemon for seen in registered(store.redis, store.keys)] == [PRODUCER]


@pytest.mark.parametrize("binary", ["valkey", "redis7"])
def test_a_heartbeat_works_at_maxmemory(binary: str, request: pytest.FixtureRequest) -> None:
    """A plain write is refused, the heartbeat is not, and neither is leaving."""
    server: RedisServer = request.getfixturevalue(binary)
    keys = Keys("stream")
    with RedisClient.connect(server.url, max_connections=4, socket_timeout=10) as redis:
        redis.call("CONFIG", "SET", "maxmemory", 1)
        try:
            with pytest.raises(RedisFull):
                redis.call("SET", "k", "v")
            registry.register(redis, keys, PRODUCER)
            assert [seen.daemon for seen in registered(redis, keys)] == [PRODUCER]
            registry.leave(redis, keys, PRODUCER)
            assert registered(redis, keys) == []
        finally:
            redis.call("CONFIG", "SET", "maxmemory", 0)
