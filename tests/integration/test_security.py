"""What docs/security.md says, point by point: real daemons, real servers, and what they leave behind."""

from __future__ import annotations

import base64
import json
import re
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from src.sandbox.server import Sandbox
from src.sandbox.tokens import CLIENT_SECRET
from tests.integration import test_end_to_end, test_intake_faults, test_intake_rules, test_worker_faults
from tests.integration.test_accounts import accounts_file, secret
from tests.integration.test_commands import finished
from tests.support import acl
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import family, free_port
from tests.support.servers import Dovecot, RedisServer, have_redis, make_certificate, need
from tests.support.wait import until
from tests.unit.test_consent import NoRedirect, visit

STREAM = "email_ingestion_stream"

# TLS


def test_a_mail_server_without_a_trusted_certificate_hears_no_secret(
    dovecot: Dovecot, valkey: RedisServer, tmp_path: Path
) -> None:
    """Self-signed and no IMAP_CA_FILE: exit 2 and one line under --once, MISCONFIGURED while running; with the file all is read."""
    pipeline = Pipeline(dovecot, valkey, tmp_path)
    pipeline.deliver("one")
    untrusted = {"IMAP_CA_FILE": ""}
    line = rf"the certificate of localhost:{dovecot.imaps_port} is not trusted \(self-signed certificate\): .*IMAP_CA_FILE"
    output = finished(pipeline.producer("--once", **untrusted), code=2)
    assert re.search(f"^producer.py: {line}", output, re.MULTILINE)
    with pipeline.producer(**untrusted) as producer:
        producer.wait_for(f"ERROR +{pipeline.account}/INBOX: MISCONFIGURED: {line}", DEADLINE)
    assert f"user=<{pipeline.account}>" not in dovecot.log(), "nobody tried to log in"
    with pipeline.producer(), pipeline.worker():
        pipeline.wait_until_settled()
    pipeline.assert_accounted()


@pytest.fixture(params=["DNS:localhost,IP:127.0.0.1"])
def secured(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RedisServer, int, Path]]:
    """A Redis that speaks TLS too, with a certificate for the names of the parameter: (server, TLS port, certificate)."""
    need(have_redis(), "redis-server")
    key, certificate, port = tmp_path / "redis-key.pem", tmp_path / "redis-ca.pem", free_port()
    make_certificate(key, certificate, request.param)
    options = {"tls-port": str(port), "tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-auth-clients": "no"}
    with RedisServer("redis", options=options) as server:
        yield server, port, certificate


def refused(pipeline: Pipeline, url: str, why: str) -> None:
    """Both daemons end with exit code 2, and their last line is `why`."""
    for daemon in (pipeline.producer(REDIS_URL=url), pipeline.worker(REDIS_URL=url)):
        output = finished(daemon, code=2)
        assert re.search(why, output.splitlines()[-1]), output


def test_a_redis_without_a_trusted_certificate_is_refused(
    secured: tuple[RedisServer, int, Path], sandbox: Sandbox, tmp_path: Path
) -> None:
    """Self-signed, and no such file of an authority: exit 2 and one line that says what to do; nothing was sent."""
    server, port, _ = secured
    pipeline = Pipeline(sandbox, server, tmp_path)
    line = r"^\w+\.py: the certificate of Redis is not trusted \(self-signed certificate\): nothing was sent\. .*ssl_ca_certs="
    refused(pipeline, f"rediss://127.0.0.1:{port}/0", line)
    refused(pipeline, f"rediss://127.0.0.1:{port}/0?ssl_ca_certs=/none.pem", r"there is no file /none.pem \(ssl_ca_certs\)")
    assert server.client().dbsize() == 0


def test_rediss_with_an_authority_of_ones_own(secured: tuple[RedisServer, int, Path], sandbox: Sandbox, tmp_path: Path) -> None:
    """REDIS_URL=rediss://…?ssl_ca_certs=FILE: the pipeline runs over TLS."""
    server, port, certificate = secured
    pipeline = Pipeline(sandbox, server, tmp_path, REDIS_URL=f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}")
    pipeline.deliver("one", "fail 1")
    with pipeline.producer(), pipeline.worker():
        pipeline.wait_until_settled()
        assert {row["laddr"].rpartition(":")[2] for row in server.client().client_list() if row["laddr"] != "?:0"} >= {str(port)}
    pipeline.assert_accounted()


