"""The sets of finished mail, counted, asked and cleared; on Redis 7.0 and Valkey (fakeredis has no MEMORY USAGE)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.worker import processed
from tests.support.fake import STREAM, Store
from tests.support.servers import RedisServer

A, B, COLON = "a@x.org", "b*@x.org", "a@x.org:z"


@pytest.fixture(params=["redis7", "valkey"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    server: RedisServer = request.getfixturevalue(request.param)
    with RedisClient.connect(server.url, max_connections=10, socket_timeout=10) as client:
        yield Store(client)


def fill(store: Store) -> None:
    for account, day, members in (
        (A, "20260130", range(1, 4)),
        (A, "20260131", range(5)),
        (A, "undated", range(1)),
        (B, "20260131", range(2)),
        ("bb@x.org", "20260131", range(1)),
        (COLON, "20260131", range(7)),
    ):
        store.redis.call("SADD", store.keys.processed_day(account, day), *members)
    store.redis.call("SADD", "stream2:processed:a@x.org:20260131", 1)
    store.redis.call("SADD", "stream:processed:a@x.org:20260131:other", 1)
    store.redis.call("EXPIRE", store.keys.processed_day(A, "20260130"), 1000)


def test_days_are_counted_by_account(store: Store) -> None:
    """Mails, bytes and time left of each set; sets of another stream or form are none; * in a name is a letter."""
    fill(store)
    rows = {(row.account, row.day): row for row in processed.days(store.redis, store.keys)}
    assert {place: row.mails for place, row in rows.items()} == {
        (A, "20260130"): 3,
        (A, "20260131"): 5,
        (A, "undated"): 1,
        (B, "20260131"): 2,
        ("bb@x.org", "20260131"): 1,
        (COLON, "20260131"): 7,
    }
    assert 990 <= rows[A, "20260130"].seconds <= 1000
    assert rows[A, "20260131"].seconds == -1
    assert all(row.bytes > 0 for row in rows.values())
    assert {(row.account, row.day) for row in processed.days(store.redis, store.keys, B)} == {(B, "20260131")}
    assert {row.day for row in processed.days(store.redis, store.keys, A)} == {"20260130", "20260131", "undated"}


def test_a_mail_is_looked_for_in_its_account_only(store: Store) -> None:
    """On a day, or on all of them; a mail may stand under two days where a server changed its mind."""
    fill(store)

    def ask(email_id: str, days: list[str] | None = None) -> list[str]:
        return processed.days_of(store.redis, store.keys, email_id, days)

    assert ask(f"gm:{A}:2") == ["20260130", "20260131"]
    assert ask(f"gm:{A}:2", ["20260130"]) == ["20260130"]
    assert ask(f"gm:{A}:2", ["20260201"]) == []
    assert ask(f"gm:{A}:99") == []
    assert ask(f"gm:{COLON}:6") == ["20260131"]
    with pytest.raises(ValueError, match="no valid email_id"):
        ask("nonsense")


def test_cleared_sets_are_gone_the_others_stay(store: Store) -> None:
    """Twice: the second time nothing is there."""
    fill(store)
    chosen = list(processed.days(store.redis, store.keys, B))
    assert processed.clear(store.redis, chosen) == 1
    assert processed.clear(store.redis, chosen) == 0
    assert {account for _, account, _ in processed.sets(store.redis, store.keys, None)} == {A, "bb@x.org", COLON}


def test_sets_are_found_over_many_pages_each_once(store: Store) -> None:
    """More keys than one SCAN returns."""
    wanted = {(f"u{n}@x.org", f"2026{n % 12 + 1:02}01") for n in range(2500)}
    for account, day in wanted:
        store.redis.call("SADD", store.keys.processed_day(account, day), 1)
    found = [(account, day) for _, account, day in processed.sets(store.redis, store.keys, None)]
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_a_stream_named_with_glob_characters_finds_its_own(store: Store) -> None:
    """`s*` is not every stream that begins with s."""
    store.redis.call("SADD", f"{STREAM}:processed:{A}:20260131", 1)
    store.redis.call("SADD", f"s*:processed:{A}:20260131", 1)
    assert [key for key, _, _ in processed.sets(store.redis, Keys("s*"), None)] == [f"s*:processed:{A}:20260131"]
