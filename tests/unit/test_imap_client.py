"""ImapMailbox against scripted servers on 127.0.0.1 that say, cut and hold back exactly what each test needs."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import TypeAlias

import pytest

from src.auth.oauth2_gmail import TokenSource
from src.common.exceptions import ConfigurationError, ImapThrottled, ImapUnavailable, LoginRefused, MailboxMissing, ReauthRequired
from src.imap.connection import CHUNK_BYTES, ImapEndpoint, session_over, throttled, xoauth2
from src.imap.imap_client import Folder, ImapMailbox, Listed, Meta, list_mailboxes
from src.sandbox.server import Sandbox
from tests.support.servers import Dovecot, have_dovecot, need
from tests.support.wait import until

ACCOUNT = "ann@gmail.example"
TOKEN = "ya29.secret"
CHALLENGE = {"status": "400", "schemes": "Bearer", "scope": "https://mail.google.com/"}

GMAIL = b"IMAP4rev1 IDLE SASL-IR AUTH=XOAUTH2 X-GM-EXT-1"
PLAIN = b"IMAP4rev1 IDLE AUTH=XOAUTH2"
EXAMINED = (
    b"* FLAGS (\\Seen)\r\n* OK [PERMANENTFLAGS ()] none\r\n* 3 EXISTS\r\n* 0 RECENT\r\n"
    b"* OK [UIDVALIDITY 77] valid\r\n* OK [UIDNEXT 10] next\r\nTAG OK [READ-ONLY] done\r\n"
)
OK = b"TAG OK done\r\n"
CUT = b"<cut>"  # a reply's end: close the connection there
HOLD = b"<hold>"  # a reply's end: say no more, keep the connection

Reply: TypeAlias = "bytes | Callable[[Server], bytes]"


class Server:
    """Answers each command by the longest matching start of a line; `heard` holds what the client said.

    In a reply TAG stands for the command's tag. IDLE is answered `+ idling`; `push` sends what it is given, unasked.
    """

    def __init__(self, replies: dict[str, Reply], capabilities: bytes, context: ssl.SSLContext | None) -> None:
        self.heard: list[str] = []
        self.done = threading.Event()
        self.closed = threading.Event()
        self._capabilities = capabilities
        self._replies: dict[str, Reply] = {
            "CAPABILITY": b"* CAPABILITY " + capabilities + b"\r\n" + OK,
            "AUTHENTICATE": self._authenticate,
            "EXAMINE": EXAMINED,
            "NOOP": OK,
            "IDLE": self._idle,
            "LOGOUT": b"* BYE bye\r\n" + OK + CUT,
            **replies,
        }
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._peer: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def push(self, data: bytes) -> None:
        assert self._peer is not None
        self._peer.sendall(data)

    def line(self) -> str:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the client closed the connection")
        self.heard.append(line.decode().rstrip("\r\n"))
        return self.heard[-1]

    def commands(self) -> list[str]:
        """The commands heard, without tags."""
        return [line.split(" ", 1)[1] for line in self.heard if " " in line]

    def stop(self) -> None:
        self.done.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._peer is not None:
            with suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)
            self._peer.close()

    def _serve(self) -> None:
        try:
            raw, _ = self._listener.accept()
            self._peer = self._context.wrap_socket(raw, server_side=True) if self._context else raw
            self._lines = self._peer.makefile("rb")
            greeting = self._replies.get("GREETING", b"* OK ready\r\n")
            assert isinstance(greeting, bytes)
            self._say(greeting)
            while True:
                tag, _, command = self.line().partition(" ")
                start = max((known for known in self._replies if command.startswith(known)), key=len, default=None)
                if start is None:
                    raise ConnectionError(f"no answer known to {command!r}")
                reply = self._replies[start]
                self._say((reply(self) if callable(reply) else reply).replace(b"TAG", tag.encode()))
        except OSError:
            pass
        finally:
            self.closed.set()
            self._hang_up()

    def _say(self, reply: bytes) -> None:
        self.push(reply.removesuffix(CUT).removesuffix(HOLD))
        if reply.endswith(CUT):
            raise ConnectionError("cut")
        if reply.endswith(HOLD):
            self.done.wait(60)

    def _authenticate(self, _: Server) -> bytes:
        self.push(b"+ \r\n")
        self.line()
        return b"TAG OK [CAPABILITY " + self._capabilities + b"] welcome\r\n"

    def _idle(self, _: Server) -> bytes:
        self.push(b"+ idling\r\n")
        assert self.line() == "DONE"
        return OK


@contextmanager
def serving(
    replies: dict[str, Reply] | None = None, capabilities: bytes = GMAIL, context: ssl.SSLContext | None = None
) -> Iterator[Server]:
    server = Server(replies or {}, capabilities, context)
    try:
        yield server
    finally:
        server.stop()


def mailbox(server: Server, name: str = "INBOX", *, timeout: float = 10.0) -> ImapMailbox:
    return ImapMailbox(ImapEndpoint("127.0.0.1", server.port, "none", timeout, None), ACCOUNT, name, TOKEN)


def refuse(challenge: bytes, verdict: bytes) -> Reply:
    """AUTHENTICATE that answers the token with a challenge, wants the empty line and gives its verdict."""

    def reply(server: Server) -> bytes:
        server.push(b"+ \r\n")
        server.line()
        server.push(b"+ " + base64.b64encode(challenge) + b"\r\n")
        assert server.line() == ""
        return b"TAG " + verdict + b"\r\n"

    return reply


def never() -> bool:
    return False


class Looks:
    """A `stop` that ends a wait after ten looks: a wait that noticed something by itself needs fewer."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        return self.patience_is_over()

    def patience_is_over(self) -> bool:
        return self.count >= 10


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


