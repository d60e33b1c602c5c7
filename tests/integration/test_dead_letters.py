"""scripts/dlq.py as a user runs it: what it shows, what it asks, what becomes of the mail; while everything runs, twice, cut short."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from src.common.keys import Keys, open_field
from src.sandbox.server import Sandbox
from tests.integration.test_commands import keys_of
from tests.support.daemons import ROOT, Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import RedisServer
from tests.support.wait import until

STREAM = "email_ingestion_stream"
KEYS = Keys(STREAM)
DAY_MS = 86_400_000


@pytest.fixture
def pipeline(sandbox: Sandbox, valkey_first: RedisServer, tmp_path: Path) -> Pipeline:
    """Into Redis 7.0, then into Valkey."""
    return Pipeline(sandbox, valkey_first, tmp_path)


def dlq(pipeline: Pipeline, *args: str, code: int = 0) -> str:
    """The output of scripts/dlq.py with nobody at a terminal."""
    with Daemon("scripts/dlq.py", *args, env=pipeline.env, tmp=pipeline.tmp) as command:
        assert command.exit_code(DEADLINE) == code, command.output()
        return command.output()


def rows(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def asked(pipeline: Pipeline, answer: bytes, *args: str) -> tuple[int, str]:
    """Exit code and output of scripts/dlq.py at a terminal at which somebody types `answer`."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/dlq.py"), *args],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": os.environ["PATH"], "HOME": str(pipeline.tmp), **pipeline.env},
        cwd=pipeline.tmp,
        preexec_fn=os.setsid,
    )
    os.write(ours, answer)
    output, _ = process.communicate(timeout=DEADLINE)
    os.close(ours)
    os.close(theirs)
    return process.returncode, output.decode()


def bury(pipeline: Pipeline, number: int, *, days_ago: float = 0.0, **fields: str) -> str:
    """A dead letter as the transitions leave it; its id. To be called from the oldest on."""
    now = int(pipeline.client.time()[0]) * 1000
    email_id, account = f"gm:{fields.get('account', 'a@x.org')}:{number}", fields.get("account", "a@x.org")
    entry = {
        "schema": "1",
        "email_id": email_id,
        "account": account,
        "mailbox": "INBOX",
        "uid": str(number),
        "internal_date": "2026-01-31T00:00:00Z",
        "from": "Ann <ann@x.org>",
        "subject": f"mail {number}",
        "correlation_id": "c",
        "record": json.dumps({"body_text": "hello"}),
        "dead_reason": "attempts",
        "dead_error_type": "ValueError",
        "dead_error": f"number {number}",
        "dead_attempts": "8",
        "dead_at": "2026-02-01T00:00:00Z",
        **fields,
    }
    letter = str(pipeline.client.xadd(KEYS.dlq, entry, id=f"{round(now - days_ago * DAY_MS)}-{number}"))
    pipeline.client.hset(KEYS.index, email_id, f"D:{letter}")
    pipeline.client.hincrby(KEYS.open, open_field(account, "INBOX", entry["internal_date"]), 1)
    return letter


def bury_many(pipeline: Pipeline, count: int) -> list[str]:
    return [bury(pipeline, number, days_ago=1) for number in range(1, count + 1)]


def deaths(pipeline: Pipeline, *subjects: str) -> list[str]:
    """These mails are dead letters after two attempts, in this order."""
    pipeline.deliver(*subjects)
    with pipeline.producer(), pipeline.worker(MAX_ATTEMPTS="2", WORKER_CONCURRENCY="1"):
        pipeline.wait_until_settled()
    return list(pipeline.books().dead)


# looking


@pytest.fixture
def graveyard(pipeline: Pipeline) -> dict[str, str]:
    """Five letters that differ in one thing each: name → id."""
    place = 'Traceback (most recent call last):\n  File "/app/shop.py", line 3, in pay\n    x\nKeyError: 1\n'
    return {
        "old": bury(pipeline, 1, days_ago=5),
        "account": bury(pipeline, 2, days_ago=2.5, account="b@y.org"),
        "sender": bury(pipeline, 3, days_ago=2, **{"from": "Bob <bob@z.org>"}),
        "handler": bury(pipeline, 4, days_ago=1, dead_handler="sql"),
        "error": bury(pipeline, 5, dead_error_type="KeyError", dead_error="1", dead_traceback=place),
    }


