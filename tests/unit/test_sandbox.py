"""The sandbox seen through the client libraries that meet it: IMAPClient, imaplib, HTTP, a bare socket."""

from __future__ import annotations

import base64
import hashlib
import imaplib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError, LoginError

from src.common.clock import Clock
from src.sandbox.server import Sandbox
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
ME = "me@gmail.example"
LETTER = b"Subject: hello\r\nFrom: a@b.example\r\n\r\nhi\r\n"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        running.add_account(ME)
        yield running


def ask(url: str, body: bytes | None = None) -> tuple[int, dict]:
    """(status, JSON) of a GET, or of a POST with this body."""
    try:
        with urllib.request.urlopen(url, body, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def post(sandbox: Sandbox, path: str, **body: object) -> tuple[int, dict]:
    return ask(f"http://127.0.0.1:{sandbox.http_port}{path}", json.dumps(body).encode())


def refresh(sandbox: Sandbox, account: str = ME, **wrong: str) -> tuple[int, dict]:
    """POST /token as a client would."""
    form = {
        "grant_type": "refresh_token",
        "client_id": sandbox.client_id,
        "client_secret": sandbox.client_secret,
        "refresh_token": sandbox.tokens.refresh_token(account),
        **wrong,
    }
    return ask(sandbox.token_uri, urllib.parse.urlencode(form).encode())


def log_in(sandbox: Sandbox, account: str = ME, token: str | None = None) -> IMAPClient:
    client = IMAPClient("127.0.0.1", sandbox.imap_port, ssl=False, timeout=10)
    access = token if token is not None else refresh(sandbox, account)[1]["access_token"]
    client.sasl_login("XOAUTH2", lambda challenge: "" if challenge else f"user={account}\x01auth=Bearer {access}\x01\x01")
    return client


@contextmanager
def reading(sandbox: Sandbox, mailbox: str = "INBOX") -> Iterator[IMAPClient]:
    """A client that has EXAMINEd the folder."""
    client = log_in(sandbox)
    try:
        client.select_folder(mailbox, readonly=True)
        yield client
    finally:
        client.shutdown()


def talk(sandbox: Sandbox) -> tuple[Callable[[bytes], None], Callable[[], bytes]]:
    """A bare connection after its greeting: (send octets, read a line)."""
    connection = socket.create_connection(("127.0.0.1", sandbox.imap_port), timeout=10)
    file = connection.makefile("rb")
    assert file.readline().startswith(b"* OK")
    return connection.sendall, file.readline


# Reading mail


def test_a_whole_mailbox_comes_out_as_it_went_in(sandbox: Sandbox) -> None:
    """500 generated mails: every body read through IMAPClient has the digest and size that the ledger holds."""
    sandbox.deliver_generated(ME, count=500, seed=3)
    with reading(sandbox) as client:
        uids = client.search("ALL")
        answer = client.fetch(uids, ["RFC822.SIZE", "BODY.PEEK[]"])
    ledger = sandbox.ledger()
    assert uids == [line.uid for line in ledger] == list(range(1, 501))
    assert [hashlib.sha256(answer[line.uid][b"BODY[]"]).hexdigest() for line in ledger] == [line.sha256 for line in ledger]
    assert [answer[line.uid][b"RFC822.SIZE"] for line in ledger] == [line.size for line in ledger]


def test_examine_tells_what_select_tells_but_read_only(sandbox: Sandbox) -> None:
    """EXAMINE answers EXISTS, UIDNEXT, UIDVALIDITY and READ-ONLY."""
    sandbox.deliver(ME, LETTER)
    client = log_in(sandbox)
    told = client.select_folder("INBOX", readonly=True)
    assert (told[b"EXISTS"], told[b"UIDNEXT"], told[b"UIDVALIDITY"]) == (1, 2, sandbox.ledger()[0].uidvalidity)
    assert b"READ-ONLY" in told
    client.logout()


def test_body_without_peek_marks_only_what_was_selected_for_writing(sandbox: Sandbox) -> None:
    """BODY[] sets \\Seen after SELECT, leaves the mail alone after EXAMINE; BODY.PEEK[] always leaves it alone."""
    sandbox.deliver(ME, LETTER)
    client = log_in(sandbox)

    def flags_after(item: str, *, readonly: bool) -> tuple[bytes, ...]:
        client.select_folder("INBOX", readonly=readonly)
        client.fetch([1], [item])
        return client.fetch([1], ["FLAGS"])[1][b"FLAGS"]

    assert flags_after("BODY[]", readonly=True) == ()
    assert flags_after("BODY.PEEK[]", readonly=False) == ()
    assert flags_after("BODY[]", readonly=False) == (b"\\Seen",)
    client.logout()


def test_partial_fetch_is_cut_at_the_octet(sandbox: Sandbox) -> None:
    """<o.n> of the header and of the whole mail; beyond the end it is empty."""
    sandbox.deliver(ME, LETTER)
    with reading(sandbox) as client:
        answer = client.fetch([1], ["BODY.PEEK[HEADER]<0.7>", "BODY.PEEK[]<3.5>"])[1]
        beyond = client.fetch([1], ["BODY.PEEK[]<9999.5>"])[1]
    assert (answer[b"BODY[HEADER]<0>"], answer[b"BODY[]<3>"]) == (LETTER[:7], LETTER[3:8])
    assert beyond[b"BODY[]<9999>"] == b""


def test_internal_date_and_day_searches_agree(sandbox: Sandbox) -> None:
    """SINCE and BEFORE compare INTERNALDATE's day, also combined with a UID range."""
    days = [datetime(2026, 3, day, 23, 59, tzinfo=UTC) for day in (1, 2, 3)]
    for day in days:
        sandbox.deliver(ME, LETTER, internal_date=day)
    with reading(sandbox) as client:
        client.normalise_times = False
        assert client.fetch([2], ["INTERNALDATE"])[2][b"INTERNALDATE"] == days[1]
        assert client.search(["SINCE", date(2026, 3, 2)]) == [2, 3]
        assert client.search(["BEFORE", date(2026, 3, 2)]) == [1]
        assert client.search(["UID", "1:2", "SINCE", date(2026, 3, 2)]) == [2]


def test_an_open_range_always_names_the_last_message(sandbox: Sandbox) -> None:
    """UID SEARCH UID n:* beyond the end answers the last UID, as real servers do; in an empty folder nothing."""
    with reading(sandbox) as client:
        assert client.search("UID 7:*") == []
    sandbox.deliver_generated(ME, count=5)
    with reading(sandbox) as client:
        assert client.search("UID 3:*") == [3, 4, 5]
        assert client.search("UID 99:*") == [5]
        assert client.search("UID 99") == []


def test_gmail_shows_one_mail_in_two_folders_under_one_msgid(sandbox: Sandbox) -> None:
    """An INBOX mail stands in All Mail with its own UID, the same X-GM-MSGID, and once in the ledger; copy adds a label."""
    sandbox.deliver(ME, LETTER, mailbox="[Gmail]/Spam")
    sandbox.deliver(ME, LETTER, mailbox="Work")
    uid = sandbox.deliver(ME, LETTER)
    sandbox.copy(ME, uid, to="Büro & Co")
    items = ["X-GM-MSGID", "X-GM-THRID", "X-GM-LABELS"]
    with reading(sandbox) as client:
        inbox = client.fetch([uid], items)[uid]
    with reading(sandbox, "[Gmail]/All Mail") as client:
        assert client.search("ALL") == [1, 2]
        everywhere = client.fetch([2], items)[2]
    with reading(sandbox, "Büro & Co") as client:
        label = client.fetch([1], items)[1]
    line = sandbox.ledger()[-1]
    assert str(inbox[b"X-GM-MSGID"]) == str(everywhere[b"X-GM-MSGID"]) == str(label[b"X-GM-MSGID"]) == line.gm_msgid
    assert int(line.gm_msgid) > 2**53
    assert set(everywhere[b"X-GM-LABELS"]) == {b"\\Inbox", b"B&APw-ro &- Co"}
    assert len(sandbox.ledger()) == 3


def test_a_plain_server_has_no_gmail_items() -> None:
    """gmail=False: no X-GM-EXT-1, no All Mail, BAD for X-GM-MSGID."""
    with Sandbox(gmail=False) as sandbox:
        sandbox.deliver(ME, LETTER)
        client = log_in(sandbox)
        assert not client.has_capability("X-GM-EXT-1")
        assert {name for _, _, name in client.list_folders()} == {"INBOX", "Drafts", "Sent", "Junk", "Trash"}
        client.select_folder("INBOX", readonly=True)
        with pytest.raises(IMAPClientError):
            client.fetch([1], ["X-GM-MSGID"])
        client.logout()


def test_folders_carry_special_use(sandbox: Sandbox) -> None:
    """LIST shows RFC 6154 attributes; a pattern with % stays on one level; XLIST answers in its own word."""
    sandbox.deliver(ME, LETTER, mailbox="Clients/One")
    client = log_in(sandbox)
    uses = {name: flags for flags, _, name in client.list_folders()}
    assert b"\\All" in uses["[Gmail]/All Mail"]
    assert b"\\Junk" in uses["[Gmail]/Spam"]
    assert "Clients/One" in uses
    assert [name for _, _, name in client.list_folders("", "%")] == ["INBOX"]
    assert len(client.xlist_folders()) == len(uses)
    client.logout()


def test_status_counts(sandbox: Sandbox) -> None:
    """STATUS answers for a folder that is not open; an unknown folder is a NO."""
    sandbox.deliver(ME, LETTER)
    client = log_in(sandbox)
    status = client.folder_status("INBOX", ["MESSAGES", "UIDNEXT", "UIDVALIDITY", "UNSEEN"])
    assert status == {b"MESSAGES": 1, b"UIDNEXT": 2, b"UIDVALIDITY": sandbox.ledger()[0].uidvalidity, b"UNSEEN": 1}
    with pytest.raises(IMAPClientError, match="NONEXISTENT"):
        client.select_folder("Nowhere", readonly=True)
    client.logout()


def test_append_keeps_date_flags_and_octets(sandbox: Sandbox) -> None:
    """APPEND by literal: the octets, the date and the flags come back, and it is in the ledger."""
    moment = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)
    client = log_in(sandbox)
    told = client.append("INBOX", LETTER, flags=[b"\\Flagged"], msg_time=moment)
    assert b"APPENDUID %d 1" % sandbox.ledger()[0].uidvalidity in told
    client.normalise_times = False
    client.select_folder("INBOX", readonly=True)
    answer = client.fetch([1], ["BODY.PEEK[]", "FLAGS", "INTERNALDATE"])[1]
    assert (answer[b"BODY[]"], answer[b"FLAGS"], answer[b"INTERNALDATE"]) == (LETTER, (b"\\Flagged",), moment)
    client.logout()


