"""The stream in numbers: on fakeredis and Valkey, on real data."""

from __future__ import annotations

from src.common.overview import Overview, look
from tests.support.fake import GROUP, Content, Store, fields_of

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
