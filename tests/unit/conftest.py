"""The store of the transitions' tests: each test that asks for it runs on fakeredis and on real Valkey."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from src.common.redis_client import RedisClient
from tests.support.fake import FakeTransport, Store
from tests.support.servers import RedisServer


@pytest.fixture(params=["fakeredis", "valkey"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "fakeredis":
        client = RedisClient(FakeTransport())
    else:
        server: RedisServer = request.getfixturevalue("valkey")
        client = RedisClient.connect(server.url, max_connections=10, socket_timeout=10)
    with client:
        yield Store(client)