# Searching


def test_the_last_message_that_n_star_always_returns_is_left_out() -> None:
    with serving({"UID SEARCH UID 10:*": b"* SEARCH 9\r\n" + OK}) as server, mailbox(server) as box:
        assert box.uids_from(10) == []


def test_uids_come_ascending_and_once() -> None:
    with serving({"UID SEARCH UID 2:*": b"* SEARCH 9 4 2 9 1\r\n" + OK}) as server, mailbox(server) as box:
        assert box.uids_from(2) == [2, 4, 9]


@pytest.mark.parametrize("answer", [b"* SEARCH\r\n", b"* SEARCH \r\n", b""])
def test_an_empty_search_is_an_empty_list(answer: bytes) -> None:
    with serving({"UID SEARCH": answer + OK}) as server, mailbox(server) as box:
        assert box.uids_from(1) == []
        assert not box.has(3)


def test_a_search_answer_of_more_than_a_million_bytes_is_read() -> None:
    uids = range(1_000_000, 1_150_000)
    answer = b"* SEARCH " + b" ".join(b"%d" % uid for uid in uids) + b"\r\n" + OK
    with serving({"UID SEARCH": answer}) as server, mailbox(server) as box:
        assert box.uids_from(1) == list(uids)


def test_since_names_the_day_as_rfc_3501_wants_it() -> None:
    with serving({"UID SEARCH UID 5:* SINCE 01-Feb-2026": b"* SEARCH 4 5 6\r\n" + OK}) as server, mailbox(server) as box:
        assert box.uids_since(date(2026, 2, 1), 5) == [5, 6]


def test_has_asks_for_the_one_uid() -> None:
    with serving({"UID SEARCH UID 7": b"* SEARCH 7\r\n" + OK, "UID SEARCH UID 8": b"* SEARCH\r\n" + OK}) as server:
        with mailbox(server) as box:
            assert box.has(7)
            assert not box.has(8)
        assert server.commands()[3:5] == ["UID SEARCH UID 7", "UID SEARCH UID 8"]


# Fetching

GMAIL_ROW = (
    b'* 1 FETCH (X-GM-THRID 18446744073709551615 X-GM-MSGID 18446744073709551614 X-GM-LABELS ("\\\\Inbox" "Entw&APw-rfe" 2024 '
    b'NIL "a \\"b\\"" bad&x {3}\r\n(x)) UID 7 RFC822.SIZE 1234 INTERNALDATE "01-Feb-2026 01:02:03 +0200")\r\n'
)


def test_meta_of_gmail_keeps_64_bit_ids_and_every_label() -> None:
    with (
        serving({"UID FETCH 7,8 (INTERNALDATE RFC822.SIZE X-GM-MSGID X-GM-THRID X-GM-LABELS)": GMAIL_ROW + OK}) as server,
        mailbox(server) as box,
    ):
        rows = box.meta([7, 8])
    labels = rows[7].gm_labels
    assert rows == {7: Meta(7, "2026-01-31T23:02:03Z", 1234, "18446744073709551614", "18446744073709551615", labels, b"")}
    assert labels[:5] == ("\\Inbox", "Entwürfe", "2024", "NIL", 'a "b"')
    assert len(labels) == 7
    assert labels[6] == "(x)"


def test_meta_elsewhere_holds_the_header() -> None:
    header = b"Message-ID: <7@x>\r\nSubject: \xff)\r\n\r\n"
    row = b'* 1 FETCH (UID 7 INTERNALDATE "01-Feb-2026 01:02:03 +0000" RFC822.SIZE 20 BODY[HEADER]<0> {%d}\r\n%s)\r\n' % (
        len(header),
        header,
    )
    with (
        serving({"UID FETCH 7 (INTERNALDATE RFC822.SIZE BODY.PEEK[HEADER]<0.65536>)": row + OK}, PLAIN) as server,
        mailbox(server) as box,
    ):
        assert box.meta([7]) == {7: Meta(7, "2026-02-01T01:02:03Z", 20, "", "", (), header)}