def test_imaplib_reads_it_too(sandbox: Sandbox) -> None:
    """The standard library's client: login, select, search and fetch by sequence number."""
    sandbox.deliver(ME, LETTER)
    access = refresh(sandbox)[1]["access_token"]
    client = imaplib.IMAP4("127.0.0.1", sandbox.imap_port, timeout=10)
    client.authenticate("XOAUTH2", lambda _: f"user={ME}\x01auth=Bearer {access}\x01\x01".encode())
    assert client.select("INBOX", readonly=True) == ("OK", [b"1"])
    assert client.search(None, "ALL") == ("OK", [b"1"])
    status, answer = client.fetch("1", "(RFC822)")
    assert (status, answer[0][1]) == ("OK", LETTER)
    client.logout()


# News


def test_idle_is_told_of_new_and_of_removed_mail(sandbox: Sandbox) -> None:
    """A delivery pushes EXISTS, an expunge pushes EXPUNGE, while the client is in IDLE."""
    with reading(sandbox) as client:
        client.idle()
        sandbox.deliver(ME, LETTER)
        assert client.idle_check(timeout=10) == [(1, b"EXISTS")]
        sandbox.deliver(ME, LETTER)
        assert client.idle_check(timeout=10) == [(2, b"EXISTS")]
        sandbox.expunge(ME, 1)
        assert client.idle_check(timeout=10) == [(1, b"EXPUNGE")]
        client.idle_done()
        assert client.search("ALL") == [2]