FILTERS = [
    ((), "old account sender handler error"),
    (("--error", "KeyError"), "error"),
    (("--error", "KeyError in shop.py:pay"), "error"),
    (("--error", "ValueError: number #"), "old account sender handler"),
    (("--older-than", "36h"), "old account sender"),
    (("--newer-than", "36h"), "handler error"),
    (("--older-than", "36h", "--newer-than", "3d"), "account sender"),
    (("--account", "B@y.org"), "account"),
    (("--sender", "bob@z.org"), "sender"),
    (("--sender", "@x.org"), "old account handler error"),
    (("--handler", "sql"), "handler"),
    (("--handler", "none"), ""),
    (("--error", "ValueError", "--sender", "@x.org", "--limit", "2"), "old account"),
]


def test_each_filter_means_its_letters(pipeline: Pipeline, graveyard: dict[str, str]) -> None:
    """list and export show exactly those, the oldest first; export the whole letter; nothing is changed."""
    before = keys_of(pipeline)
    for flags, names in FILTERS:
        assert [row["id"] for row in rows(dlq(pipeline, "list", *flags))] == [graveyard[name] for name in names.split()], flags
    [letter] = rows(dlq(pipeline, "export", "--handler", "sql"))
    assert (letter["id"], letter["record"], letter["dead_handler"]) == (graveyard["handler"], {"body_text": "hello"}, "sql")
    assert letter["group"] == "ValueError: number #"
    assert keys_of(pipeline) == before


def test_groups_are_counted_with_an_example(pipeline: Pipeline, graveyard: dict[str, str]) -> None:
    """The largest first; `--error` takes what `groups` prints."""
    first, second = rows(dlq(pipeline, "groups"))
    assert (first["group"], first["count"], first["example"]) == ("ValueError: number #", 4, graveyard["handler"])
    assert (second["group"], second["count"], second["example"]) == ("KeyError in shop.py:pay", 1, graveyard["error"])
    assert (second["first"], second["last"]) == ("2026-02-01T00:00:00Z", "2026-02-01T00:00:00Z")
    [only] = rows(dlq(pipeline, "groups", "--error", first["group"], "--newer-than", "36h"))
    assert only["count"] == 1


def test_choosing_letters_reads_only_them(pipeline: Pipeline) -> None:
    """20 of 2,000 letters, by id and by mail: a look-up each, not the whole queue for each."""
    letters = bury_many(pipeline, 2000)
    pipeline.client.config_resetstat()
    wanted = [*letters[::200], *(f"gm:a@x.org:{number}" for number in range(2, 2000, 200))]
    dlq(pipeline, "replay", *wanted)
    statistics = pipeline.client.info("commandstats")
    assert statistics["cmdstat_xrange"]["calls"] < 100
    assert len(pipeline.books().stream) == 20


# asking


BULK = [("replay", "--all"), ("discard", "--error", "ValueError"), ("clear",)]


@pytest.mark.parametrize("command", BULK, ids=lambda command: command[0])
def test_nobody_to_ask(pipeline: Pipeline, command: Sequence[str]) -> None:
    """A bulk change without a terminal and without --yes: exit 2, the line to use, nothing changed; nor by --dry-run."""
    bury_many(pipeline, 3)
    before = keys_of(pipeline)
    output = dlq(pipeline, *command, code=2)
    assert " ".join(["python scripts/dlq.py", *command, "--yes"]) in output
    assert ("will not come back" in output) == (command[0] != "replay")
    [would] = rows(dlq(pipeline, *command, "--dry-run"))
    assert (would["chosen"], would["dry_run"], would["groups"]) == (3, True, {"ValueError: number #": 3})
    assert keys_of(pipeline) == before


