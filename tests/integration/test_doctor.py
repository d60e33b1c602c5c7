"""scripts/doctor.py against real servers: a healthy set-up, then one fault each; no secret in any of its outputs, nothing changed by it."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from config.settings import load_settings
from src.auth.oauth2_gmail import TokenSource
from src.common.clock import SYSTEM, iso
from src.common.keys import Keys
from src.doctor.judge import exit_code
from src.doctor.probes import examine
from src.sandbox.server import Sandbox
from tests.integration.test_commands import files_of, keys_of
from tests.support import acl
from tests.support.daemons import ROOT, Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import free_port
from tests.support.servers import RedisServer, faketime, have_redis, need

KEYS = Keys("email_ingestion_stream")
PASSWORD = "hunter2hunter2"  # of Redis and of a mailbox; must never be shown
HEALTHY = {"set-max-intset-entries": "4096"}


@pytest.fixture(params=["redis", "valkey"])
def either(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path: Path) -> Iterator[Pipeline]:
    need(request.param == "valkey" or have_redis(), "redis-server")
    with RedisServer(request.param, appendonly=True, options=HEALTHY) as server:
        yield Pipeline(sandbox, server, tmp_path)


@pytest.fixture
def pipeline(sandbox: Sandbox, tmp_path: Path) -> Iterator[Pipeline]:
    with RedisServer("valkey", appendonly=True, options=HEALTHY) as server:
        yield Pipeline(sandbox, server, tmp_path)


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the daemons of a pipeline run too: relative paths and .env are those of the test."""
    monkeypatch.chdir(tmp_path)


Findings = Mapping[str, tuple[str, str, str]]  # check → (status, detail, remedy)


def doctor(pipeline: Pipeline, *args: str, code: int = 0, **env: str) -> Findings:
    """What `--json` says; no line of it holds a secret."""
    with Daemon("scripts/doctor.py", "--json", *args, env={**pipeline.env, **env}, tmp=pipeline.tmp) as running:
        assert running.exit_code(DEADLINE) == code, running.output()
        output = running.output()
    for secret in secrets(pipeline):
        assert secret not in output
    return {one["check"]: (one["status"], one["detail"], one["remedy"]) for one in json.loads(output[output.index("[") :])}


def look(pipeline: Pipeline, *args: str, code: int = 0, **env: str) -> Findings:
    """The same without a process of its own."""
    settings = load_settings({"METRICS_PORT": "off", **pipeline.env, **env})
    found = examine(settings, SYSTEM, offline="--offline" in args)
    assert exit_code(found) == code, found
    assert [secret for secret in secrets(pipeline) if secret in repr(found)] == []
    return {one.check: (one.status, one.detail, one.remedy) for one in found}


def secrets(pipeline: Pipeline) -> set[str]:
    found = {PASSWORD}
    for path in (pipeline.tmp / "tokens").glob("*.json"):
        token = json.loads(path.read_text())
        found |= {token[name] for name in ("token", "refresh_token", "client_secret") if token.get(name)}
    return found


def wrong(findings: Findings) -> dict[str, tuple[str, str, str]]:
    """All that is not ok."""
    return {check: found for check, found in findings.items() if found[0] != "ok"}


def only(findings: Findings, check: str, status: str) -> tuple[str, str]:
    """Detail and remedy of the one finding that is not ok."""
    found = wrong(findings)
    assert list(found) == [check], found
    assert found[check][0] == status
    return found[check][1:]


def token_file(pipeline: Pipeline) -> Path:
    return pipeline.tmp / "tokens" / f"{pipeline.account}.json"


def rewrite(path: Path, **changes: str) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_healthy_set_up_before_and_while_it_runs(either: Pipeline) -> None:
    """All is ok and exit 0; with an access token that ran out, which is refreshed and written nowhere: no key and no file changes."""
    pipeline = either
    assert wrong(look(pipeline)) == {}
    pipeline.deliver("one", "permanent")
    with pipeline.producer() as producer, pipeline.worker():
        pipeline.wait_until_settled()
        url = producer.wait_for(r"health: http://127.0.0.1:(\d+)/", DEADLINE)
        found = doctor(pipeline, HTTP_PORT=url[1])
        assert wrong(found) == {}
        assert found["daemons"][1] == "1 producer, 1 worker"
        assert found[f"port {url[1]}"][1] == "a daemon of ours listens there"
        assert found[f"mailbox {pipeline.account}/INBOX"][1].startswith("2 messages")
        assert found["dead letters"][1] == "1 of DLQ_MAX=10000"
    rewrite(token_file(pipeline), token="", expiry="")
    keys, files = keys_of(pipeline), files_of(pipeline.tmp)
    assert wrong(look(pipeline)) == {}
    assert (keys_of(pipeline), files_of(pipeline.tmp)) == (keys, files)