def test_meta_elsewhere_holds_the_start_of_a_mail_without_message_id() -> None:
    """Two mails may share a header that names neither: their first bytes tell them apart."""
    header = b"Subject: x\r\n\r\n"
    row = b'* 1 FETCH (UID 7 INTERNALDATE "01-Feb-2026 01:02:03 +0000" RFC822.SIZE 20 BODY[HEADER]<0> {%d}\r\n%s)\r\n'
    start = b"* 1 FETCH (UID 7 BODY[]<0> {20}\r\n%s)\r\n" % (header + b"body\r\n")
    answers = {
        "UID FETCH 7 (INTERNALDATE RFC822.SIZE BODY.PEEK[HEADER]<0.65536>)": row % (len(header), header) + OK,
        "UID FETCH 7 (BODY.PEEK[]<0.65536>)": start + OK,
    }
    with serving(answers, PLAIN) as server, mailbox(server) as box:
        assert box.meta([7]) == {7: Meta(7, "2026-02-01T01:02:03Z", 20, "", "", (), header, header + b"body\r\n")}


def test_internaldate_is_utc_whatever_this_machines_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        with serving({"UID FETCH": GMAIL_ROW + OK}) as server, mailbox(server) as box:
            assert box.meta([7])[7].internal_date == "2026-01-31T23:02:03Z"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "moment",
    [b"NIL", b'"31-Feb-2026 01:02:03 +0000"', b'"nonsense"', b'"01-Feb-2026 01:02:03 +9999"', b'"31-Dec-9999 23:00:00 -1000"'],
)
def test_an_impossible_internaldate_is_empty_and_blocks_nothing(moment: bytes) -> None:
    row = b"* 1 FETCH (UID 7 INTERNALDATE " + moment + b" RFC822.SIZE 20 X-GM-MSGID 1 X-GM-THRID 1 X-GM-LABELS ())\r\n"
    with serving({"UID FETCH": row + OK}) as server, mailbox(server) as box:
        assert box.meta([7])[7].internal_date == ""


@pytest.mark.parametrize(
    "row",
    [
        b"",
        b"* 7 FETCH (FLAGS (\\Seen))\r\n",
        b"* 1 FETCH (UID 7 RFC822.SIZE 20)\r\n",
        b'* 1 FETCH (UID 7 RFC822.SIZE 20 INTERNALDATE "01-Feb-2026 01:02:03 +0000")\r\n',
        b"* 1 FETCH (UID 9 RFC822.SIZE 20 INTERNALDATE NIL X-GM-MSGID 1 X-GM-THRID 1 X-GM-LABELS ())\r\n",
        b"* 7 EXPUNGE\r\n",
    ],
    ids=["nothing", "flags of sequence number 7", "half", "no gmail ids", "another uid", "expunged"],
)
def test_meta_of_a_message_the_server_does_not_answer_for_is_absent(row: bytes) -> None:
    with serving({"UID FETCH": row + OK}) as server, mailbox(server) as box:
        assert box.meta([7]) == {}


def test_bodies_come_byte_for_byte_and_absent_ones_are_absent() -> None:
    first, second = b"a\r\n.\r\n\x00\xff)\r\n* 9 EXPUNGE\r\n{5}\r\n", b""
    rows = b"* 1 FETCH (UID 7 BODY[] {%d}\r\n%s)\r\n* 2 FETCH (FLAGS () UID 6)\r\n* 2 FETCH (BODY[] {0}\r\n%s UID 8)\r\n" % (
        len(first),
        first,
        second,
    )
    gone = b"* 3 FETCH (UID 9 BODY[] NIL)\r\n"
    with serving({"UID FETCH 7,8,9,10 (BODY.PEEK[])": rows + gone + OK}) as server, mailbox(server) as box:
        assert box.bodies([7, 8, 9, 10]) == {7: first, 8: second}


