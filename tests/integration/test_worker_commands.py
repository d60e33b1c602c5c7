"""worker.py as a developer uses it: --try, --dry-run, --drain, several handlers, breakers, rolling restarts and many workers."""

from __future__ import annotations

import io
import json
import random
import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from config.settings import load_settings
from src.worker.processor import load_handlers
from src.worker.trial import print_plan
from tests.integration.test_commands import Terminal, files_of, finished, keys_of
from tests.integration.test_worker_faults import begun, published
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.wait import until

MAIL = b"From: Ann <ann@example.org>\r\nSubject: hello\r\n\r\ntext\r\n"
HANDLER = """
import asyncio
from src.common.exceptions import Permanent, RetryLater, SkipEmail
def handle(email, context):
    context.log.info("seen %s", email.subject)
    return {"n": context.once("step", lambda: 7), "raw": len(email.raw())}
async def later(email, context): await asyncio.sleep(0); return {"n": 1}
def batch(emails, contexts): return [{"n": len(emails)}]
def skip(email, context): raise SkipEmail("nothing to do")
def fails(email, context): raise ValueError("no")
def dead(email, context): raise Permanent("never")
"""


@pytest.mark.parametrize(
    ("function", "code", "said"),
    [
        ("handle", 0, ["step      step: 7", f'done      {{"n":7,"raw":{len(MAIL)}}}', "seen hello"]),
        ("later", 0, ['done      {"n":1}', "(async)"]),
        ("batch", 0, ['done      {"n":1}', "(batch)"]),
        ("skip", 0, ['skipped   {"reason": "nothing to do"}']),
        ("fails", 1, ["failed    it would be tried again in ", "ValueError: no", "in fails"]),
        ("dead", 1, ["dead      at once: Permanent: never"]),
    ],
)
def test_try_runs_a_handler_on_a_file(pipeline: Pipeline, function: str, code: int, said: list[str]) -> None:
    """No Redis is touched (the address is nobody's), nothing is written; result, log, time and exit code tell how it went."""
    (pipeline.tmp / "mine.py").write_text(HANDLER)
    (pipeline.tmp / "m.eml").write_bytes(MAIL)
    before = files_of(pipeline.tmp)
    env = {"REDIS_URL": "redis://127.0.0.1:1", "PYTHONDONTWRITEBYTECODE": "1"}
    output = finished(pipeline.worker("--try", "m.eml", "--handler", f"mine.py:{function}", **env), code)
    always = ["mail      hello, from Ann <ann@example.org>, 0 attachments", "time      "]
    assert [words for words in [*said, *always] if words not in output] == []
    assert files_of(pipeline.tmp) == before


def test_try_names_a_file_that_cannot_be_read(pipeline: Pipeline) -> None:
    output = finished(pipeline.worker("--try", "none.eml"), 2)
    assert output == "worker.py: --try none.eml: No such file or directory\n"


def test_dry_run_changes_nothing_and_says_what_would_be_done(pipeline: Pipeline) -> None:
    """Handlers, waits, the stream, the group and the next mails, as one JSON object; every key and file is as before."""
    published(pipeline, "hold gate", *(f"mail {number}" for number in range(12)), "permanent")
    with pipeline.worker(WORKER_CONCURRENCY="1") as worker:
        pipeline.wait_for_begun(pipeline.delivered[:1])
        worker.freeze()  # else its leases are renewed meanwhile
        keys, files = keys_of(pipeline), files_of(pipeline.tmp)
        output = finished(pipeline.worker("--dry-run", BACKOFF_BASE="1", BACKOFF_CAP="4", MAX_ATTEMPTS="4", BACKOFF_JITTER="0"))
        assert keys_of(pipeline) == keys
        assert files_of(pipeline.tmp) == files
    plan = json.loads(output.splitlines()[-1])
    assert plan["handlers"][0]["waits"] == "between them 1, 2, 4 s"
    assert plan["stream"] == {"unfinished": 14, "in_flight": 1, "due": 0, "unread": 13, "dead": 0}
    assert [consumer["pending"] for consumer in plan["consumers"]] == [1]
    assert [mail["subject"] for mail in plan["next"]] == [f"mail {number}" for number in range(10)]