def test_somebody_to_ask(pipeline: Pipeline) -> None:
    """No by default; y does it; letters that are named are not asked about."""
    letters = bury_many(pipeline, 3)
    before = keys_of(pipeline)
    for answer in (b"\n", b"n\n", b"\x04"):
        code, output = asked(pipeline, answer, "clear")
        assert (code, "nothing was changed" in output) == (1, True), output
    assert keys_of(pipeline) == before
    assert rows(dlq(pipeline, "replay", letters[0]))[0]["replayed"] == 1
    code, output = asked(pipeline, b"y\n", "clear")
    assert code == 0, output
    assert rows(output[output.index("{") :])[0]["discarded"] == 2
    assert pipeline.books().discarded == Counter({"gm:a@x.org:2": 1, "gm:a@x.org:3": 1})


@pytest.mark.parametrize(
    "command",
    [("replay",), ("discard",), ("replay", "--all", "1-0"), ("replay", "9-9"), ("discard", "--all", "--error", "KeyError")],
    ids=" ".join,
)
def test_what_is_meant_must_be_said_once(pipeline: Pipeline, command: Sequence[str]) -> None:
    """Nothing, two things, or a letter that is not there: exit 2 and one line."""
    bury_many(pipeline, 1)
    output = dlq(pipeline, *command, code=2)
    assert output.startswith("dlq.py: ")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("flags", [("--rate", "5"), ("--limit", "0"), ("--older-than", "soon")], ids=" ".join)
def test_words_that_are_none(pipeline: Pipeline, flags: Sequence[str]) -> None:
    assert flags[1] in dlq(pipeline, "replay", "--all", *flags, code=2).splitlines()[-1]


# settling


def test_foreign_letters_are_left_and_said(pipeline: Pipeline) -> None:
    """replay: exit 1, the others come back; discard takes it."""
    bury(pipeline, 1, days_ago=1)
    pipeline.client.xadd(
        KEYS.dlq, {"hello": "world", "dead_id": "foreign:7-0", "dead_reason": "foreign", "dead_error_type": "Foreign"}
    )
    [told] = rows(dlq(pipeline, "replay", "--all", "--yes", code=1))
    assert (told["replayed"], told["foreign"]) == (1, 1)
    dlq(pipeline, "discard", "foreign:7-0")
    assert (pipeline.books().dead, pipeline.books().discarded) == ({}, Counter())


def test_limit_and_filter_take_the_oldest_of_theirs(pipeline: Pipeline, graveyard: dict[str, str]) -> None:
    """discard --error … --limit 2: two go, for good; a replay of the rest of the group twice brings each back once."""
    assert rows(dlq(pipeline, "discard", "--error", "ValueError", "--limit", "2", "--yes"))[0]["discarded"] == 2
    assert set(pipeline.books().dead) == {graveyard[name] for name in ("sender", "handler", "error")}
    assert rows(dlq(pipeline, "replay", "--error", "ValueError", "--yes"))[0]["replayed"] == 2
    assert rows(dlq(pipeline, "replay", "--error", "ValueError", "--yes"))[0]["chosen"] == 0
    books = pipeline.books()
    assert sorted(fields["subject"] for fields in books.stream.values()) == ["mail 3", "mail 4"]
    assert {fields["replays"] for fields in books.stream.values()} == {"1"}
    assert sum(books.open.values()) == 3


