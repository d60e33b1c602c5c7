"""What a real Gmail refuses, ends and hides, as the sandbox does it: seen through IMAPClient and HTTP."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

import pytest
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError, LoginError

from src.common.clock import Clock
from src.sandbox.server import Sandbox
from src.sandbox.tokens import JWT_BEARER
from tests.support.wait import until

ME = "me@gmail.example"
LETTER = b"Subject: hello\r\n\r\nhi\r\n"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        running.set_password(ME, "abcd efgh")
        yield running


def client_of(sandbox: Sandbox) -> IMAPClient:
    return IMAPClient("127.0.0.1", sandbox.imap_port, ssl=False, timeout=10)


def logged_in(sandbox: Sandbox) -> IMAPClient:
    client = client_of(sandbox)
    client.login(ME, "abcd efgh")
    return client


@pytest.mark.parametrize("way", ["login", "plain_login"])
def test_a_password_opens_the_account_that_was_given_it(sandbox: Sandbox, way: str) -> None:
    """Right, wrong, and none at all; each try is counted."""
    client = client_of(sandbox)
    assert client.has_capability("AUTH=PLAIN")
    with pytest.raises(LoginError, match="Invalid credentials"):
        getattr(client, way)(ME, "wrong")
    with pytest.raises(LoginError, match="Application-specific password required"):
        getattr(client, way)("other@gmail.example", "abcd efgh")
    getattr(client, way)(ME, "abcd efgh")
    assert client.select_folder("INBOX", readonly=True)[b"EXISTS"] == 0
    assert (sandbox.attempts(ME), sandbox.attempts("other@gmail.example")) == (2, 1)
    client.logout()


def test_the_sixteenth_connection_of_an_account_is_refused() -> None:
    """The limit is on sessions that are open: one that ends makes room."""
    with Sandbox(connection_limit=2) as sandbox:
        sandbox.set_password(ME, "abcd efgh")
        first, second = logged_in(sandbox), logged_in(sandbox)
        third = client_of(sandbox)
        with pytest.raises(LoginError, match=r"\[ALERT\] Too many simultaneous connections"):
            third.login(ME, "abcd efgh")
        first.logout()

        def admitted() -> bool:
            try:
                third.login(ME, "abcd efgh")
            except LoginError:
                return False
            return True

        until(admitted, 10, "there is room again")
        second.logout()
        third.logout()


def test_a_session_ends_with_its_token() -> None:
    """At the next command, and while it idles: BYE with Gmail's words. A password's session does not end."""
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    with Sandbox(token_lifetime=100, clock=Clock(wall=lambda: now[0], monotonic=lambda: 0.0)) as sandbox:
        sandbox.set_password(ME, "abcd efgh")

        def by_token() -> IMAPClient:
            form = {"grant_type": "refresh_token", "refresh_token": sandbox.tokens.refresh_token(ME)}
            form |= {"client_id": sandbox.client_id, "client_secret": sandbox.client_secret}
            token = sandbox.tokens.grant(form).body["access_token"]
            client = client_of(sandbox)
            client.sasl_login("XOAUTH2", lambda challenge: f"user={ME}\x01auth=Bearer {token}\x01\x01")
            client.select_folder("INBOX", readonly=True)
            return client

        asking, idling, lasting = by_token(), by_token(), logged_in(sandbox)
        idling.idle()
        now[0] += timedelta(seconds=99)
        asking.noop()
        now[0] += timedelta(seconds=2)
        with pytest.raises(IMAPClientError, match="Session expired, please login again"):
            asking.search("ALL")
        assert idling.idle_check(timeout=10) == [(b"BYE", b"Session", b"expired,", b"please", b"login", b"again.")]
        lasting.noop()
        lasting.logout()


def test_answer_no_strikes_the_command_it_names(sandbox: Sandbox) -> None:
    """FETCH is answered NO as often as ordered, UID or not; other commands go on."""
    sandbox.deliver(ME, LETTER)
    client = logged_in(sandbox)
    client.select_folder("INBOX", readonly=True)
    sandbox.faults.answer_no(times=2)
    assert client.search("ALL") == [1]
    for _ in range(2):
        with pytest.raises(IMAPClientError, match=r"\[OVERQUOTA\] Account exceeded"):
            client.fetch([1], ["FLAGS"])
    assert client.fetch([1], ["RFC822.SIZE"])[1][b"RFC822.SIZE"] == len(LETTER)
    sandbox.faults.answer_no("[THROTTLED] Slow down", command="search")
    with pytest.raises(IMAPClientError, match=r"\[THROTTLED\]"):
        client.search("ALL")
    client.logout()


def test_half_open_says_nothing_and_stays(sandbox: Sandbox) -> None:
    """The command is never answered, the connection not closed; a new connection works."""
    client = logged_in(sandbox)
    sandbox.faults.half_open()
    client.socket().settimeout(0.3)
    with pytest.raises(socket.timeout):
        client.noop()
    logged_in(sandbox).logout()
    assert not sandbox.faults.state()
    client.shutdown()


def test_a_half_open_session_ends_with_its_client(sandbox: Sandbox) -> None:
    """Sessions whose client gave up no longer count among those that an account may have: 15."""
    for _ in range(45):
        client = logged_in(sandbox)
        sandbox.faults.half_open()
        client.socket().sendall(b"x NOOP\r\n")
        until(lambda: not sandbox.faults.state(), 10, "the fault strikes")
        client.shutdown()
    logged_in(sandbox).logout()


def test_half_open_while_idling(sandbox: Sandbox) -> None:
    """Neither news nor the end of IDLE are heard any more."""
    client = logged_in(sandbox)
    client.select_folder("INBOX", readonly=True)
    client.idle()
    sandbox.faults.half_open()
    sandbox.deliver(ME, LETTER)
    until(lambda: not sandbox.faults.state(), 10, "the fault strikes")
    assert client.idle_check(timeout=0.3) == []
    client.socket().settimeout(0.3)
    with pytest.raises(socket.timeout):
        client.idle_done()
    client.shutdown()


def test_a_renamed_folder_keeps_its_use_and_its_mail(sandbox: Sandbox) -> None:
    """An account in another language: \\All has another name, and new mail still comes into it."""
    sandbox.deliver(ME, LETTER)
    sandbox.rename(ME, "[Gmail]/All Mail", "[Gmail]/Tous les messages")
    sandbox.deliver(ME, LETTER)
    client = logged_in(sandbox)
    uses = {name: flags for flags, _, name in client.list_folders()}
    assert b"\\All" in uses["[Gmail]/Tous les messages"]
    assert client.select_folder("[Gmail]/Tous les messages", readonly=True)[b"EXISTS"] == 2
    sandbox.rename(ME, "[Gmail]/Tous les messages", "[Gmail]/Alle Nachrichten")
    with pytest.raises(IMAPClientError):
        client.fetch([1], ["FLAGS"])
    client.shutdown()


def test_a_hidden_folder_is_neither_listed_nor_opened(sandbox: Sandbox) -> None:
    """Gmail's "Show in IMAP", off and on again; also over HTTP."""
    sandbox.hide(ME, "[Gmail]/All Mail")
    client = logged_in(sandbox)
    assert "[Gmail]/All Mail" not in {name for _, _, name in client.list_folders()}
    with pytest.raises(IMAPClientError, match="NONEXISTENT"):
        client.select_folder("[Gmail]/All Mail", readonly=True)
    body = json.dumps({"account": ME, "mailbox": "[Gmail]/All Mail", "shown": True}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{sandbox.http_port}/hide", body, timeout=10) as answer:
        assert json.load(answer) == {"hidden": False}
    client.select_folder("[Gmail]/All Mail", readonly=True)
    client.logout()


def test_a_service_account_reads_what_it_was_delegated(sandbox: Sandbox, tmp_path: Path) -> None:
    """An assertion that is not its own is a bad signature; the key file is for its owner alone. (What works: test_service_account.)"""
    sandbox.write_service_account_key(tmp_path / "key.json", ME)
    assert (tmp_path / "key.json").stat().st_mode & 0o777 == 0o600
    form = urlencode({"grant_type": JWT_BEARER, "assertion": "not.a.jwt"}).encode()
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(sandbox.token_uri, form, timeout=10)
    assert json.load(error.value)["error_description"] == "Invalid JWT Signature."