def test_dry_run_on_a_terminal_is_a_page(pipeline: Pipeline) -> None:
    published(pipeline, "one")
    settings = load_settings({"REDIS_URL": pipeline.redis.url}, env_file=None)
    terminal = Terminal()
    assert print_plan(settings, load_handlers(settings.work, ()), terminal) == 0
    page = terminal.getvalue().splitlines()
    assert page[0] == "handler   src.worker.processor:summarize (plain)"
    assert page[1] == "          8 attempts of 1800 s at most; between them up to 1, 2, 4, 8, 16, 32, 64 s"
    assert page[2] == "redis     answers"
    assert page[3].startswith("stream    email_ingestion_stream: 1 unfinished = 0 in flight + 0 waiting")
    assert page[-1].startswith("next      ")
    assert page[-1].endswith("→ src.worker.processor:summarize")


def test_dry_run_without_a_redis_starts_none(tmp_path: Path) -> None:
    settings = load_settings({"REDIS_URL": "redis://127.0.0.1:1", "DATA_DIR": tmp_path}, env_file=None)
    out = io.StringIO()
    assert print_plan(settings, load_handlers(settings.work, ()), out) == 0
    assert json.loads(out.getvalue())["redis"] == "no Redis answers"
    assert list(tmp_path.iterdir()) == []


def test_drain_works_until_nothing_is_left(pipeline: Pipeline) -> None:
    """Retries are waited for, which is said; the exit code is 0 and the stream empty."""
    published(pipeline, *(f"fail {number % 3}" for number in range(30)), "permanent")
    output = finished(pipeline.worker("--drain"))
    assert "waiting for their next attempt" in output
    assert "stopping: the stream is drained" in output
    pipeline.assert_accounted(dead={pipeline.delivered[-1]: "permanent"})


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_handler_may_be_an_object(pipeline: Pipeline, isolation: str) -> None:
    """src.testing.FailTimes as the handler: each mail fails once, then it is done."""
    (pipeline.tmp / "flaky.py").write_text(
        "from src.testing import FailTimes\nhandle = FailTimes(1, lambda mail, told: {'attempt': told.attempt})"
    )
    published(pipeline, "one", "two")
    finished(pipeline.worker("--drain", "--handler", "flaky.py:handle", "--concurrency", "2", WORKER_ISOLATION=isolation))
    pipeline.assert_accounted()
    results = pipeline.client.xrange("email_ingestion_stream:results")
    assert [fields["result"] for _, fields in results] == ['{"attempt":2}'] * 2


def test_drain_of_an_empty_stream_ends_at_once(pipeline: Pipeline) -> None:
    assert "stopping: the stream is drained" in finished(pipeline.worker("--drain"))


def test_drain_that_cannot_go_on_says_so(pipeline: Pipeline) -> None:
    """At DLQ_MAX: exit code 1, the rest stays where it is."""
    published(pipeline, *["permanent"] * 300)
    output = finished(pipeline.worker("--drain", "--concurrency", "1", DLQ_MAX="1", RECOVERY_TICK="0.01"), 1)
    assert "cannot drain the stream: " in output
    books = pipeline.books()
    assert books.stream
    assert len(books.stream) + len(books.dead) == 300


def test_each_mail_goes_to_the_handler_of_its_route(pipeline: Pipeline) -> None:
    """The results name the handler; one that no route matches has that of all; a wrong file is exit 2 with the place."""
    (pipeline.tmp / "mine.py").write_text(HANDLER)
    invoices = '[[route]]\nhandler = "mine.py:later"\nkeyword = "invoice"\n'
    spam = '[[route]]\nhandler = "mine.py:dead"\nkeyword = "spam"\nmax_attempts = 1\n'
    (pipeline.tmp / "routes.toml").write_text(invoices + spam)
    ids = published(pipeline, "an Invoice", "spam", "other")
    output = finished(pipeline.worker("--drain", HANDLERS_FILE="routes.toml", WORKER_HANDLER="mine.py:handle"))
    results = pipeline.client.xrange("email_ingestion_stream:results")
    assert {fields["email_id"]: fields["handler"] for _, fields in results} == {
        ids[0]: "mine.py:later",
        ids[2]: "mine.py:handle",
    }, output
    [dead] = pipeline.books().dead.values()
    assert (dead["email_id"], dead["dead_handler"]) == (ids[1], "mine.py:dead")
    (pipeline.tmp / "routes.toml").write_text("[[route]]\nhandler = 'mine.py:nothing'\nlabel = 'x'\n")
    output = finished(pipeline.worker(HANDLERS_FILE="routes.toml"), 2)
    assert output == "worker.py: routes.toml: mine.py:nothing: mine.py has no function nothing\n"


