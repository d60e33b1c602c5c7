"""A pipeline for each test: real daemons between a mail server and a Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.sandbox.server import Sandbox
from tests.support.pipeline import Pipeline
from tests.support.servers import RedisServer


@pytest.fixture(params=["redis7", "valkey"])
def either_redis(request: pytest.FixtureRequest) -> RedisServer:
    """Debian's Redis 7.0, then Valkey: empty."""
    server: RedisServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=[pytest.param("redis7", marks=pytest.mark.full), "valkey"])
def valkey_first(request: pytest.FixtureRequest) -> RedisServer:
    """The same for long tests of what both answer alike: Redis 7.0 only with --all."""
    server: RedisServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def pipeline(sandbox: Sandbox, valkey: RedisServer, tmp_path: Path) -> Pipeline:
    """From a sandbox Gmail into Valkey."""
    return Pipeline(sandbox, valkey, tmp_path)