@pytest.mark.full
def test_replay_from_two_shells_while_everything_runs(pipeline: Pipeline) -> None:
    """Two people replay the same 120 letters while a producer and a worker are at work: each mail is done once, none is lost."""
    for deaths_so_far in (40, 80, 120):  # by three workers: 50 deaths of one group would stop one
        assert len(deaths(pipeline, *["fail 2"] * 40)) == deaths_so_far
    with pipeline.producer(), pipeline.worker(MAX_ATTEMPTS="3") as worker:
        worker.wait_for("reads email_ingestion_stream", DEADLINE)
        with ExitStack() as stack:
            flags = ("replay", "--all", "--yes", "--rate", "50/s")
            shells = [stack.enter_context(Daemon("scripts/dlq.py", *flags, env=pipeline.env, tmp=pipeline.tmp)) for _ in range(2)]
            pipeline.deliver(*(f"new {number}" for number in range(40)))
            assert [shell.exit_code(DEADLINE) for shell in shells] == [0, 0]
            told = [rows(shell.output())[0] for shell in shells]
        assert sum(summary["replayed"] for summary in told) == 120
        pipeline.wait_until_settled()
    pipeline.assert_accounted()
    attempts = Counter(line.email_id for line in pipeline.lines("end"))
    assert set(attempts.values()) == {1}, "each effect once"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_replay_that_ends_on_the_way(pipeline: Pipeline, end: signal.Signals) -> None:
    """Between two pages, or wherever it is: what came back came back once; the same line again brings the rest."""
    bury_many(pipeline, 60)
    with Daemon("scripts/dlq.py", "replay", "--all", "--yes", "--rate", "10/s", env=pipeline.env, tmp=pipeline.tmp) as command:
        until(lambda: pipeline.client.xlen(STREAM) >= 10, DEADLINE, "a page came back")
        command.send(end)
        assert command.exit_code(DEADLINE) == (1 if end == signal.SIGINT else -9)
        output = command.output()
    back = len(pipeline.books().stream)
    assert 10 <= back < 60
    if end == signal.SIGINT:
        assert rows(output)[0]["replayed"] == back
        assert "stopped as asked" in output
    assert rows(dlq(pipeline, "replay", "--all", "--yes"))[0]["replayed"] == 60 - back
    books = pipeline.books()
    assert (len(books.stream), books.dead) == (60, {})
    assert set(books.index.values()) == {f"S:{entry}" for entry in books.stream}
    assert sum(books.open.values()) == 60


def test_stop_on_failure(pipeline: Pipeline) -> None:
    """One mail heals, the next dies again: the replay stops there, names it, and leaves the other letters where they are."""
    dead = deaths(pipeline, "fail 2", "permanent", "fail 2", "fail 2")
    by_subject = [(fields["subject"], fields["email_id"]) for fields in pipeline.books().dead.values()]
    ordered = sorted(dead, key=lambda letter: tuple(map(int, letter.split("-"))))
    position = [subject for subject, _ in by_subject].index("permanent")
    flags = ("replay", "--all", "--yes", "--stop-on-failure", "--rate", "1/s")
    with pipeline.worker(MAX_ATTEMPTS="3"):
        output = dlq(pipeline, *flags, code=1)
    assert f"{by_subject[position][1]} died again" in output
    assert rows(output)[0]["replayed"] == position + 1
    left = pipeline.books().dead
    assert set(ordered[position + 1 :]) <= set(left)
    assert len(left) == len(ordered) - position
    assert len(pipeline.books().done) == position


def test_stop_on_failure_does_not_wait_for_ever(pipeline: Pipeline) -> None:
    """No worker runs: after --wait it says so and stops, with the rest untouched."""
    bury_many(pipeline, 25)
    output = dlq(pipeline, "replay", "--all", "--yes", "--stop-on-failure", "--wait", "1s", code=1)
    assert "10 replayed mails: neither done nor dead after 1 s (does a worker run?)" in output
    assert (len(pipeline.books().stream), len(pipeline.books().dead)) == (10, 15)


def test_a_full_redis(sandbox: Sandbox, tmp_path: Path) -> None:
    """replay: exit 1 and what to do, nothing lost; discard makes room all the same; with room the same line goes through."""
    with RedisServer("valkey") as server:
        pipeline = Pipeline(sandbox, server, tmp_path)
        letters = bury_many(pipeline, 5)
        pipeline.client.config_set("maxmemory", "1")
        output = dlq(pipeline, "replay", "--all", "--yes", code=1)
        assert "Redis is full" in output
        assert "run the same line again" in output
        assert len(pipeline.client.xrange(KEYS.dlq)) == 5
        assert rows(dlq(pipeline, "discard", letters[0]))[0]["discarded"] == 1
        pipeline.client.config_set("maxmemory", "0")
        assert rows(dlq(pipeline, "replay", "--all", "--yes"))[0]["replayed"] == 4
        assert len(pipeline.books().stream) == 4