BREAKING = """
import pathlib
def handle(email, context):
    with context.breaker("crm"):
        if not pathlib.Path("up").exists():
            raise ConnectionError("down")
    return {"attempt": context.attempt}
"""


def test_an_outage_behind_a_breaker_uses_up_no_attempts(pipeline: Pipeline) -> None:
    """Five calls fail, then no call is made and the worker stops reading; when the other side is up, one probe and all is done."""
    (pipeline.tmp / "breaking.py").write_text(BREAKING)
    ids = published(pipeline, *(f"mail {number}" for number in range(30)))
    settings = {"BREAKER_OPEN_SECONDS": "1", "BREAKER_OPEN_CAP": "1", "MAX_ATTEMPTS": "12"}
    with pipeline.worker("--handler", "breaking.py:handle", "--concurrency", "1", **settings) as worker:
        worker.wait_for("every breaker is open: reading stops", DEADLINE)
        (pipeline.tmp / "up").touch()
        pipeline.wait_until_settled()
        worker.wait_for("crm answers again", DEADLINE)
    pipeline.assert_accounted()
    results = pipeline.client.xrange("email_ingestion_stream:results")
    attempts = Counter(json.loads(fields["result"])["attempt"] for _, fields in results)
    assert attempts[1] > len(ids) / 2, "most never met the outage with an attempt of theirs"


def test_a_rolling_restart_under_load_loses_and_repeats_nothing(pipeline: Pipeline) -> None:
    """Three workers, each stopped with SIGTERM and started again in turn, twice, while mail arrives: each mail is begun once."""
    with pipeline.producer() as producer, ExitStack() as stack:
        pipeline.wait_for_first_poll()

        def started() -> Daemon:
            worker = stack.enter_context(pipeline.worker())
            worker.wait_for("reads email_ingestion_stream", DEADLINE)
            return worker

        workers = [started() for _ in range(3)]
        for turn in range(6):
            fresh = pipeline.deliver(*["slow 30"] * 25)
            pipeline.wait_for_begun(fresh[:5])
            assert workers[turn % 3].terminate() == 0
            workers[turn % 3] = started()
        pipeline.wait_until_settled()
        assert [daemon.terminate() for daemon in (*workers, producer)] == [0, 0, 0, 0]
    pipeline.assert_accounted()
    assert Counter(Counter(line.email_id for line in pipeline.lines("begin")).values()) == {1: 150}
    assert pipeline.client.hkeys("email_ingestion_stream:daemons") == [], "each daemon has taken itself out"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_twenty_workers_come_and_go(pipeline: Pipeline) -> None:
    """Twenty workers are started, stopped and killed at random while 2,000 mails arrive: each ends in one place."""
    draw = random.Random(11)
    with pipeline.producer(), ExitStack() as stack:
        pipeline.wait_for_first_poll()
        workers = [stack.enter_context(pipeline.worker(LEASE_SECONDS="3")) for _ in range(20)]
        for _ in range(20):
            fresh = pipeline.deliver(*[draw.choice(["slow 20", "fine", "fail 1"]) for _ in range(100)])
            pipeline.wait_for_begun(fresh[:3])
            for number in draw.sample(range(20), 2):
                if draw.random() < 0.5:
                    workers[number].kill9()
                else:
                    workers[number].send(signal.SIGTERM)
                workers[number] = stack.enter_context(pipeline.worker(LEASE_SECONDS="3"))
        pipeline.wait_until_settled(timeout=300)
        until(lambda: len(pipeline.books().pending) == 0, DEADLINE, "nothing is pending")
    pipeline.assert_accounted()
    assert len(pipeline.delivered) == 2_000
    assert begun(pipeline, pipeline.delivered[0])