@pytest.mark.parametrize("secured", ["DNS:redis.example"], indirect=True)
def test_a_certificate_for_another_name_is_refused(
    secured: tuple[RedisServer, int, Path], sandbox: Sandbox, tmp_path: Path
) -> None:
    """The authority is trusted, the name is somebody else's: exit 2."""
    server, port, certificate = secured
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    refused(Pipeline(sandbox, server, tmp_path), url, r"is not trusted \(IP address mismatch")


# least privilege in Redis


@pytest.fixture
def with_users(sandbox: Sandbox, either_redis: RedisServer, tmp_path: Path) -> Iterator[Pipeline]:
    """The daemons log in as producer and worker, the scripts as operator; the test itself may do everything."""
    acl.make_users(either_redis.client())
    either_redis.client().execute_command("ACL", "LOG", "RESET")
    pipeline = Pipeline(sandbox, either_redis, tmp_path)
    pipeline.users = True
    pipeline.env = {**pipeline.env, "REDIS_URL": acl.as_user(either_redis.url, "operator")}
    yield pipeline
    denied = {(row["username"], row["object"]) for row in either_redis.client().acl_log()}
    if not acl.EVERYWHERE:
        either_redis.client().acl_deluser("producer", "worker", "operator")
    assert {what for _, what in denied} <= {"config|get"}, denied


STORIES: list[Any] = [
    test_end_to_end.test_reprocess_from_the_dead_letters,
    test_worker_faults.test_sigterm_hands_back_what_cannot_finish,
]
MORE: list[Any] = [
    test_end_to_end.test_duplicates_are_prevented,
    test_worker_faults.test_one_mail_that_kills_the_process_among_31,
    test_end_to_end.test_thousand_mails,
    test_end_to_end.test_dead_letter_after_the_last_attempt,
    test_worker_faults.test_dlq_max,
    test_intake_faults.test_uidvalidity_change,
    test_intake_rules.test_resync_asked_of_the_producer_that_reads,
]


@pytest.mark.parametrize("story", [*STORIES, *(pytest.param(story, marks=pytest.mark.full) for story in MORE)])
def test_the_pipeline_runs_under_the_users_of_the_documents(with_users: Pipeline, story: Callable[[Pipeline], None]) -> None:
    """Tests of other files, with daemons and scripts that may do only what docs/security.md lists; nothing was refused on the way."""
    story(with_users)


