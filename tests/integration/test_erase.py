"""scripts/erase.py as a user runs it: what goes, what stays, and that nothing brings it back; while daemons run, twice, cut short."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from src.common.archive import ref_of
from src.common.keys import Keys
from src.sandbox.server import Sandbox
from src.worker.erase import YOUNG_SECONDS
from tests.integration.test_commands import files_of, keys_of
from tests.support import acl
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import RedisServer
from tests.support.wait import until

STREAM = "email_ingestion_stream"
KEYS = Keys(STREAM)
SECRET = "sesame4711"  # a word of the mails that are erased, and of no other
SENDER = f"Eve.{SECRET}@Example.org"


def command(pipeline: Pipeline, script: str, *args: str, code: int = 0, **env: str) -> str:
    with Daemon(f"scripts/{script}.py", *args, env={**pipeline.env, **env}, tmp=pipeline.tmp) as running:
        assert running.exit_code(DEADLINE) == code, running.output()
        return running.output()


def erase(pipeline: Pipeline, *args: str, code: int = 0, **env: str) -> dict[str, Any]:
    """The JSON line that the command ends with."""
    output = command(pipeline, "erase", *args, code=code, **env)
    [told] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return dict(told)


def from_eve(pipeline: Pipeline, *subjects: str) -> dict[str, str]:
    """Mails of the sender that is to be erased: subject → email_id."""
    ids = {}
    for number, subject in enumerate(subjects):
        raw = f"From: Eve <{SENDER}>\r\nSubject: {subject} {SECRET}\r\nMessage-ID: <{number}-{SECRET}@x>\r\n\r\n{SECRET}\r\n"
        pipeline.source.deliver(pipeline.account, raw.encode())
        assert isinstance(pipeline.source, Sandbox)
        ids[subject] = f"gm:{pipeline.account}:{pipeline.source.ledger()[-1].gm_msgid}"
    return ids


def settle(pipeline: Pipeline, ids: dict[str, str], **env: str) -> None:
    """Daemons until these mails, and all delivered ones, are done or dead."""
    with pipeline.producer(), pipeline.worker(MAX_ATTEMPTS="1", **env):
        pipeline.wait_until_settled([*pipeline.delivered, *ids.values()])


def mentions(pipeline: Pipeline, *words: str) -> list[str]:
    """Keys of Redis and files of the archive that hold one of the words: in their name, as they are read, or as they are dumped, where the
    deleted entries of a stream are still seen."""
    wanted = [word.encode().lower() for word in words]
    with pipeline.redis.client(decode_responses=False) as client:
        client.config_set("rdbcompression", "no")
        places = {key.decode(): key + repr(content(client, key)).encode() + client.dump(key) for key in client.scan_iter("*")}
    for path in (pipeline.tmp / "data" / "raw").rglob("*"):
        if path.is_file():
            places[str(path)] = path.read_bytes()
    return sorted(place for place, text in places.items() if any(word in text.lower() for word in wanted))


def raw_files(pipeline: Pipeline) -> list[Path]:
    return list((pipeline.tmp / "data" / "raw").glob("[0-9a-f]/*"))


def content(client: Any, key: bytes) -> object:
    readers = {
        b"string": lambda: client.get(key),
        b"hash": lambda: client.hgetall(key),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1),
        b"stream": lambda: client.xrange(key),
    }
    return readers[client.type(key)]()


def audit(pipeline: Pipeline) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command(pipeline, "audit").splitlines() if line.startswith("{")]


def test_all_mail_of_a_sender(sandbox: Sandbox, redis7: RedisServer, tmp_path: Path) -> None:
    """Done, dead, and both after a replay leave results, letters, steps, runs and the archive; others stay; nothing comes back."""
    pipeline = Pipeline(sandbox, redis7, tmp_path)
    others = pipeline.deliver("one", "permanent")
    eve = from_eve(pipeline, "fine", "permanent", "fail 1")
    settle(pipeline, eve)
    pipeline.client.hset(KEYS.steps(eve["permanent"]), "step", f'"{SECRET}"')
    pipeline.client.sadd(KEYS.run("run"), eve["fine"], others[0])
    [letter] = [entry for entry, fields in pipeline.books().dead.items() if fields["email_id"] == eve["fail 1"]]
    command(pipeline, "dlq", "replay", letter)
    settle(pipeline, {}, JOURNAL=str(pipeline.tmp / "other"))  # a fresh journal: the mail fails, and is dead, once more
    pipeline.client.xadd(KEYS.results, {"email_id": eve["fail 1"], "outcome": "done", "from": SENDER.upper()})  # and done before
    raw_before = len(raw_files(pipeline))
    assert len(mentions(pipeline, SECRET)) >= 5

    told = erase(pipeline, "--sender", SENDER.swapcase(), "--yes")
    assert told["erased"] == {
        "mails": 3,
        "dead letters": 2,
        "results": 2,
        "stored steps": 1,
        "mentions in reprocess runs": 1,
        "raw mails": 3,
    }
    assert (told["left"], told["troubles"]) == ({}, [])
    assert mentions(pipeline, SECRET, *eve.values()) == []
    assert len(raw_files(pipeline)) == raw_before - 3

    mailbox, redis = audit(pipeline)
    assert (mailbox["unaccounted"], redis["ok"]) == (0, True)
    with pipeline.producer("--once", "--resync-from", "2020-01-01") as producer:
        assert producer.exit_code(DEADLINE) == 0
    assert mentions(pipeline, SECRET) == [], "it was not published again"
    books = pipeline.books()
    assert set(books.done) == {others[0]}
    assert set(books.reasons) == {others[1]}
    assert list(books.index) == [others[1]]
    assert sum(books.open.values()) == 1


def test_one_mail_and_nothing_but_it(pipeline: Pipeline) -> None:
    """--email-id takes one mail; --dry-run and a question that nobody answers change nothing."""
    eve = from_eve(pipeline, "fine", "other")
    settle(pipeline, eve)
    keys, files = keys_of(pipeline), files_of(pipeline.tmp / "data" / "raw")
    assert erase(pipeline, "--email-id", eve["fine"], "--dry-run") == {
        "dry_run": True,
        "mails": 1,
        "stream entries": 0,
        "dead letters": 0,
        "results": 1,
        "raw mails": 1,
    }
    output = command(pipeline, "erase", "--email-id", eve["fine"], code=2)
    assert f"python scripts/erase.py --email-id {eve['fine']} --yes" in output
    assert (keys_of(pipeline), files_of(pipeline.tmp / "data" / "raw")) == (keys, files)
    assert erase(pipeline, "--email-id", eve["fine"], "--yes")["erased"] == {"mails": 1, "results": 1, "raw mails": 1}
    assert set(pipeline.books().done) == {eve["other"]}
    assert len(pipeline.books().processed) == 2


def test_unfinished_mail_is_left_to_its_worker(pipeline: Pipeline) -> None:
    """A mail in a worker's hands is left, with --force too, and its worker finishes it; one that nobody has is left without --force."""
    eve = from_eve(pipeline, "hold gate", "waits")
    with pipeline.producer(), pipeline.worker(WORKER_CONCURRENCY="1") as worker:
        pipeline.wait_for_begun([eve["hold gate"]])
        until(lambda: len(pipeline.books().stream) == 2, DEADLINE, "both are in the stream")
        before = pipeline.books()
        told = erase(pipeline, "--sender", SENDER, "--yes", code=1)
        assert {email_id: why.split(":")[0] for email_id, why in told["left"].items()} == {
            eve["hold gate"]: "a worker has it in its hands",
            eve["waits"]: "it is unfinished",
        }
        assert pipeline.books() == before
        assert len(mentions(pipeline, SECRET)) >= 3, "its raw mail is there for the worker"
        told = erase(pipeline, "--sender", SENDER, "--yes", "--force", code=1)
        assert list(told["left"]) == [eve["hold gate"]]
        assert told["erased"] == {"mails": 1, "stream entries": 1, "raw mails": 1}
        pipeline.open_gate("gate")
        pipeline.wait_until_settled([eve["hold gate"]])
        assert worker.running()
    assert pipeline.books().done == {eve["hold gate"]: 1}
    erase(pipeline, "--sender", SENDER, "--yes")
    assert mentions(pipeline, SECRET) == []
    assert audit(pipeline)[0]["unaccounted"] == 0
    assert [line.email_id for line in pipeline.lines("end")] == [eve["hold gate"]]


