"""The handlers of the box in real workers and against real databases: killed again and again, rows = mails."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from src.common.exceptions import ConfigurationError, Permanent, Transient
from src.handlers import sql
from src.handlers.sql import SqlSettings, attachments, connect, create_tables, emails, store
from src.mail.record import Address, Attachment, Email, Envelope, Record, to_fields
from tests.support.account import read_books
from tests.support.daemons import ROOT, Daemon
from tests.support.hooks import HookServer, Request, answering
from tests.support.postgres import PostgresServer, have_postgres
from tests.support.servers import RedisServer, need
from tests.support.wait import until

STREAM = "email_ingestion_stream"
ACCOUNT = "load@example.org"
MAILS = 60  # a round
SEED = 11
DEADLINE = 60.0


def entry(number: int, **changes: Any) -> dict[str, str]:
    """The stream entry of mail `number`, with `number % 3` attachments."""
    envelope = Envelope(
        account=ACCOUNT,
        mailbox="INBOX",
        uid=number + 1,
        uidvalidity=1,
        internal_date="2026-11-01T10:00:00Z",
        size=1000,
        email_id=email_id(number),
        correlation_id=f"{number:016x}",
        ingested_at="2026-11-01T10:00:01Z",
    )
    record = Record(
        uidvalidity=1,
        message_id=f"<{number}@example.org>",
        from_=Address("Ann", "ann@example.org"),
        to=(Address("", "b@example.org"), Address("Bö", "c@example.org")),
        subject=f"mail {number}",
        date="2026-11-01T09:59:00Z",
        size=1000,
        body_text=f"text of mail {number}\n",
        attachments=tuple(Attachment(f"{part}.pdf", "application/pdf", 7, "0" * 64) for part in range(number % 3)),
    )
    return to_fields(envelope, replace(record, **changes))


def email_id(number: int) -> str:
    return f"gm:{ACCOUNT}:{1_700_000_000_000_000_000 + number}"


def fill(client: redis.Redis, count: int) -> None:
    pipe = client.pipeline(transaction=False)
    for number in range(count):
        pipe.xadd(STREAM, entry(number))  # type: ignore[arg-type]
    pipe.execute()


class Workers:
    """Two workers on one stream, with short leases and waits."""

    def __init__(self, server: RedisServer, tmp: Path, handler: str, **env: str) -> None:
        self.client = server.client()
        self.tmp = tmp
        self.env = {
            "REDIS_URL": server.url,
            "WORKER_HANDLER": f"src.handlers.{handler}:handle",
            "WORKER_BLOCK_MS": "200",
            "LEASE_SECONDS": "2",
            "RECOVERY_TICK": "0.1",
            "BACKOFF_BASE": "0.1",
            "BACKOFF_CAP": "0.2",
            "MAX_ATTEMPTS": "100",
            "HTTP_PORT": "0",
            "LOG_FORMAT": "text",
            **env,
        }

    def worker(self) -> Daemon:
        return Daemon("worker.py", env=self.env, tmp=self.tmp)

    def left(self) -> int:
        return int(self.client.xlen(STREAM))

    def wait_until_done(self, timeout: float = DEADLINE) -> None:
        until(lambda: self.left() == 0, timeout, "the stream is empty")

    def kill_again_and_again(self, kills: int) -> None:
        """MAILS mails a kill; each worker in turn is killed at a random place of its round."""
        draw = random.Random(SEED)
        fill(self.client, kills * MAILS)
        with ExitStack() as stack:
            running = [stack.enter_context(self.worker()) for _ in range(2)]
            for number in range(kills):
                target = (kills - number) * MAILS - draw.randrange(1, MAILS)
                until(lambda target=target: self.left() <= target, DEADLINE, f"kill {number}: {target} mails left")
                running[number % 2].kill9()
                running[number % 2] = stack.enter_context(self.worker())
            self.wait_until_done()
            for daemon in running:  # the one that was started last may not be up yet
                daemon.wait_for(f"reads {STREAM}", DEADLINE)
            assert [daemon.terminate() for daemon in running] == [0, 0]

    def assert_done_once(self, count: int) -> None:
        """Each mail has one result, and none is dead."""
        books = read_books(self.client)
        assert books.reasons == {}
        assert books.done == Counter(email_id(number) for number in range(count))


THIRTY = pytest.param(30, marks=[pytest.mark.full, pytest.mark.timeout(600)])


# --- SQL ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres_of_module() -> Iterator[PostgresServer]:
    need(have_postgres(), "postgresql")
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty SQLite file, then an empty database of a real PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'mail.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_of_module")
    return server.url(server.new_database())


def engine_of(url: str, **settings: Any) -> sa.Engine:
    return connect(SqlSettings(_env_file=None, url=url, **settings))


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = engine_of(url)
    create_tables(engine)
    yield engine
    engine.dispose()


def rows(engine: sa.Engine, table: sa.Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()]


def test_a_mail_as_rows(engine: sa.Engine) -> None:
    """Every column says what the mail says; dates are UTC, lists are JSON, attachments are in order."""
    store(engine, Email(entry(2)))
    [mail] = rows(engine, emails)
    assert (mail["email_id"], mail["account"], mail["mailbox"], mail["uid"]) == (email_id(2), ACCOUNT, "INBOX", 3)
    assert mail["received_at"].strftime("%Y-%m-%dT%H:%M:%S") == "2026-11-01T10:00:00"
    assert mail["sent_at"].strftime("%H:%M") == "09:59"
    assert (mail["sender_name"], mail["sender_address"], mail["subject"]) == ("Ann", "ann@example.org", "mail 2")
    assert mail["to_addresses"] == [{"name": "", "address": "b@example.org"}, {"name": "Bö", "address": "c@example.org"}]
    assert (mail["body_text"], mail["body_truncated"], mail["labels"]) == ("text of mail 2\n", False, [])
    assert mail["stored_at"] is not None
    assert [(row["position"], row["name"], row["size"]) for row in rows(engine, attachments)] == [
        (0, "0.pdf", 7),
        (1, "1.pdf", 7),
    ]


def test_again_is_the_same_rows(engine: sa.Engine) -> None:
    """The same mail three times, the last time changed and with fewer attachments: one row with the last state, none left over."""
    store(engine, Email(entry(2)))
    [first] = rows(engine, emails)
    store(engine, Email(entry(2)))
    store(engine, Email(entry(5)))
    assert rows(engine, emails)[0] == first
    store(engine, Email(entry(2, subject="parsed better", attachments=(Attachment("z", "a/b", 1, ""),))))
    mails = rows(engine, emails)
    assert [(mail["email_id"], mail["subject"]) for mail in mails] == [(email_id(2), "parsed better"), (email_id(5), "mail 5")]
    assert mails[0]["stored_at"] == first["stored_at"]
    assert [(row["email_id"], row["name"]) for row in rows(engine, attachments)] == [
        (email_id(2), "z"),
        (email_id(5), "0.pdf"),
        (email_id(5), "1.pdf"),
    ]


def test_the_query_of_the_documents(engine: sa.Engine) -> None:
    """The statement in docs/handlers/sql.md runs, and reserved words need no quotes."""
    for number in range(3):
        store(engine, Email(entry(number)))
    query = (ROOT / "docs/handlers/sql.md").read_text().split("```sql\n")[1].split("```")[0]
    with engine.connect() as connection:
        assert [tuple(row) for row in connection.execute(sa.text(query))] == [("ann@example.org", 3, 21)]


def test_undated_mail(engine: sa.Engine) -> None:
    """A mail without dates, and with a date that no calendar has, is stored with NULL."""
    store(engine, Email(entry(0, date="") | {"internal_date": ""}))
    store(engine, Email(entry(3, date="2026-02-30T00:00:00Z")))
    assert [(row["received_at"] is None, row["sent_at"]) for row in rows(engine, emails)] == [(True, None), (False, None)]


def test_a_mail_is_written_whole_or_not_at_all(engine: sa.Engine) -> None:
    """An attachment that the database cannot hold: the mail's row is not there either, and the mail is buried at once."""
    with pytest.raises(Permanent, match="cannot hold this mail") as caught:
        store(engine, Email(entry(0, attachments=(Attachment("a", "b/c", 1 << 70, ""),))))
    assert "text of mail" not in str(caught.value)
    assert (rows(engine, emails), rows(engine, attachments)) == ([], [])