def test_noop_brings_the_news_of_a_poll(sandbox: Sandbox) -> None:
    """Without IDLE, NOOP tells how many mails there are now; an expunged UID is absent from FETCH and never given again."""
    sandbox.deliver_generated(ME, count=3)
    with reading(sandbox) as client:
        sandbox.expunge(ME, 3)
        assert client.fetch([2, 3], ["UID"]).keys() == {2}
        assert sandbox.deliver(ME, LETTER) == 4
        assert (3, b"EXISTS") in client.noop()[1]


def test_a_changed_uidvalidity_ends_the_sessions_that_had_the_folder_open(sandbox: Sandbox) -> None:
    """Nobody reads new UIDs under the old number: the session dies; afterwards UIDs run from 1, shuffled on demand."""
    sandbox.deliver_generated(ME, count=20)
    with reading(sandbox) as client:
        before = client.fetch(range(1, 21), ["X-GM-MSGID"])
        sandbox.expunge(ME, 1)
        changed = sandbox.change_uidvalidity(ME, shuffle=True)
        with pytest.raises(imaplib.IMAP4.abort):
            client.fetch([2], ["X-GM-MSGID"])
    assert changed > sandbox.ledger()[0].uidvalidity
    with reading(sandbox) as client:
        after = client.fetch(range(1, 21), ["X-GM-MSGID"])
        assert client.folder_status("INBOX", ["UIDVALIDITY"]) == {b"UIDVALIDITY": changed}
    old = [before[uid][b"X-GM-MSGID"] for uid in range(2, 21)]
    new = [after[uid][b"X-GM-MSGID"] for uid in range(1, 20)]
    assert sorted(new) == sorted(old)
    assert new != old


# Logins and tokens


