"""Several accounts and ways to log in; what ends a login, told apart. Each test accounts for every mail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from imapclient import IMAPClient

from config.accounts import load_accounts
from config.settings import load_settings
from src.common.clock import SYSTEM, Clock, iso
from src.common.exceptions import ConfigurationError, ReauthRequired
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.producer.daemon import Access, NoUsableToken, Producer, accesses
from src.sandbox.server import Sandbox
from tests.integration.test_commands import finished
from tests.support.inline import HurriedShutdown, a_second_a_look, hurried_breakers
from tests.support.once import read_once
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until

POST = "post@example.org"


def accounts_file(pipeline: Pipeline, text: str) -> dict[str, str]:
    """The environment that reads the accounts from a file and from nowhere else."""
    path = pipeline.tmp / "accounts.toml"
    path.write_text(text)
    return {"ACCOUNTS_FILE": str(path), "GMAIL_USERNAME": ""}


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def age_token(pipeline: Pipeline, account: str, days: float) -> None:
    """The consent of `account` becomes `days` days old."""
    path = pipeline.tmp / "tokens" / f"{account}.json"
    content = json.loads(path.read_text()) | {"obtained_at": iso(datetime.now(UTC) - timedelta(days=days))}
    secret(path, json.dumps(content))


def test_three_ways_to_log_in_side_by_side(
    pipeline: Pipeline, sandbox: Sandbox, dovecot: Dovecot, caplog: pytest.LogCaptureFixture
) -> None:
    """A consent and a service account at one server, a password at another over TLS, each with its own folders and overrides."""
    bob, post = "bob@example.com", "post-accounts@example.org"
    sandbox.write_service_account_key(pipeline.tmp / "key.json", bob)
    password = secret(pipeline.tmp / "post.password", f"{Dovecot.PASSWORD}\n")
    caplog.set_level("INFO")
    env = accounts_file(
        pipeline,
        f"""
        [[account]]
        username = "{pipeline.account}"
        mailboxes = ["INBOX", "Work"]

        [[account]]
        username = "{bob}"
        auth_method = "service_account"
        service_account_file = "{pipeline.tmp}/key.json"
        initial_sync = "since:3d"

        [[account]]
        username = "{post}"
        auth_method = "password"
        password_file = "{password}"
        host = "localhost"
        port = {dovecot.imaps_port}
        security = "tls"
        ca_file = "{dovecot.ca_file}"
        """,
    )
    pipeline.deliver("one")
    sandbox.deliver(pipeline.account, b"Subject: work\r\n\r\n", mailbox="Work")
    pipeline.delivered.append(f"gm:{pipeline.account}:{sandbox.ledger()[-1].gm_msgid}")
    pipeline.deliver("too old for bob", account=bob, days_ago=10, expected=False)
    pipeline.deliver("two", account=bob)
    raw = b"Subject: three\r\nMessage-ID: <three@example.org>\r\n\r\nhello\r\n"
    dovecot.deliver(post, raw)
    assert read_once(pipeline, **env) == 0
    books = pipeline.books()
    [elsewhere] = [fields["email_id"] for fields in books.stream.values() if fields["account"] == post]
    pipeline.delivered.append(elsewhere)
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert {(fields["account"], fields["mailbox"]) for fields in books.stream.values()} == {
        (pipeline.account, "INBOX"),
        (pipeline.account, "Work"),
        (bob, "INBOX"),
        (post, "INBOX"),
    }
    assert f"{bob}/INBOX: first read: mail since 20" in caplog.text
    assert f"{pipeline.account}/INBOX: first read: mail since ever" in caplog.text
    assert not list((pipeline.tmp / "tokens").glob(f"{bob}*")), "a service account's tokens stay in memory"


def test_a_wrong_entry_is_one_line(pipeline: Pipeline) -> None:
    """Exit 2: file, account and key."""
    env = accounts_file(pipeline, '[[account]]\nusername = "ann@example.com"\nport = "imap"\n')
    output = finished(pipeline.producer(**env), code=2)
    assert output.startswith(f"producer.py: {pipeline.tmp}/accounts.toml: account ann@example.com: port=imap: ")
    assert len(output.splitlines()) == 1


def test_a_wrong_password_is_tried_once(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """One try, then REAUTH_REQUIRED with the server's words while the others go on; a new password file is noticed."""
    sandbox.set_password(POST, "right")
    path = secret(pipeline.tmp / "post.password", "wr0ng")
    env = accounts_file(
        pipeline,
        f'[[account]]\nusername = "{pipeline.account}"\n[[account]]\nusername = "{POST}"\nauth_method = "password"\n'
        f'password_file = "{path}"\n',
    )
    pipeline.deliver("held back", account=POST)
    with pipeline.producer(POLL_INTERVAL="0.2", **env) as producer, pipeline.worker():
        producer.wait_for(
            f"ERROR +{POST}/INBOX: REAUTH_REQUIRED: the server refuses the password of {POST}; set a new one: in {path}; "
            r"the IMAP server said: .*\[AUTHENTICATIONFAILED\]",
            DEADLINE,
        )
        for number in range(3):
            [email_id] = pipeline.deliver(f"mail {number}")
            pipeline.wait_until_settled([email_id])
        producer.wait_for(f"{POST}/INBOX: REAUTH_REQUIRED, 0 published", DEADLINE)
        assert sandbox.attempts(POST) == 1
        secret(path, "right")
        pipeline.wait_until_settled()
        assert sandbox.attempts(POST) == 2
        assert "wr0ng" not in producer.output()
    pipeline.assert_accounted()