def test_bodies_asked_for_ahead_are_fetched_once_whatever_is_called_meanwhile() -> None:
    """The answer is read by the next call and kept for `bodies`; other UIDs than those asked for are fetched anew."""
    replies: dict[str, Reply] = {
        "UID FETCH 7,8 (BODY.PEEK[])": b"* 1 FETCH (UID 7 BODY[] {1}\r\na)\r\n* 2 FETCH (UID 6 BODY[] {1}\r\nb)\r\n" + OK,
        "UID FETCH 9 (BODY.PEEK[])": b"* 3 FETCH (UID 9 BODY[] {1}\r\nc)\r\n" + OK,
        "UID FETCH 5 (BODY.PEEK[]<0.5>)": b"* 4 FETCH (UID 5 BODY[]<0> {1}\r\nd)\r\n" + OK,
    }
    with serving(replies) as server:
        with mailbox(server) as box:
            box.ask_bodies([7, 8])
            assert box.head(5, 5) == b"d"
            assert box.bodies([7, 8]) == {7: b"a"}
            box.ask_bodies([7, 8])
            assert box.bodies([9]) == {9: b"c"}
            box.ask_bodies([9])
            assert box.bodies([9]) == {9: b"c"}
            assert box.bodies([9]) == {9: b"c"}, "asked for once more, as nobody asked ahead"
        fetched = [command.partition("UID FETCH ")[2].split()[0] for command in server.commands() if "UID FETCH" in command]
        assert fetched == ["7,8", "5", "7,8", "9", "9", "9"]


def test_a_session_is_left_without_waiting_for_what_was_asked_ahead() -> None:
    """Else megabytes would be read that nobody wants: the connection is closed in place of a LOGOUT."""
    with serving({"UID FETCH": b"* 1 FETCH (UID 7 BODY[] {9999999}\r\na"}) as server:
        with mailbox(server) as box:
            box.ask_bodies([7])
        assert not any(command == "LOGOUT" for command in server.commands())


def test_a_megabyte_of_body_is_read_whole() -> None:
    """Each piece of it is a sign of life: a large mail on a slow line takes longer than a thread may be silent."""
    body = bytes(range(256)) * 4096
    signs: list[None] = []
    endpoint = ImapEndpoint("127.0.0.1", 0, "none", 10, None)
    with (
        serving({"UID FETCH": b"* 1 FETCH (UID 7 BODY[] {%d}\r\n%s)\r\n" % (len(body), body) + OK}) as server,
        ImapMailbox(replace(endpoint, port=server.port), ACCOUNT, "INBOX", TOKEN, lambda: signs.append(None)) as box,
    ):
        before = len(signs)
        assert box.bodies([7]) == {7: body}
    assert len(signs) - before >= len(body) // CHUNK_BYTES - 1


def test_head_is_the_start_or_nothing() -> None:
    replies: dict[str, Reply] = {
        "UID FETCH 7 (BODY.PEEK[]<0.5>)": b"* 1 FETCH (UID 7 BODY[]<0> {5}\r\nSubje)\r\n" + OK,
        "UID FETCH 8 (BODY.PEEK[]<0.5>)": b"* 2 FETCH (UID 8 BODY[]<0> NIL)\r\n" + OK,
        "UID FETCH 9 (BODY.PEEK[]<0.5>)": OK,
    }
    with serving(replies) as server, mailbox(server) as box:
        assert [box.head(uid, 5) for uid in (7, 8, 9)] == [b"Subje", b"", b""]


def test_no_command_line_grows_beyond_what_servers_read() -> None:
    with serving({"UID FETCH": OK}) as server:
        with mailbox(server) as box:
            assert box.bodies(range(4_000_000_000, 4_000_001_200)) == {}
        assert len([command for command in server.commands() if "FETCH" in command]) == 3
        assert max(map(len, server.heard)) < 8000


def test_asking_for_nothing_says_nothing() -> None:
    with serving() as server:
        with mailbox(server) as box:
            assert box.meta([]) == {}
            assert box.bodies([]) == {}
        assert server.commands()[-1] == "LOGOUT"
        assert not any("FETCH" in command for command in server.commands())


def test_nothing_is_marked_or_moved_by_any_call() -> None:
    with serving({"UID FETCH": OK, "UID SEARCH": OK}) as server:
        with mailbox(server) as box:
            box.uids_from(1)
            box.uids_since(date(2026, 1, 1))
            box.has(1)
            box.meta([1])
            box.bodies([1])
            box.head(1, 10)
            box.wait(0.05, never)
        said = "\n".join(server.commands())
    assert not re.search(r"\b(SELECT|STORE|APPEND|COPY|MOVE|EXPUNGE|CLOSE|DELETE)\b", said)
    assert "BODY[" not in said


# Broken answers


