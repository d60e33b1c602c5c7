"""scripts/audit.py and the hourly look: mail is taken out of Redis by hand in every way there is, and none is lost or doubled."""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.producer import repair
from src.sandbox.server import Sandbox
from tests.integration.test_commands import keys_of
from tests.integration.test_reprocess import command, reprocess, take_in, work
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import RedisServer, have_redis, need
from tests.support.wait import until

STREAM = "email_ingestion_stream"
GROUP = "email_workers"
KEYS = Keys(STREAM)
LOOKS = {"RELIST_INTERVAL": "0.05", "POLL_INTERVAL": "0.05"}  # seconds: each sixth look is the hourly one


@pytest.fixture
def anywhere(sandbox: Sandbox, valkey_first: RedisServer, tmp_path: Path) -> Pipeline:
    """From a sandbox Gmail into Redis 7.0, then into Valkey."""
    return Pipeline(sandbox, valkey_first, tmp_path)


def audit(pipeline: Pipeline, *args: str, code: int = 0, **env: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(what it says of each mailbox, of Redis)."""
    rows = [json.loads(line) for line in command(pipeline, "audit", *args, code=code, **env).splitlines() if line.startswith("{")]
    return rows[:-1], rows[-1]


def balance(pipeline: Pipeline, *args: str, code: int = 0, **env: str) -> dict[str, Any]:
    """Of the one mailbox, less what is zero or always the same. Proves on the way that nothing is changed without --repair."""
    before = keys_of(pipeline)
    [row], _ = audit(pipeline, *args, code=code, **env)
    assert "--repair" in args or keys_of(pipeline) == before, "a look changes nothing"
    hidden = ("account", "mailbox", "since", "passed_why", "unaccounted_why")
    return {name: value for name, value in row.items() if value and name not in hidden}


def entry_of(pipeline: Pipeline, email_id: str) -> str:
    return str(pipeline.client.hget(KEYS.index, email_id)).removeprefix("S:").removeprefix("D:")


def in_every_place(pipeline: Pipeline) -> dict[str, str]:
    """A mail each that is done, dead, waiting for its attempt, in flight (its worker was killed) and unread; by place, its email_id."""
    done, dead = pipeline.deliver("done", "permanent")
    take_in(pipeline)
    work(pipeline)
    [waiting, flight] = pipeline.deliver("fail 1", "hold gate")
    take_in(pipeline)
    with pipeline.worker(BACKOFF_BASE="3600", BACKOFF_CAP="3600", BACKOFF_JITTER="0") as worker:
        pipeline.wait_for_begun([flight])
        pipeline.wait_for_books(lambda books: books.due, "it waits")
        worker.kill9()
    [unread] = pipeline.deliver("unread")
    take_in(pipeline)
    return {"done": done, "dead": dead, "waiting": waiting, "flight": flight, "unread": unread}


def settle(pipeline: Pipeline, places: dict[str, str]) -> None:
    """All waits end, everything is worked off; each mail has one end."""
    pipeline.open_gate("gate")
    for member in pipeline.client.zrange(KEYS.due, 0, -1):
        pipeline.client.zadd(KEYS.due, {member: 1})
    work(pipeline)
    pipeline.assert_accounted(dead={places["dead"]: "permanent"})


# the look


def test_a_mail_in_every_place_is_counted_there(anywhere: Pipeline) -> None:
    """Done, in the stream, waiting, dead, passed with why, not read yet; --since leaves out what is older."""
    anywhere.deliver("too old", days_ago=9, expected=False)
    anywhere.deliver("new enough")
    with anywhere.producer("--once", INITIAL_SYNC="since:5d") as producer:
        assert producer.exit_code(DEADLINE) == 0
    places = in_every_place(anywhere)
    anywhere.deliver("not read yet", expected=False)
    assert balance(anywhere) == {
        "in_the_mailbox": 8,
        "done": 2,
        "in_the_stream": 2,
        "waiting": 1,
        "dead": 1,
        "passed": 1,
        "to_come": 1,
    }
    [row], server = audit(anywhere)
    assert row["passed_why"] == {f"before {(datetime.now(UTC) - timedelta(days=5)).date()}": 1}
    assert server == {"redis": {}, "counters_off_by": 0, "mended": False, "ok": True}
    since = (datetime.now(UTC) - timedelta(days=2)).date().isoformat()
    assert balance(anywhere, "--since", since)["in_the_mailbox"] == 7
    take_in(anywhere)
    anywhere.delivered += [
        fields["email_id"] for fields in anywhere.books().stream.values() if fields["subject"] == "not read yet"
    ]
    settle(anywhere, places)


# by hand, one thing at a time

Damage = Callable[[Pipeline, dict[str, str]], object]


def xdel(place: str) -> Damage:
    return lambda pipeline, places: pipeline.client.xdel(STREAM, entry_of(pipeline, places[place]))


def xtrim(pipeline: Pipeline, places: dict[str, str]) -> None:
    assert pipeline.client.xtrim(STREAM, minid=entry_of(pipeline, places["flight"]), approximate=False) == 1, (
        "the waiting mail was before it"
    )


def ack(pipeline: Pipeline, places: dict[str, str]) -> None:
    pipeline.client.xack(STREAM, GROUP, entry_of(pipeline, places["flight"]))


def del_consumer(pipeline: Pipeline, places: dict[str, str]) -> None:
    for consumer in pipeline.client.xinfo_consumers(STREAM, GROUP):
        pipeline.client.xgroup_delconsumer(STREAM, GROUP, consumer["name"])


def hdel(place: str) -> Damage:
    return lambda pipeline, places: pipeline.client.hdel(KEYS.index, places[place])


def no_due(pipeline: Pipeline, places: dict[str, str]) -> None:
    assert pipeline.client.delete(KEYS.due) == 1


def no_processed(pipeline: Pipeline, places: dict[str, str]) -> None:
    [key] = pipeline.client.keys(f"{STREAM}:processed:*")
    assert pipeline.client.delete(key) == 1


def no_counters(pipeline: Pipeline, places: dict[str, str]) -> None:
    assert pipeline.client.delete(KEYS.open) == 1


def marks(pipeline: Pipeline, places: dict[str, str]) -> None:
    pipeline.client.hset(KEYS.starts, places["done"], "0|1-1:1")
    pipeline.client.hset(KEYS.tries, places["done"], "1|1|1")
    pipeline.client.zadd(KEYS.due, {f"1-1|{places['done']}": 4_000_000_000_000})


DAMAGES: dict[str, tuple[Damage, int, dict[str, int]]] = {
    # what is done, how many mails are unaccounted then, what Redis' own check finds
    "XDEL of an unread mail": (xdel("unread"), 1, {"dangling": 1}),
    "XDEL of a waiting mail": (xdel("waiting"), 1, {"dangling": 1, "nothing due": 1}),
    "XDEL of a dead letter": (
        lambda pipeline, places: pipeline.client.xdel(KEYS.dlq, entry_of(pipeline, places["dead"])),
        1,
        {"dangling": 1},
    ),
    "XTRIM": (xtrim, 1, {"dangling": 1, "nothing due": 1}),
    "XACK of a mail in flight": (ack, 1, {"lost": 1}),
    "XGROUP DELCONSUMER": (del_consumer, 1, {"lost": 1}),
    "HDEL of an unread mail": (hdel("unread"), 0, {"stray": 1}),
    "HDEL of a mail in flight": (hdel("flight"), 0, {"stray": 1}),
    "DEL of the due set": (no_due, 1, {"lost": 1}),
    "DEL of a processed set": (no_processed, 1, {}),
    "DEL of the counters": (no_counters, 0, {}),
    "marks of nothing": (marks, 0, {"mark": 2, "nothing due": 1}),
}


OFTEN = ("XDEL of a waiting mail", "HDEL of a mail in flight")  # the others with --all


@pytest.mark.parametrize("damage", [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.full]) for name in DAMAGES])
def test_damage_is_seen_and_mended(anywhere: Pipeline, damage: str) -> None:
    """A look names it and changes nothing, exit code 1; --repair mends it, 0; then all is accounted for, and each mail is done once."""
    strike, unaccounted, found = DAMAGES[damage]
    places = in_every_place(anywhere)
    strike(anywhere, places)
    assert balance(anywhere, code=1).get("unaccounted", 0) == unaccounted
    [_], server = audit(anywhere, code=1)
    assert server["redis"] == found
    [row], server = audit(anywhere, "--repair")
    assert row["unaccounted"] == 0 and server["redis"] == found and server["ok"]
    [row], server = audit(anywhere)
    assert row["unaccounted"] == 0 and server == {"redis": {}, "counters_off_by": 0, "mended": False, "ok": True}
    settle(anywhere, places)
    assert Counter(anywhere.books().done).total() == 4
    [row], server = audit(anywhere)
    assert row["done"] == 4 and row["dead"] == 1 and server["ok"]


@pytest.mark.full
@pytest.mark.parametrize("damage", [name for name in DAMAGES if "processed" not in name and "counters" not in name])
def test_a_running_producer_mends_it_by_itself(pipeline: Pipeline, damage: str) -> None:
    """The hourly look finds the same damage and mends it; /status had nothing to say before."""
    strike, _, found = DAMAGES[damage]
    places = in_every_place(pipeline)
    with pipeline.producer(**LOOKS) as producer:
        producer.wait_for("producer reads")
        strike(pipeline, places)
        pipeline.wait_for_books(
            lambda books: not audit_of_redis(pipeline).found and not audit_of_redis(pipeline).miscount, "it is mended"
        )
        assert producer.terminate() == 0
    settle(pipeline, places)
    assert found.keys() - {"nothing due"} and "WARNING" in producer.output()
    assert pipeline.client.get(f"producer_state:{pipeline.account}:INBOX:email_count") == str(5 + found.get("dangling", 0)), (
        "only what was deleted is published again"
    )


def audit_of_redis(pipeline: Pipeline) -> repair.Findings:
    with RedisClient.connect(pipeline.redis.url, max_connections=4, socket_timeout=10) as client:
        return repair.examine(client, KEYS, GROUP, mend=False)


@pytest.mark.full
def test_all_is_trimmed_while_the_worker_of_one_is_dead(anywhere: Pipeline) -> None:
    """XTRIM to nothing: what the dead worker held counts as held until its lease is over; then --repair brings all three again."""
    places = in_every_place(anywhere)
    anywhere.client.xtrim(STREAM, maxlen=0)
    assert balance(anywhere, code=1)["unaccounted"] == 2
    with anywhere.worker():
        anywhere.wait_for_books(lambda books: not books.pending, "a worker looked for what it held")
    assert balance(anywhere, code=1)["unaccounted"] == 3
    audit(anywhere, "--repair")
    settle(anywhere, places)


def test_a_mail_deleted_while_it_is_handled(pipeline: Pipeline) -> None:
    """XDEL under the hands of a living worker takes its lease away: the mail counts as in flight until it would be renewed, then it comes
    again; what the first worker made of it is refused, the result is written once."""
    [held] = pipeline.deliver("hold gate")
    with pipeline.producer(**LOOKS), pipeline.worker():
        pipeline.wait_for_begun([held])
        pipeline.client.xdel(STREAM, entry_of(pipeline, held))
        until(lambda: len(pipeline.lines("begin")) == 2, DEADLINE, "it is begun again")
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
        until(lambda: len(pipeline.lines("end")) == 2, DEADLINE, "both are finished")
    pipeline.assert_accounted()


def test_a_mail_deleted_while_it_is_handled_in_vain(pipeline: Pipeline) -> None:
    """XDEL under the hands of a living worker whose handler then fails: nothing is left to retry, so the producer brings it again."""
    [held, other] = pipeline.deliver("hold gate", "fail 1")
    with pipeline.producer(**LOOKS) as producer, pipeline.worker(BACKOFF_BASE="2", BACKOFF_CAP="2", BACKOFF_JITTER="0"):
        pipeline.wait_for_begun([held])
        pipeline.wait_for_books(lambda books: books.due, "it waits")
        pipeline.client.xdel(STREAM, entry_of(pipeline, other))
        pipeline.open_gate("gate")
        pipeline.wait_until_settled()
        producer.wait_for("deleted from Redis by hand", DEADLINE)
        pipeline.wait_for_books(lambda books: not books.due, "the old life waits no more")
    pipeline.assert_accounted()


# mail that was deleted by hand and is in no mailbox any more


def test_what_is_gone_from_the_mailbox_too_is_forgotten(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """Its entry was deleted here, the mail there: a look says so, --repair forgets it, the counters follow."""
    gone, _ = pipeline.deliver("gone", "stays")
    pipeline.delivered.remove(gone)
    take_in(pipeline)
    pipeline.client.xdel(STREAM, entry_of(pipeline, gone))
    sandbox.expunge(pipeline.account, 1)
    [row], server = audit(pipeline, code=1)
    assert row["unaccounted"] == 0 and server["redis"] == {"dangling": 1}
    [row], server = audit(pipeline, "--repair")
    assert server["redis"] == {"dangling": 1, "forgotten": 1} and server["ok"]
    pipeline.assert_accounted(waiting=pipeline.delivered)
    [row], server = audit(pipeline)
    assert server["ok"]


# what the mailbox shows


def test_mail_that_became_visible_late(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """A UID that the server did not show when it was passed: named with its UID, published by --repair, once."""
    sandbox.faults.hide_uids([2], times=10_000)
    pipeline.deliver("one", "two", "three")
    take_in(pipeline)
    sandbox.faults.clear()
    assert balance(pipeline, code=1)["unaccounted_uids"] == [2]
    assert balance(pipeline, "--repair") == {"in_the_mailbox": 3, "in_the_stream": 3}
    work(pipeline)
    pipeline.assert_accounted()


def test_repair_leaves_passed_mail_alone(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """--repair publishes what is known nowhere, not what the first read left out; nor what is only not read yet by itself."""
    pipeline.deliver("not new", days_ago=1, expected=False)
    with pipeline.producer("--once", INITIAL_SYNC="new") as producer:
        assert producer.exit_code(DEADLINE) == 0
    sandbox.faults.hide_uids([2], times=10_000)
    pipeline.deliver("two", "three", days_ago=1)
    take_in(pipeline)
    sandbox.faults.clear()
    [row], _ = audit(pipeline, code=1)
    assert row["passed_why"] == {"not new": 1} and row["unaccounted_uids"] == [2]
    assert balance(pipeline, "--repair") == {"in_the_mailbox": 3, "in_the_stream": 2, "passed": 1}
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_old_mail_that_was_deleted_by_hand_comes_again(pipeline: Pipeline) -> None:
    """A mail that came after the first read with an old date: the index tells that it was ours, though its date would not."""
    pipeline.deliver("first")
    take_in(pipeline)
    [old] = pipeline.deliver("later, with an old date", days_ago=40)
    take_in(pipeline)
    pipeline.client.xdel(STREAM, entry_of(pipeline, old))
    with pipeline.producer(**LOOKS):
        until(lambda: pipeline.client.xlen(STREAM) == 2, DEADLINE, "it came again")
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_repair_beside_the_producer_that_reads(pipeline: Pipeline) -> None:
    """The owner is asked and does it; the audit waits for it and reports what came of it."""
    with pipeline.producer(RELIST_INTERVAL="3600") as producer:
        pipeline.wait_for_first_poll()
        for number in range(2):  # the second one is read after the look back that begins a session
            [email_id] = pipeline.deliver(f"mail {number}")
            pipeline.wait_for_uid(number + 1)
        pipeline.client.xdel(STREAM, entry_of(pipeline, email_id))
        assert balance(pipeline, "--repair") == {"in_the_mailbox": 2, "in_the_stream": 2}
        assert "looking again at 2 mails since" in producer.output() and producer.running()
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_dead_token_holds_up_no_other_account(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """Two accounts, the token of one is revoked: it is named, the other is counted, exit code 1."""
    other = "other@example.org"
    pipeline.write_token(other)
    pipeline.deliver("mine")
    pipeline.deliver("theirs", account=other, expected=False)
    both = {"GMAIL_USERNAME": f"{other},{pipeline.account}"}
    with pipeline.producer("--once", **both) as producer:
        assert producer.exit_code(DEADLINE) == 0
    sandbox.revoke(other)
    output = command(pipeline, "audit", code=1, **both)
    [row, server] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert row["account"] == pipeline.account and row["in_the_stream"] == 1 and not server["ok"]
    assert f"{other}/INBOX: " in output
    assert balance(pipeline, "--username", pipeline.account)["in_the_stream"] == 1


# Redis forgets, or comes back older


def test_after_flushall(pipeline: Pipeline) -> None:
    """FLUSHALL with mail in every place: nothing is to be found, everything is still to come; read again, all is accounted for."""
    places = in_every_place(pipeline)
    pipeline.client.flushall()
    assert balance(pipeline) == {"in_the_mailbox": 5, "to_come": 5}
    with pipeline.producer("--once") as producer:
        producer.wait_for("the state is gone from Redis: reading again", DEADLINE)
        assert producer.exit_code(DEADLINE) == 0
    assert balance(pipeline) == {"in_the_mailbox": 5, "in_the_stream": 5}
    settle(pipeline, places)
    assert balance(pipeline) == {"in_the_mailbox": 5, "done": 4, "dead": 1}


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.full), "valkey"])
def durable(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path: Path) -> Iterator[Pipeline]:
    """Into a server of its own with an append-only file."""
    binary: Literal["redis", "valkey"] = request.param
    need(binary == "valkey" or have_redis(), "redis-server")
    with RedisServer(binary, appendonly=True) as server:
        yield Pipeline(sandbox, server, tmp_path)


def test_a_redis_that_came_back_older(durable: Pipeline) -> None:
    """Its files are put back to an hour ago: the producer says so, reads what it had read since, and what was done since is done again."""
    places = in_every_place(durable)
    durable.redis.stop()
    durable.redis.keep_copy(durable.tmp / "older")
    durable.redis.start()
    later = durable.deliver("later", "later too")
    take_in(durable)
    settle(durable, places)
    durable.redis.stop()
    durable.redis.put_back(durable.tmp / "older")
    durable.redis.start()
    assert balance(durable) == {
        "in_the_mailbox": 7,
        "done": 1,
        "in_the_stream": 2,
        "waiting": 1,
        "dead": 1,
        "to_come": 2,
    }
    with durable.producer("--once") as producer:
        producer.wait_for("Redis came back older .last_uid 5, 7 was reached", DEADLINE)
        assert producer.exit_code(DEADLINE) == 0
    assert set(later) <= {fields["email_id"] for fields in durable.books().stream.values()}
    settle(durable, places)
    assert balance(durable) == {"in_the_mailbox": 7, "done": 6, "dead": 1}


def test_a_redis_that_came_back_older_and_read_as_far(durable: Pipeline) -> None:
    """Its files are put back to before an owner changed, last_uid is the same: the epoch tells, unfinished days are looked at again."""
    places = in_every_place(durable)
    durable.redis.stop()
    durable.redis.keep_copy(durable.tmp / "older")
    durable.redis.start()
    for _ in range(3):
        take_in(durable)
    durable.redis.stop()
    durable.redis.put_back(durable.tmp / "older")
    durable.redis.start()
    with durable.producer("--once") as producer:
        producer.wait_for(r"Redis came back older .epoch (\d+), \d+ was reached", DEADLINE)
        producer.wait_for("looking again at 5 mails since", DEADLINE)
        assert producer.exit_code(DEADLINE) == 0
    with durable.producer("--once") as producer:
        assert producer.exit_code(DEADLINE) == 0
        assert "older" not in producer.output(), "said once"
    settle(durable, places)
    assert balance(durable) == {"in_the_mailbox": 5, "done": 4, "dead": 1}


def test_the_lines_of_an_attached_sandbox_work_when_pasted(pipeline: Pipeline) -> None:
    """producer.py --sandbox prints how to deliver mail and what points audit, doctor and reprocess at its sandbox; begun anew,
    that sandbox's mail is new mail."""
    with pipeline.producer("--sandbox") as producer:
        curl = shlex.split(producer.wait_for(r"sandbox: new mail: (curl .*)\n")[1])
        exports = shlex.split(producer.wait_for(r"sandbox: for scripts/.*: (export .*)\n")[1])
        environment = dict(pair.split("=", 1) for pair in exports[1:])
        [program, option, body, url] = curl
        assert (program, option) == ("curl", "-d")
        with urllib.request.urlopen(url, body.encode(), timeout=20) as answer:
            assert len(json.load(answer)["uids"]) == 10
        until(lambda: pipeline.client.xlen(STREAM) == 35, DEADLINE, "25 mails of its own and 10 are in the stream")
        [row], _ = audit(pipeline, **environment)
        assert (row["in_the_mailbox"], row["in_the_stream"]) == (35, 35)
        assert "logged in" in command(pipeline, "doctor", code=1, **environment)  # 1: the server of tests keeps nothing on disk
        with pipeline.worker("--drain", WORKER_HANDLER="src.worker.processor:summarize") as worker:
            assert worker.exit_code(DEADLINE) == 0
        days = [f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%d}" for days in (-1, 1)]
        again = reprocess(
            pipeline, "--since", days[0], "--until", days[1], "--source", "imap", "--dry-run", RAW_ARCHIVE="off", **environment
        )
        assert again["would_bring_back"] == 35
        assert producer.terminate() == 0
    with pipeline.producer("--sandbox", "--once") as producer:
        assert producer.exit_code(DEADLINE) == 0
        assert "25 published, 0 known already" in producer.output()
        assert "new mail" not in producer.output()  # nobody could deliver any


# never a false alarm


@pytest.mark.full
def test_no_alarm_under_load(pipeline: Pipeline) -> None:
    """20 audits, some with --repair, beside the producer's own, while mail arrives, fails, dies, and a worker is killed: none finds
    anything, and every mail is done once."""
    dead: dict[str, str] = {}
    with pipeline.producer(**LOOKS) as producer, pipeline.worker() as first, pipeline.worker():
        for number in range(20):
            orders = ["permanent", "fail 1", "fail 2", *(f"slow {n}" for n in range(17))]
            ids = pipeline.deliver(*orders)
            dead[ids[0]] = "permanent"
            [row], server = audit(pipeline, *(["--repair"] if number % 5 == 4 else []))
            assert row["unaccounted"] == 0 and server["ok"] and server["redis"] == {} and server["counters_off_by"] == 0, (
                row,
                server,
            )
            if number == 10:
                first.kill9()
        pipeline.wait_until_settled()
        pipeline.wait_for_uid(400)
        assert "WARNING audit" not in producer.output() and "by hand" not in producer.output()
        assert not audit_of_redis(pipeline).found
    pipeline.assert_accounted(dead=dead)
    assert balance(pipeline) == {"in_the_mailbox": 400, "done": 380, "dead": 20}