def test_offline_asks_no_mail_server(pipeline: Pipeline) -> None:
    """--offline with an IMAP server and a token endpoint that are away: all is ok."""
    pipeline.source.stop()  # type: ignore[union-attr]  # a Sandbox
    rewrite(token_file(pipeline), token="", expiry="")
    assert wrong(look(pipeline, "--offline")) == {}
    assert f"imap {pipeline.account}" not in look(pipeline, "--offline")
    pipeline.source.start()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("option", "value", "check", "status", "remedy"),
    [
        ("maxmemory-policy", "allkeys-lru", "redis policy", "fail", "redis-cli CONFIG SET maxmemory-policy noeviction"),
        ("appendonly", "no", "redis persistence", "fail", "redis-cli CONFIG SET appendonly yes"),
        ("maxmemory", "1100000", "redis memory", "fail", "redis-cli CONFIG SET maxmemory "),
        (
            "set-max-intset-entries",
            "512",
            "redis set-max-intset-entries",
            "warn",
            "redis-cli CONFIG SET set-max-intset-entries 4096",
        ),
    ],
)
def test_a_server_that_is_not_set_right(
    pipeline: Pipeline, option: str, value: str, check: str, status: str, remedy: str
) -> None:
    """One finding, the rest ok, and its remedy is the line that mends it."""
    pipeline.client.config_set(option, value)
    assert only(look(pipeline, code=int(status == "fail")), check, status)[1].startswith(remedy)


@pytest.mark.parametrize("role", ["producer", "worker"])
def test_the_acl_lacks_a_command(either: Pipeline, role: acl.Role) -> None:
    """A user of docs/security.md without one command and one key pattern: the remedy, run as it is, mends it."""
    client, url = either.client, acl.as_user(either.redis.tcp_url, role)
    acl.make_users(client)
    assert wrong(look(either, REDIS_URL=url)) == {}
    client.execute_command(
        "ACL", "SETUSER", role, "-xadd", "-xinfo|groups", "resetkeys", f"~{KEYS.stream}:*", "~producer_state:*"
    )
    detail, remedy = only(look(either, code=1, REDIS_URL=url), "redis acl", "fail")
    assert detail == f"{role} may not do all that a {role} needs (docs/security.md)"
    assert remedy == f"redis-cli ACL SETUSER {role} '~{KEYS.stream}' +xadd '+xinfo|groups'"
    line = remedy.replace("redis-cli", f"redis-cli -s {either.redis.socket_path}")
    subprocess.run(["bash", "-c", line], check=True, capture_output=True)
    assert wrong(look(either, REDIS_URL=url)) == {}


def test_redis_is_away_or_refuses(pipeline: Pipeline) -> None:
    """No server, and a wrong password: one finding each, without the password, the checks that need none go on."""
    nobody = f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0"
    found = look(pipeline, code=1, REDIS_URL=nobody)
    assert "does not answer" in only(found, "redis", "fail")[0]
    assert found[f"imap {pipeline.account}"][0] == "ok"
    refused = pipeline.redis.tcp_url.replace("//", f"//nobody:{PASSWORD}@")
    assert "invalid username-password pair" in only(look(pipeline, code=1, REDIS_URL=refused), "redis", "fail")[0]


def test_tokens(pipeline: Pipeline) -> None:
    """A file that others can read, a consent of 6.5 days, another scope, one that was revoked, none: what to run stands there."""
    path, check, setup = token_file(pipeline), f"token {pipeline.account}", f"--auth-setup --username {pipeline.account}"
    path.chmod(0o644)
    assert only(look(pipeline, code=1), check, "fail")[1] == f"chmod 600 tokens/{pipeline.account}.json"
    path.chmod(0o600)
    rewrite(path, obtained_at=iso(datetime.now(UTC) - timedelta(days=6.5)))
    detail, remedy = only(look(pipeline), check, "warn")
    assert detail.startswith("consented 6.5 days ago: if the app is in testing")
    assert remedy.endswith(setup)
    rewrite(path, obtained_at=iso(datetime.now(UTC) - timedelta(days=7)), token="", expiry="")
    pipeline.source.revoke(pipeline.account)  # type: ignore[union-attr]  # a Sandbox
    detail, remedy = only(look(pipeline, code=1), check, "fail")
    assert "the app is in testing" in detail
    assert remedy.endswith(setup)
    path.unlink()
    assert only(look(pipeline, code=1), check, "fail")[1].endswith(setup)


