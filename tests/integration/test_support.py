"""The servers, the proxy and the daemons that other tests stand on do what they say."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest
import redis
from imapclient import IMAPClient  # type: ignore[import-untyped]
from imapclient.exceptions import LoginError  # type: ignore[import-untyped]
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.daemons import ROOT, Daemon
from tests.support.proxy import FaultProxy, wait_for_connections
from tests.support.servers import Dovecot, RedisServer, have_redis, need
from tests.support.wait import until

MAIL = b"From: a@example.org\r\nSubject: %d\r\n\r\nhello\r\n"


def state(pid: int) -> str:
    """The process state as ps writes it ("T": stopped, "Z": zombie), "" for no process."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()


def alive(pid: int) -> bool:
    return state(pid)[:1] not in ("", "Z")


def refused(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("binary", ["valkey", "redis"])
def test_redis_server_keeps_data_and_port_over_kill9_and_ends_with_its_context(binary: Literal["valkey", "redis"]) -> None:
    if binary == "redis":
        need(have_redis(), "redis-server")
    with RedisServer(binary, appendonly=True) as server:
        server.client().set("a", "1")
        server.kill9()
        with pytest.raises(redis.ConnectionError):
            server.client().ping()
        server.start()
        assert redis.Redis.from_url(server.tcp_url, protocol=2, decode_responses=True).get("a") == "1"
        server.stop()
        server.start()
        assert server.client().get("a") == "1"
        pid = server.pid
    assert not alive(pid)
    assert not server.socket_path.parent.exists()


def test_shared_database_is_empty_for_each_test(valkey: RedisServer) -> None:
    assert valkey.client().dbsize() == 0
    valkey.client().set("left", "behind")


def test_shared_database_is_empty_for_each_test_again(valkey: RedisServer) -> None:
    assert valkey.client().dbsize() == 0
    valkey.client().set("left", "behind")


def test_child_processes_end_when_pytest_is_killed(tmp_path: Path) -> None:
    """A server outlives neither a SIGKILL of the process that started it nor its group."""
    script = """
import sys
from tests.support.servers import RedisServer
server = RedisServer("valkey")
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env)
    assert parent.stdin is not None and parent.stdout is not None
    with parent.stdin, parent.stdout:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        until(lambda: not alive(pid), what="the server has ended")


def test_dovecot_gives_uids_in_order_of_delivery_and_keeps_internal_dates(dovecot: Dovecot) -> None:
    dates = [datetime(2024, 5, day, 12, 30, tzinfo=UTC) for day in (3, 1, 2)]
    for number, date in enumerate(dates):
        dovecot.deliver("order@example.org", MAIL % number, internal_date=date)
    with IMAPClient("127.0.0.1", dovecot.imap_port, ssl=False) as client:
        client.normalise_times = False
        client.login("order@example.org", dovecot.PASSWORD)
        client.select_folder("INBOX", readonly=True)
        mails = client.fetch([1, 2, 3], ["INTERNALDATE", "BODY.PEEK[]"])
    assert [mails[uid][b"BODY[]"] for uid in (1, 2, 3)] == [MAIL % 0, MAIL % 1, MAIL % 2]
    assert [mails[uid][b"INTERNALDATE"] for uid in (1, 2, 3)] == dates


def test_dovecot_delivery_wakes_up_idle(dovecot: Dovecot) -> None:
    dovecot.deliver("idle@example.org", MAIL % 0)
    with IMAPClient("127.0.0.1", dovecot.imap_port, ssl=False) as client:
        client.login("idle@example.org", dovecot.PASSWORD)
        client.select_folder("INBOX", readonly=True)
        client.idle()
        dovecot.deliver("idle@example.org", MAIL % 1)
        assert (2, b"EXISTS") in client.idle_check(timeout=20)
        client.idle_done()


def test_dovecot_delivers_to_a_folder_that_did_not_exist(dovecot: Dovecot) -> None:
    dovecot.deliver("folder@example.org", MAIL % 0, mailbox="Work/Grüße")
    with IMAPClient("127.0.0.1", dovecot.imap_port, ssl=False) as client:
        client.login("folder@example.org", dovecot.PASSWORD)
        assert client.select_folder("Work/Grüße", readonly=True)[b"EXISTS"] == 1


def test_dovecot_changes_uidvalidity_and_counts_uids_from_one() -> None:
    with Dovecot() as server:
        for number in range(3):
            server.deliver("a@example.org", MAIL % number)
        with server.login("a@example.org") as session:
            session.select("INBOX")
            session.uid("STORE", "1", "+FLAGS", r"(\Deleted)")
            session.expunge()
        before = server.uidvalidity("a@example.org")
        after = server.change_uidvalidity("a@example.org")
        assert after != before
        assert server.uidvalidity("a@example.org") == after
        with server.login("a@example.org") as session:
            session.select("INBOX", readonly=True)
            assert session.uid("SEARCH", "ALL")[1] == [b"1 2"]
            assert session.uid("FETCH", "1", "BODY.PEEK[]")[1][0][1] == MAIL % 1


def test_dovecot_takes_a_token_over_tls_and_refuses_an_expired_one(tmp_path: Path) -> None:
    with Dovecot() as server:
        token = access_token(server, tmp_path, "token@example.org")
        with IMAPClient("localhost", server.imaps_port, ssl_context=trusting(server)) as client:
            client.oauth2_login("token@example.org", token)
            assert client.select_folder("INBOX", readonly=True)[b"EXISTS"] == 0
        server.tokens.expire_tokens()
        server.kill9()
        server.start()
        with IMAPClient("127.0.0.1", server.imap_port, ssl=False) as client, pytest.raises(LoginError):
            client.oauth2_login("token@example.org", token)


def test_proxy_cuts_refuses_and_listens_again(valkey: RedisServer) -> None:
    with FaultProxy(valkey.socket_path) as proxy:
        client = client_through(proxy)
        assert client.ping()
        proxy.refuse(True)
        assert client.ping()
        proxy.cut()
        assert proxy.connections == 0
        assert refused(proxy.port)
        with pytest.raises(redis.ConnectionError):
            client.ping()
        proxy.refuse(False)
        assert client.ping()
    assert refused(proxy.port)


def test_proxy_loses_a_reply_after_the_server_has_done_the_work(valkey: RedisServer) -> None:
    with FaultProxy(valkey.port) as proxy:
        client = client_through(proxy)
        client.ping()
        proxy.cut_after(0, "to_client")
        with pytest.raises(redis.ConnectionError):
            client.incr("n")
        assert not proxy.cut_is_pending("to_client")
        assert valkey.client().get("n") == "1"
        assert client.incr("n") == 2


def test_proxy_passes_exactly_the_bytes_it_was_told(valkey: RedisServer) -> None:
    with FaultProxy(valkey.port) as proxy, closing(socket.create_connection(("127.0.0.1", proxy.port))) as raw:
        proxy.cut_after(3, "to_client")
        raw.sendall(b"PING\r\n")
        with raw.makefile("rb") as answer:
            assert answer.read() == b"+PO"
        wait_for_connections(proxy, 0)


def test_proxy_stalls_and_lets_go(valkey: RedisServer) -> None:
    with FaultProxy(valkey.port) as proxy:
        client = client_through(proxy, socket_timeout=0.2)
        client.ping()
        proxy.stall(True)
        with pytest.raises(redis.TimeoutError):
            client.incr("n")
        assert valkey.client().get("n") is None
        proxy.stall(False)
        until(lambda: valkey.client().get("n"), what="the request that was held back has arrived")


def test_proxy_delays_every_answer(valkey: RedisServer) -> None:
    with FaultProxy(valkey.port) as proxy:
        client = client_through(proxy, socket_timeout=0.05)
        client.ping()
        proxy.delay(500)
        with pytest.raises(redis.TimeoutError):
            client.ping()
        proxy.delay(0)
        assert client.ping()


def test_a_missing_server_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="redis-server"):
        need(False, "redis-server")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="redis-server"):
        need(False, "redis-server")


DAEMON = """
import os, signal, sys, threading
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print("up", os.getcwd(), sorted(name for name in os.environ if not name.startswith("COVERAGE_")), sys.argv[1:])
stop.wait()
print("down")
sys.exit(3)
"""


def test_daemon_runs_in_a_clean_environment_and_hands_back_its_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "daemon.py"
    script.write_text(DAEMON)
    with Daemon(str(script), "--once", env={"REDIS_URL": "unset"}, tmp=tmp_path) as daemon:
        environment = "'HOME', 'LANG', 'METRICS_PORT', 'PATH', 'PYTHONUNBUFFERED', 'REDIS_URL'"
        daemon.wait_for(re.escape(f"up {tmp_path} [{environment}] ['--once']"))
        assert daemon.terminate() == 3
        assert daemon.output().endswith("down\n")
    with Daemon(str(script), env={}, tmp=tmp_path) as second:
        second.wait_for("up")
        assert "--once" not in second.output()
        second.kill9()
        assert second.exit_code() == -signal.SIGKILL


def test_daemon_that_ended_without_the_awaited_line_fails_at_once_with_its_output(tmp_path: Path) -> None:
    script = tmp_path / "daemon.py"
    script.write_text("print('no such setting')")
    with pytest.raises(AssertionError, match="no such setting"), Daemon(str(script), env={}, tmp=tmp_path) as daemon:
        daemon.wait_for("ready", timeout=60)


def test_frozen_daemon_ends_with_its_context(tmp_path: Path) -> None:
    script = tmp_path / "daemon.py"
    script.write_text(DAEMON)
    with Daemon(str(script), env={}, tmp=tmp_path) as daemon:
        daemon.wait_for("up")
        daemon.freeze()
        daemon.send(signal.SIGTERM)
        until(lambda: state(daemon.pid).startswith("T"), what="the daemon is stopped")
        daemon.thaw()
        assert daemon.exit_code() == 3
    with Daemon(str(script), env={}, tmp=tmp_path) as daemon:
        daemon.wait_for("up")
        daemon.freeze()
    assert not alive(daemon.pid)


def client_through(proxy: FaultProxy, socket_timeout: float = 10) -> redis.Redis:
    return redis.Redis(port=proxy.port, protocol=2, socket_timeout=socket_timeout, retry=Retry(NoBackoff(), 0))


def trusting(server: Dovecot) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(server.ca_file))


def access_token(server: Dovecot, tmp_path: Path, account: str) -> str:
    """What a client gets for the refresh token in its token file."""
    token_file = tmp_path / "token.json"
    server.tokens.write_token_file(token_file, account)
    fields = json.loads(token_file.read_text())
    form = {"grant_type": "refresh_token"} | {name: fields[name] for name in ("client_id", "client_secret", "refresh_token")}
    with urllib.request.urlopen(fields["token_uri"], urllib.parse.urlencode(form).encode(), timeout=10) as answer:
        return str(json.load(answer)["access_token"])