def test_killed_half_way_the_next_one_does_the_rest(pipeline: Pipeline) -> None:
    """Between the transition and the raw mail (the archive is away): exit 1; the same line removes it, though Redis knows it no more."""
    eve = from_eve(pipeline, "fine")
    settle(pipeline, eve)
    archive = pipeline.tmp / "data" / "raw"
    [raw] = archive.glob("[0-9a-f]/*")
    archive.rename(pipeline.tmp / "away")
    told = erase(pipeline, "--email-id", eve["fine"], "--yes", code=1)
    assert told["erased"] == {"mails": 1, "results": 1}
    assert "still in the archive: 1 raw mail (" in told["troubles"][0]
    assert pipeline.client.smembers(KEYS.erasing) == {ref_of((pipeline.tmp / "away" / raw.relative_to(archive)).read_bytes())}
    (pipeline.tmp / "away").rename(archive)
    assert erase(pipeline, "--email-id", eve["fine"], "--yes")["erased"] == {"raw mails": 1}
    assert not raw.exists()
    assert not pipeline.client.exists(KEYS.erasing)
    assert "nothing is known of such mail" in command(pipeline, "erase", "--email-id", eve["fine"]), "nothing is asked"


def test_sigkill_in_the_midst_of_two_thousand(pipeline: Pipeline) -> None:
    """Killed between two mails: the next run erases the rest, and nothing of any is left."""
    with pipeline.client.pipeline(transaction=False) as pipe:
        for number in range(1, 2001):
            fields = {"email_id": f"gm:a@x.org:{number}", "outcome": "done", "from": SENDER, "mailbox": "INBOX"}
            pipe.xadd(KEYS.results, {**fields, "internal_date": "2026-01-31T00:00:00Z"})
        pipe.execute()
    with Daemon("scripts/erase.py", "--sender", SENDER, "--yes", env=pipeline.env, tmp=pipeline.tmp) as running:
        until(lambda: pipeline.client.xlen(KEYS.results) < 2000, DEADLINE, "the first mail is gone")
        running.kill9()
    erase(pipeline, "--sender", SENDER, "--yes")
    assert mentions(pipeline, SECRET) == []
    assert pipeline.client.scard(KEYS.processed("a@x.org", "2026-01-31")) == 2000
    assert not pipeline.client.exists(KEYS.erasing, KEYS.copy(KEYS.results))
    assert pipeline.client.xlen(KEYS.results) == 0