def test_the_mail_server(pipeline: Pipeline) -> None:
    """A closed port, a log in that is refused, a folder that is missing, one that is hidden."""
    check = f"imap {pipeline.account}"
    port = free_port()
    detail, remedy = only(look(pipeline, code=1, IMAP_PORT=str(port)), check, "fail")
    assert f"127.0.0.1:{port}" in detail
    assert remedy.startswith(f"nc -zv 127.0.0.1 {port}")
    source = pipeline.source
    assert isinstance(source, Sandbox)
    source.faults.login_no("[AUTHENTICATIONFAILED] Invalid credentials (Failure)", times=9)
    assert "Invalid credentials" in only(look(pipeline, code=1), check, "fail")[0]
    source.faults.clear()
    found = wrong(look(pipeline, code=1, MAILBOXES="INBOX,Nowhere"))
    assert found[f"mailbox {pipeline.account}/Nowhere"][2].startswith("python producer.py --list-mailboxes")
    source.hide(pipeline.account, "[Gmail]/Spam")
    assert only(look(pipeline), f"folders {pipeline.account}", "warn")[0].endswith("\\Junk")


def test_a_token_that_ended_early_is_renewed_once(pipeline: Pipeline) -> None:
    """The server refuses an access token that should still be good: one refresh, as the producer does it, and all is ok."""
    TokenSource(token_file(pipeline), pipeline.account).access_token()
    pipeline.source.expire_tokens()  # type: ignore[union-attr]  # a Sandbox
    stored = token_file(pipeline).read_text()
    assert wrong(look(pipeline)) == {}
    assert token_file(pipeline).read_text() == stored


def test_a_check_that_breaks_hides_no_other(pipeline: Pipeline) -> None:
    """A handler whose own start raises: that group says so, the checks around it are all there."""
    (pipeline.tmp / "mine.py").write_text("def prepare(): raise RuntimeError('no start')\ndef handle(email, context): pass\n")
    found = look(pipeline, code=2, WORKER_HANDLER=f"{pipeline.tmp / 'mine.py'}:handle")
    assert only(found, "handlers", "fail")[0].startswith("the check itself failed: RuntimeError: no start")
    assert {"token " + pipeline.account, "redis acl", "disk data", "archive"} <= set(found)


def test_a_marker_that_cannot_be_read(pipeline: Pipeline) -> None:
    """A folder where the marker file should be: said with its path, as the producer says it."""
    (pipeline.tmp / "data" / "markers" / pipeline.account / "INBOX.json").mkdir(parents=True)
    detail, remedy = only(look(pipeline, code=1), f"marker {pipeline.account}/INBOX", "fail")
    assert "INBOX.json cannot be read (Is a directory)" in detail
    assert "scripts/audit.py" in remedy


def test_a_stranger_on_our_port(pipeline: Pipeline) -> None:
    """HTTP_PORT that another program has: fail, and how to find it."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        detail, remedy = only(look(pipeline, code=1, HTTP_PORT=str(port)), f"port {port}", "fail")
    assert f"HTTP_PORT={port} asks for it" in detail
    assert remedy.startswith(f"ss -ltnp 'sport = :{port}'")


def test_a_metrics_port_that_is_taken(pipeline: Pipeline) -> None:
    """By another program: a warning, since every daemon goes on; by a producer's /metrics: ours."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = str(stranger.getsockname()[1])
        detail, remedy = only(look(pipeline, "--offline", METRICS_PORT=taken), f"port {taken}", "warn")
    assert detail.endswith("on the daemon's own port alone") and "METRICS_PORT names another port, or off" in remedy
    ours = str(free_port())
    with pipeline.producer(METRICS_PORT=ours) as producer:
        producer.wait_for("producer reads")
        assert look(pipeline, "--offline", METRICS_PORT=ours)[f"port {ours}"][:2] == ("ok", "a daemon of ours listens there")