@pytest.mark.parametrize("initial", [True, False], ids=["with SASL-IR", "without"])
def test_a_refused_token_gets_the_challenge_then_no(sandbox: Sandbox, initial: bool) -> None:
    """Gmail's JSON challenge, an empty line from the client, NO; the connection lives and a good token then works."""
    send, line = talk(sandbox)

    def response(token: str) -> bytes:
        return base64.b64encode(f"user={ME}\x01auth=Bearer {token}\x01\x01".encode())

    def authenticate(tag: bytes, token: str) -> bytes:
        if initial:
            send(tag + b" AUTHENTICATE XOAUTH2 " + response(token) + b"\r\n")
        else:
            send(tag + b" AUTHENTICATE XOAUTH2\r\n")
            assert line() == b"+ \r\n"
            send(response(token) + b"\r\n")
        return line()

    challenge = authenticate(b"a1", "bad")
    assert challenge == b"+ eyJzdGF0dXMiOiI0MDAiLCJzY2hlbWVzIjoiQmVhcmVyIiwic2NvcGUiOiJodHRwczovL21haWwuZ29vZ2xlLmNvbS8ifQ==\r\n"
    send(b"\r\n")
    assert line() == b"a1 NO [AUTHENTICATIONFAILED] Invalid credentials (Failure)\r\n"
    assert authenticate(b"a2", refresh(sandbox)[1]["access_token"]).startswith(b"* CAPABILITY")
    assert line().startswith(b"a2 OK")


def test_a_token_opens_its_own_account_only(sandbox: Sandbox) -> None:
    """A valid token of one account is refused for another."""
    token = refresh(sandbox)[1]["access_token"]
    with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"):
        log_in(sandbox, "other@gmail.example", token)


def test_there_is_no_password_login(sandbox: Sandbox) -> None:
    """LOGIN is answered NO, as Google does for a plain password."""
    client = IMAPClient("127.0.0.1", sandbox.imap_port, ssl=False, timeout=10)
    with pytest.raises(LoginError):
        client.login(ME, "secret")
    client.shutdown()


def test_access_tokens_end_by_the_clock_handed_in() -> None:
    """A token works until its lifetime is over on the wall clock, not longer; /tokeninfo says the same."""
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    with Sandbox(token_lifetime=100, clock=Clock(wall=lambda: now[0], monotonic=lambda: 0.0)) as sandbox:
        sandbox.add_account(ME)
        status, granted = refresh(sandbox)
        assert (status, granted["expires_in"], granted["token_type"]) == (200, 100, "Bearer")
        token = granted["access_token"]
        info = f"http://127.0.0.1:{sandbox.http_port}/tokeninfo?access_token={token}"
        now[0] += timedelta(seconds=99)
        log_in(sandbox, token=token).logout()
        assert ask(info)[1]["email"] == ME
        now[0] += timedelta(seconds=1)
        with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"):
            log_in(sandbox, token=token)
        assert ask(info)[0] == 400