def test_a_wrong_password_under_once(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """What becomes exit 3; the password is in no text. A Gmail password is warned about."""
    sandbox.set_password(POST, "right")
    env = {"AUTH_METHOD": "password", "GMAIL_USERNAME": POST, "IMAP_PASSWORD": "hunter2"}
    with pytest.raises(NoUsableToken, match=f"refuses the password of {POST}; set a new one: IMAP_PASSWORD") as error:
        read_once(pipeline, **env)
    assert "hunter2" not in str(error.value)
    assert sandbox.attempts(POST) == 1


def test_gmail_passwords_are_warned_about(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is asked of Gmail: the producer is only made."""
    settings = load_settings(
        {"AUTH_METHOD": "password", "GMAIL_USERNAME": POST, "IMAP_PASSWORD": "x", "DATA_DIR": pipeline.tmp}, env_file=None
    )
    with RedisClient.connect(pipeline.redis.url, max_connections=4, socket_timeout=5) as redis:
        Producer(settings, accesses(load_accounts(settings.mail), SYSTEM), redis, Shutdown(), SYSTEM, hurried_breakers())
    assert f"{POST}: Gmail takes app passwords only" in caplog.text


def test_what_needs_a_person_names_the_likely_cause(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """A consent of seven days ago, IMAP switched off for the domain, a delegation withdrawn: each says so, is asked no more,
    holds up nobody, and goes on without a restart when a person has mended it."""
    tested, barred, robot = "tested@example.org", "barred@example.org", "robot@example.org"
    pipeline.write_token(tested)
    pipeline.write_token(barred)
    age_token(pipeline, tested, 7.01)
    key = pipeline.tmp / "key.json"
    sandbox.write_service_account_key(key, robot)
    sandbox.revoke(tested)
    sandbox.revoke(robot)
    env = accounts_file(
        pipeline,
        "".join(f'[[account]]\nusername = "{name}"\n' for name in (tested, barred, pipeline.account))
        + f'[[account]]\nusername = "{robot}"\nauth_method = "service_account"\nservice_account_file = "{key}"\n',
    )
    held_back = [*pipeline.deliver("one", account=tested), *pipeline.deliver("two", account=barred)]
    held_back += pipeline.deliver("three", account=robot)
    sandbox.faults.login_no("[ALERT] IMAP access is disabled for your domain. Please contact your administrator. (Failure)", 1)
    with (
        pipeline.producer(GMAIL_USERNAME="", ACCOUNTS_FILE=env["ACCOUNTS_FILE"], LOG_LEVEL="DEBUG") as producer,
        pipeline.worker(),
    ):
        producer.wait_for(f"{tested}/INBOX: REAUTH_REQUIRED: .*the app is in testing.*--auth-setup --username {tested}", DEADLINE)
        producer.wait_for(r"/INBOX: REAUTH_REQUIRED: IMAP is switched off for \S+ \(.*disabled for your domain", DEADLINE)
        producer.wait_for(f"{robot}/INBOX: REAUTH_REQUIRED: Google does not let .*Domain-wide delegation", DEADLINE)
        off = producer.wait_for(r"(\S+)/INBOX: REAUTH_REQUIRED: IMAP is switched off")[1]
        going_on = {pipeline.account, barred} - {off}
        for account in going_on:
            pipeline.deliver(f"meanwhile {account}", account=account)
        open_accounts = {email_id for email_id in pipeline.delivered if email_id.split(":")[1] in going_on}
        pipeline.wait_until_settled(open_accounts)
        assert sandbox.attempts(tested) == 0
        assert sandbox.attempts(off) == 1
        assert producer.output().count("REAUTH_REQUIRED: ") == 3
        pipeline.write_token(tested)
        age_token(pipeline, off, 0.5)
        sandbox.write_service_account_key(key, robot)
        pipeline.wait_until_settled()
        producer.wait_for(f"{tested}/INBOX: it is read again")
    pipeline.assert_accounted()


class Refused:
    """Credentials that are refused; `asked`: when they were."""

    def __init__(self, clock: Clock, error: Exception) -> None:
        self.asked: list[float] = []
        self.file = "as it was"
        self._clock = clock
        self._error = error

    def access_token(self, *, refuse: str | None = None) -> str:
        self.asked.append(self._clock.monotonic())
        raise self._error

    def stamp(self) -> object:
        return self.file

    def facts(self) -> dict[str, object]:
        return {}


@pytest.mark.parametrize(
    ("error", "status", "pause"),
    [(ReauthRequired("no"), "REAUTH_REQUIRED", 3600), (ConfigurationError("no"), "MISCONFIGURED", 60)],
)
def test_what_was_refused_is_asked_again_after_its_pause_or_when_its_file_changes(
    pipeline: Pipeline, error: Exception, status: str, pause: int
) -> None:
    """An hour for what the server refused, a minute for what is wrong here; a changed file ends either. The lease is given up."""
    settings = load_settings({**pipeline.env, "DATA_DIR": pipeline.tmp}, env_file=None)
    clock, shutdown = a_second_a_look(), HurriedShutdown()
    credentials = Refused(clock, error)
    [account] = load_accounts(settings.mail)
    with RedisClient.connect(pipeline.redis.url, max_connections=4, socket_timeout=5) as redis, ThreadPoolExecutor(1) as pool:
        producer = Producer(settings, [Access(account, credentials)], redis, shutdown, clock, hurried_breakers())
        [mailbox] = producer.mailboxes
        running = pool.submit(mailbox.run)
        try:
            until(lambda: len(credentials.asked) >= 3, DEADLINE, "asked three times")
            assert (mailbox.status, mailbox.why, mailbox.owns) == (status, "no", False)
            count = len(credentials.asked)
            credentials.file = "another"
            until(lambda: len(credentials.asked) > count, DEADLINE, "asked once more")
        finally:
            shutdown.request("the test is over")
        running.result(DEADLINE)
    first, second, third, *_ = credentials.asked
    assert pause <= second - first < pause + 50
    assert pause <= third - second < pause + 50
    if pause == 3600:
        assert credentials.asked[count] - credentials.asked[count - 1] < pause


def test_an_outage_of_the_token_endpoint_is_waited_for(
    pipeline: Pipeline, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """503, 429, HTML in place of JSON, no answer in time: asked again until it is back, and nobody is told to consent."""
    for number, (status, body) in enumerate(
        [(503, "<html>Service Unavailable</html>"), (429, "slow down"), (200, "<html>hi</html>")]
    ):
        pipeline.deliver(f"mail {number}")
        sandbox.expire_tokens()
        pipeline.write_token(pipeline.account)
        sandbox.faults.token_answer(status, body, times=5)
        assert read_once(pipeline) == 0
        assert not sandbox.faults.state()
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert caplog.text.count("the token endpoint is away") == 3, "said once an outage"
    assert "REAUTH" not in caplog.text


@pytest.fixture
def short_lived() -> Iterator[Sandbox]:
    with Sandbox(token_lifetime=1) as running:
        yield running


def test_sessions_that_end_with_their_token_are_no_news(short_lived: Sandbox, valkey: RedisServer, tmp_path: Path) -> None:
    """The server ends each session after a second, as Gmail does after an hour: a new one with a fresh token, no line in the log."""
    pipeline = Pipeline(short_lived, valkey, tmp_path)
    with pipeline.producer(POLL_INTERVAL="600") as producer, pipeline.worker():
        for number in range(2):
            pipeline.deliver(f"mail {number}")
            pipeline.wait_until_settled()
            sessions = short_lived.attempts(pipeline.account)
            until(lambda count=sessions: short_lived.attempts(pipeline.account) > count, DEADLINE, "another session")
        told = [line for line in producer.output().splitlines() if "keeps nothing on disk" not in line]
        assert [line for line in told if " INFO " not in line or "again" in line or "refused" in line] == []
    pipeline.assert_accounted()


@pytest.fixture
def narrow() -> Iterator[Sandbox]:
    with Sandbox(connection_limit=1) as running:
        yield running


def test_what_the_server_wants_a_rest_for(
    narrow: Sandbox, valkey: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """[OVERQUOTA], [THROTTLED] and too many connections: each its own long rest, then on; no login fails, no mail is lost."""
    pipeline = Pipeline(narrow, valkey, tmp_path)
    caplog.set_level("INFO")
    pipeline.deliver("one")
    narrow.faults.answer_no()
    assert read_once(pipeline) == 0
    pipeline.deliver("two")
    narrow.faults.answer_no("[THROTTLED] Slow down. (Failure)", command="SEARCH")
    assert read_once(pipeline) == 0
    pipeline.deliver("three")
    narrow.set_password(pipeline.account, "phone")
    with IMAPClient("127.0.0.1", narrow.imap_port, ssl=False, timeout=10) as phone, ThreadPoolExecutor() as pool:
        phone.login(pipeline.account, "phone")
        reading = pool.submit(read_once, pipeline)
        until(lambda: "Too many simultaneous connections" in caplog.text, DEADLINE, "the one connection is taken")
        phone.logout()
        assert reading.result(DEADLINE) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)
    rests = [(record.levelname, record.getMessage()) for record in caplog.records if "resting for" in record.getMessage()]
    kinds = [("[OVERQUOTA]", "3600"), ("[THROTTLED]", "900"), ("Too many simultaneous connections", "300")]
    for kind, seconds in kinds:
        assert {level for level, text in rests if kind in text and text.endswith(f"resting for {seconds} s")} == {"WARNING"}
    assert len(rests) == sum(kind in text for _, text in rests for kind, _ in kinds)
    assert "login refused" not in caplog.text
    assert caplog.text.count("it is read again") == 3