REFUSED = {
    "producer": [
        ("XDEL", STREAM, "0-1"),
        ("XTRIM", STREAM, "MAXLEN", "0"),
        ("DEL", STREAM),
        ("SADD", f"{STREAM}:processed:a:20260131", "1"),
        ("XREADGROUP", "GROUP", "email_workers", "me", "STREAMS", STREAM, ">"),
        ("GET", "somebody:else"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "requirepass"),
        ("KEYS", "*"),
    ],
    "worker": [
        ("GET", "producer_state:a:INBOX:last_uid"),
        ("SET", "producer_state:a:INBOX:last_uid", "0"),
        ("HGETALL", "somebody:else"),
        ("XGROUP", "DESTROY", STREAM, "email_workers"),
        ("FLUSHDB",),
        ("CONFIG", "SET", "maxmemory", "1"),
        ("ACL", "LIST"),
    ],
    "operator": [("GET", "somebody:else"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("SHUTDOWN",), ("ACL", "SETUSER", "me")],
}


@pytest.mark.parametrize("role", list(REFUSED))
def test_what_the_users_may_not_do(either_redis: RedisServer, role: acl.Role) -> None:
    """Outside of what each is for: refused, by the command or by the key; within a script too."""
    acl.make_users(either_redis.client())
    with redis.Redis(port=either_redis.port, username=role, password=acl.password(role), protocol=2) as client:
        assert client.ping()
        for command in REFUSED[role]:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
        with pytest.raises(redis.exceptions.ResponseError, match=r"ACL failure in script|can't run this command|NOPERM"):
            client.execute_command("EVAL", "return redis.call('FLUSHALL')", 0)


# secrets


def titles(*daemons: Daemon) -> str:
    """What `ps` shows of them and of what they started."""
    shown = []
    for pid in (pid for daemon in daemons for pid in family(daemon.pid)):
        with suppress(OSError):
            shown.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    return "\n".join(shown)


def pages(daemon: Daemon) -> str:
    """All that its endpoint says."""
    address = daemon.wait_for(r"health: (http://\S+)/health", DEADLINE)[1]
    told = []
    for page in ("health", "ready", "status", "", "fragment"):
        try:
            with urllib.request.urlopen(f"{address}/{page}", timeout=20) as answer:
                told.append(answer.read().decode())
        except urllib.error.HTTPError as error:
            told.append(error.read().decode())
    return "\n".join(told)


def encoded(secrets: dict[str, str], accounts: list[str]) -> dict[str, str]:
    """Each secret, and the forms in which IMAP carries it."""
    found = dict(secrets)
    for name, value in secrets.items():
        found[f"{name}, base64"] = base64.b64encode(value.encode()).decode().rstrip("=")
        for account in accounts:
            for form, text in (("XOAUTH2", f"user={account}\1auth=Bearer {value}\1\1"), ("PLAIN", f"\0{account}\0{value}")):
                found[f"{name} of {account}, {form}"] = base64.b64encode(text.encode()).decode().rstrip("=")
    return found


HANDLER = """
import logging
def handle(email, context):
    logging.getLogger(__name__).debug("seen %s", email.subject)
    raise RuntimeError(email.subject)
"""


def test_no_secret_in_anything_that_is_written(sandbox: Sandbox, valkey: RedisServer, tmp_path: Path) -> None:
    """A consent, three ways to log in, wrong and revoked secrets, servers that are away, a handler that raises, all at DEBUG: no secret
    stands in a log, an error, a page of the endpoint, a process title, in Redis, or in a file but its own."""
    valkey.client().execute_command("ACL", "SETUSER", "joe", "on", ">redis-hunter2", "~*", "+@all")
    pipeline = Pipeline(sandbox, valkey, tmp_path)
    pipeline.users = False
    ann, bob, post = pipeline.account, "bob@example.com", "post@example.com"
    debug = {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json", "REDIS_URL": f"redis://joe:redis-hunter2@127.0.0.1:{valkey.port}/0"}
    (tmp_path / "mine.py").write_text(HANDLER)
    secrets = {"client secret": CLIENT_SECRET, "Redis password": "redis-hunter2", "wrong Redis password": "redis-wr0ng"}
    seen = []

    # a consent
    (tmp_path / "tokens" / f"{ann}.json").unlink()
    sandbox.add_account(ann)
    sandbox.write_client_secrets(tmp_path / "client.json")
    client = {"GMAIL_CLIENT_SECRETS_FILE": str(tmp_path / "client.json"), "TOKEN_FILE": str(tmp_path / "tokens" / f"{ann}.json")}
    with pipeline.producer("--auth-setup", "--no-browser", **debug, **client) as setup:
        answer = redirected_for(ann, setup.wait_for(r"(?m)^(http://\S+/auth\S+)", DEADLINE)[1])
        secrets["code"] = urllib.parse.parse_qs(urllib.parse.urlsplit(answer).query)["code"][0]
        visit(answer)
        assert setup.exit_code(DEADLINE) == 0
        seen.append(setup.output())
    token = json.loads((tmp_path / "tokens" / f"{ann}.json").read_text())
    secrets |= {"refresh token": token["refresh_token"], "access token": token["token"]}

    # three ways to log in
    sandbox.set_password(post, "right-hunter3")
    sandbox.write_service_account_key(tmp_path / "key.json", bob)
    key = json.loads((tmp_path / "key.json").read_text())["private_key"]
    secrets |= {"private key": key.splitlines()[1], "wrong password": "wr0ng-hunter4", "password": "right-hunter3"}
    password = secret(tmp_path / "post.password", "wr0ng-hunter4")
    env = debug | accounts_file(
        pipeline,
        f'[[account]]\nusername = "{ann}"\n[[account]]\nusername = "{bob}"\nauth_method = "service_account"\n'
        f'service_account_file = "{tmp_path}/key.json"\n[[account]]\nusername = "{post}"\nauth_method = "password"\n'
        f'password_file = "{password}"\n',
    )
    for account in (ann, bob, post):
        pipeline.deliver("one", account=account)
    with (
        pipeline.producer(**env) as producer,
        pipeline.worker("--handler", "mine.py:handle", MAX_ATTEMPTS="2", WORKER_ISOLATION="process", **debug) as worker,
    ):
        producer.wait_for(f"{post}/INBOX: REAUTH_REQUIRED", DEADLINE)
        secret(password, "right-hunter3")
        pipeline.wait_until_settled()
        sandbox.revoke(ann)
        sandbox.expire_tokens()
        sandbox.cut()
        producer.wait_for(f"{ann}/INBOX: REAUTH_REQUIRED", DEADLINE)
        secrets["second access token"] = json.loads((tmp_path / "tokens" / f"{ann}.json").read_text())["token"]
        seen += [pages(producer), pages(worker), titles(producer, worker)]
        assert producer.terminate() == 0
        assert worker.terminate() == 0
        seen += [producer.output(), worker.output()]
    dead = dict.fromkeys(pipeline.delivered, "attempts")
    pipeline.assert_accounted(dead=dead)

    # what does not answer, or refuses
    wrong = f"redis://joe:redis-wr0ng@127.0.0.1:{valkey.port}/0"
    seen.append(finished(pipeline.worker(**{**debug, "REDIS_URL": wrong}), code=2))
    seen.append(finished(pipeline.producer("--once", **{**env, "REDIS_URL": wrong}), code=2))
    seen.append(finished(pipeline.producer("--once", **{**env, "REDIS_URL": "redis://joe:redis-hunter2@[::1/0"}), code=2))
    pipeline.deliver("two", account=post, expected=False)
    away = {**env, "REDIS_URL": f"redis://joe:redis-hunter2@127.0.0.1:{free_port()}/0"}
    nowhere = {**env, "RAW_ARCHIVE": f"ftp://joe:ftp-hunter6@127.0.0.1:{free_port()}/raw"}
    secrets["archive password"] = "ftp-hunter6"
    odd = {**env, "GMAIL_USERNAME": bob}
    secrets["token of a broken answer"] = "odd-token-hunter5"
    for settings, line in ((away, "Redis is away"), (nowhere, "raw mail cannot be kept"), (odd, "the answer holds no token")):
        if settings is odd:
            sandbox.faults.token_answer(200, json.dumps({"access_token": "odd-token-hunter5"}))
        with pipeline.producer(**settings) as producer:
            producer.wait_for(line, DEADLINE)
            seen += [pages(producer), titles(producer)]
            producer.terminate()
            seen.append(producer.output())

    # all of it
    with valkey.client(decode_responses=False) as raw:
        seen += [raw.dump(name).decode("latin-1") for name in raw.scan_iter("*")]
    own = {tmp_path / "tokens", tmp_path / "client.json", tmp_path / "key.json", password}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not own & {path, *path.parents}]
    seen += [path.read_text(errors="replace") for path in files]
    everything = "\n".join(seen)
    valkey.client().acl_deluser("joe")
    assert len(everything) > 20_000
    assert "seen one" in everything, "DEBUG is on"
    shown = [name for name, value in encoded(secrets, [ann, bob, post]).items() if value in everything]
    assert shown == []


def redirected_for(account: str, address: str) -> str:
    """The address to which the sandbox's consent page sends the browser when `account` agrees."""
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(address).query))
    form = {**query, "account": account, "decision": "allow", "mail": "on"}
    opener = urllib.request.build_opener(NoRedirect)
    try:
        opener.open(address.partition("/auth")[0] + "/consent", urllib.parse.urlencode(form).encode(), timeout=20)
    except urllib.error.HTTPError as answer:
        return str(answer.headers["Location"])
    raise AssertionError("the sandbox did not redirect")