def test_expired_tokens_can_be_refreshed_and_revoked_ones_cannot(sandbox: Sandbox, tmp_path: Path) -> None:
    """expire_tokens: a refresh helps. revoke: invalid_grant, until a token file stands for a new consent."""
    token = refresh(sandbox)[1]["access_token"]
    sandbox.expire_tokens()
    with pytest.raises(LoginError):
        log_in(sandbox, token=token)
    log_in(sandbox).logout()
    path = tmp_path / "gmail_token.json"
    sandbox.write_token_file(path, ME)
    old = json.loads(path.read_text())["refresh_token"]
    sandbox.revoke(ME)
    expected = {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
    assert refresh(sandbox, refresh_token=old) == (400, expected)
    sandbox.write_token_file(path, ME)
    assert refresh(sandbox, refresh_token=json.loads(path.read_text())["refresh_token"])[0] == 200


def test_a_wrong_client_is_told_so(sandbox: Sandbox) -> None:
    """401 invalid_client, as Google answers."""
    status, body = refresh(sandbox, client_secret="wrong")
    assert (status, body["error"]) == (401, "invalid_client")


def test_the_token_file_is_private_and_complete(sandbox: Sandbox, tmp_path: Path) -> None:
    """Mode 0600, the keys of Google's authorized-user form and ours, nothing left beside it."""
    path = tmp_path / "tokens" / "gmail_token.json"
    sandbox.write_token_file(path, ME)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["gmail_token.json"]
    token = json.loads(path.read_text())
    assert token.keys() == {
        *("type", "account", "client_id", "client_secret", "refresh_token"),
        *("token", "expiry", "scopes", "token_uri", "obtained_at"),
    }
    assert (token["type"], token["account"], token["token_uri"]) == ("authorized_user", ME, sandbox.token_uri)


# Malformed commands


@pytest.mark.parametrize(
    "command",
    [
        b"",
        b"a",
        b"a FROBNICATE",
        b"a EXAMINE",
        b'a EXAMINE "INBOX',
        b"a FETCH 1 (UID",
        b"a UID",
        b"a ((((",
        b"a SELECT ((INBOX))",
    ],
)
def test_nonsense_is_answered_bad_and_the_session_goes_on(sandbox: Sandbox, command: bytes) -> None:
    """BAD before the login and after it; NOOP still works."""
    send, line = talk(sandbox)
    send(command + b"\r\nz NOOP\r\n")
    assert b" BAD " in line()
    assert line().startswith(b"z OK")


@pytest.mark.parametrize(
    "command",
    [b"FETCH 1:x UID", b"FETCH 5 UID", b"UID FETCH 1 ENVELOP", b"UID SEARCH", b"UID SEARCH SINCE tomorrow", b"UID COPY 1 X"],
)
def test_nonsense_in_a_folder_is_answered_bad(sandbox: Sandbox, command: bytes) -> None:
    """Wrong sets, items, keys and dates are BAD; the folder stays open."""
    sandbox.deliver(ME, LETTER)
    with reading(sandbox) as client:
        client._imap.send(b"q9 " + command + b"\r\n")
        assert client._imap.readline().startswith(b"q9 BAD")
        assert client.search("ALL") == [1]


@pytest.mark.parametrize("command", [b"AUTHENTICATE PLAIN", b"AUTHENTICATE XOAUTH2 %%%", b"AUTHENTICATE XOAUTH2 aGVsbG8="])
def test_a_sasl_response_that_is_none_is_answered_bad(sandbox: Sandbox, command: bytes) -> None:
    """Another mechanism, no base64, no XOAUTH2 fields."""
    send, line = talk(sandbox)
    send(b"a " + command + b"\r\n")
    assert line().startswith(b"a BAD")


def test_a_literal_beyond_all_bounds_ends_the_session(sandbox: Sandbox) -> None:
    """BYE instead of 900 MB of memory."""
    send, line = talk(sandbox)
    send(b"a APPEND INBOX {900000000}\r\n")
    assert line().startswith(b"* BYE")
    assert line() == b""


def test_small_commands(sandbox: Sandbox) -> None:
    """ID, NAMESPACE, CREATE, ENABLE, UNSELECT and CLOSE answer as the client expects; FETCH then needs a folder."""
    client = log_in(sandbox)
    assert client.id_({"name": "test"})[0][:2] == (b"name", b"GImap")
    assert client.namespace().personal == (("", "/"),)
    client.create_folder("Größe")
    assert "Größe" in {name for _, _, name in client.list_folders()}
    assert client._imap.enable("CONDSTORE")[0] == "OK"
    for leave in (client.unselect_folder, client.close_folder):
        client.select_folder("INBOX", readonly=True)
        leave()
        client._imap.send(b"q UID FETCH 1 UID\r\n")
        assert client._imap.readline().startswith(b"q BAD")
    client.logout()


def test_search_keys_over_mail(sandbox: Sandbox) -> None:
    """Sizes, flags, NOT, OR, lists, X-GM-MSGID and sequence sets choose the mails they describe."""
    sandbox.deliver(ME, LETTER)
    sandbox.deliver(ME, LETTER + b"x" * 1000)
    sandbox.deliver(ME, LETTER + b"x" * 2000)
    with reading(sandbox) as client:
        assert client.search("LARGER 500 SMALLER 1500") == [2]
        assert client.search("NOT 2") == [1, 3]
        assert client.search("OR UID 1 (LARGER 500 UNSEEN 3)") == [1, 3]
        assert client.search("SEEN") == []
        assert client.search(f"X-GM-MSGID {sandbox.ledger()[1].gm_msgid}") == [2]
        today = sandbox.ledger()[0].internal_date.date()
        assert client.search(["ON", today]) == [1, 2, 3]


def test_header_fields_and_text(sandbox: Sandbox) -> None:
    """BODY[HEADER.FIELDS (…)], its NOT, and BODY[TEXT] cut the mail where they should."""
    sandbox.deliver(ME, LETTER)
    with reading(sandbox) as client:
        answer = client.fetch(
            [1], ["BODY.PEEK[HEADER.FIELDS (SUBJECT)]", "BODY.PEEK[HEADER.FIELDS.NOT (SUBJECT)]", "BODY.PEEK[TEXT]"]
        )
    assert [value for name, value in answer[1].items() if name.startswith(b"BODY")] == [
        b"Subject: hello\r\n\r\n",
        b"From: a@b.example\r\n\r\n",
        b"hi\r\n",
    ]


# Faults


def test_refused_connections(sandbox: Sandbox) -> None:
    """refuse(2): two connections end before the greeting, the third is greeted."""
    sandbox.faults.refuse(2)
    for _ in range(2):
        with pytest.raises((imaplib.IMAP4.error, OSError)):
            IMAPClient("127.0.0.1", sandbox.imap_port, ssl=False, timeout=10)
    log_in(sandbox).logout()
    assert sandbox.faults.state() == {}


def test_login_no(sandbox: Sandbox) -> None:
    """The next login is refused in the given words, the one after it works."""
    sandbox.faults.login_no("[OVERQUOTA] Account exceeded command or bandwidth limits. (Failure)")
    with pytest.raises(LoginError, match="OVERQUOTA"):
        log_in(sandbox)
    log_in(sandbox).logout()


def test_drop_after_bytes_cuts_inside_a_literal(sandbox: Sandbox) -> None:
    """The client gets exactly so many octets more, then the end of the connection; the next connection is whole."""
    sandbox.deliver(ME, b"Subject: big\r\n\r\n" + b"x" * 100_000)
    with reading(sandbox) as client:
        sandbox.faults.drop_after_bytes(5000)
        client._imap.send(b"q UID FETCH 1 BODY.PEEK[]\r\n")
        received = b""
        while chunk := client.socket().recv(65536):
            received += chunk
        assert len(received) == 5000
    with reading(sandbox) as client:
        assert len(client.fetch([1], ["BODY.PEEK[]"])[1][b"BODY[]"]) == 100_016


def test_a_stall_outlasts_the_clients_patience_and_ends_with_the_sandbox() -> None:
    """stall: no answer within the client's timeout; stopping the sandbox does not wait for it."""
    with Sandbox() as sandbox:
        sandbox.add_account(ME)
        client = log_in(sandbox)
        sandbox.faults.stall(3600)
        client.socket().settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.noop()
    assert sandbox.faults.state() == {}


def test_bye_ends_a_session_that_is_logged_in(sandbox: Sandbox) -> None:
    """The next command is answered with BYE and the end of the connection."""
    with reading(sandbox) as client:
        sandbox.faults.bye()
        with pytest.raises(imaplib.IMAP4.abort):
            client.noop()


def test_ok_without_data(sandbox: Sandbox) -> None:
    """OK without the data of the named UIDs for so many FETCHes, of bodies only where asked; the others come."""
    sandbox.deliver_generated(ME, count=3)
    sandbox.faults.ok_without_data([2], times=2, bodies_only=True)
    with reading(sandbox) as client:
        assert client.fetch([1, 2, 3], ["RFC822.SIZE"]).keys() == {1, 2, 3}
        assert [client.fetch([1, 2, 3], ["BODY.PEEK[]"]).keys() for _ in range(3)] == [{1, 3}, {1, 3}, {1, 2, 3}]
        sandbox.faults.ok_without_data([2], no="Some messages could not be FETCHed (Failure)")
        with pytest.raises(IMAPClientError, match="fetch failed: Some messages could not be FETCHed"):
            client.fetch([1, 2, 3], ["UID"])


def test_hidden_uids_become_visible_late(sandbox: Sandbox) -> None:
    """Higher UIDs are there before a lower one: one SEARCH and any FETCH before it do not know it, then it is there."""
    sandbox.deliver_generated(ME, count=3)
    sandbox.faults.hide_uids([2])
    with reading(sandbox) as client:
        assert client.fetch([1, 2], ["UID"]).keys() == {1}
        assert [client.search("ALL"), client.search("ALL")] == [[1, 3], [1, 2, 3]]
        assert client.fetch([1, 2], ["UID"]).keys() == {1, 2}


def test_muted_idle_leaves_the_news_to_the_poll(sandbox: Sandbox) -> None:
    """mute_idle: the delivery is not pushed; SEARCH finds it."""
    with reading(sandbox) as client:
        client.idle()
        sandbox.faults.mute_idle()
        sandbox.deliver(ME, LETTER)
        until(lambda: sandbox.faults.state() == {}, what="the push is swallowed")
        assert client.idle_check(timeout=0) == []
        client.idle_done()
        assert client.search("ALL") == [1]


def test_garbage_is_no_imap(sandbox: Sandbox) -> None:
    """garbage: the FETCH answer does not parse; the next one does."""
    sandbox.deliver(ME, LETTER)
    with reading(sandbox) as client:
        sandbox.faults.garbage()
        with pytest.raises(imaplib.IMAP4.error):
            client.fetch([1], ["UID"])
    with reading(sandbox) as client:
        assert client.fetch([1], ["UID"]).keys() == {1}


def test_the_token_endpoint_fails_on_demand(sandbox: Sandbox) -> None:
    """token_answer: HTML with the given status, then tokens again."""
    sandbox.faults.token_answer(503)
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(sandbox.token_uri, b"", timeout=10)
    assert (failure.value.code, failure.value.headers["Content-Type"]) == (503, "text/html")
    assert refresh(sandbox)[0] == 200


def test_cut_ends_every_connection(sandbox: Sandbox) -> None:
    """All live connections see EOF; the sandbox goes on serving."""
    with reading(sandbox) as one, reading(sandbox) as two:
        assert sandbox.cut() == 2
        for client in (one, two):
            with pytest.raises((imaplib.IMAP4.abort, OSError)):
                client.noop()
    log_in(sandbox).logout()


# Control over HTTP


def test_deliver_over_http(sandbox: Sandbox) -> None:
    """A raw mail with its date, and generated ones, stand in the ledger and in its summary."""
    raw = "U3ViamVjdDogaGVsbG8NCg0KaGkNCg=="
    assert post(sandbox, "/deliver", account=ME, raw=raw, internal_date="2026-02-03T04:05:06Z") == (200, {"uids": [1]})
    generate = {"count": 2, "seed": 9, "kinds": ["koi8_r"]}
    assert post(sandbox, "/deliver", account=ME, mailbox="Work", generate=generate) == (200, {"uids": [1, 2]})
    base = f"http://127.0.0.1:{sandbox.http_port}/ledger"
    mails = ask(base)[1]["mails"]
    assert [(m["mailbox"], m["kind"], m["uid"]) for m in mails] == [
        ("INBOX", "raw", 1),
        ("Work", "koi8_r", 1),
        ("Work", "koi8_r", 2),
    ]
    assert (mails[0]["subject"], mails[0]["internal_date"]) == ("hello", "2026-02-03T04:05:06Z")
    summary = ask(f"{base}?summary=1")[1]
    assert (summary["mails"], summary["by_mailbox"]) == (3, {"INBOX": 1, "Work": 2})


def test_mail_trickles_in_at_a_rate(sandbox: Sandbox) -> None:
    """rate: the answer comes at once, the mails one after the other."""
    generate = {"count": 5, "rate": 1000}
    assert post(sandbox, "/deliver", account=ME, generate=generate) == (200, {"delivering": 5})
    until(lambda: len(sandbox.ledger()) == 5, what="five mails")


def test_every_switch_works_over_http(sandbox: Sandbox) -> None:
    """expire, revoke, new UIDVALIDITY, expunge, faults, cut: each does over HTTP what its method does."""
    sandbox.deliver_generated(ME, count=2)
    token = refresh(sandbox)[1]["access_token"]
    assert post(sandbox, "/expire-tokens")[0] == 200
    assert sandbox.tokens.login(token) is None
    old = sandbox.tokens.refresh_token(ME)
    assert post(sandbox, "/revoke-token", account=ME)[0] == 200
    assert refresh(sandbox, refresh_token=old)[0] == 400
    assert post(sandbox, "/expunge", account=ME, uid=1)[0] == 200
    uidvalidity = post(sandbox, "/new-uidvalidity", account=ME)[1]["uidvalidity"]
    with reading(sandbox) as client:
        assert client.folder_status("INBOX", ["UIDVALIDITY", "MESSAGES"]) == {b"UIDVALIDITY": uidvalidity, b"MESSAGES": 1}
        assert post(sandbox, "/cut") == (200, {"cut": 1})
    wanted = {"stall": {"seconds": 1, "times": 2}, "refuse": 3}
    post(sandbox, "/faults", **wanted)
    armed = ask(f"http://127.0.0.1:{sandbox.http_port}/faults")[1]
    assert armed == {"stall": {"seconds": 1, "left": 2}, "refuse": {"left": 3}}
    post(sandbox, "/faults", stall={"seconds": 1, "times": 0}, refuse=0)
    assert sandbox.faults.state() == {}


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/faults", {"explode": 1}, "explode"),
        ("/faults", {"stall": {"seconds": 1, "minutes": 1}}, "minutes"),
        ("/faults", {"stall": "long"}, "seconds"),
        ("/faults", {"ok_without_data": {"uids": "all"}}, "uids"),
        ("/deliver", {"account": ME}, "generate"),
        ("/deliver", {"account": ME, "raw": "%%"}, "base64"),
        ("/deliver", {"account": ME, "generate": {"count": 1, "kinds": ["poem"]}}, "poem"),
        ("/deliver", {"account": ME, "generate": {"count": -1}}, "count"),
        ("/deliver", {"account": ME, "raw": "eA==", "internal_date": "soon"}, "internal_date"),
        ("/deliver", {"raw": "eA=="}, "account"),
        ("/new-uidvalidity", {"account": ME, "mailbox": "Nowhere"}, "Nowhere"),
        ("/new-uidvalidity", {"account": ME, "shuffle": 1}, "shuffle"),
        ("/expunge", {"account": ME, "uid": 7}, "7"),
        ("/expire-tokens", {"all": True}, "all"),
    ],
)
def test_a_wrong_request_is_answered_with_a_sentence(sandbox: Sandbox, path: str, body: dict, word: str) -> None:
    """400, the word that is wrong in the sentence, and nothing armed or delivered."""
    status, answer = post(sandbox, path, **body)
    assert status == 400
    assert word in answer["error"]
    assert (sandbox.ledger(), sandbox.faults.state()) == ([], {})


