"""What is read, when and by whom: first reads, late mail, resync, the order of old and new, quotas, standby, lying sessions."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from src.sandbox.server import Sandbox
from tests.integration.test_commands import finished
from tests.support.once import read_once, reading
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.proxy import FaultProxy
from tests.support.wait import until


def day(days_ago: int) -> str:
    return (datetime.now(UTC) - timedelta(days=days_ago)).date().isoformat()


def in_stream(pipeline: Pipeline) -> set[str]:
    return {fields["email_id"] for fields in pipeline.books().stream.values()}


# the first read


@pytest.mark.parametrize(
    ("sync", "first", "why"),
    [
        ("all", 3, r"first read: mail since ever \(3 of 3 mails to look at\)"),
        ("since:7d", 2, rf"first read: mail since {day(7)} \(2 of 3 mails to look at\)"),
        (f"since:{day(2)}", 1, rf"first read: mail since {day(2)} \(2 of 3 mails to look at\)"),
        ("new", 0, r"first read: new mail only \(0 of 3 mails to look at\)"),
    ],
)
def test_initial_sync(pipeline: Pipeline, sync: str, first: int, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """How far back the first read goes, and the line that says how many mails that is; what comes later is always read."""
    caplog.set_level("INFO")
    pipeline.delivered = [pipeline.deliver(f"{days} days", days_ago=days, expected=False)[0] for days in (30, 3, 0)][3 - first :]
    assert read_once(pipeline, INITIAL_SYNC=sync) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert re.search(why, caplog.text)
    pipeline.deliver("later, with an old date", days_ago=40)
    assert read_once(pipeline, INITIAL_SYNC=sync) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_interrupted_first_read_goes_on_where_it_was(pipeline: Pipeline) -> None:
    """Killed half-way: the next producer leaves out what the first left out, reads nothing twice, and counts what is left out once."""
    pipeline.deliver(*(f"too old {number}" for number in range(3)), days_ago=20, expected=False)
    pipeline.deliver("too old, but SEARCH names it", days_ago=6, expected=False)
    pipeline.deliver(*(f"mail {number}" for number in range(30)), days_ago=1)
    pipeline.deliver("too old as well", days_ago=30, expected=False)
    settings = {"INITIAL_SYNC": "since:5d", "PRODUCER_BATCH_SIZE": "10"}
    with pipeline.producer(STREAM_MAXLEN="100", PRODUCER_LEASE="0.5", **settings) as producer:  # backfill may use a tenth
        producer.wait_for("intake waits", DEADLINE)
        producer.kill9()
    assert 10 <= len(in_stream(pipeline)) < 30, "the first read was interrupted"
    assert pipeline.client.hget(f"producer_state:{pipeline.account}:INBOX:intake", "passed") == "4"
    assert read_once(pipeline, **settings) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert pipeline.client.hget(f"producer_state:{pipeline.account}:INBOX:intake", "passed") == "5"
    pipeline.change_uidvalidity()
    assert read_once(pipeline, **settings) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert pipeline.client.hget(f"producer_state:{pipeline.account}:INBOX:intake", "passed") == "5", "walked, not added"
    assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:email_count") == "30"


# what comes late, and what is asked for


def test_uids_that_become_visible_late(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """Two mails that the server did not show when their UIDs were passed: found by looking back, each once."""
    sandbox.faults.hide_uids([2, 3], times=10_000)
    late = pipeline.deliver("one", "two", "three", "four")[1:3]
    with pipeline.producer(RELIST_INTERVAL="0.5") as producer, pipeline.worker():
        pipeline.wait_until_settled(set(pipeline.delivered) - set(late))
        assert pipeline.last_uid() == "4"
        sandbox.faults.clear()
        pipeline.wait_until_settled()
        producer.wait_for(r"mails became visible late", DEADLINE)
    pipeline.assert_accounted()
    assert pipeline.last_uid() == "4"


def test_resync_brings_back_what_new_mail_only_had_passed(pipeline: Pipeline) -> None:
    """--resync-from publishes passed mail since that day, known mail not again, older mail not at all; then it is over."""
    pipeline.deliver("too old", days_ago=9, expected=False)
    pipeline.deliver("a day too old", days_ago=4, expected=False)
    passed = [pipeline.deliver(f"passed {number}", days_ago=number, expected=False)[0] for number in (1, 2)]
    assert read_once(pipeline, INITIAL_SYNC="new") == 0
    pipeline.deliver("new")
    assert read_once(pipeline) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)
    since = datetime.now(UTC).date() - timedelta(days=3)
    assert read_once(pipeline, resync_from=since) == 0
    pipeline.delivered += passed
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert pipeline.client.hget(f"producer_state:{pipeline.account}:INBOX:intake", "resync") is None
    assert read_once(pipeline, resync_from=since) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_resync_asked_of_the_producer_that_reads(pipeline: Pipeline) -> None:
    """Under --once beside a running producer: that one does it at once, this one says so and ends; a wrong date is exit 2."""
    passed = pipeline.deliver("passed", days_ago=1, expected=False)
    with pipeline.producer(INITIAL_SYNC="new", POLL_INTERVAL="600") as owner:
        pipeline.wait_for_first_poll()
        output = finished(pipeline.producer("--once", "--resync-from", day(2)))
        assert f"INBOX: another producer reads it, and looks again at all mail since {day(2)}" in output
        pipeline.delivered += passed
        until(lambda: in_stream(pipeline) == set(passed), DEADLINE, "the owner has published it")
        owner.wait_for(f"looking again at 1 mails since {day(2)}")
        until(lambda: not pipeline.client.hexists(f"producer_state:{pipeline.account}:INBOX:intake", "resync"), DEADLINE, "done")
        assert owner.running()
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert "yesterday is no date like 2026-01-31" in finished(pipeline.producer("--resync-from", "yesterday"), code=2)


# old mail must not hold up new mail


def test_new_mail_goes_ahead_of_a_long_backfill(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Old mail fills its tenth of the stream and waits; new mail passes it; with room again all of it comes, each once."""
    old = pipeline.deliver(*(f"old {number}" for number in range(40)), days_ago=1)
    settings = {"PRODUCER_BATCH_SIZE": "5"}
    with reading(pipeline, STREAM_MAXLEN="100", **settings):
        until(lambda: "10 unfinished mails (limit 10): intake waits" in caplog.text, DEADLINE, "the backfill waits")
        new = pipeline.deliver("new 1", "new 2")
        until(lambda: set(new) <= in_stream(pipeline), DEADLINE, "the new mails have passed")
        assert in_stream(pipeline) == {*old[:10], *new}
        assert pipeline.last_uid() == "10"
    assert read_once(pipeline, **settings) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert pipeline.last_uid() == "42"


