"""What the commands print, write and leave alone; exit codes as the README gives them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import urllib.request
from pathlib import Path

import pytest

from config.accounts import load_accounts
from config.settings import load_settings
from src.common.clock import SYSTEM
from src.producer.daemon import accesses
from src.producer.offline import print_preview
from tests.support.acl import not_under_acl
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import free_port
from tests.support.wait import until


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def finished(daemon: Daemon, code: int = 0) -> str:
    """The output of a command that ends by itself with exit code `code`."""
    with daemon:
        assert daemon.exit_code(DEADLINE) == code, daemon.output()
        return daemon.output()


def keys_of(pipeline: Pipeline) -> dict[str, tuple[bytes, int]]:
    """Every key as it would be dumped, with its expiry."""
    with pipeline.redis.client(decode_responses=False) as client:
        return {key.decode(): (client.dump(key), client.pexpiretime(key)) for key in client.scan_iter("*")}


def files_of(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Every file and folder below `folder`, but the outputs of the daemons: content, mode, time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix != ".log":
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
            found[str(path.relative_to(folder))] = (content, status.st_mode, status.st_mtime_ns)
    return found


def test_once_reads_what_is_there_and_ends(pipeline: Pipeline) -> None:
    """--once publishes everything, ends with 0 and leaves no lease behind; again, it publishes nothing."""
    pipeline.deliver("one", "two", "three")
    finished(pipeline.producer("--once"))
    pipeline.assert_accounted(waiting=pipeline.delivered)
    finished(pipeline.producer("--once", PRODUCER_LEASE="3600"))
    pipeline.deliver("four")
    finished(pipeline.producer("--once", PRODUCER_LEASE="3600"))
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:email_count") == "4"


@pytest.mark.parametrize("lived", [False, True], ids=["fresh", "lived"])
def test_dry_run_writes_nothing(pipeline: Pipeline, lived: bool) -> None:
    """--dry-run shows what would be published; no key in Redis and no file is made, changed or touched."""
    if lived:
        pipeline.deliver("known")
        finished(pipeline.producer("--once"))
    [email_id] = pipeline.deliver("a subject to look at")
    keys, files = keys_of(pipeline), files_of(pipeline.tmp)
    output = finished(pipeline.producer("--dry-run"))
    assert keys_of(pipeline) == keys
    assert files_of(pipeline.tmp) == files
    [shown] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert shown["mailbox"] == f"{pipeline.account}/INBOX"
    assert shown["mails"] == 1
    assert shown["known"] == 0, "what was read before is not looked at again"
    assert [line["subject"] for line in shown["lines"]] == ["a subject to look at"]
    finished(pipeline.producer("--once"))
    assert email_id in {fields["email_id"] for fields in pipeline.books().stream.values()}
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_dry_run_on_a_terminal_is_a_table(pipeline: Pipeline) -> None:
    """A line of totals, one for each of the first 20 mails (UID, date, bytes, sender, subject), and how many more there are."""
    pipeline.deliver(*(f"mail {number}" for number in range(22)))
    places = {"TOKEN_DIR": pipeline.tmp / "tokens", "DATA_DIR": pipeline.tmp / "data"}
    settings = load_settings({**places, **pipeline.env}, env_file=None)
    out = Terminal()
    assert print_preview(settings, accesses(load_accounts(settings.mail), SYSTEM, keep=False), SYSTEM, out) == 0
    totals, *lines, more = out.getvalue().splitlines()
    assert totals == (f"{pipeline.account}/INBOX: 22 mails (0.0 MB) would be published, 0 are known. first read: mail since ever")
    assert [line.split()[0] for line in lines] == [str(uid) for uid in range(1, 21)]
    assert re.fullmatch(r" +1  \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ +\d+  ann@example\.org +mail 0", lines[0])
    assert more == "  … and 2 more"
    pipeline.delivered.clear()
    pipeline.assert_accounted()


def test_dry_run_without_redis_starts_none(pipeline: Pipeline) -> None:
    """Where no Redis answers every mail counts as new, and nothing is started or written."""
    pipeline.deliver("one", "two")
    port = free_port()
    files = files_of(pipeline.tmp)
    output = finished(pipeline.producer("--dry-run", REDIS_URL=f"redis://127.0.0.1:{port}/0"))
    assert files_of(pipeline.tmp) == files
    seen = json.loads(output.splitlines()[-1])
    assert seen["mails"] == 2 and seen["why"].startswith("no Redis answers, so every mail counts as new; first read")
    pipeline.delivered.clear()
    pipeline.assert_accounted()


def test_parse_prints_what_intake_would_publish(pipeline: Pipeline) -> None:
    """--parse prints one record a file, without Redis and IMAP: the fields that come from the mail are those in the stream."""
    raw = b"From: Ann <ann@example.org>\r\nTo: bob@example.org\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\nhello\r\n"
    path = pipeline.tmp / "mail.eml"
    path.write_bytes(raw)
    pipeline.source.deliver(pipeline.account, raw)
    finished(pipeline.producer("--once"))
    [fields] = pipeline.books().stream.values()
    pipeline.delivered.append(fields["email_id"])
    with Daemon("producer.py", "--parse", str(path), str(path), env={}, tmp=pipeline.tmp) as command:
        assert command.exit_code(DEADLINE) == 0
        first, second = (json.loads(line) for line in command.output().splitlines())
    assert first == second
    assert first["subject"] == "Grüße"
    published = json.loads(fields["record"])
    told_by_intake = {"uidvalidity", "gm_thrid", "gm_labels", "ingested_at", "raw_ref", "traceparent"}
    assert {name for name in first if first[name] != published[name]} <= told_by_intake
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_parse_of_a_missing_file(tmp_path: Path) -> None:
    """Exit 2 and one line that names the file."""
    with Daemon("producer.py", "--parse", "nowhere.eml", env={}, tmp=tmp_path) as command:
        assert command.exit_code(DEADLINE) == 2
        assert command.output() == "producer.py: --parse nowhere.eml: No such file or directory\n"


@pytest.mark.parametrize("flags", [(), ("--once",), ("--dry-run",)])
def test_no_token(pipeline: Pipeline, flags: tuple[str, ...]) -> None:
    """No mailbox has a token: exit 3, and the last line is the command that makes one."""
    for path in (pipeline.tmp / "tokens").iterdir():
        path.unlink()
    output = finished(pipeline.producer(*flags), code=3)
    assert output.splitlines()[-1].startswith("producer.py: there is no token file")
    assert f"python producer.py --auth-setup --username {pipeline.account}" in output.splitlines()[-1]
    pipeline.assert_accounted()


def test_revoked_token_under_once(pipeline: Pipeline) -> None:
    """--once with a token that was revoked: exit 3 with the cause and the command."""
    pipeline.deliver("one")
    pipeline.source.revoke(pipeline.account)  # type: ignore[union-attr]  # a Sandbox
    output = finished(pipeline.producer("--once"), code=3)
    assert "revoked" in output.splitlines()[-1]
    assert f"--auth-setup --username {pipeline.account}" in output.splitlines()[-1]


@pytest.mark.parametrize("script", ["producer.py", "worker.py"])
def test_health_answers(pipeline: Pipeline, script: str) -> None:
    """GET /health of a running daemon: 200 and ok; another page is 404."""
    with pipeline.producer() if script == "producer.py" else pipeline.worker() as daemon:
        url = daemon.wait_for(r"health: (http://\S+/health)", DEADLINE)[1]

        def healthy() -> bool:
            with urllib.request.urlopen(url, timeout=10) as answer:
                body = json.load(answer)
                assert (answer.status, body["status"]) == (200, "ok")
                return len(body["loops"]) >= 2

        until(healthy, DEADLINE, "the daemon's loops are seen")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url.replace("health", "nothing"), timeout=10)


def test_port_taken_by_name_is_an_error(pipeline: Pipeline) -> None:
    """HTTP_PORT that another process has: exit 2 and one line; without HTTP_PORT the next free port is taken and printed."""
    with pipeline.worker() as first:
        port = first.wait_for(r"health: http://127.0.0.1:(\d+)/", DEADLINE)[1]
        output = finished(pipeline.worker(HTTP_PORT=port), code=2)
        assert output.splitlines()[-1].startswith(f"worker.py: HTTP_PORT={port}: cannot listen")


@pytest.mark.parametrize("script", ["producer.py", "worker.py"])
def test_wrong_setting(pipeline: Pipeline, script: str) -> None:
    """Exit 2 and one line that names the variable, the rule and the value."""
    make = pipeline.producer if script == "producer.py" else pipeline.worker
    output = finished(make(LEASE_SECONDS="soon"), code=2)
    assert output.startswith(f"{script}: LEASE_SECONDS=soon: ")
    assert len(output.splitlines()) == 1


@not_under_acl("the users may reach one stream only")
def test_stream_name_that_is_taken(pipeline: Pipeline) -> None:
    """STREAM_NAME of a key that is no stream: exit 2 for the worker; the producer leaves the key alone and says so."""
    pipeline.client.set("taken", "precious")
    output = finished(pipeline.worker(STREAM_NAME="taken"), code=2)
    assert "STREAM_NAME=taken: that key is a string, not a stream" in output
    pipeline.deliver("one")
    with pipeline.producer(STREAM_NAME="taken") as producer:
        producer.wait_for("STREAM_NAME=taken: that key is a string", DEADLINE)
    assert pipeline.client.get("taken") == "precious"
