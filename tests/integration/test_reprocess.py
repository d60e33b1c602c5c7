"""scripts/reprocess.py and scripts/processed.py as a user runs them: finished mail again, from the archive and from IMAP."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from src.common.keys import Keys
from src.mail.record import member_of
from src.sandbox.server import Sandbox
from tests.integration.test_commands import keys_of
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.wait import until

STREAM = "email_ingestion_stream"
KEYS = Keys(STREAM)


def day(ago: int) -> str:
    return (datetime.now(UTC) - timedelta(days=ago)).date().isoformat()


def days(first: int, last: int) -> tuple[str, ...]:
    """--since and --until as days ago."""
    return ("--since", day(first), "--until", day(last))


def command(pipeline: Pipeline, script: str, *args: str, code: int = 0, **env: str) -> str:
    with Daemon(f"scripts/{script}.py", *args, env={**pipeline.env, **env}, tmp=pipeline.tmp) as running:
        assert running.exit_code(DEADLINE) == code, running.output()
        return running.output()


def told(output: str) -> dict[str, Any]:
    """The JSON line a command ends with."""
    [summary] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return dict(summary)


def reprocess(pipeline: Pipeline, *args: str, code: int = 0, **env: str) -> dict[str, Any]:
    return told(command(pipeline, "reprocess", *args, "--yes", code=code, **env))


def work(pipeline: Pipeline, **env: str) -> None:
    """A worker until the stream is empty."""
    with pipeline.worker(**env):
        pipeline.wait_until_settled()


def lives(pipeline: Pipeline) -> Counter[str]:
    """How often the handler finished each mail."""
    return Counter(line.email_id for line in pipeline.lines("end"))


def take_in(pipeline: Pipeline) -> None:
    with pipeline.producer("--once") as producer:
        assert producer.exit_code(DEADLINE) == 0, producer.output()


def subjects(books_stream: Mapping[str, Mapping[str, str]]) -> list[str]:
    return sorted(fields["subject"] for fields in books_stream.values())


@pytest.fixture(params=[("sandbox", "redis7"), ("dovecot", "valkey")], ids=lambda names: "-".join(names))
def mailbox(request: pytest.FixtureRequest, tmp_path: Path) -> Pipeline:
    """From a sandbox Gmail into Redis 7.0, then from Dovecot over TLS into Valkey."""
    source, redis = (request.getfixturevalue(name) for name in request.param)
    return Pipeline(source, redis, tmp_path)


def test_from_the_archive(pipeline: Pipeline) -> None:
    """The mails of two days come back with their ids, text and raw mail, `replays` set; handled again, they are done again."""
    for ago in (5, 4, 3, 2):
        pipeline.deliver(f"{ago} days ago", days_ago=ago)
    take_in(pipeline)
    first = {fields["email_id"]: fields for fields in pipeline.books().stream.values()}
    work(pipeline)
    # no token, no server: the archive is enough
    shutil.rmtree(pipeline.tmp / "tokens")
    summary = reprocess(pipeline, *days(4, 3))
    assert (summary["brought_back"], summary["left"]) == (2, [])
    books = pipeline.books()
    assert subjects(books.stream) == ["3 days ago", "4 days ago"]
    for fields in books.stream.values():
        before = first[fields["email_id"]]
        own = ("correlation_id", "record", "replays")
        assert {n: v for n, v in fields.items() if n not in own} == {n: v for n, v in before.items() if n not in own}
        record, record_before = json.loads(fields["record"]), json.loads(before["record"])
        changed = {name for name in record if record[name] != record_before[name]}
        assert changed <= {"uidvalidity", "gm_thrid", "gm_labels", "defects", "ingested_at", "traceparent"}
        assert fields["replays"] == "1"
    pipeline.wait_for_books(lambda books: sum(books.open.values()) == 2, "two are counted as unfinished")
    work(pipeline)
    pipeline.assert_accounted(repeated=True)
    assert sorted(lives(pipeline).values()) == [1, 1, 2, 2]


def test_from_imap(mailbox: Pipeline) -> None:
    """Results and archive are gone: the same mails are found in the mailbox, under the ids the producer gave them."""
    for ago in (5, 4, 3, 2):
        mailbox.deliver(f"{ago} days ago", days_ago=ago)
    take_in(mailbox)
    first = {fields["email_id"]: fields for fields in mailbox.books().stream.values()}
    work(mailbox)
    mailbox.client.delete(KEYS.results)
    shutil.rmtree(mailbox.tmp / "data" / "raw")
    summary = reprocess(mailbox, *days(4, 3))
    assert (summary["brought_back"], summary["left"]) == (2, [])
    books = mailbox.books()
    assert subjects(books.stream) == ["3 days ago", "4 days ago"]
    for fields in books.stream.values():
        before, own = first[fields["email_id"]], ("correlation_id", "record", "replays")
        assert {n: v for n, v in fields.items() if n not in own} == {n: v for n, v in before.items() if n not in own}
        record, record_before = json.loads(fields["record"]), json.loads(before["record"])
        assert {name for name in record if record[name] != record_before[name]} <= {"ingested_at", "traceparent"}
        digest = record["raw_ref"].removeprefix("sha256:")
        assert (mailbox.tmp / "data" / "raw" / digest[0] / digest).exists(), "kept again, for handlers that read it"
    with mailbox.worker():
        mailbox.wait_for_books(lambda after: not after.stream, "both are done again")
    assert set(mailbox.books().done) == set(books.index), "each of the two is done, once since the results were lost"
    assert sorted(lives(mailbox).values()) == [1, 1, 2, 2]


def test_imap_brings_what_the_archive_lacks(mailbox: Pipeline) -> None:
    """One raw mail was swept, one mail's result is too old: both come from IMAP, the third from the archive, each once."""
    mailbox.deliver("swept", "forgotten", "kept", days_ago=3)
    take_in(mailbox)
    work(mailbox)
    results = {fields["email_id"]: (entry, fields) for entry, fields in mailbox.client.xrange(KEYS.results)}
    swept, forgotten, _ = mailbox.delivered
    digest = results[swept][1]["raw_ref"].removeprefix("sha256:")
    (mailbox.tmp / "data" / "raw" / digest[0] / digest).unlink()
    mailbox.client.xdel(KEYS.results, results[forgotten][0])
    assert reprocess(mailbox, *days(3, 3), "--source", "archive", "--dry-run")["would_bring_back"] == 2
    assert reprocess(mailbox, *days(3, 3), "--source", "imap", "--dry-run")["would_bring_back"] == 3
    assert reprocess(mailbox, *days(3, 3))["brought_back"] == 3
    assert subjects(mailbox.books().stream) == ["forgotten", "kept", "swept"]
    work(mailbox)
    assert set(lives(mailbox).values()) == {2}


