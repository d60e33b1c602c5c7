"""How ImapMailbox reaches a server and logs in: refusals, lost connections, passwords, TLS, against scripted servers."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from src.common.exceptions import ConfigurationError, ImapThrottled, ImapUnavailable, LoginRefused, MailboxMissing, ReauthRequired
from src.imap.connection import ImapEndpoint, throttled, xoauth2
from src.imap.imap_client import Folder, ImapMailbox
from tests.support.scripted_imap import (
    ACCOUNT,
    CHALLENGE,
    CUT,
    HOLD,
    OK,
    PLAIN,
    TOKEN,
    Looks,
    Reply,
    Server,
    idle_then,
    mailbox,
    refuse,
    serving,
)
from tests.support.wait import until

# Entering and leaving


def test_entering_logs_in_examines_and_shows_the_folder() -> None:
    with serving() as server:
        with mailbox(server) as box:
            assert box.folder == Folder("INBOX", uidvalidity=77, exists=3, gmail=True)
        assert (
            base64.b64decode(server.heard[2]).decode()
            == f"user={ACCOUNT}\x01auth=Bearer {TOKEN}\x01\x01"
            == xoauth2(ACCOUNT, TOKEN)
        )
        assert server.commands() == ["CAPABILITY", "AUTHENTICATE XOAUTH2", 'EXAMINE "INBOX"', "LOGOUT"]


def test_a_server_without_x_gm_ext_1_is_not_gmail() -> None:
    with serving(capabilities=PLAIN) as server, mailbox(server) as box:
        assert not box.folder.gmail


def test_a_server_that_says_no_uidnext_is_taken() -> None:
    with serving({"EXAMINE": b"* 0 EXISTS\r\n* OK [UIDVALIDITY 1] ok\r\nTAG OK done\r\n"}) as server, mailbox(server) as box:
        assert box.folder == Folder("INBOX", uidvalidity=1, exists=0, gmail=True)


def test_a_mailbox_name_travels_in_modified_utf7_and_cannot_smuggle_a_command() -> None:
    with serving() as server:
        with mailbox(server, 'Entwürfe & "x"\r\nA1 DELETE INBOX'):
            pass
        examine = next(command for command in server.commands() if command.startswith("EXAMINE"))
        assert examine.startswith('EXAMINE "Entw&APw-rfe &- \\"x\\"&')
        assert not [command for command in server.commands() if command.startswith("DELETE")]


def test_the_socket_sends_at_once_and_notices_a_dead_peer() -> None:
    with serving() as server, mailbox(server) as box:
        connection = box._client.socket()
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0


def test_a_refused_login_tells_code_and_challenge_and_not_the_token() -> None:
    verdict = b"NO [AUTHENTICATIONFAILED] Invalid credentials (Failure)"
    with serving({"AUTHENTICATE": refuse(json.dumps(CHALLENGE).encode(), verdict)}) as server:
        with pytest.raises(LoginRefused) as caught, mailbox(server):
            pass
        assert str(caught.value) == (
            "[AUTHENTICATIONFAILED] Invalid credentials (Failure) status=400 schemes=Bearer scope=https://mail.google.com/"
        )
        assert until(server.closed.is_set)


def test_a_server_that_echoes_the_token_does_not_get_it_into_the_error() -> None:
    echo = base64.b64encode(xoauth2(ACCOUNT, TOKEN).encode())
    with serving({"AUTHENTICATE": refuse(b"?", b"NO bad token " + TOKEN.encode() + b" in " + echo)}) as server:
        with pytest.raises(LoginRefused) as caught, mailbox(server):
            pass
        assert str(caught.value) == "bad token *** in *** ?"


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [
        (b"NO [ALERT] Too many simultaneous connections. (Failure)", "CONNECTIONS"),
        (b"NO [UNAVAILABLE] Temporary authentication failure", ""),
        (b"NO [OVERQUOTA] Account exceeded command or bandwidth limits. (Failure)", "OVERQUOTA"),
        (b"NO [THROTTLED] slow down", "THROTTLED"),
        (b"NO [LIMIT] Maximum number of connections from user+IP exceeded", "CONNECTIONS"),
    ],
)
def test_a_login_refused_for_limits_is_no_verdict_on_the_token(verdict: bytes, kind: str) -> None:
    """Each request for a long pause is told apart; the rest is an outage like any other."""
    with serving({"AUTHENTICATE": refuse(b"", verdict)}) as server:
        with pytest.raises((ImapUnavailable, ImapThrottled)) as caught, mailbox(server):
            pass
        assert getattr(caught.value, "kind", "") == kind
        assert verdict.decode().removeprefix("NO ") in str(caught.value)
        assert throttled(str(caught.value))


@pytest.mark.parametrize(
    "reply",
    [b"+ \r\n" + CUT, CUT, b"* BYE gone\r\n" + CUT, b"+ %%%\r\n", b"\xff\xfe\r\n", b"+ a\r\n"],
    ids=["cut before the answer", "cut", "bye", "challenge is no base64", "garbage", "broken base64"],
)
def test_a_connection_lost_during_login_is_not_a_refused_login(reply: bytes) -> None:
    with serving({"AUTHENTICATE": reply}) as server, pytest.raises(ImapUnavailable), mailbox(server):
        pass


@pytest.mark.parametrize(
    "greeting",
    [b"* BYE too busy\r\n", b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"* OK hi\r\n* BYE\r\n", b"\xff\x00\r\n", b"x" * 9],
)
def test_whatever_else_greets_is_unavailable(greeting: bytes) -> None:
    with serving({"GREETING": greeting + CUT}) as server, pytest.raises(ImapUnavailable, match=r"127\.0\.0\.1"), mailbox(server):
        pass


def test_a_missing_mailbox_is_told_by_name() -> None:
    with serving({"EXAMINE": b"TAG NO [NONEXISTENT] Unknown Mailbox: Nope (Failure)\r\n"}) as server:
        with pytest.raises(MailboxMissing, match=r"'Nope': \[NONEXISTENT\] Unknown Mailbox"), mailbox(server, "Nope"):
            pass
        assert until(server.closed.is_set)


@pytest.mark.parametrize(
    "examine",
    [
        b"TAG NO [UNAVAILABLE] backend error\r\n",
        b"TAG BAD what\r\n",
        b"* 3 EXISTS\r\nTAG OK no uidvalidity\r\n",
        b"* OK [UIDVALIDITY x] ?\r\n* 3 EXISTS\r\nTAG OK\r\n",
        b"* BYE\r\n" + CUT,
    ],
)
def test_an_examine_without_a_clear_answer_is_unavailable(examine: bytes) -> None:
    with serving({"EXAMINE": examine}) as server, pytest.raises(ImapUnavailable), mailbox(server):
        pass


def test_nobody_listening_is_unavailable() -> None:
    with serving() as server:
        pass
    with pytest.raises(ImapUnavailable, match="refused"), mailbox(server):
        pass


def test_a_server_that_stalls_is_unavailable_after_the_time_out() -> None:
    with serving({"GREETING": HOLD}) as server, pytest.raises(ImapUnavailable, match="timed out"), mailbox(server, timeout=0.2):
        pass


def test_leaving_never_raises_and_closes_the_connection() -> None:
    with serving({"LOGOUT": CUT}) as server:
        with mailbox(server):
            pass
        assert until(server.closed.is_set)


def test_leaving_passes_on_what_happened_inside() -> None:
    with serving() as server, pytest.raises(ZeroDivisionError), mailbox(server):
        raise ZeroDivisionError


def test_a_token_never_travels_in_the_clear_to_another_machine() -> None:
    with pytest.raises(ConfigurationError, match="in the clear"):
        ImapEndpoint("imap.gmail.com", 143, "none", 10.0, None)
    with pytest.raises(ConfigurationError, match="tls or none"):
        ImapEndpoint("127.0.0.1", 143, "ssl", 10.0, None)


# passwords


def by_password(server: Server, password: str, account: str = ACCOUNT) -> ImapMailbox:
    return ImapMailbox(ImapEndpoint("127.0.0.1", server.port, "none", 10.0, None, "password"), account, "INBOX", password)


def plain(server: Server) -> bytes:
    """AUTHENTICATE PLAIN, answered as XOAUTH2 is."""
    server.push(b"+ \r\n")
    server.line()
    return b"TAG OK welcome\r\n"


def test_a_password_goes_by_plain_where_it_is_offered() -> None:
    """Any characters reach the server, as UTF-8 (RFC 4616)."""
    capabilities = b"IMAP4rev1 AUTH=PLAIN LOGINDISABLED"
    with serving({"AUTHENTICATE PLAIN": plain}, capabilities=capabilities) as server, by_password(server, "pä ss\\wörd"):
        said = server.heard[server.heard.index(next(line for line in server.heard if "AUTHENTICATE PLAIN" in line)) + 1]
    assert base64.b64decode(said).decode() == f"\0{ACCOUNT}\0pä ss\\wörd"


def test_a_password_goes_by_login_elsewhere() -> None:
    """Quoted as RFC 3501 wants it."""
    with serving({"LOGIN": OK}, capabilities=b"IMAP4rev1") as server, by_password(server, 'pa"ss\\word'):
        assert f'LOGIN {ACCOUNT} "pa\\"ss\\\\word"' in server.commands()


@pytest.mark.parametrize(
    ("capabilities", "password", "told"),
    [(b"IMAP4rev1 LOGINDISABLED", "x", "LOGINDISABLED"), (b"IMAP4rev1", "pässword", "cannot carry a password")],
)
def test_no_way_to_log_in_with_a_password(capabilities: bytes, password: str, told: str) -> None:
    """Nothing is sent, and it is no network error that would be repeated for ever."""
    with serving({}, capabilities=capabilities) as server:
        with pytest.raises(ConfigurationError, match=told), by_password(server, password):
            pass
        assert not [command for command in server.commands() if command.startswith(("LOGIN", "AUTHENTICATE"))]


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        ("[AUTHENTICATIONFAILED] Invalid credentials (Failure)", LoginRefused, "AUTHENTICATIONFAILED"),
        ("[ALERT] Application-specific password required (Failure)", LoginRefused, "Application-specific"),
        ("[ALERT] Too many simultaneous connections. (Failure)", ImapThrottled, "Too many"),
        ("[UNAVAILABLE] Temporary authentication failure.", ImapUnavailable, "UNAVAILABLE"),
        ("[ALERT] IMAP access is disabled for your domain. (Failure)", ReauthRequired, f"switched off for {ACCOUNT}"),
        ("[ALERT] Your account is not enabled for IMAP use. (Failure)", ReauthRequired, "section 1"),
    ],
)
@pytest.mark.parametrize("command", ["LOGIN", "AUTHENTICATE PLAIN"])
def test_a_refused_password_by_the_servers_words(command: str, answer: str, error: type[Exception], told: str) -> None:
    """Refused, not now, and never are told apart; the password is in no text."""

    def refuse(server: Server) -> bytes:
        if command != "LOGIN":
            plain(server)
        return f"TAG NO {answer}\r\n".encode()

    capabilities = b"IMAP4rev1" + (b"" if command == "LOGIN" else b" AUTH=PLAIN")
    with serving({command: refuse}, capabilities=capabilities) as server:
        with pytest.raises(error, match=re.escape(told)) as caught, by_password(server, "hunter2"):
            pass
        assert "hunter2" not in str(caught.value)
        assert len([line for line in server.commands() if line.startswith(("LOGIN ", "AUTHENTICATE"))]) == 1


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("tls")
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    argv += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    argv += ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run(argv, check=True, capture_output=True)
    return directory / "cert.pem", directory / "key.pem"


@pytest.fixture
def server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def secure(server: Server, ca_file: Path | None, host: str = "localhost") -> ImapMailbox:
    return ImapMailbox(ImapEndpoint(host, server.port, "tls", 10.0, str(ca_file) if ca_file else None), ACCOUNT, "INBOX", TOKEN)


def test_tls_is_verified_and_works_through_idle(server_context: ssl.SSLContext, certificate: tuple[Path, Path]) -> None:
    looks = Looks()
    replies: dict[str, Reply] = {"IDLE": idle_then(b"+ idling\r\n", b"* 4 EXISTS\r\n"), "UID SEARCH": b"* SEARCH 1\r\n" + OK}
    with serving(replies, context=server_context) as server, secure(server, certificate[0]) as box:
        assert box.wait(600, looks)
        assert box.uids_from(1) == [1]
    assert not looks.patience_is_over()


def test_half_a_tls_record_is_not_the_end_of_the_connection(
    server_context: ssl.SSLContext, certificate: tuple[Path, Path]
) -> None:
    """The first half makes the socket readable and holds no line; the second is sent once the client has looked at it."""
    split, looks = threading.Event(), threading.Semaphore(0)

    def stop() -> bool:
        looks.release()
        return False

    def idle(server: Server) -> bytes:
        server.push(b"+ idling\r\n")
        assert looks.acquire(timeout=20)
        split.set()
        server.push(b"* 4 EXISTS\r\n")
        assert server.line() == "DONE"
        return OK

    def relay(source: socket.socket, target: socket.socket, *, splitting: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if splitting and split.is_set():
                    split.clear()
                    target.sendall(data[:10])
                    for _ in range(2):
                        assert looks.acquire(timeout=20)
                    data = data[10:]
                target.sendall(data)

    with (
        serving({"IDLE": idle}, context=server_context) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(("127.0.0.1", server.port)) as there,
    ):
        endpoint = ImapEndpoint("localhost", listener.getsockname()[1], "tls", 10.0, str(certificate[0]))

        def meet() -> None:
            here, _ = listener.accept()
            with here:
                threading.Thread(target=relay, args=(here, there), kwargs={"splitting": False}, daemon=True).start()
                relay(there, here, splitting=True)

        threading.Thread(target=meet, daemon=True).start()
        with ImapMailbox(endpoint, ACCOUNT, "INBOX", TOKEN) as box:
            assert box.wait(60, stop)


def test_two_lines_in_one_tls_record_are_both_noticed(server_context: ssl.SSLContext, certificate: tuple[Path, Path]) -> None:
    looks = Looks()
    idle = idle_then(b"+ idling\r\n* OK Still here\r\n* 4 EXISTS\r\n")
    with serving({"IDLE": idle}, context=server_context) as server, secure(server, certificate[0]) as box:
        assert box.wait(600, looks)
    assert not looks.patience_is_over()


def test_a_tls_connection_lost_in_idle_is_noticed_at_once(server_context: ssl.SSLContext, certificate: tuple[Path, Path]) -> None:
    looks = Looks()
    with (
        serving({"IDLE": b"+ idling\r\n" + CUT}, context=server_context) as server,
        secure(server, certificate[0]) as box,
        pytest.raises(ImapUnavailable),
    ):
        box.wait(600, looks)
    assert not looks.patience_is_over()


def test_an_unknown_authority_gets_no_token(server_context: ssl.SSLContext) -> None:
    with serving(context=server_context) as server:
        with pytest.raises(ConfigurationError, match=r"is not trusted \(self-signed.*IMAP_CA_FILE"), secure(server, None):
            pass
        assert server.heard == []


def test_a_certificate_for_another_name_gets_no_token(server_context: ssl.SSLContext, certificate: tuple[Path, Path]) -> None:
    with serving(context=server_context) as server:
        with (
            pytest.raises(ConfigurationError, match=r"is not trusted \(IP address mismatch"),
            secure(server, certificate[0], "127.0.0.1"),
        ):
            pass
        assert server.heard == []


def test_an_unusable_ca_file_is_a_wrong_setting(tmp_path: Path) -> None:
    with serving() as server, pytest.raises(ConfigurationError, match="CA file"), secure(server, tmp_path / "none.pem"):
        pass
