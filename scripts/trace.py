"""One mail's timeline: what Redis holds of it, and its lines in log files. `python scripts/trace.py --help`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import _path  # noqa: F401  # before the project's own modules
from _command import run_command
from config.settings import Settings
from src.common.clock import iso
from src.common.embedded import open_redis
from src.common.exceptions import ConfigurationError, GroupMissing
from src.common.keys import Keys
from src.common.redis_client import Fields, RedisClient
from src.common.shutdown import Shutdown
from src.mail.record import member_of, split_email_id

PAGE = 1000
TEXT_LINE = re.compile(r"^(\d\d:\d\d:\d\d) ")


@dataclass(frozen=True)
class Event:
    """`at`: ISO 8601 in UTC, "" where Redis keeps no time of it: it stands where it belongs."""

    at: str
    what: str
    detail: str = ""


@dataclass
class Trace:
    """`state`: in the stream, in flight, due, dead, done, discarded, unknown."""

    email_id: str
    state: str = "unknown"
    correlation_id: str = ""
    traceparent: str = ""
    subject: str = ""
    events: list[Event] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


def moment(milliseconds: str | float) -> str:
    """`1795461854996`, a stream id or a score as ISO 8601."""
    return iso(datetime.fromtimestamp(float(str(milliseconds).split("-")[0]) / 1000, UTC))


def trace(redis: RedisClient, keys: Keys, group: str, email_id: str) -> Trace:
    """Everything Redis knows of the mail. Reads only. Raises ConfigurationError for what is no email_id."""
    if split_email_id(email_id) is None:
        raise ConfigurationError(f"{email_id} is no email_id (gm:<account>:<number> or h:<account>:<hash>)")
    found = Trace(email_id)
    place = redis.call("HGET", keys.index, email_id) or ""
    kind, stream_id = place[:1], place[2:]
    entries = redis.entries(keys.stream if kind == "S" else keys.dlq, stream_id, stream_id, count=1) if place else []
    if entries:
        fields = entries[0][1]
        _intake(found, fields)
        if kind == "S":
            _unfinished(found, redis, keys, group, stream_id)
        else:
            _dead(found, stream_id, fields)
    elif place:
        found.events.append(Event("", "dangling", f"the index says {place}, where nothing stands"))
    _finished(found, redis, keys)
    return found


def _intake(found: Trace, fields: Fields) -> None:
    """The entry as the producer wrote it."""
    try:
        record = json.loads(fields.get("record", "{}"))
    except ValueError:
        record = None
    record = record if isinstance(record, dict) else {}  # what somebody else wrote is traced too
    found.correlation_id, found.subject = fields.get("correlation_id", ""), fields.get("subject", "")
    found.traceparent = record.get("traceparent", "")
    where = f"{fields.get('account')}/{fields.get('mailbox')}, UID {fields.get('uid')}, {record.get('size')} bytes"
    found.events.append(Event(fields.get("internal_date", ""), "received", where))
    found.events.append(Event(record.get("ingested_at", ""), "ingested", "; ".join(record.get("defects", []))))


def _unfinished(found: Trace, redis: RedisClient, keys: Keys, group: str, stream_id: str) -> None:
    email_id, events = found.email_id, found.events
    events.append(Event(moment(stream_id), "published", f"as {stream_id} in {keys.stream}"))
    found.state = "in the stream"
    failed = redis.call("HGET", keys.tries, email_id)
    if failed:
        events.append(Event("", "failed", f"attempts so far: {failed.split('|')[0]}"))
    start = redis.call("HGET", keys.starts, email_id)
    if start:
        solo, _, last = start.partition("|")
        events.append(
            Event("", "started", f"delivery {last.rpartition(':')[2]}, not finished; started alone {solo} times before")
        )
    for _, consumer, idle, deliveries in _pending(redis, keys.stream, group, stream_id):
        found.state = "in flight"
        events.append(
            Event("", "in flight", f"with {consumer}, delivery {deliveries}, {int(idle) / 1000:.1f} s since its last sign")
        )
    due = redis.call("ZSCORE", keys.due, f"{stream_id}|{email_id}")
    if due:
        found.state = "due"
        events.append(Event(moment(due), "due", "for its next attempt"))


def _pending(redis: RedisClient, stream: str, group: str, stream_id: str) -> list[tuple[str, str, int, int]]:
    """(stream id, consumer, ms since its last sign, deliveries) while a worker has it."""
    try:
        return [tuple(entry) for entry in redis.call("XPENDING", stream, group, stream_id, stream_id, 1)]
    except GroupMissing:  # no worker has ever come
        return []


def _dead(found: Trace, letter: str, fields: Fields) -> None:
    found.state = "dead"
    why = f"{fields.get('dead_reason')}: {fields.get('dead_error_type')}: {fields.get('dead_error')}"
    after = f"failed attempts: {fields.get('dead_attempts')}, in {fields.get('dead_worker')}"
    found.events.append(Event(fields.get("dead_at", ""), "dead", f"{why} ({after}); dead letter {letter}"))


def _finished(found: Trace, redis: RedisClient, keys: Keys) -> None:
    """Results of it, and the day under which its id counts as processed."""
    for entry, fields in _results(redis, keys):
        if fields.get("email_id") == found.email_id:
            found.state = fields.get("outcome", "done")
            found.correlation_id = found.correlation_id or fields.get("correlation_id", "")
            found.events.append(Event(moment(entry), found.state, fields.get("result", "")))
    known = split_email_id(found.email_id)
    start = keys.processed(known[1] if known else "", "").removesuffix("undated")
    for key in _keys_like(redis, start):
        if redis.are_members(key, [member_of(found.email_id)]) == [True]:
            found.state = "done" if found.state == "unknown" else found.state
            found.events.append(Event("", "processed", f"its id stands among those of {key.removeprefix(start)}"))


def _results(redis: RedisClient, keys: Keys) -> Iterator[tuple[str, Fields]]:
    """The log of results, the oldest first."""
    start = "-"
    while page := redis.entries(keys.results, start, count=PAGE):
        yield from page
        start = f"({page[-1][0]}"


def _keys_like(redis: RedisClient, start: str) -> list[str]:
    pattern = "".join(f"\\{char}" if char in "*?[]\\^" else char for char in start) + "*"
    cursor, found = "0", []
    while True:
        cursor, page = redis.call("SCAN", cursor, "MATCH", pattern, "COUNT", PAGE)
        found += page
        if str(cursor) == "0":
            return sorted(found)


# log files


def log_lines(files: Iterable[Path], email_id: str, correlation_id: str) -> list[str]:
    """The lines of this mail, in order of time: by its correlation id, which lines that name the mail may tell too.

    Raises ConfigurationError for a file that cannot be read.
    """
    lines: list[str] = []
    for path in files:
        try:
            lines += path.read_text(errors="replace").splitlines()
        except OSError as error:
            raise ConfigurationError(f"--log {path}: {error.strerror}") from None
    named = re.compile(rf"(?<![\w@.-]){re.escape(email_id)}(?!\w)")
    parsed = [(_parsed(line), line) for line in lines]
    ids = {correlation_id, *(content.get("correlation_id") for content, line in parsed if named.search(line))} - {"", None}
    mine = [(content, line) for content, line in parsed if content.get("correlation_id") in ids or named.search(line)]
    return [line for _, line in sorted(mine, key=lambda item: str(item[0].get("timestamp", "")))]


def _parsed(line: str) -> dict[str, Any]:
    """timestamp and correlation_id of a line in either LOG_FORMAT; text lines know the time of day only."""
    try:
        content = json.loads(line)
    except ValueError:
        clock, own = TEXT_LINE.match(line), re.search(r" correlation_id=(\S+)$", line)
        return {"timestamp": clock[1] if clock else "", "correlation_id": own[1] if own else ""}
    return content if isinstance(content, dict) else {}


# what is shown


def show(found: Trace) -> str:
    lines = [f"{found.email_id}: {found.state}" + (f"  {plain(found.subject)}" if found.subject else "")]
    if found.correlation_id:
        lines.append(
            f"correlation id {found.correlation_id}" + (f", traceparent {found.traceparent}" if found.traceparent else "")
        )
    lines += [f"  {event.at or '…':<20}  {event.what:<10} {plain(event.detail)}" for event in found.events]
    return "\n".join([*lines, *found.log])


def as_json(found: Trace) -> str:
    content = vars(found) | {"events": [vars(event) for event in found.events]}
    return json.dumps(content, ensure_ascii=False)


def plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="One mail's timeline: what Redis holds of it, and its lines in log files. JSON when piped. "
        "Exit code 1: nothing is known of it."
    )
    parser.add_argument("email_id", metavar="EMAIL_ID", help="as in the stream, the dead letters, the results and the logs")
    parser.add_argument("--log", metavar="FILE", nargs="+", type=Path, default=[], help="log files of the daemons (JSON or text)")
    return parser


def main() -> int:
    given = arguments().parse_args()

    def run(settings: Settings, shutdown: Shutdown) -> int:
        with open_redis(settings, shutdown) as redis:
            found = trace(redis, Keys(settings.stream.name), settings.stream.group, given.email_id)
        found.log = log_lines(given.log, found.email_id, found.correlation_id)
        print(show(found) if sys.stdout.isatty() else as_json(found))
        return 0 if found.events or found.log else 1

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