@pytest.mark.full
def test_only_what_is_meant(pipeline: Pipeline) -> None:
    """Other days, accounts, senders and handlers stay as they are; so do unfinished, dead and discarded mail and mail never seen."""
    bob = b"From: Bob <bob@shop.example>\r\nSubject: of bob\r\nMessage-ID: <b@x>\r\n\r\nhello\r\n"
    moment = datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)
    [mine, dead, given_up] = pipeline.deliver("mine", "permanent", "permanent too", days_ago=3)
    pipeline.source.deliver(pipeline.account, bob, internal_date=moment)
    pipeline.deliver("another day", days_ago=2)
    take_in(pipeline)
    with pipeline.worker():
        pipeline.wait_for_books(lambda books: not books.stream, "all are settled")
    letters = {fields["email_id"]: entry for entry, fields in pipeline.books().dead.items()}
    command(pipeline, "dlq", "discard", letters[given_up])
    pipeline.source.deliver(pipeline.account, bob.replace(b"of bob", b"never seen"), internal_date=moment)

    def would(*flags: str, **env: str) -> int:
        return int(reprocess(pipeline, *days(3, 3), "--dry-run", *flags, **env)["would_bring_back"])

    before = keys_of(pipeline)
    for source in ("archive", "imap", "auto"):
        assert would("--source", source) == 2, "mine and of bob"
        assert would("--source", source, "--sender", "bob@shop.example") == 1
        assert would("--source", source, "--sender", "@example.org") == 1
        assert would("--source", source, "--account", pipeline.account.upper()) == 2
        assert would("--source", source, "--account", "somebody@else.example") == 0
        assert would("--source", source, "--handler", "sql") == 0
    assert keys_of(pipeline) == before, "a dry run changes nothing"
    [result] = [fields for _, fields in pipeline.client.xrange(KEYS.results) if fields["email_id"] == mine]
    pipeline.client.xadd(KEYS.results, {**result, "handler": "sql"})
    assert would("--handler", "sql") == 1
    assert reprocess(pipeline, *days(3, 3), "--source", "imap")["brought_back"] == 2
    assert subjects(pipeline.books().stream) == ["mine", "of bob"]
    again = reprocess(pipeline, *days(3, 3), "--source", "archive")
    assert (again["brought_back"], again["live"]) == (0, 2)
    assert pipeline.books().reasons == {dead: "permanent"}
    assert mine in pipeline.books().index