# files


def test_every_file_is_for_its_owner_alone(pipeline: Pipeline) -> None:
    """Markers, archive, tokens, locks, a handler's output, the embedded server's data: 0600 and 0700, whatever the umask was."""
    data = pipeline.tmp / "data"
    data.mkdir(mode=0o700)
    (data / "redis.json").write_text('{"use": "embedded"}')  # else a server on 6379 would be taken
    (data / "redis.json").chmod(0o600)
    before = set(pipeline.tmp.rglob("*"))
    env = {"REDIS_URL": "", "EMBEDDED_TCP": "false", "JSONL_PATH": str(pipeline.tmp / "mails.jsonl")}
    pipeline.users = False
    pipeline.deliver("one", "two")
    with pipeline.producer(**env) as producer:
        producer.wait_for("producer reads", DEADLINE)
        finished(pipeline.worker("--handler", "src.handlers.jsonl:handle", "--drain", **env))
        (pipeline.tmp / "mine.py").write_text("def handle(email, context): open('mine.txt', 'w').write(email.text)\n")
        (pipeline.tmp / "mine.py").chmod(0o600)
        pipeline.deliver("three")
        until(lambda: len(list((data / "raw").glob("[0-9a-f]/*"))) == 3, DEADLINE, "it is published soon")
        with pipeline.worker("--handler", "mine.py:handle", **env) as worker:
            until((pipeline.tmp / "mine.txt").exists, DEADLINE, "it is handled")
            assert worker.terminate() == 0
        assert producer.terminate() == 0, "the last one out ends the embedded server"
    made = [
        path
        for path in pipeline.tmp.rglob("*")
        if (path not in before and path.suffix != ".log") or path.parent == data / "redis"
    ]
    names = {path.name for path in made}
    assert names >= {
        "mine.txt",
        "INBOX.json",
        "mails.jsonl",
        "users.lock",
        "valkey.log",
        f"{pipeline.account}.json.lock",
        "archive",
    }
    assert any(path.suffix == ".aof" for path in made)
    assert [f"{path} {stat.filemode(path.lstat().st_mode)}" for path in made if path.lstat().st_mode & 0o077] == []


