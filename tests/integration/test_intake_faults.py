"""The producer against mailboxes that change, stall, lie and break off; each test accounts for every mail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.sandbox.server import Sandbox
from tests.support.once import read_once
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.proxy import FaultProxy
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until


@pytest.fixture(params=["sandbox", "dovecot"])
def either_source(request: pytest.FixtureRequest, valkey: RedisServer, tmp_path: Path) -> Pipeline:
    """From a sandbox Gmail, then from Dovecot over TLS."""
    return Pipeline(request.getfixturevalue(request.param), valkey, tmp_path)


@pytest.fixture
def gmail(pipeline: Pipeline, sandbox: Sandbox) -> tuple[Pipeline, Sandbox]:
    """The pipeline together with its sandbox, on which faults are ordered."""
    return pipeline, sandbox


def record_of(pipeline: Pipeline, email_id: str) -> dict[str, object]:
    """What stands in the stream of a mail."""
    [fields] = [fields for fields in pipeline.books().stream.values() if fields["email_id"] == email_id]
    record: dict[str, object] = json.loads(fields["record"])
    return record


def test_uidvalidity_change(either_source: Pipeline) -> None:
    """The folder is walked from UID 1; done, waiting and dead mail is recognised, only what is new is published."""
    pipeline = either_source
    [_, _, held, dead] = pipeline.deliver("one", "two", "hold gate", "permanent")
    with pipeline.producer() as producer, pipeline.worker(LEASE_SECONDS="60"):
        pipeline.wait_for_books(lambda books: len(books.fates()) == 3, "all but one are settled")
        uidvalidity = pipeline.change_uidvalidity()
        pipeline.deliver("five", "six")
        producer.wait_for(f"UIDVALIDITY changed from \\d+ to {uidvalidity}", DEADLINE)
        pipeline.wait_for_books(lambda books: len(books.fates()) == 5, "the new mails are settled")
        pipeline.wait_for_uid(6)
        pipeline.assert_accounted(dead={dead: "permanent"}, waiting=[held])
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
    pipeline.assert_accounted(dead={dead: "permanent"})
    assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:uidvalidity") == str(uidvalidity)
    assert len(pipeline.lines("begin")) == 6


def test_interrupted_first_read_then_uidvalidity_change(either_source: Pipeline) -> None:
    """A first read that was killed half-way loses nothing to a new UIDVALIDITY, and still leaves out what its boundary leaves out."""
    pipeline = either_source
    pipeline.deliver(*(f"too old {number}" for number in range(5)), days_ago=20, expected=False)
    pipeline.deliver(*(f"mail {number}" for number in range(60)), days_ago=1)
    settings = {"INITIAL_SYNC": "since:5d", "PRODUCER_BATCH_SIZE": "10"}
    with pipeline.producer(STREAM_MAXLEN="200", **settings) as producer:  # backfill may use a tenth
        producer.wait_for("intake waits", DEADLINE)
        producer.kill9()
    read = len(pipeline.books().stream)
    assert 20 <= read < 60, "the first read was interrupted"
    uidvalidity = pipeline.change_uidvalidity()
    pipeline.deliver("came meanwhile")
    with pipeline.producer(**settings) as producer, pipeline.worker():
        producer.wait_for(f"UIDVALIDITY changed from \\d+ to {uidvalidity}", DEADLINE)
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(66)
    pipeline.assert_accounted()
    assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:email_count") == "61"


@pytest.mark.full
def test_fetches_longer_than_the_lease_with_a_standby(gmail: tuple[Pipeline, Sandbox]) -> None:
    """Two producers, each IMAP answer takes longer than the lease: the owner goes on, the standby takes over when it is killed."""
    pipeline, sandbox = gmail
    with pipeline.producer(PRODUCER_LEASE="2") as owner:
        pipeline.wait_for_first_poll()
        with pipeline.producer(PRODUCER_LEASE="2") as standby, pipeline.worker():
            standby.wait_for("standing by")
            sandbox.faults.stall(3, times=1000)  # with leases left to the fetches the two would fence each other for ever
            pipeline.deliver("one", "two", "three")
            pipeline.wait_until_settled()
            assert int(str(sandbox.faults.state()["stall"]["left"])) <= 997, "search, sizes and bodies came late"
            sandbox.faults.clear()
            owner.kill9()
            pipeline.deliver("four", "five")
            pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert len(pipeline.lines("begin")) == 5


def test_frozen_producer_publishes_nothing_after_its_lease(gmail: tuple[Pipeline, Sandbox]) -> None:
    """The owner freezes in the middle of a fetch, a standby reads the mails; thawed, the owner is fenced and stands by."""
    pipeline, sandbox = gmail
    with pipeline.producer(PRODUCER_LEASE="2", POLL_INTERVAL="600") as owner, pipeline.worker():
        pipeline.wait_for_first_poll()
        with pipeline.producer(PRODUCER_LEASE="2") as standby:
            standby.wait_for("standing by")
            sandbox.faults.stall(1, times=4)
            pipeline.deliver("one", "two", "three")
            until(lambda: sandbox.faults.state().get("stall", {"left": 0})["left"] != 4, DEADLINE, "the owner is at it")
            owner.freeze()
            pipeline.wait_until_settled()
            owner.thaw()
            owner.wait_for("standing by|another producer", DEADLINE)
            pipeline.deliver("four")
            pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert len(pipeline.lines("begin")) == 4


def test_stream_maxlen(pipeline: Pipeline) -> None:
    """At STREAM_MAXLEN the producer waits and says so, mail stays in IMAP; drained, it goes on."""
    with pipeline.producer(STREAM_MAXLEN="10", PRODUCER_BATCH_SIZE="4") as producer:
        pipeline.wait_for_first_poll()
        pipeline.deliver(*(f"mail {number}" for number in range(40)))
        producer.wait_for(r"the stream holds \d+ unfinished mails \(limit 10\): intake waits", DEADLINE)
        unfinished = len(pipeline.books().stream)
        assert 10 <= unfinished < 10 + 4, "at most one batch above the limit"
        assert int(pipeline.last_uid() or 0) == unfinished
        with pipeline.worker():
            pipeline.wait_until_settled()
            producer.wait_for("the stream has room again")
    pipeline.assert_accounted()


def test_ok_without_data_is_asked_again(gmail: tuple[Pipeline, Sandbox]) -> None:
    """FETCH answers OK without a mail's data, once for what stands before the body and once for the body: nothing is passed over."""
    pipeline, sandbox = gmail
    pipeline.deliver("one", "two", "three", "four")
    sandbox.faults.ok_without_data([2], times=2)
    with pipeline.producer() as producer, pipeline.worker():
        producer.wait_for("OK without the data of UID 2")
        pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert not sandbox.faults.state()


