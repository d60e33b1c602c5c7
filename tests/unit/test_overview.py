"""The stream in numbers: on fakeredis and Valkey, on real data; what is known stays known."""

from __future__ import annotations

import pytest
import redis

from src.common import registry
from src.common.exceptions import RedisUnavailable
from src.common.keys import Keys
from src.common.overview import Overview, Survey, look
from src.common.redis_client import RedisClient
from src.common.registry import Registration
from tests.support import acl
from tests.support.fake import GROUP, Content, Store, fields_of
from tests.support.servers import RedisServer

ME = Registration("producer", "host-1-aa", "http://127.0.0.1:8080", "0.1.0", "host", 1, "2026-01-31T00:00:00Z")

FULL: Content = {
    "stream": {"1-0": "gm:a:1", "2-0": "gm:a:2", "3-0": "gm:a:3", "4-0": "gm:a:4", "5-0": "gm:a:5", "6-0": "gm:a:6"},
    "pending": {"1-0": ("w1", 1), "3-0": ("w2", 4)},
    "due": {"2-0|gm:a:2"},
    "dlq": [("gm:a:7", "permanent", "1"), ("gm:a:8", "attempts", "8")],
}


def test_nothing_is_there_yet(store: Store) -> None:
    """No stream, no group: all zero."""
    assert look(store.redis, store.keys, GROUP) == Overview(0, 0, 0, 0, 0, 0.0)


def test_where_mail_stands(store: Store) -> None:
    """Live = unread + in flight + waiting; dead letters and results beside it; the age is that of the first entry."""
    store.put(FULL)
    store.redis.call("XADD", store.keys.results, "*", "email_id", "gm:a:9")
    seen = look(store.redis, store.keys, GROUP)
    assert (seen.live, seen.unread, seen.in_flight, seen.waiting) == (6, 3, 2, 1)
    assert (seen.dead, seen.results) == (2, 1)
    [now, _] = store.redis.call("TIME")
    assert abs(seen.oldest - int(now)) < 60, "the entry 1-0 is of 1970"


def test_the_oldest_age_is_by_the_servers_clock(store: Store) -> None:
    """A mail that has just been published is some seconds old at most, and never younger than nothing."""
    store.redis.call("XADD", store.keys.stream, "*", *[part for pair in fields_of("gm:a:1").items() for part in pair])
    assert 0.0 <= look(store.redis, store.keys, GROUP).oldest < 60


def test_a_stream_without_its_group_is_all_unread(store: Store) -> None:
    store.add("1-0", fields_of("gm:a:1"))
    seen = look(store.redis, store.keys, GROUP)
    assert (seen.live, seen.unread, seen.in_flight) == (1, 1, 0)


def test_a_survey_keeps_what_it_last_saw() -> None:
    """Redis is away: the outage is raised, the numbers and the daemons stay; back, they are new."""
    with (
        RedisServer("valkey", appendonly=True) as server,
        RedisClient.connect(server.url, max_connections=4, socket_timeout=10) as client,
    ):
        store, survey = Store(client), Survey(client, Keys("stream"), GROUP)
        assert (survey.overview, survey.daemons) == (None, [])
        store.put(FULL)
        registry.register(client, store.keys, ME)
        survey.take()
        seen = survey.overview
        assert seen and seen.live == 6
        assert [found.daemon for found in survey.daemons] == [ME]
        server.kill9()
        with pytest.raises(RedisUnavailable):
            survey.take()
        assert survey.overview == seen
        assert [found.daemon for found in survey.daemons] == [ME]
        server.start()
        client.call("DEL", store.keys.stream)
        survey.take()
        assert survey.overview and survey.overview.live == 0


def test_a_survey_that_redis_refuses_is_one_line_and_no_end(valkey: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A user of an older docs/security.md, without ZCARD: one warning, nothing known, nothing raised; allowed again, it is."""
    admin = valkey.client()
    acl.make_users(admin)
    admin.execute_command("ACL", "SETUSER", "producer", "-zcard")
    try:
        with RedisClient.connect(acl.as_user(valkey.url, "producer"), max_connections=4, socket_timeout=10) as client:
            survey = Survey(client, Keys("email_ingestion_stream"), GROUP)
            survey.take()
            survey.take()
            assert survey.overview is None
            assert [record.message.partition(":")[0] for record in caplog.records] == [
                "the stream cannot be counted for the metrics"
            ]
            admin.execute_command("ACL", "SETUSER", "producer", "+zcard")
            survey.take()
            assert survey.overview == Overview(0, 0, 0, 0, 0, 0.0)
    finally:
        if not acl.EVERYWHERE:
            admin.execute_command("ACL", "DELUSER", "producer", "worker", "operator")


def test_what_a_survey_raises_is_an_outage_only() -> None:
    """An error of the connection goes on to whoever asked, for the look at Redis to count."""

    class Lost:
        def execute_command(self, *args: object) -> object:
            raise redis.ConnectionError("lost")

        def close(self) -> None: ...

    with pytest.raises(RedisUnavailable, match="lost"):
        Survey(RedisClient(Lost()), Keys("stream"), GROUP).take()