def test_a_spent_day_holds_back_old_mail_only(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """DAILY_BYTES: the backfill stops within a window of the limit and says so, new mail goes on; with more it goes on too."""
    old = pipeline.deliver(*(f"old {number}" for number in range(8)), body=b"0123456789abcdef\r\n" * 17_000, days_ago=1)
    settings = {"PRODUCER_BATCH_SIZE": "2"}
    with reading(pipeline, DAILY_BYTES="1000000", **settings):
        told = "DAILY_BYTES are spent: old mail waits until midnight UTC, new mail goes on"
        until(lambda: told in caplog.text, DEADLINE, "the backfill waits")
        assert in_stream(pipeline) == set(old[:4]), "1.2 of 2.4 MB"
        new = pipeline.deliver("new", body=b"0123456789abcdef\r\n" * 17_000)
        until(lambda: set(new) <= in_stream(pipeline), DEADLINE, "new mail may exceed it")
        assert in_stream(pipeline) == {*old[:4], *new}
    read = sum(int(pipeline.client.get(key)) for key in pipeline.client.keys(f"producer_state:{pipeline.account}:bytes:*"))
    assert 1_500_000 < read < 1_600_000, "each mail was fetched once"
    assert caplog.text.count(told) == 1
    assert read_once(pipeline, **settings) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)


# who reads