@pytest.mark.parametrize("source", [pytest.param("archive", marks=pytest.mark.full), "imap"])
def test_a_run_that_is_killed_is_gone_on_with(mailbox: Pipeline, source: str) -> None:
    """kill -9 between two pages while a worker finishes what came back: with --run each mail gets one second life, no more."""
    mailbox.deliver(*(f"mail {number}" for number in range(30)), days_ago=3)
    take_in(mailbox)
    work(mailbox)
    flags = (*days(3, 3), "--source", source, "--run", "friday", "--yes")
    with mailbox.worker():
        with Daemon("scripts/reprocess.py", *flags, "--rate", "5/s", env=mailbox.env, tmp=mailbox.tmp) as running:
            until(lambda: sum(lives(mailbox).values()) >= 40, DEADLINE, "two pages came back and were done")
            running.kill9()
        mailbox.wait_for_books(lambda books: not books.stream, "what came back is done")
        back = sum(lives(mailbox).values()) - 30
        assert 10 <= back < 30
        summary = told(command(mailbox, "reprocess", *flags))
        assert (summary["brought_back"], summary["already"], summary["left"]) == (30 - back, back, [])
        mailbox.wait_for_books(lambda books: not books.stream, "the rest is done")
        assert told(command(mailbox, "reprocess", *flags))["already"] == 30
    mailbox.assert_accounted(repeated=True)
    assert set(lives(mailbox).values()) == {2}
    assert set(mailbox.books().done.values()) == {2}


def test_a_session_that_is_cut_is_opened_again(pipeline: Pipeline) -> None:
    """The server ends all connections between two pages: said, connected again, each mail came back once."""
    pipeline.deliver(*(f"mail {number}" for number in range(20)), days_ago=3)
    take_in(pipeline)
    work(pipeline)
    assert isinstance(pipeline.source, Sandbox)
    flags = (*days(3, 3), "--source", "imap", "--rate", "4/s", "--yes")
    with Daemon("scripts/reprocess.py", *flags, env=pipeline.env, tmp=pipeline.tmp) as running:
        until(lambda: pipeline.client.xlen(STREAM) >= 4, DEADLINE, "a page came back")
        assert pipeline.source.cut() == 1
        assert running.exit_code(DEADLINE) == 0, running.output()
        assert "connecting again" in running.output()
        assert told(running.output())["brought_back"] == 20
    assert len(subjects(pipeline.books().stream)) == len(set(subjects(pipeline.books().stream))) == 20


def test_a_full_stream_is_waited_for(pipeline: Pipeline) -> None:
    """STREAM_MAXLEN: it says so, goes on as room comes, and never holds more than that."""
    pipeline.deliver(*(f"mail {number}" for number in range(7)), days_ago=3)
    take_in(pipeline)
    work(pipeline)
    env = {**pipeline.env, "STREAM_MAXLEN": "3"}
    with Daemon("scripts/reprocess.py", *days(3, 3), "--yes", env=env, tmp=pipeline.tmp) as running:
        running.wait_for(r"the stream is full \(STREAM_MAXLEN=3\): waiting for room", DEADLINE)
        assert len(pipeline.books().stream) == 3
        with pipeline.worker():
            assert running.exit_code(DEADLINE) == 0, running.output()
            assert told(running.output())["brought_back"] == 7
            pipeline.wait_for_books(lambda books: not books.stream, "all are done again")
    assert set(lives(pipeline).values()) == {2}


