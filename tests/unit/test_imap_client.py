"""ImapMailbox against scripted servers on 127.0.0.1, a sandbox Gmail and Dovecot: search, fetch, news, special uses, broken answers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pytest

from src.auth.oauth2_gmail import TokenSource
from src.common.exceptions import ImapThrottled, ImapUnavailable, LoginRefused, MailboxMissing, ReauthRequired
from src.imap.connection import CHUNK_BYTES, ImapEndpoint, session_over
from src.imap.imap_client import ImapMailbox, Listed, Meta, list_mailboxes
from src.sandbox.server import Sandbox
from tests.support.scripted_imap import (
    ACCOUNT,
    CUT,
    GMAIL,
    HOLD,
    OK,
    PLAIN,
    TOKEN,
    Looks,
    Reply,
    Server,
    idle_then,
    mailbox,
    never,
    serving,
)
from tests.support.servers import Dovecot, have_dovecot, need

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


@pytest.mark.parametrize("given", [b"", b"* 1 FETCH (UID 7 BODY[] {5}\r\nwhole)\r\n"], ids=["none came", "one came"])
def test_a_server_in_need_withholds_no_mail(given: bytes) -> None:
    """Gmail's NO where nothing came, or that tells to try again: it may be about any mail, so it says nothing of these."""
    text = b"[UNAVAILABLE] Some messages could not be FETCHed" if given else b"Some messages could not be FETCHed (Failure)"
    with (
        serving({"UID FETCH": given + b"TAG NO " + text + b"\r\n"}) as server,
        mailbox(server) as box,
        pytest.raises(ImapUnavailable),
    ):
        box.bodies([7, 8])


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