@pytest.mark.parametrize("no", ["", "Some messages could not be FETCHed (Failure)"], ids=["OK", "NO"])
@pytest.mark.parametrize("bodies_only", [True, False])
def test_mail_that_can_never_be_fetched(gmail: tuple[Pipeline, Sandbox], bodies_only: bool, no: str) -> None:
    """After three tries it enters as a stub with the reason; the mails behind it come through. Gmail says NO to a group with one."""
    pipeline, sandbox = gmail
    [_, refused, _] = pipeline.deliver("one", "two", "three")
    sandbox.faults.ok_without_data([2], times=1000, bodies_only=bodies_only, no=no)
    with pipeline.producer() as producer:
        pipeline.wait_for_uid(3)
        producer.wait_for("UID 2 was asked for 3 times without an answer")
        [_, entry, _] = pipeline.books().stream.values()
        if bodies_only:
            assert entry["email_id"] == refused
        else:  # the server told nothing that could identify it
            pipeline.delivered[1] = refused = entry["email_id"]
        record = record_of(pipeline, refused)
        assert record["defects"] == ["the server did not give this mail in 3 tries"]
        with pipeline.worker():
            pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert 1000 - int(str(sandbox.faults.state()["ok_without_data"]["left"])) >= 3, "it was asked for three times"


def test_expunged_mail_does_not_hold_the_others(gmail: tuple[Pipeline, Sandbox]) -> None:
    """A mail deleted between the search and the fetch is gone, not withheld: the others come through, no stub is made."""
    pipeline, sandbox = gmail
    pipeline.deliver("one")
    sandbox.faults.ok_without_data([2], times=2, bodies_only=True)
    pipeline.deliver("two", expected=False)
    pipeline.deliver("three")
    with pipeline.producer(INCOMPLETE_WAIT="3") as producer, pipeline.worker():
        producer.wait_for("OK without the data of UID 2")
        sandbox.expunge(pipeline.account, 2)
        pipeline.wait_until_settled()
        producer.wait_for("UID 2 is gone from the folder")
    pipeline.assert_accounted()