def test_it_asks_and_says_what_is_left(pipeline: Pipeline) -> None:
    """Nobody to ask: exit 2 with the line. No token for what only IMAP has: exit 1 with the command that makes one. No days: exit 2."""
    pipeline.deliver("one", "two", days_ago=3)
    take_in(pipeline)
    work(pipeline)
    output = command(pipeline, "reprocess", *days(3, 3), code=2)
    assert f"python scripts/reprocess.py {' '.join(days(3, 3))} --yes" in output
    assert "effects outside Redis happen again" in output
    pipeline.client.delete(KEYS.results)
    shutil.rmtree(pipeline.tmp / "tokens")
    output = command(pipeline, "reprocess", *days(3, 3), "--yes", code=1)
    assert "2 finished mails are not in the archive, and IMAP cannot be asked" in output
    assert "--auth-setup" in output
    assert told(output)["brought_back"] == 0
    assert told(command(pipeline, "reprocess", *days(3, 3), "--source", "archive", "--yes"))["brought_back"] == 0
    assert "--since is after --until" in command(pipeline, "reprocess", *days(3, 4), code=2)
    assert pipeline.books().stream == {}


def test_mail_that_is_nowhere_any_more(pipeline: Pipeline) -> None:
    """Expunged and no longer in the results: said and counted, exit 1; the others came back."""
    pipeline.deliver("stays", "goes", days_ago=3)
    take_in(pipeline)
    work(pipeline)
    pipeline.client.delete(KEYS.results)
    assert isinstance(pipeline.source, Sandbox)
    pipeline.source.expunge(pipeline.account, 2)
    output = command(pipeline, "reprocess", *days(3, 3), "--yes", code=1)
    assert "1 finished mails are neither in the archive nor in the folders that are read" in output
    assert subjects(pipeline.books().stream) == ["stays"]


# the sets of finished mail


def test_processed(pipeline: Pipeline) -> None:
    """count, has and clear: what they say is what stands in Redis; the cleared day's mail is handled again when read again."""
    [old, young] = [pipeline.deliver(f"{ago} days ago", days_ago=ago)[0] for ago in (5, 2)]
    take_in(pipeline)
    work(pipeline)
    *counted, total = [json.loads(line) for line in command(pipeline, "processed", "count").splitlines() if line.startswith("{")]
    assert [(row["day"], row["mails"]) for row in counted] == [(day(5).replace("-", ""), 1), (day(2).replace("-", ""), 1)]
    assert (total["total"], total["sets"], total["bytes"]) == (2, 2, sum(row["bytes"] for row in counted))
    assert all(row["bytes"] == pipeline.client.memory_usage(row["key"]) for row in counted)
    assert told(command(pipeline, "processed", "has", old))["days"] == [day(5).replace("-", "")]
    assert told(command(pipeline, "processed", "has", old, "--date", day(5)))["done"] is True
    assert told(command(pipeline, "processed", "has", old, "--date", day(4), code=1))["done"] is False
    assert "no email_id" in command(pipeline, "processed", "has", "nonsense", code=2)

    before = keys_of(pipeline)
    output = command(pipeline, "processed", "clear", "--before", day(2), code=2)
    assert "handled again when it is read again" in output
    assert "PROCESSED_DAYS=400" in output
    assert keys_of(pipeline) == before
    assert told(command(pipeline, "processed", "clear", "--before", day(2), "--yes"))["cleared"] == 1
    assert set(pipeline.books().processed) == {member_of(young)}
    with pipeline.producer("--once", "--resync-from", day(6)) as producer:
        assert producer.exit_code(DEADLINE) == 0
    work(pipeline)
    assert lives(pipeline) == Counter({old: 2, young: 1})