@pytest.mark.parametrize("body", [b"{", b"[]"])
def test_a_body_that_is_no_json_object_is_a_400(sandbox: Sandbox, body: bytes) -> None:
    """A sentence instead of a trace."""
    assert ask(f"http://127.0.0.1:{sandbox.http_port}/faults", body)[0] == 400


def test_unknown_paths_are_404(sandbox: Sandbox) -> None:
    """GET and POST alike."""
    assert ask(f"http://127.0.0.1:{sandbox.http_port}/nothing")[0] == 404
    assert post(sandbox, "/nothing")[0] == 404


# Life of the sandbox


def test_it_comes_back_on_the_same_ports_with_the_same_mail(sandbox: Sandbox) -> None:
    """stop ends connections and refuses new ones; start again: same ports, same UIDs, tokens still good."""
    sandbox.deliver(ME, LETTER)
    ports = (sandbox.imap_port, sandbox.http_port)
    token = refresh(sandbox)[1]["access_token"]
    client = log_in(sandbox)
    sandbox.stop()
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        client.noop()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", ports[0]), timeout=10)
    sandbox.start()
    assert (sandbox.imap_port, sandbox.http_port) == ports
    again = log_in(sandbox, token=token)
    again.select_folder("INBOX", readonly=True)
    assert again.search("ALL") == [1]
    again.logout()


