"""scripts/trace.py: each place where a mail may be, and its lines in log files."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from src.common.exceptions import ConfigurationError
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.mail.record import member_of
from tests.support.fake import GROUP, Store, fields_of, flat

for name in ("_path", "_command"):
    sys.modules[name] = importlib.import_module(f"scripts.{name}")  # its own folder is not on our path
script = importlib.import_module("scripts.trace")
Event, log_lines, show, trace = script.Event, script.log_lines, script.show, script.trace

ID = "gm:a:1850000000000000003"
RECORD = json.dumps(
    {"traceparent": "00-1-2-01", "size": 99, "ingested_at": "2026-01-31T08:00:01Z", "defects": [], "body_text": "s3cret"}
)


def put(store: Store, **more: str) -> str:
    """The mail stands in the stream; its stream id."""
    fields = fields_of(ID, **{"subject": "Hello\x1b[2J", "record": RECORD, **more})
    stream_id: str = store.redis.call("XADD", store.keys.stream, "1769846402000-0", *flat(fields))
    store.redis.call("HSET", store.keys.index, ID, f"S:{stream_id}")
    return stream_id


def whats(store: Store) -> tuple[str, list[str]]:
    found = trace(store.redis, store.keys, GROUP, ID)
    return found.state, [event.what for event in found.events]


def test_in_the_stream_before_any_worker_came(store: Store) -> None:
    """Where from, when, under which correlation id and trace; nothing of the body."""
    put(store)
    found = trace(store.redis, store.keys, GROUP, ID)
    assert (found.state, found.correlation_id, found.traceparent) == ("in the stream", f"c{ID}", "00-1-2-01")
    assert found.events == [
        Event("2026-01-31T00:00:00Z", "received", "a/INBOX, UID 1850000000000000003, 99 bytes"),
        Event("2026-01-31T08:00:01Z", "ingested"),
        Event("2026-01-31T08:00:02Z", "published", "as 1769846402000-0 in stream"),
    ]
    shown = show(found)
    assert "s3cret" not in shown
    assert "\x1b" not in shown


def test_in_a_workers_hands_then_due(store: Store) -> None:
    """Who has it and since which delivery; what failed so far; when it is due."""
    stream_id = put(store)
    store.redis.call("XGROUP", "CREATE", store.keys.stream, GROUP, "0")
    store.redis.read_new(store.keys.stream, GROUP, "w1", count=1, block_ms=1)
    store.redis.call("HSET", store.keys.starts, ID, f"0|{stream_id}:1")
    found = trace(store.redis, store.keys, GROUP, ID)
    assert found.state == "in flight"
    assert [event.what for event in found.events[3:]] == ["started", "in flight"]
    assert found.events[4].detail.startswith("with w1, delivery 1, 0.")
    store.redis.call("XACK", store.keys.stream, GROUP, stream_id)
    store.redis.call("HDEL", store.keys.starts, ID)
    store.redis.call("HSET", store.keys.tries, ID, "2|1")
    store.redis.call("ZADD", store.keys.due, 1769846500000, f"{stream_id}|{ID}")
    found = trace(store.redis, store.keys, GROUP, ID)
    assert found.state == "due"
    assert found.events[3:] == [
        Event("", "failed", "attempts so far: 2"),
        Event("2026-01-31T08:01:40Z", "due", "for its next attempt"),
    ]


def test_dead_with_its_reason(store: Store) -> None:
    notes = {"dead_reason": "attempts", "dead_error_type": "ValueError", "dead_error": "no", "dead_attempts": "8"}
    notes |= {"dead_at": "2026-01-31T09:00:00Z", "dead_worker": "w1"}
    store.redis.call("XADD", store.keys.dlq, "5-0", *flat(fields_of(ID, record=RECORD, **notes)))
    store.redis.call("HSET", store.keys.index, ID, "D:5-0")
    found = trace(store.redis, store.keys, GROUP, ID)
    assert found.state == "dead"
    assert found.events[-1] == Event(
        "2026-01-31T09:00:00Z", "dead", "attempts: ValueError: no (failed attempts: 8, in w1); dead letter 5-0"
    )


def test_done_with_its_result_and_day(store: Store) -> None:
    """The entry is gone: the log of results (however long) and the processed set tell."""
    for number in range(1, 2003):
        email_id = ID if number == 2001 else f"gm:a:{number}"
        store.redis.call("XADD", store.keys.results, f"{number}000-0", "email_id", email_id, "outcome", "done", "result", "{}")
    store.redis.call("SADD", store.keys.processed("a", "2026-01-31"), member_of(ID))
    store.redis.call("SADD", store.keys.processed("a", "2026-02-01"), "5")
    found = trace(store.redis, store.keys, GROUP, ID)
    assert found.state == "done"
    assert found.events == [
        Event("1970-01-01T00:33:21Z", "done", "{}"),
        Event("", "processed", "its id stands among those of 20260131"),
    ]


def test_only_its_processed_id_is_left(store: Store) -> None:
    """The results were trimmed long ago."""
    store.redis.call("SADD", store.keys.processed("a", ""), member_of(ID))
    assert whats(store) == ("done", ["processed"])


def test_an_index_that_dangles_and_a_mail_nobody_knows(store: Store) -> None:
    assert whats(store) == ("unknown", [])
    store.redis.call("HSET", store.keys.index, ID, "S:7-0")
    assert whats(store) == ("unknown", ["dangling"])


@pytest.mark.parametrize("record", ["[]", "null", '"x"'])
def test_a_record_that_is_no_object(store: Store, record: str) -> None:
    """Somebody else wrote it: what its fields say is shown all the same."""
    put(store, record=record, account="a", mailbox="INBOX")
    assert whats(store) == ("in the stream", ["received", "ingested", "published"])


def test_what_is_no_email_id_is_refused(store: Store) -> None:
    with pytest.raises(ConfigurationError, match="foreign:1-0 is no email_id"):
        trace(store.redis, Keys("s"), GROUP, "foreign:1-0")


def test_nothing_is_written(store: Store) -> None:
    put(store)
    before = store.content()
    trace(RedisClient(store.redis._transport), store.keys, GROUP, ID)
    assert store.content() == before


# log files


def line(at: str, message: str, correlation_id: str = "") -> str:
    return json.dumps({"timestamp": at, "message": message, "correlation_id": correlation_id})


def test_lines_of_a_mail_in_order_of_time_over_all_files(tmp_path: Path) -> None:
    """By its correlation id and by its email_id; also where only a line that names the mail knows the correlation id."""
    a, b = tmp_path / "producer.log", tmp_path / "worker.log"
    one, two = line("2026-01-31T08:00:01+00:00", f"UID 3 is {ID}", "c1"), line("2026-01-31T08:00:03+00:00", "said", "c1")
    three = line("2026-01-31T08:00:02+00:00", f"attempt 1 of {ID} failed")
    other = [line("2026-01-31T08:00:02+00:00", f"about {ID}4", "c2"), line("2026-01-31T08:00:02+00:00", "x", "c2"), "{", "7"]
    a.write_text("\n".join([two, *other, one]))
    b.write_text("\n".join([three, *other]))
    for known in ("c1", ""):
        assert log_lines([a, b], ID, known) == [one, three, two]
    assert log_lines([b], ID, "") == [three]


def test_text_lines_too(tmp_path: Path) -> None:
    """LOG_FORMAT=text: the id at the end of the line."""
    path = tmp_path / "log"
    mine = ["08:00:01 INFO    hello  correlation_id=c1", f"08:00:02 ERROR   {ID} is dead after 1 attempt (Permanent: no)"]
    path.write_text("\n".join([mine[1], "08:00:01 INFO    other  correlation_id=c11", mine[0]]))
    assert log_lines([path], ID, "c1") == mine


def test_a_log_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--log .*none: No such file"):
        log_lines([tmp_path / "none"], ID, "")