def test_text_that_is_no_sql(engine: sa.Engine) -> None:
    """A subject that would end a statement is a subject."""
    subject = "'); DROP TABLE email; -- \\ \" %s :x"
    store(engine, Email(entry(0, subject=subject)))
    assert [mail["subject"] for mail in rows(engine, emails)] == [subject]


def test_two_writers_of_one_mail(engine: sa.Engine) -> None:
    """Two threads write one mail with one and two attachments a hundred times: never a mixture, no error."""
    versions = [Email(entry(2)), Email(entry(2, attachments=(Attachment("z", "a/b", 1, ""),)))]
    failed: list[Exception] = []

    def write(email: Email) -> None:
        try:
            for _ in range(50):
                store(engine, email)
        except Exception as error:  # noqa: BLE001  # shown below
            failed.append(error)

    writers = [threading.Thread(target=write, args=(email,)) for email in versions]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert [row["name"] for row in rows(engine, attachments)] in (["z"], ["0.pdf", "1.pdf"])


def test_an_error_does_not_show_the_mail(engine: sa.Engine) -> None:
    """The table is gone: the error, which goes to log and dead letter, holds nothing of the mail."""
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE email_attachment"))
        connection.execute(sa.text("DROP TABLE email"))
    with pytest.raises(sa.exc.DBAPIError) as caught:
        store(engine, Email(entry(0)))
    assert "text of mail" not in str(caught.value)