def test_the_clock_is_off(pipeline: Pipeline) -> None:
    """Two hours ahead of the server of Redis."""
    need(bool(faketime()), "faketime")
    detail, _ = only(doctor(pipeline, "--offline", code=1, **faketime("+2h")), "clock redis", "fail")
    assert "s ahead of it" in detail


def test_the_disk(pipeline: Pipeline) -> None:
    """A full one, then one that is mounted read-only."""
    place = pipeline.tmp / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode != 0:
        pytest.skip("mounting a file system takes root")
    env = {"DATA_DIR": str(place / "data"), "RAW_ARCHIVE": "off"}
    try:
        detail, remedy = only(look(pipeline, "--offline", code=1, **env), "disk data", "fail")
        assert (detail[:11], remedy[:9]) == ("0.0 GB free", "make room")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        detail, _ = only(look(pipeline, "--offline", code=1, **env), "disk data", "fail")
        assert detail == f"{place}/data cannot be written"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_daemons_markers_archive_and_letters(pipeline: Pipeline) -> None:
    """A worker that was killed, letters at DLQ_MAX, an archive that is away, a Redis that forgot: none hides another."""
    pipeline.deliver("one", "permanent")
    with pipeline.producer(), pipeline.worker():
        pipeline.wait_until_settled()
    dead = {"role": "worker", "name": "w", "address": "", "version": "0", "host": "vm", "pid": 17, "started": ""}
    pipeline.client.hset(KEYS.daemons, "w", f"{(int(pipeline.client.time()[0]) - 100) * 1000}|{json.dumps(dead)}")
    found = look(pipeline, code=1, DLQ_MAX="1", RAW_ARCHIVE=f"file:{pipeline.tmp}/nowhere")
    assert {check: status for check, (status, *_) in wrong(found).items()} == {
        "daemons": "warn",
        "dead letters": "fail",
        "archive": "fail",
    }
    assert "silent: w on vm" in found["daemons"][1]
    pipeline.client.flushall()
    assert "Redis knows nothing of it" in only(look(pipeline), f"marker {pipeline.account}/INBOX", "warn")[0]
    marker = next((pipeline.tmp / "data" / "markers").rglob("*.json"))
    marker.write_text("{")
    assert "is damaged" in only(look(pipeline, code=1), f"marker {pipeline.account}/INBOX", "fail")[0]


def test_settings_accounts_and_handlers(pipeline: Pipeline) -> None:
    """What keeps a daemon from starting is exit code 2, as theirs is; a name that is no setting is a warning."""
    found = doctor(pipeline, code=2, POLL_INTERVAL="soon")
    assert found["settings"][:2] == ("fail", found["settings"][1])
    assert found["settings"][1].startswith("POLL_INTERVAL=soon: ")
    assert only(look(pipeline, "--offline", code=2, ACCOUNTS_FILE="none.toml"), "accounts", "fail")[1] == "edit none.toml"
    assert "none.py" in only(look(pipeline, "--offline", code=2, WORKER_HANDLER="none.py:handle"), "handlers", "fail")[0]
    (pipeline.tmp / ".env").write_text("REDIS_ULR=redis://x\n")
    (pipeline.tmp / ".env").chmod(0o600)
    assert only(look(pipeline, "--offline"), "settings", "warn")[1] == "did you mean REDIS_URL? Rename it in .env"


def test_on_a_terminal(pipeline: Pipeline) -> None:
    """A line a check, the remedy below it, coloured; piped, the same without colours."""
    token_file(pipeline).chmod(0o644)
    env: dict[str, Any] = {"PATH": os.environ["PATH"], "HOME": str(pipeline.tmp), **pipeline.env}
    command = [sys.executable, str(ROOT / "scripts/doctor.py"), "--offline"]
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as screen:  # noqa: PTH123  # a handle
        with subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=env, cwd=pipeline.tmp) as process:
            os.close(theirs)
            shown = b""
            while part := read(screen.fileno()):
                shown += part
        assert process.returncode == 1
    piped = subprocess.run(command, capture_output=True, env=env, cwd=pipeline.tmp, text=True, timeout=DEADLINE)
    assert b"\x1b[31mfail\x1b[0m  token " in shown
    assert "\x1b" not in piped.stdout
    assert f"→ chmod 600 tokens/{pipeline.account}.json\n" in piped.stdout
    assert piped.stdout.splitlines()[-1].endswith(" 1 failed")


def read(handle: int) -> bytes:
    """What a terminal shows; b"" at its end."""
    try:
        return os.read(handle, 65_536)
    except OSError:
        return b""