# the log


FORGER = """
import logging
def handle(email, context):
    raw = email.raw().decode("utf-8", "replace")
    context.log.info("subject %s from %s", email.subject, email.sender)
    context.log.warning("raw %s", raw)
    try:
        raise ValueError(raw)
    except ValueError:
        logging.getLogger("mine").exception("it failed: %s", raw)
    raise ValueError(raw)
"""
ATTACK = (
    'x\r\n12:00:00 ERROR   FORGED\n{"level": "ERROR", "message": "FORGED"}\n'
    "\x1b[2J\x1b]0;title\x07\x9b31m\x85\u2028\u2029\u202e\x00\x7f end"
)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_mail_cannot_forge_a_line_of_the_log(pipeline: Pipeline, sandbox: Sandbox, form: str) -> None:
    """Line breaks, escape sequences, C1 and bidi characters in subject, sender, body and exceptions: shown or escaped, never obeyed."""
    (pipeline.tmp / "mine.py").write_text(FORGER)
    word = base64.b64encode(ATTACK.encode()).decode()
    raw = (
        f"From: =?utf-8?b?{word}?= <a@x>\r\nSubject: =?utf-8?b?{word}?=\r\nMessage-ID: <{form}@x>\r\n\r\n".encode()
        + ATTACK.encode()
    )
    sandbox.deliver(pipeline.account, raw)
    env = {"LOG_FORMAT": form, "LOG_LEVEL": "DEBUG"}
    with pipeline.producer(**env) as producer, pipeline.worker("--handler", "mine.py:handle", MAX_ATTEMPTS="1", **env) as worker:
        worker.wait_for("is dead after 1 attempt", DEADLINE)
        assert producer.terminate() == 0
        assert worker.terminate() == 0
        written = producer.output() + worker.output()
    assert written.count("FORGED") >= 4
    assert not re.search("[^\\n\x20-\x7e\xa0-\u2027\u202f-\uffff]", written), "nothing that drives a terminal"
    lines = written.rstrip("\n").split("\n")
    if form == "json":
        assert all(json.loads(line)["message"] != "FORGED" for line in lines)
    else:
        assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) |  ", line)] == []
        assert not [line for line in lines if line.startswith(("12:00:00 ERROR   FORGED", '{"level'))]