CALLS: dict[str, Callable[[ImapMailbox], object]] = {
    "search": lambda box: box.uids_from(1),
    "has": lambda box: box.has(1),
    "meta": lambda box: box.meta([7]),
    "bodies": lambda box: box.bodies([7]),
    "asked ahead": lambda box: (box.ask_bodies([7]), box.bodies([7])),
    "head": lambda box: box.head(7, 10),
    "wait": lambda box: box.wait(5, never),
}
BROKEN = {
    "cut": CUT,
    "bye": b"* BYE Session expired, please login again.\r\n" + CUT,
    "no": b"TAG NO [THROTTLED] slow down\r\n",
    "bad": b"TAG BAD what\r\n",
    "unknown tag": b"ZZZ9 OK done\r\n",
    "garbage": b"\x00\xff garbage\r\n",
    "bare line feed": b"* 1 EXISTS\n" + CUT,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("broken", BROKEN)
def test_any_broken_answer_ends_the_session_for_good(call: str, broken: str) -> None:
    reply = BROKEN[broken]
    with serving({"UID SEARCH": reply, "UID FETCH": reply, "NOOP": reply, "IDLE": reply}) as server, mailbox(server) as box:
        with pytest.raises((ImapUnavailable, ImapThrottled)):
            CALLS[call](box)
        for again in CALLS.values():
            with pytest.raises(ImapUnavailable, match="closed"):
                again(box)
        assert not any(command == "LOGOUT" for command in server.commands())


@pytest.mark.parametrize(
    "answer",
    [
        b"* 1 FETCH (UID 7 BODY[] {1000}\r\nshort" + CUT,
        b"* 1 FETCH (UID 7 BODY[] {5}\r\nshort" + CUT,
        b"* 1 FETCH (UID 7 BODY[] {5}\r\nshort)\r\n" + CUT,
        b"* 1 FETCH (UID 7 BODY[]\r\n" + OK,
        b"* 1 FETCH (UID x BODY[] NIL)\r\n" + OK,
        b"* 1 FETCH (5 5)\r\n" + OK,
        b"* 1 FETCH ((a b) c)\r\n" + OK,
        b'* 1 FETCH (UID 7 BODY[] "open)\r\n' + OK,
        b"* 1 FETCH (UID 7 INTERNALDATE 5 RFC822.SIZE 1)\r\n" + OK,
        b"* 1 FETCH (UID 7 X-GM-LABELS " + b"(" * 5000 + b")" * 5000 + b")\r\n" + OK,
    ],
    ids=["in the literal", "after it", "before OK", "unclosed", "no uid", "ints", "nested", "quote", "no date", "deep"],
)
def test_a_fetch_cut_short_or_malformed_gives_no_half_body(answer: bytes) -> None:
    with serving({"UID FETCH": answer}) as server, mailbox(server) as box:
        with pytest.raises((ImapUnavailable, ImapThrottled)):
            box.bodies([7])
        with pytest.raises(ImapUnavailable, match="closed"):
            box.bodies([7])


@pytest.mark.parametrize("no", [b"Some messages could not be FETCHed (Failure)", b"[EXPUNGEISSUED] Some are gone"])
def test_a_no_about_some_messages_gives_the_others(no: bytes) -> None:
    """As where OK comes without their data: the session goes on, and also what was asked ahead came."""
    answer = b"* 1 FETCH (UID 7 BODY[] {5}\r\nwhole)\r\nTAG NO " + no + b"\r\n"
    with serving({"UID FETCH": answer}) as server, mailbox(server) as box:
        assert box.bodies([7, 8]) == {7: b"whole"}
        box.ask_bodies([7, 8])
        assert box.bodies([7, 8]) == {7: b"whole"}


@pytest.mark.parametrize("no", [b"[SERVERBUG] Internal error", b"Server error, please try again later", b"no", b""])
def test_any_other_no_to_a_fetch_is_no_answer(no: bytes) -> None:
    """Mail is not taken for withheld because a server has its troubles."""
    with serving({"UID FETCH": b"TAG NO " + no + b"\r\n"}) as server, mailbox(server) as box, pytest.raises(ImapUnavailable):
        box.bodies([7, 8])


def test_a_stalled_fetch_ends_with_the_time_out() -> None:
    with (
        serving({"UID FETCH": b"* 1 FETCH (UID 7 BODY[] {10}\r\nabc" + HOLD}) as server,
        mailbox(server, timeout=0.3) as box,
        pytest.raises(ImapUnavailable, match="timed out"),
    ):
        box.bodies([7])


def test_the_text_of_an_error_is_one_printable_line() -> None:
    with serving({"NOOP": b"TAG NO \x1b[31m [X] \x07" + b"y" * 9000 + b"\r\n"}) as server, mailbox(server) as box:
        with pytest.raises(ImapUnavailable) as caught:
            box.has(1)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= 500


# News


def idle_then(*pushes: bytes) -> Reply:
    def reply(server: Server) -> bytes:
        for push in pushes:
            server.push(push)
        assert server.line() == "DONE"
        return OK

    return reply


def test_wait_returns_as_soon_as_a_mail_is_announced_and_ends_idle() -> None:
    looks = Looks()
    with serving({"IDLE": idle_then(b"+ idling\r\n", b"* OK Still here\r\n", b"* 4 EXISTS\r\n")}) as server:
        with mailbox(server) as box:
            assert box.wait(600, looks)
        assert [line.split(" ", 1)[-1] for line in server.heard[4:7]] == ["IDLE", "DONE", "LOGOUT"]
    assert not looks.patience_is_over()


def test_an_announcement_in_the_same_segment_as_the_start_of_idle_is_noticed() -> None:
    looks = Looks()
    with serving({"IDLE": idle_then(b"+ idling\r\n* 4 EXISTS\r\n")}) as server, mailbox(server) as box:
        assert box.wait(600, looks)
    assert not looks.patience_is_over()


def test_an_announcement_that_came_with_an_earlier_answer_is_not_slept_over() -> None:
    looks = Looks()
    with serving({"UID SEARCH": b"* SEARCH 9\r\n* 4 EXISTS\r\n" + OK}) as server, mailbox(server) as box:
        box.uids_from(1)
        assert box.wait(600, looks)
        assert "IDLE" not in server.commands()
    assert not looks.patience_is_over()


def test_the_examine_itself_is_no_news() -> None:
    with serving() as server, mailbox(server) as box:
        assert not box.wait(0.05, never)
        assert "IDLE" in server.commands()


def test_expunges_flags_and_still_here_are_not_new_mail() -> None:
    chatter = b"* OK Still here\r\n* 2 FETCH (FLAGS (\\Seen))\r\n* 1 EXPUNGE\r\n* 0 RECENT\r\n"
    with serving({"IDLE": idle_then(b"+ idling\r\n", chatter)}) as server, mailbox(server) as box:
        assert not box.wait(0.3, never)


def test_wait_ends_idle_properly_when_told_to_stop() -> None:
    asked = threading.Event()

    def stop() -> bool:
        asked.set()
        return "IDLE" in server.commands()

    with serving() as server:
        with mailbox(server) as box:
            assert not box.wait(600, stop)
            assert asked.is_set()
        assert "DONE" in server.heard
        assert server.commands()[-1] == "LOGOUT"


@pytest.mark.parametrize(
    "end",
    [
        b"+ idling\r\n" + CUT,
        b"+ idling\r\n* BYE Session expired\r\n" + CUT,
        b"+ idling\r\n* OK Still here\r\n" + CUT,
        b"+ idling\r\n* 4 EX" + CUT,
    ],
)
def test_a_connection_lost_in_idle_is_noticed_at_once(end: bytes) -> None:
    looks = Looks()
    with serving({"IDLE": end}) as server, mailbox(server) as box:
        with pytest.raises(ImapUnavailable):
            box.wait(600, looks)
        with pytest.raises(ImapUnavailable, match="closed"):
            box.wait(600, looks)
    assert not looks.patience_is_over()


def test_the_servers_last_words_in_idle_are_told() -> None:
    looks = Looks()
    with (
        serving({"IDLE": b"+ idling\r\n* BYE Session expired, please login again.\r\n" + CUT}) as server,
        mailbox(server) as box,
        pytest.raises(ImapUnavailable, match="Session expired"),
    ):
        box.wait(600, looks)
    assert not looks.patience_is_over()


def test_half_a_line_in_idle_ends_with_the_time_out() -> None:
    looks = Looks()
    with (
        serving({"IDLE": b"+ idling\r\n* 4 EXI" + HOLD}) as server,
        mailbox(server, timeout=0.3) as box,
        pytest.raises(ImapUnavailable, match="timed out"),
    ):
        box.wait(600, looks)
    assert not looks.patience_is_over()


def test_without_idle_the_server_is_asked_when_the_time_is_over() -> None:
    capabilities = b"IMAP4rev1 AUTH=XOAUTH2"
    with serving({"NOOP": b"* 4 EXISTS\r\n" + OK}, capabilities) as server:
        with mailbox(server) as box:
            assert box.wait(0.05, never)
        assert server.commands()[3:4] == ["NOOP"]


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


# The real thing: a Gmail of ours, and Dovecot

MAIL = b"Message-ID: <1@example.org>\r\nFrom: b@example.org\r\nSubject: one\r\n\r\n" + b"hello\r\n" * 20
MOMENT = datetime(2026, 2, 1, 23, 59, 58, tzinfo=timezone(timedelta(hours=2)))


def arrive(box: ImapMailbox, deliver: Callable[[], object]) -> bool:
    """Wait in IDLE, deliver once the wait has begun, and tell what the wait says."""
    begun = threading.Event()

    def stop() -> bool:
        begun.set()
        return False

    with ThreadPoolExecutor(1) as pool:
        news = pool.submit(box.wait, 30, stop)
        assert begun.wait(20)
        deliver()
        return news.result(30)


def sandbox_mailbox(sandbox: Sandbox, path: Path, name: str = "INBOX", *, refuse: str | None = None) -> ImapMailbox:
    endpoint = ImapEndpoint("127.0.0.1", sandbox.imap_port, "none", 10.0, None)
    return ImapMailbox(endpoint, ACCOUNT, name, TokenSource(path, ACCOUNT).access_token(refuse=refuse))


def test_a_gmail_is_read_with_its_ids_and_labels(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "token.json"
    uids = [sandbox.deliver(ACCOUNT, MAIL + b"%d" % n, internal_date=MOMENT) for n in range(3)]
    sandbox.write_token_file(path, ACCOUNT)
    with sandbox_mailbox(sandbox, path) as box:
        assert (box.folder.exists, box.folder.gmail) == (3, True)
        assert box.uids_from(1) == uids
        assert box.uids_from(uids[-1] + 1) == []
        assert box.uids_since(MOMENT.date()) == uids
        assert box.uids_since(MOMENT.date() + timedelta(days=2)) == []
        rows = box.meta([*uids, 999])
        assert [(row.uid, row.size, row.gm_msgid, row.internal_date) for row in rows.values()] == [
            (mail.uid, mail.size, mail.gm_msgid, "2026-02-01T21:59:58Z") for mail in sandbox.ledger()
        ]
        assert box.bodies([*uids, 999]) == {uid: MAIL + b"%d" % n for n, uid in enumerate(uids)}
        assert box.head(uids[0], 10) == MAIL[:10]
        assert arrive(box, lambda: sandbox.deliver(ACCOUNT, b"Subject: new\r\n\r\n"))
        assert len(box.uids_from(uids[-1] + 1)) == 1


def test_an_expired_token_is_refused_and_a_refreshed_one_is_not(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "token.json"
    sandbox.add_account(ACCOUNT)
    sandbox.write_token_file(path, ACCOUNT)
    old = TokenSource(path, ACCOUNT).access_token()
    sandbox.expire_tokens()
    with pytest.raises(LoginRefused, match=r"AUTHENTICATIONFAILED.*status=400 schemes=Bearer"), sandbox_mailbox(sandbox, path):
        pass
    with sandbox_mailbox(sandbox, path, refuse=old) as box:
        assert box.folder.exists == 0


def test_a_revoked_grant_asks_for_consent(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "token.json"
    sandbox.add_account(ACCOUNT)
    sandbox.write_token_file(path, ACCOUNT)
    token = TokenSource(path, ACCOUNT).access_token()
    sandbox.revoke(ACCOUNT)
    with pytest.raises(ReauthRequired, match="expired or revoked"):
        TokenSource(path, ACCOUNT).access_token(refuse=token)


def test_a_mailbox_gmail_does_not_show_is_missing(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "token.json"
    sandbox.add_account(ACCOUNT)
    sandbox.write_token_file(path, ACCOUNT)
    with pytest.raises(MailboxMissing, match="Nope"), sandbox_mailbox(sandbox, path, "Nope"):
        pass


def test_dovecot_is_read_over_tls_and_left_untouched(dovecot: Dovecot, tmp_path: Path) -> None:
    account, path = "imap-client@example.org", tmp_path / "token.json"
    dovecot.tokens.add_account(account)
    dovecot.tokens.write_token_file(path, account)
    for n in range(2):
        dovecot.deliver(account, MAIL + b"%d" % n, mailbox="Entwürfe", internal_date=MOMENT)
    endpoint = ImapEndpoint("localhost", dovecot.imaps_port, "tls", 10.0, str(dovecot.ca_file))
    with ImapMailbox(endpoint, account, "Entwürfe", TokenSource(path, account).access_token()) as box:
        assert not box.folder.gmail
        assert box.folder.exists == 2
        assert box.uids_from(1) == [1, 2]
        assert box.uids_from(3) == []
        assert (box.has(2), box.has(3)) == (True, False)
        header = MAIL[: MAIL.index(b"\r\n\r\n") + 4]
        assert box.meta([1, 2, 3]) == {
            uid: Meta(uid, "2026-02-01T21:59:58Z", len(MAIL) + 1, "", "", (), header) for uid in (1, 2)
        }
        assert box.bodies([1, 2, 3]) == {1: MAIL + b"0", 2: MAIL + b"1"}
        assert box.head(1, 10) == MAIL[:10]
        assert arrive(box, lambda: dovecot.deliver(account, MAIL, mailbox="Entwürfe"))
        assert box.uids_from(3) == [3]
    with dovecot.login(account) as session:
        session.select("Entw&APw-rfe", readonly=True)
        assert session.search(None, "SEEN") == ("OK", [b""])


def test_dovecot_refuses_a_token_that_is_over(dovecot: Dovecot) -> None:
    endpoint = ImapEndpoint("127.0.0.1", dovecot.imap_port, "none", 10.0, None)
    with pytest.raises(LoginRefused, match=r"AUTHENTICATIONFAILED.*status="), ImapMailbox(endpoint, ACCOUNT, "INBOX", "over"):
        pass


def test_a_killed_dovecot_is_noticed_in_idle(tmp_path: Path) -> None:
    need(have_dovecot(), "dovecot-imapd")
    path = tmp_path / "token.json"
    with Dovecot() as own:
        own.tokens.add_account(ACCOUNT)
        own.tokens.write_token_file(path, ACCOUNT)
        endpoint = ImapEndpoint("127.0.0.1", own.imap_port, "none", 10.0, None)
        token = TokenSource(path, ACCOUNT).access_token()
        with ImapMailbox(endpoint, ACCOUNT, "INBOX", token) as box, pytest.raises(ImapUnavailable):
            arrive(box, own.kill9)


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


# special uses


LISTED = (
    b'* LIST (\\HasNoChildren) "/" INBOX\r\n* LIST (\\HasChildren \\Noselect) "/" "[Gmail]"\r\n'
    b'* LIST (\\AlL \\HasNoChildren) "/" "[Gmail]/Tous les messages"\r\n* LIST (\\Drafts) "/" "Entw&APw-rfe"\r\nTAG OK done\r\n'
)


def test_a_special_use_is_opened_under_the_servers_name_for_it() -> None:
    """Found by LIST whatever its case, anew in each session; the name goes to the server in modified UTF-7."""
    with serving({"LIST": LISTED}) as server, mailbox(server, "\\All") as box:
        assert box.folder.name == "[Gmail]/Tous les messages"
        assert 'EXAMINE "[Gmail]/Tous les messages"' in server.commands()
    with serving({"LIST": LISTED}) as server, mailbox(server, "\\drafts") as box:
        assert box.folder.name == "Entwürfe"
        assert 'EXAMINE "Entw&APw-rfe"' in server.commands() or "EXAMINE Entw&APw-rfe" in server.commands()


def test_a_special_use_that_nobody_has() -> None:
    """It may be hidden from IMAP: the text names the command that shows it."""
    with serving({"LIST": LISTED}) as server:
        with pytest.raises(MailboxMissing, match=r"special use \\Junk; is it hidden from IMAP\?.*--list-mailboxes"):
            mailbox(server, "\\Junk").__enter__()
        assert not [command for command in server.commands() if command.startswith("EXAMINE")]


def test_the_folders_with_their_counts_and_what_is_hidden() -> None:
    """STATUS for what can be opened; of a Gmail also the special uses that LIST does not show."""
    status = b"* STATUS X (MESSAGES 7)\r\nTAG OK done\r\n"
    replies: dict[str, Reply] = {"LIST": LISTED, "STATUS": status, 'STATUS "Entw': b"TAG NO [NOPERM] no\r\n"}
    with serving(replies, capabilities=GMAIL) as server:
        listed, hidden = list_mailboxes(ImapEndpoint("127.0.0.1", server.port, "none", 10.0, None), ACCOUNT, TOKEN)
    assert listed == [
        Listed("INBOX", "", 7),
        Listed("[Gmail]", "", None),
        Listed("[Gmail]/Tous les messages", "\\All", 7),
        Listed("Entwürfe", "\\Drafts", None),
    ]
    assert hidden == ("\\Flagged", "\\Important", "\\Junk", "\\Sent", "\\Trash")
    with serving({"LIST": LISTED, "STATUS": status}, capabilities=PLAIN) as server:
        assert list_mailboxes(ImapEndpoint("127.0.0.1", server.port, "none", 10.0, None), ACCOUNT, TOKEN)[1] == ()


@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("Session expired, please login again.", True),
        ("Autologout; idle for too long", True),
        ("the server closed the connection", False),
        ("System shutting down", False),
    ],
)
def test_the_end_of_a_sessions_time_is_told_from_other_ends(text: str, over: bool) -> None:
    """BYE in the middle of an IDLE and in place of any answer: ImapUnavailable with the server's words, known by `session_over`."""

    def bye(server: Server) -> bytes:
        server.push(b"+ idling\r\n")
        return f"* BYE {text}\r\n".encode() + CUT

    def bye_at_once(server: Server) -> bytes:
        return f"* BYE {text}\r\n".encode() + CUT

    replies: list[tuple[dict[str, Reply], Callable[[ImapMailbox], object]]] = [
        ({"IDLE": bye}, lambda box: box.wait(10, lambda: False)),
        ({"IDLE": bye_at_once}, lambda box: box.wait(10, lambda: False)),
        ({"UID SEARCH": bye_at_once}, lambda box: box.uids_from(1)),
        ({"UID FETCH": bye_at_once}, lambda box: box.bodies([1])),
    ]
    for reply, ask in replies:
        with serving(reply) as server, mailbox(server) as box, pytest.raises(ImapUnavailable) as error:
            ask(box)
        assert str(error.value) == text
        assert session_over(str(error.value)) is over