def test_the_command_serves_until_sigterm(tmp_path: Path) -> None:
    """python -m src.sandbox: state and token files appear, mail is there, SIGTERM ends it with 0 and takes the state away."""
    state_file = tmp_path / "state.json"
    arguments = ["--token-dir", str(tmp_path), "--state-file", str(state_file), "--emails", "3", "--account", ME]
    began = datetime.now(UTC)
    process = subprocess.Popen([sys.executable, "-m", "src.sandbox", *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        until(state_file.exists, what="the state file")
        state = json.loads(state_file.read_text())
        assert (state["pid"], state["account"], state["token_file"]) == (process.pid, ME, str(tmp_path / "gmail_token.json"))
        assert state["token_uri"] == f"http://127.0.0.1:{state['http_port']}/token"
        assert ask(f"http://127.0.0.1:{state['http_port']}/ledger?summary=1")[1]["mails"] == 3
        assert ask(f"http://127.0.0.1:{state['http_port']}/health")[1]["imap_port"] == state["imap_port"]
        first = ask(f"http://127.0.0.1:{state['http_port']}/ledger")[1]["mails"][0]
        assert int(first["uidvalidity"]) > int(began.timestamp())
        assert int(first["gm_msgid"]) >= int(began.timestamp() * 1000) * 10**6
        assert json.loads((tmp_path / "gmail_token.json").read_text())["token_uri"] == state["token_uri"]
        os.kill(process.pid, signal.SIGTERM)
        printed, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "python producer.py --sandbox" in printed
    assert not state_file.exists()


def test_mail_of_a_later_sandbox_is_never_taken_for_known() -> None:
    """Begun a second later, every folder has another UIDVALIDITY and every mail another id; told no moment, always the same."""

    def numbers(began: datetime | None) -> tuple[int, str]:
        later = Sandbox(numbered_from=began)
        later.deliver(ME, LETTER)
        [mail] = later.ledger()
        return mail.uidvalidity, mail.gm_msgid

    began = datetime(2026, 1, 31, tzinfo=UTC)
    first, second = numbers(began), numbers(began + timedelta(seconds=1))
    assert first[0] < second[0] < 1 << 32
    assert int(first[1]) < int(second[1]) < 1 << 63
    assert first[1].endswith("000000"), "the last digits count the mails"
    assert numbers(None) == numbers(None) == (600_000_001, "1850000000000000000")


def test_a_second_sandbox_is_refused_where_one_runs(tmp_path: Path) -> None:
    """One line and exit code 1; the state file and the token stay those of the first. What a dead one left is no hindrance."""
    state_file = tmp_path / "state.json"
    command = [sys.executable, "-m", "src.sandbox", "--state-file", str(state_file), "--token-dir", str(tmp_path)]
    state_file.write_text(json.dumps({"imap_port": 1, "http_port": 1, "pid": 1}))
    process = subprocess.Popen([*command, "--emails", "0"], stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        until(lambda: json.loads(state_file.read_text())["pid"] == process.pid, what="the state file")
        before = state_file.read_text(), (tmp_path / "gmail_token.json").read_text()
        refused = subprocess.run([*command, "--emails", "0"], capture_output=True, text=True, timeout=20, cwd=ROOT)
        assert (state_file.read_text(), (tmp_path / "gmail_token.json").read_text()) == before
    finally:
        process.kill()
        process.wait()
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        f"The sandbox cannot start: one runs already (pid {process.pid}, {state_file}); end that one"
    )
    assert len(refused.stderr.splitlines()) == 1


def test_several_accounts_get_a_token_file_each(tmp_path: Path) -> None:
    """The names that TOKEN_DIR knows; a taken port is one line and exit code 1."""
    state_file = tmp_path / "state.json"
    common = ["--token-dir", str(tmp_path), "--state-file", str(state_file), "--emails", "0"]
    command = [sys.executable, "-m", "src.sandbox", *common, "--account", ME, "--account", "you@gmail.example"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        until(state_file.exists, what="the state file")
        assert {path.name for path in tmp_path.glob("*@*")} == {f"{ME}.json", "you@gmail.example.json"}
        port = str(json.loads(state_file.read_text())["imap_port"])
        second = [sys.executable, "-m", "src.sandbox", "--imap-port", port, "--token-dir", str(tmp_path / "b")]
        refused = subprocess.run(
            [*second, "--state-file", str(tmp_path / "c")], capture_output=True, text=True, timeout=20, cwd=ROOT
        )
    finally:
        process.kill()
        process.wait()
    assert refused.returncode == 1
    assert "cannot start" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