def test_mail_above_max_message_bytes(either_source: Pipeline) -> None:
    """It enters as a stub: header, the first 64 KiB, truncated, the reason; its neighbours enter whole."""
    pipeline = either_source
    pipeline.deliver("small")
    [large] = pipeline.deliver("large", body=b"0123456789abcdef\r\n" * 12_000)
    pipeline.deliver("small too")
    with pipeline.producer(MAX_MESSAGE_BYTES="100000"):
        pipeline.wait_for_uid(3)
        record = record_of(pipeline, large)
        assert record["subject"] == "large"
        assert record["body_truncated"] is True
        assert 216_000 < int(str(record["size"])) < 217_000
        assert [reason for reason in record["defects"] if "above MAX_MESSAGE_BYTES=100000" in reason]  # type: ignore[attr-defined]
        with pipeline.worker():
            pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_the_first_mail_of_all_is_too_large(pipeline: Pipeline) -> None:
    """It enters as a stub at once: a group without raw mail asks nothing of an archive that does not exist yet."""
    pipeline.deliver("large", body=b"0123456789abcdef\r\n" * 12_000)
    assert read_once(pipeline, MAX_MESSAGE_BYTES="100000") == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_idle_brings_mail_long_before_the_poll(either_source: Pipeline) -> None:
    """With POLL_INTERVAL=600 new mail is handled within the test's deadline: IDLE tells of it."""
    pipeline = either_source
    with pipeline.producer(POLL_INTERVAL="600"), pipeline.worker():
        pipeline.wait_for_first_poll()
        for number in range(3):
            pipeline.deliver(f"mail {number}")
            pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_connection_dropped_in_the_middle_of_a_literal(gmail: tuple[Pipeline, Sandbox]) -> None:
    """The connection ends three times within the bodies of a fetch: what came is no mail yet, and nothing is lost or doubled."""
    pipeline, sandbox = gmail
    pipeline.deliver(*(f"mail {number}" for number in range(20)), body=b"0123456789abcdef\r\n" * 1000)
    sandbox.faults.drop_after_bytes(100_000, times=3)
    with pipeline.producer(PRODUCER_BATCH_SIZE="10"), pipeline.worker():
        pipeline.wait_until_settled()
    pipeline.assert_accounted()
    assert not sandbox.faults.state(), "all three drops have happened"


def test_tls_connection_cut_in_the_middle_of_a_fetch(dovecot: Dovecot, valkey: RedisServer, tmp_path: Path) -> None:
    """The same under TLS: the proxy cuts between producer and Dovecot, then refuses for a while."""
    with FaultProxy(dovecot.imaps_port) as proxy:
        pipeline = Pipeline(dovecot, valkey, tmp_path, IMAP_PORT=str(proxy.port))
        pipeline.deliver(*(f"mail {number}" for number in range(20)), body=b"0123456789abcdef\r\n" * 1000)
        proxy.cut_after(100_000, "to_client")
        with pipeline.producer(PRODUCER_BATCH_SIZE="10") as producer, pipeline.worker():
            until(lambda: not proxy.cut_is_pending("to_client"), DEADLINE, "the cut in the middle of a fetch")
            proxy.refuse(True)
            proxy.cut()
            producer.wait_for("IMAP is away", DEADLINE)
            pipeline.deliver("came meanwhile")
            proxy.refuse(False)
            pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_expired_access_tokens_are_no_news(gmail: tuple[Pipeline, Sandbox]) -> None:
    """The server ends the session and refuses the access token, as Gmail does after an hour: one refresh, and on it goes."""
    pipeline, sandbox = gmail
    with pipeline.producer() as producer, pipeline.worker():
        pipeline.deliver("one")
        pipeline.wait_until_settled()
        sandbox.expire_tokens()
        sandbox.faults.bye()
        pipeline.deliver("two")
        pipeline.wait_until_settled()
        assert "REAUTH_REQUIRED" not in producer.output()
    pipeline.assert_accounted()


def test_revoked_token_holds_its_own_mailbox_only(gmail: tuple[Pipeline, Sandbox]) -> None:
    """invalid_grant: REAUTH_REQUIRED with the command in the log, the other account goes on, a new token file is noticed."""
    pipeline, sandbox = gmail
    other = "other@example.org"
    pipeline.write_token(other)
    with pipeline.producer(GMAIL_USERNAME=f"{pipeline.account},{other}") as producer, pipeline.worker():
        pipeline.deliver("one")
        pipeline.deliver("two", account=other)
        pipeline.wait_until_settled()
        sandbox.revoke(pipeline.account)
        sandbox.expire_tokens()
        sandbox.cut()
        producer.wait_for(f"{pipeline.account}/INBOX: REAUTH_REQUIRED: .*--auth-setup --username {pipeline.account}", DEADLINE)
        held_back = pipeline.deliver("three")
        pipeline.deliver("four", account=other)
        pipeline.wait_until_settled(set(pipeline.delivered) - set(held_back))
        pipeline.write_token(pipeline.account)
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


def test_too_many_connections_is_rested_out(gmail: tuple[Pipeline, Sandbox]) -> None:
    """Gmail refuses the login because of too many connections: no new consent is asked for, after a rest the mailbox is read."""
    pipeline, sandbox = gmail
    sandbox.faults.login_no("[ALERT] Too many simultaneous connections. (Failure)", times=2)
    pipeline.deliver("one", "two")
    with pipeline.producer(CONNECTIONS_WAIT="0.2") as producer, pipeline.worker():
        pipeline.wait_until_settled()
        assert "REAUTH_REQUIRED" not in producer.output()
    pipeline.assert_accounted()
    assert not sandbox.faults.state()