def test_raw_mail_that_the_results_have_forgotten(pipeline: Pipeline) -> None:
    """--sender looks into the archive itself; raw mail that another mail needs stays, and is said to; what is young stays for an hour."""
    eve = from_eve(pipeline, "fine", "other")
    settle(pipeline, eve)
    [one, two] = pipeline.client.xrange(KEYS.results)
    pipeline.client.xdel(KEYS.results, one[0], two[0])
    pipeline.client.xadd(
        KEYS.results, {"email_id": "gm:x@y.org:1", "outcome": "done", "raw_ref": two[1]["raw_ref"], "from": "z@y"}
    )
    told = erase(pipeline, "--sender", SENDER, "--yes", code=1)
    assert told["erased"] == {}
    assert "not removed yet: 1 raw mail" in told["troubles"][0]
    assert len(raw_files(pipeline)) == 2, "a producer may be about to publish it"
    for path in raw_files(pipeline):
        moment = time.time() - YOUNG_SECONDS
        os.utime(path, (moment, moment))
    told = erase(pipeline, "--sender", SENDER, "--yes")
    assert told["erased"] == {"raw mails": 1}
    assert "1 raw mail in the archive" in told["stays"][-1]
    assert [path.name for path in raw_files(pipeline)] == [two[1]["raw_ref"].removeprefix("sha256:")]


def test_under_least_privilege(pipeline: Pipeline) -> None:
    """The operator of docs/security.md may do all of it."""
    acl.make_users(pipeline.client)
    pipeline.client.execute_command("ACL", "LOG", "RESET")
    eve = from_eve(pipeline, "fine", "permanent")
    settle(pipeline, eve)
    url = acl.as_user(pipeline.redis.url, "operator")
    assert erase(pipeline, "--sender", SENDER, "--yes", REDIS_URL=url)["erased"]["mails"] == 2
    assert mentions(pipeline, SECRET) == []
    denied = {row["object"] for row in pipeline.client.acl_log()}
    if not acl.EVERYWHERE:
        pipeline.client.acl_deluser("producer", "worker", "operator")
    assert denied <= {"config|get"}


@pytest.mark.parametrize(
    "args", [("--sender", "@example.org"), ("--email-id", "17"), (), ("--sender", "a@b", "--email-id", "gm:a:1")]
)
def test_wrong_arguments(valkey: RedisServer, tmp_path: Path, args: tuple[str, ...]) -> None:
    """A domain is no sender, a number no email_id, and one of both must be said: exit 2."""
    with Daemon("scripts/erase.py", *args, "--yes", env={"REDIS_URL": valkey.url}, tmp=tmp_path) as running:
        assert running.exit_code(DEADLINE) == 2
