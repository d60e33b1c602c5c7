"""From the mailbox to the handler with real processes, on Redis 7.0 and on Valkey; each test accounts for every mail."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from src.sandbox.server import Sandbox
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until

STREAM = "email_ingestion_stream"


@pytest.fixture
def gmail(sandbox: Sandbox, either_redis: RedisServer, tmp_path: Path) -> Pipeline:
    return Pipeline(sandbox, either_redis, tmp_path)


@pytest.fixture
def imap(dovecot: Dovecot, either_redis: RedisServer, tmp_path: Path) -> Pipeline:
    """From Dovecot over TLS."""
    return Pipeline(dovecot, either_redis, tmp_path)


def dlq(pipeline: Pipeline, *args: str) -> str:
    """scripts/dlq.py, as a user runs it; its output."""
    with Daemon("scripts/dlq.py", *args, env=pipeline.env, tmp=pipeline.tmp) as command:
        assert command.exit_code(DEADLINE) == 0, command.output()
        return command.output()


def test_producer_stream_worker(imap: Pipeline) -> None:
    """Mail of a Dovecot mailbox stands in the stream as formats.md says, then each mail goes through the handler once."""
    imap.deliver("one", "two", "three")
    with imap.producer():
        imap.wait_for_uid(3)
        books = imap.books()
        assert [(fields["subject"], fields["uid"]) for fields in books.stream.values()] == [
            ("one", "1"),
            ("two", "2"),
            ("three", "3"),
        ]
        assert [fields["email_id"] for fields in books.stream.values()] == imap.delivered
        first = next(iter(books.stream.values()))
        assert first["account"] == imap.account
        assert first["mailbox"] == "INBOX"
        assert json.loads(first["record"])["body_text"].strip() == "hello"
        imap.assert_accounted(waiting=imap.delivered)
        with imap.worker():
            imap.wait_until_settled()
            imap.deliver("four")  # IDLE brings it
            imap.wait_until_settled()
    imap.assert_accounted()
    assert Counter(line.email_id for line in imap.lines("end")) == Counter(imap.delivered)


def test_duplicates_are_prevented(gmail: Pipeline) -> None:
    """The same mail once: under two labels, read again after its state was lost, put into the stream a second time."""
    gmail.deliver("labelled", "plain")
    gmail.source.copy(gmail.account, 1, "Work")  # type: ignore[union-attr]  # a Sandbox
    with gmail.producer("--mailbox", "INBOX", "--mailbox", "Work") as producer, gmail.worker() as worker:
        gmail.wait_for_uid(2)
        gmail.wait_for_uid(1, "Work")
        gmail.wait_until_settled()
        gmail.assert_accounted()

        assert producer.terminate() == 0
        assert gmail.client.delete(*gmail.client.scan_iter("producer_state:*"))
        with gmail.producer("--mailbox", "INBOX", "--mailbox", "Work"):
            gmail.wait_for_uid(2)
            gmail.wait_for_uid(1, "Work")
            assert not gmail.client.exists(f"producer_state:{gmail.account}:INBOX:email_count"), "nothing was published"

        with gmail.producer():
            gmail.wait_for_begun(gmail.deliver("hold gate"))
            [fields] = gmail.books().stream.values()
            again = gmail.client.xadd(STREAM, fields)
            gmail.wait_for_books(lambda books: again not in books.stream, "the copy of a mail in flight is dropped")
            gmail.open_gate("gate")
            gmail.wait_until_settled()
            late = gmail.client.xadd(STREAM, fields)
            gmail.wait_for_books(lambda books: late not in books.stream, "the copy of a finished mail is dropped")
        worker.wait_for("dropped 1 duplicates")
    gmail.assert_accounted()
    assert Counter(line.email_id for line in gmail.lines("begin")) == Counter(gmail.delivered)


def test_dead_letter_after_the_last_attempt(gmail: Pipeline) -> None:
    """A mail is retried with a growing count of attempts until MAX_ATTEMPTS, then stands in the DLQ with the error."""
    [dies, heals, _] = gmail.deliver("fail 99", "fail 2", "fine")
    with gmail.producer(), gmail.worker(MAX_ATTEMPTS="3") as worker:
        gmail.wait_until_settled()
        worker.wait_for(f"{dies} is dead after 3 attempts")
    gmail.assert_accounted(dead={dies: "attempts"})
    [letter] = gmail.books().dead.values()
    assert letter["dead_attempts"] == "3"
    assert letter["dead_error_type"] == "RuntimeError"
    assert letter["dead_error"] == "attempt 3 fails as ordered"
    assert [line.attempt for line in gmail.lines("begin") if line.email_id == dies] == [1, 2, 3]
    assert [line.attempt for line in gmail.lines("begin") if line.email_id == heals] == [1, 2, 3]


def test_whole_pipeline_with_acknowledgement(imap: Pipeline) -> None:
    """A handled mail is acknowledged and leaves the stream only when its handler has finished; its result is on record."""
    [held, *_] = imap.deliver("hold gate", "quick", "permanent")
    with imap.producer() as producer, imap.worker() as worker:
        imap.wait_for_books(lambda books: len(books.fates()) == 2, "the other two are settled")
        books = imap.books()
        assert {fields["email_id"] for fields in books.stream.values()} == {held}
        assert books.pending == set(books.stream)
        imap.open_gate("gate")
        imap.wait_until_settled()
        [group] = imap.client.xinfo_groups(STREAM)
        assert (group["name"], group["pending"]) == ("email_workers", 0)
        assert producer.terminate() == 0
        assert worker.terminate() == 0
    imap.assert_accounted(dead={imap.delivered[2]: "permanent"})
    results = {fields["email_id"]: fields for _, fields in imap.client.xrange(f"{STREAM}:results")}
    assert json.loads(results[held]["result"]) == {"subject": "hold gate", "attempt": 1}
    assert imap.client.xinfo_consumers(STREAM, "email_workers") == [], "a worker that ended leaves no consumer behind"


def test_reprocess_from_the_dead_letters(gmail: Pipeline) -> None:
    """`dlq.py replay` sends a dead mail through the handler again with a fresh count of attempts; `discard` gives it up."""
    [heals, given_up, _] = gmail.deliver("fail 2", "permanent", "fine")
    with gmail.producer(), gmail.worker(MAX_ATTEMPTS="2"):
        gmail.wait_until_settled()
        gmail.assert_accounted(dead={heals: "attempts", given_up: "permanent"})
    letters = {fields["email_id"]: entry_id for entry_id, fields in gmail.books().dead.items()}
    assert heals in dlq(gmail, "list")
    assert "attempt 2 fails as ordered" in dlq(gmail, "show", letters[heals])
    dlq(gmail, "replay", letters[heals])
    dlq(gmail, "discard", letters[given_up])
    gmail.assert_accounted(waiting=[heals], discarded=[given_up])
    with gmail.worker(MAX_ATTEMPTS="3"):
        gmail.wait_until_settled()
    gmail.assert_accounted(discarded=[given_up])
    assert [line.attempt for line in gmail.lines("begin") if line.email_id == heals] == [1, 2, 1, 2, 3]


def test_concurrent_consumers(gmail: Pipeline) -> None:
    """Three workers share 300 mails: each is handled once, and each worker has its part."""
    gates = [f"hold gate{number}" for number in range(3)]
    gmail.deliver(*gates)
    with gmail.producer(), ExitStack() as stack:
        workers = [stack.enter_context(gmail.worker(WORKER_CONCURRENCY="1", LEASE_SECONDS="60")) for _ in range(3)]
        gmail.wait_for_begun(gmail.delivered)
        assert len({line.pid for line in gmail.lines("begin")}) == 3, "a worker with one slot takes one mail"
        gmail.deliver(*("fail 1" if number % 10 == 0 else f"mail {number}" for number in range(297)))
        for number in range(3):
            gmail.open_gate(f"gate{number}")
        gmail.wait_until_settled()
        assert [worker.terminate() for worker in workers] == [0, 0, 0]
    gmail.assert_accounted()
    assert Counter(line.email_id for line in gmail.lines("end")) == Counter(gmail.delivered)
    assert {line.pid for line in gmail.lines("end")} == {worker.pid for worker in workers}


def test_thousand_mails(gmail: Pipeline) -> None:
    """1,000 mails, some failing once, some dead: every one in exactly one place."""
    subjects = [
        "permanent" if number % 100 == 7 else "fail 1" if number % 20 == 3 else f"mail {number}" for number in range(1000)
    ]
    ids = gmail.deliver(*subjects)
    with gmail.producer(), gmail.worker(), gmail.worker():
        gmail.wait_until_settled(timeout=120)
    dead = {email_id: "permanent" for email_id, subject in zip(ids, subjects, strict=True) if subject == "permanent"}
    assert len(dead) == 10
    gmail.assert_accounted(dead=dead)
    until(lambda: gmail.client.get(f"producer_state:{gmail.account}:INBOX:email_count") == "1000", what="the count of mails")


def test_a_handler_has_the_raw_mail_and_its_attachments(gmail: Pipeline) -> None:
    """`email.raw()` is what the mailbox holds, byte for byte; `attachments[i].open()` gives the decoded file."""
    raw = (
        b'Message-ID: <raw@x>\r\nSubject: raw\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="b"\r\n\r\n'
        b"--b\r\nContent-Type: text/plain\r\n\r\nhello\r\n"
        b'--b\r\nContent-Type: application/pdf\r\nContent-Disposition: attachment; filename="a.pdf"\r\n'
        b"Content-Transfer-Encoding: base64\r\n\r\nJVBERi0xLjQ=\r\n--b--\r\n"
    )
    gmail.source.deliver(gmail.account, raw)
    with (
        gmail.producer("--once") as producer,
        gmail.worker(WORKER_HANDLER="tests.support.handlers:measure_raw") as worker,
    ):
        assert producer.exit_code(DEADLINE) == 0
        [(_, line)] = until(lambda: gmail.redis.client().xrange(f"{STREAM}:results"), DEADLINE, "the mail is done")
        assert worker.running()
        result = json.loads(line["result"])
    assert result == {"sha256": hashlib.sha256(raw).hexdigest(), "attachments": ["%PDF"]}