def prepare_with(monkeypatch: pytest.MonkeyPatch, tmp: Path, **env: str) -> sa.Engine:
    monkeypatch.chdir(tmp)
    for name in ("SQL_URL", "SQL_CREATE_TABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    sql.prepare.cache_clear()
    return sql.prepare()


def test_tables_are_made_on_request_only(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SQL_CREATE_TABLES the worker says what is missing and makes nothing; with it, as often as one likes."""
    with pytest.raises(ConfigurationError, match=r"no table email, email_attachment; SQL_CREATE_TABLES=true makes it"):
        prepare_with(monkeypatch, tmp_path, SQL_URL=url)
    assert sa.inspect(engine_of(url)).get_table_names() == []
    for _ in range(2):
        prepare_with(monkeypatch, tmp_path, SQL_URL=url, SQL_CREATE_TABLES="true").dispose()
    prepare_with(monkeypatch, tmp_path, SQL_URL=url).dispose()


def test_tables_made_by_many_at_once(url: str) -> None:
    """Eight workers that start together on an empty database: the tables are there, nobody fails."""
    failed: list[Exception] = []
    start = threading.Barrier(8)

    def make() -> None:
        engine = engine_of(url)
        start.wait()
        try:
            create_tables(engine)
        except Exception as error:  # noqa: BLE001  # shown below
            failed.append(error)
        engine.dispose()

    makers = [threading.Thread(target=make) for _ in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert failed == []
    assert set(sa.inspect(engine_of(url)).get_table_names()) == {"email", "email_attachment"}


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("", "SQL_URL is not set: sqlite:////path/to/file or postgresql://"),
        ("mysql://root:hunter2@h/d", "SQL_URL=***: must start with sqlite:// or postgresql://"),
        ("hunter2", "SQL_URL=***: is no database address"),
        ("sqlite://", "SQL_URL=***: must name a file"),
    ],
)
def test_settings_in_one_line(url: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address is told at the start, its password is not."""
    with pytest.raises(ConfigurationError) as caught:
        prepare_with(monkeypatch, tmp_path, SQL_URL=url)
    assert str(caught.value).startswith(line)
    assert "hunter2" not in str(caught.value)


def test_a_database_that_does_not_answer_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server there: transient, in one line, without the password."""
    url = f"postgresql://u:hunter2@/d?host={tmp_path}"
    with pytest.raises(Transient, match=r"SQL_URL=postgresql\+psycopg://u:\*\*\*@") as caught:
        prepare_with(monkeypatch, tmp_path, SQL_URL=url)
    assert "\n" not in str(caught.value)


def assert_rows_are_mails(url: str, count: int) -> None:
    """One row a mail, and of each mail its own attachments."""
    engine = engine_of(url)
    assert [row["email_id"] for row in rows(engine, emails)] == [email_id(number) for number in range(count)]
    assert [(row["email_id"], row["position"]) for row in rows(engine, attachments)] == [
        (email_id(number), position) for number in range(count) for position in range(number % 3)
    ]
    engine.dispose()


@pytest.mark.parametrize("kills", [3, THIRTY])
def test_sql_kill9_under_load(url: str, valkey: RedisServer, tmp_path: Path, kills: int) -> None:
    """kill -9 of a worker at a random place, again and again: rows = mails."""
    workers = Workers(valkey, tmp_path, "sql", SQL_URL=url, SQL_CREATE_TABLES="true")
    workers.kill_again_and_again(kills)
    assert_rows_are_mails(url, kills * MAILS)
    workers.assert_done_once(kills * MAILS)


@pytest.mark.full
def test_postgres_restarts_under_load(postgres_of_module: PostgresServer, valkey: RedisServer, tmp_path: Path) -> None:
    """PostgreSQL goes down and comes back while workers write: what failed is retried, rows = mails."""
    url = postgres_of_module.url(postgres_of_module.new_database())
    workers = Workers(valkey, tmp_path, "sql", SQL_URL=url, SQL_CREATE_TABLES="true")
    fill(workers.client, 10 * MAILS)
    with workers.worker() as first, workers.worker() as second:
        for worker in (first, second):  # one that begins while the database is away ends, and says why
            worker.wait_for("as group", DEADLINE)
        until(lambda: workers.left() < 9 * MAILS, DEADLINE, "the first mails are stored")
        postgres_of_module.stop()
        try:
            until(lambda: workers.client.zcard(f"{STREAM}:due"), DEADLINE, "a mail waits for its next attempt")
        finally:
            postgres_of_module.start()
        workers.wait_until_done()
        assert first.terminate() == 0, first.output()
    assert_rows_are_mails(url, 10 * MAILS)
    workers.assert_done_once(10 * MAILS)


# --- jsonl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [THIRTY])
def test_jsonl_kill9_under_load(valkey: RedisServer, tmp_path: Path, kills: int) -> None:
    """Two workers write one file and are killed again and again: every line is whole, every mail has one, the same when repeated."""
    path = tmp_path / "mail.jsonl"
    workers = Workers(valkey, tmp_path, "jsonl", JSONL_PATH=str(path))
    workers.kill_again_and_again(kills)
    lines = path.read_text().split("\n")
    assert lines.pop() == ""
    written: dict[str, set[str]] = {}
    for line in lines:
        written.setdefault(json.loads(line)["email_id"], set()).add(line)
    assert set(written) == {email_id(number) for number in range(kills * MAILS)}
    assert {len(versions) for versions in written.values()} == {1}
    assert len(lines) - len(written) <= kills * 100, "repeated are at most the mails in flight at a kill"
    workers.assert_done_once(kills * MAILS)


# --- webhook and classify ----------------------------------------------------------------------------------------------


def hook_env(server: HookServer, **env: str) -> Mapping[str, str]:
    return {
        "WEBHOOK_URL": f"http://127.0.0.1:{server.port}/in",
        "WEBHOOK_SECRET": "whsec_" + "YWJj" * 8,
        "WEBHOOK_ALLOWED_HOSTS": "127.0.0.1",
        "WEBHOOK_ALLOWED_ADDRESSES": "127.0.0.1",
        **env,
    }


@pytest.mark.parametrize("kills", [THIRTY])
def test_webhook_kill9_under_load(valkey: RedisServer, tmp_path: Path, kills: int) -> None:
    """A receiver that keeps Idempotency-Keys has each mail once, though workers are killed and a tenth of its answers is 503."""
    draw = random.Random(SEED)
    seen: dict[str, bytes] = {}

    def reply(request: Request) -> list[bytes]:
        kept = seen.setdefault(request.headers["idempotency-key"], request.body)
        status = 503 if draw.random() < 0.1 else 200 if kept == request.body else 422
        return [b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status]

    with HookServer(reply) as server:
        workers = Workers(valkey, tmp_path, "webhook", **hook_env(server))
        workers.kill_again_and_again(kills)
    assert set(seen) == {email_id(number) for number in range(kills * MAILS)}
    workers.assert_done_once(kills * MAILS)


def test_classify_in_a_worker(valkey: RedisServer, tmp_path: Path) -> None:
    """The results stream holds priority and labels of every mail."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "classify.toml").write_text('[[rule]]\nlabel = "seven"\nkeywords = ["mail 7"]\npriority = "high"')
    workers = Workers(valkey, tmp_path, "classify")
    fill(workers.client, 10)
    with workers.worker():
        workers.wait_until_done()
    results = {fields["email_id"]: json.loads(fields["result"]) for _, fields in workers.client.xrange(f"{STREAM}:results")}
    expected = {email_id(number): {"priority": "normal", "labels": []} for number in range(10)}
    assert results == expected | {email_id(7): {"priority": "high", "labels": ["seven"]}}


def test_retry_after_is_the_mails_due_time(valkey: RedisServer, tmp_path: Path) -> None:
    """503 with Retry-After: 3600 puts the mail an hour away, whatever the backoff would say."""
    with HookServer(answering(503, "Retry-After: 3600")) as server:
        workers = Workers(valkey, tmp_path, "webhook", **hook_env(server))
        fill(workers.client, 1)
        with workers.worker():
            until(lambda: workers.client.zcard(f"{STREAM}:due"), DEADLINE, "the mail waits for its next attempt")
            [(_, due)] = workers.client.zrange(f"{STREAM}:due", 0, -1, withscores=True)
            assert 3500 < due // 1000 - workers.client.time()[0] <= 3600


@pytest.mark.parametrize("handler", ["webhook", "sql", "jsonl", "classify"])
def test_a_worker_without_its_handlers_settings(valkey: RedisServer, tmp_path: Path, handler: str) -> None:
    """Exit code 2 and one line that names the variable, before any mail is read."""
    workers = Workers(valkey, tmp_path, handler)
    fill(workers.client, 1)
    with workers.worker() as worker:
        assert worker.exit_code() == 2
        assert re.fullmatch(r"worker\.py: (WEBHOOK_URL|SQL_URL|JSONL_PATH|CLASSIFY_RULES)\b.*\n", worker.output())
    assert workers.left() == 1
    assert not workers.client.xinfo_groups(STREAM)
