"""Servers shared by the tests of one pytest process (under pytest-xdist each worker process has its own)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from src.sandbox.server import Sandbox
from tests.support.servers import Dovecot, RedisServer, have_dovecot, have_redis, need


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run also the tests marked full (as does TEST_ALL=1)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or os.environ.get("TEST_ALL") == "1":
        return
    full = [item for item in items if item.get_closest_marker("full")]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]


@pytest.fixture(scope="session")
def valkey_of_session() -> Iterator[RedisServer]:
    with RedisServer("valkey") as server:
        yield server


@pytest.fixture(scope="session")
def redis7_of_session() -> Iterator[RedisServer]:
    need(have_redis(), "redis-server")
    with RedisServer("redis") as server:
        yield server


@pytest.fixture
def valkey(valkey_of_session: RedisServer) -> RedisServer:
    """A running Valkey with an empty database. Tests that stop or configure a server start their own RedisServer."""
    valkey_of_session.client().flushall()
    return valkey_of_session


@pytest.fixture
def redis7(redis7_of_session: RedisServer) -> RedisServer:
    """A running Redis 7.0 with an empty database."""
    redis7_of_session.client().flushall()
    return redis7_of_session


@pytest.fixture(scope="session")
def dovecot() -> Iterator[Dovecot]:
    """A running Dovecot. Mail of other tests stays in it: use an account of your own."""
    need(have_dovecot(), "dovecot-imapd")
    with Dovecot() as server:
        yield server


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A fresh, empty sandbox Gmail."""
    with Sandbox() as server:
        yield server