def test_a_standby_takes_over(pipeline: Pipeline) -> None:
    """The second producer stands by while the first lives, and reads what comes after its death; nothing twice."""
    with pipeline.producer(PRODUCER_LEASE="1") as owner:
        pipeline.wait_for_first_poll()
        with pipeline.producer(PRODUCER_LEASE="1") as standby:
            standby.wait_for("INBOX: another producer reads it; standing by", DEADLINE)
            pipeline.deliver("for the first")
            pipeline.wait_for_uid(1)
            standby.wait_for("INBOX: STANDBY, 0 published", DEADLINE)
            owner.kill9()
            pipeline.deliver("for the second")
            pipeline.wait_for_uid(2)
            standby.wait_for("INBOX: CONNECTED, 1 published", DEADLINE)
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_once_beside_a_living_producer_and_after_a_dead_one(pipeline: Pipeline) -> None:
    """--once leaves the mailbox to whoever reads it and ends; after a kill -9 it waits for the end of the lease and reads."""
    with pipeline.producer(PRODUCER_LEASE="1") as owner:
        pipeline.wait_for_first_poll()
        with pipeline.producer("--once", PRODUCER_LEASE="1") as once:
            assert once.exit_code(DEADLINE) == 0
            assert "another producer is alive and reads it: left to that one" in once.output()
            assert "gone from Redis" not in once.output()
        owner.kill9()
        pipeline.deliver("for the second")
    with pipeline.producer("--once", PRODUCER_LEASE="1") as once:
        assert once.exit_code(DEADLINE) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_once_that_is_stopped_while_it_stands_by_reads_nothing(pipeline: Pipeline) -> None:
    """SIGTERM while another holds the lease: no word of a state that is gone, exit 0."""
    pipeline.deliver("one")
    with pipeline.producer("--once") as first:
        assert first.exit_code(DEADLINE) == 0
    with pipeline.producer(PRODUCER_LEASE="600", STATS_INTERVAL="0.1") as owner:
        owner.wait_for("INBOX: CONNECTED", DEADLINE)
        with pipeline.producer("--once", PRODUCER_LEASE="600") as once:
            once.wait_for("standing by", DEADLINE)
            assert once.terminate() == 0
            assert "gone from Redis" not in once.output() and "published" not in once.output().partition("STANDBY")[0]
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_first_read_counts_as_connected(pipeline: Pipeline) -> None:
    """The counts in the log do not say STARTING until a long first read is over."""
    pipeline.deliver(*(f"mail {number}" for number in range(300)))
    with pipeline.producer(PRODUCER_BATCH_SIZE="1", STATS_INTERVAL="0.1") as producer:
        published = int(producer.wait_for(r"INBOX: CONNECTED, (\d+) published", DEADLINE)[1])
        assert published < 300
        pipeline.wait_for_uid(300)
    pipeline.assert_accounted(waiting=pipeline.delivered)


# what a poll costs


@pytest.mark.parametrize("size", [10, 5_000])
def test_a_poll_of_an_unchanged_folder(pipeline: Pipeline, sandbox: Sandbox, size: int) -> None:
    """Two round trips whatever the folder's size: IDLE until the time is over, and a SEARCH that is answered with one UID."""
    for number in range(size):
        sandbox.deliver(pipeline.account, b"Subject: %d\r\n\r\nx" % number)
    with FaultProxy(sandbox.imap_port, keep=True) as proxy:
        env = {"IMAP_PORT": str(proxy.port), "INITIAL_SYNC": "new", "POLL_INTERVAL": "0.1", "RELIST_INTERVAL": "3600"}
        with pipeline.producer(**env):
            until(lambda: proxy.passed("to_server").count(b" IDLE\r\n") > 10, DEADLINE, "ten polls")
        commands = re.findall(rb"^[A-Z]+\d+ (.*)\r\n", proxy.passed("to_server"), re.MULTILINE)
        polls = commands[commands.index(b"IDLE") :]
        search = b"UID SEARCH UID %d:*" % (size + 1)
        assert polls[:20] == [b"IDLE", search] * 10
        answers = re.findall(rb"^\* .*\r\n", proxy.passed("to_client").partition(b"+ idling")[2], re.MULTILINE)
        assert set(answers) == {b"* SEARCH %d\r\n" % size}


# sessions that lie


def test_idle_that_says_nothing(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """News that are not pushed are found by the poll; a session that falls silent is given up after IMAP_TIMEOUT."""
    with pipeline.producer(IMAP_TIMEOUT="1") as producer:
        pipeline.wait_for_first_poll()
        sandbox.faults.mute_idle(times=3)
        pipeline.deliver("not pushed")
        pipeline.wait_for_uid(1)
        sandbox.faults.half_open()
        pipeline.deliver("said to nobody")
        pipeline.wait_for_uid(2)
        producer.wait_for("INBOX: timed out; connecting again", DEADLINE)
        assert "ERROR" not in producer.output()
    pipeline.assert_accounted(waiting=pipeline.delivered)
