"""The names of keys: fixed, since users and other versions read them."""

from __future__ import annotations

import pytest

from src.common.keys import Keys, day_of, open_field


def test_the_keys_beside_the_stream() -> None:
    """One server: `<stream>:<suffix>`."""
    keys = Keys("email_ingestion_stream")
    assert {
        keys.stream,
        keys.index,
        keys.starts,
        keys.tries,
        keys.due,
        keys.dlq,
        keys.results,
        keys.open,
    } == {
        "email_ingestion_stream",
        *(f"email_ingestion_stream:{name}" for name in ("index", "starts", "tries", "due", "dlq", "results", "open")),
    }


def test_the_state_keys_that_users_read() -> None:
    """`redis-cli GET "producer_state:{user}:INBOX:last_uid"`."""
    own = Keys("s").mailbox("me@example.org", "INBOX")
    start = "producer_state:me@example.org:INBOX:"
    assert [own.last_uid, own.uidvalidity, own.last_poll, own.email_count, own.intake] == [
        start + name for name in ("last_uid", "uidvalidity", "last_poll", "email_count", "intake")
    ]


@pytest.mark.parametrize(("date", "day"), [("2026-01-31T23:59:59Z", "20260131"), ("", "undated")])
def test_processed_sets_and_open_counts_are_by_internaldate_day(date: str, day: str) -> None:
    """One set per account and day; one count per account, mailbox and day."""
    assert day_of(date) == day
    assert Keys("s").processed("a@b", date) == f"s:processed:a@b:{day}"
    assert open_field("a@b", "[Gmail]/All Mail", date) == f"a@b|[Gmail]/All Mail|{day}"


def test_the_bytes_of_a_day_are_counted_per_account() -> None:
    assert Keys("s").bytes_read("a@b", "2026-01-31T23:59:59Z") == "producer_state:a@b:bytes:20260131"
