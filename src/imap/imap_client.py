"""One read-only IMAP session on one mailbox: EXAMINE, search, fetch, wait.

Nothing here marks, moves or deletes: EXAMINE and BODY.PEEK only (RFC 3501 6.3.2, 6.4.5). After any failure the session is dead: its
socket is closed and each further call raises ImapUnavailable.
"""

from __future__ import annotations

import imaplib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from types import TracebackType
from typing import Any, Self

from imapclient.imap_utf7 import decode as decode_utf7  # type: ignore[import-untyped]
from imapclient.response_parser import parse_fetch_response  # type: ignore[import-untyped]

from src.common.clock import iso
from src.common.exceptions import ImapUnavailable, MailboxMissing
from src.imap.connection import (
    FOREIGN,
    ImapEndpoint,
    connect,
    describe,
    log_in,
    parting_words,
    throttled,
    translated,
    unavailable,
)

HEADER_BYTES = 65536
UIDS_PER_FETCH = 500  # keeps a command line under 6 KB; servers may stop reading at 8 KB
IDLE_SECONDS = 540.0  # RFC 2177 allows 29 minutes; Gmail ends quiet sessions after about 10
LOOK_SECONDS = 1.0  # how often a wait asks whether it should stop
LOGOUT_SECONDS = 2.0

# What Gmail shows under these attributes (RFC 6154, RFC 8457), unless the account's owner hides it from IMAP.
GMAIL_USES = ("\\All", "\\Drafts", "\\Flagged", "\\Important", "\\Junk", "\\Sent", "\\Trash")

SPECIAL_USES = (*GMAIL_USES, "\\Archive")
# The data of some messages cannot be had, while that of others may have come: Gmail's words, and RFC 5530's code for expunged ones.
_SOME_FAILED = re.compile(r"messages could not be fetched", re.IGNORECASE)
_SOME_GONE = re.compile(r"\[EXPUNGEISSUED\]", re.IGNORECASE)
_MESSAGE_ID = re.compile(rb"^message-id[ \t]*:[ \t]*\S", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Folder:
    """A mailbox as EXAMINE showed it. `name`: the server's own, also where a special use was asked for.

    `exists`: number of messages then. `gmail`: X-GM-EXT-1 is advertised.
    """

    name: str
    uidvalidity: int
    exists: int
    gmail: bool


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of a message before its body is fetched.

    `internal_date`: ISO 8601 in UTC with `Z`, "" where the server gives none. `size`: RFC822.SIZE in bytes. `gm_*`:
    decimal strings and labels, "" and () where the server is not Gmail. `header`: the first 64 KiB of the header there,
    b"" on Gmail. `start`: the first 64 KiB of the mail where that header has no Message-ID, else b"": two such mails may share
    a header.
    """

    uid: int
    internal_date: str
    size: int
    gm_msgid: str
    gm_thrid: str
    gm_labels: tuple[str, ...]
    header: bytes
    start: bytes = b""


@dataclass(frozen=True, slots=True)
class Listed:
    """A mailbox as LIST and STATUS showed it. `special_use`: "" for none. `messages`: None where the server does not tell (\\Noselect)."""

    name: str
    special_use: str
    messages: int | None


class ImapMailbox:
    """A context manager: entering connects, logs in and EXAMINEs; leaving logs out and never raises.

    `mailbox`: a name, or a special use (`\\All`) under whatever name the server has it. `secret`: see `ImapEndpoint.login`. `alive`: see
    `connect`.
    Every call raises ImapUnavailable once the session is broken. Entering also raises LoginRefused (AUTHENTICATE or LOGIN
    answered NO; the text holds the bracketed code and the XOAUTH2 challenge), ReauthRequired (IMAP is switched off for the
    account), MailboxMissing, ConfigurationError (`ca_file`, no way to log in with a password). Not for use by several threads.
    """

    folder: Folder

    def __init__(
        self, endpoint: ImapEndpoint, account: str, mailbox: str, secret: str, alive: Callable[[], None] = lambda: None
    ) -> None:
        self._endpoint = endpoint
        self._account = account
        self._mailbox = mailbox
        self._secret = secret
        self._alive = alive
        self._client: Any = None
        self._asked: tuple[Sequence[int], bytes] | None = None  # (UIDs, tag) of a FETCH whose answer was not read yet
        self._came: tuple[Sequence[int], dict[int, dict[bytes, Any]]] = ((), {})

    def __enter__(self) -> Self:
        with translated(self._endpoint, self._cut):
            self._client = connect(self._endpoint, self._alive)
            log_in(self._client, self._endpoint.login, self._account, self._secret)
            self.folder = _examine(self._client, self._mailbox)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._client is not None and self._asked is None:  # else its answer would have to be read first
            with suppress(*FOREIGN):
                self._client.socket().settimeout(LOGOUT_SECONDS)
                self._client.logout()
        self._cut()

    def uids_from(self, first: int) -> list[int]:
        """UIDs >= `first`, ascending (UID SEARCH UID first:*, which by RFC 3501 always names the last message too)."""
        return self._search(first, [])

    def uids_since(self, day: date, first: int = 1) -> list[int]:
        """UIDs >= `first` whose INTERNALDATE, in the server's own time zone, is `day` or later, ascending."""
        return self._search(first, ["SINCE", day])

    def has(self, uid: int) -> bool:
        """Whether the mailbox shows the message (UID SEARCH UID n)."""
        with self._speaking() as client:
            found = client.search(["UID", str(uid)])
        return uid in found

    def meta(self, uids: Sequence[int]) -> dict[int, Meta]:
        """What is known of these messages; one the server does not answer for, or only in part, is absent."""
        items = ["INTERNALDATE", "RFC822.SIZE"]
        items += ["X-GM-MSGID", "X-GM-THRID", "X-GM-LABELS"] if self.folder.gmail else [f"BODY.PEEK[HEADER]<0.{HEADER_BYTES}>"]
        answers = self._fetch(uids, items)
        metas = {uid: meta for uid, answer in answers.items() if (meta := _meta(uid, answer, self.folder.gmail)) is not None}
        alike = [uid for uid, meta in metas.items() if not self.folder.gmail and not _MESSAGE_ID.search(meta.header)]
        starts = self._fetch(alike, [f"BODY.PEEK[]<0.{HEADER_BYTES}>"]) if alike else {}
        for uid in alike:
            start = starts.get(uid, {}).get(b"BODY[]<0>")
            meta = metas.pop(uid)
            if isinstance(start, bytes):
                metas[uid] = replace(meta, start=start)
        return metas

    def ask_bodies(self, uids: Sequence[int]) -> None:
        """Ask for at most UIDS_PER_FETCH messages that `bodies` will be called for next. The server works and the answer travels meanwhile;
        the next call, whatever it is, reads it."""
        with self._speaking() as client:
            self._asked = (list(uids), _ask(client, uids, ["BODY.PEEK[]"]))

    def bodies(self, uids: Sequence[int]) -> dict[int, bytes]:
        """Whole messages, byte for byte. An absent one may be gone, or an OK without data: `has` tells them apart."""
        with self._speaking():
            (asked, answers), self._came = self._came, ((), {})
        if asked != list(uids):
            answers = self._fetch(uids, ["BODY.PEEK[]"])
        return {uid: body for uid, answer in answers.items() if isinstance(body := answer.get(b"BODY[]"), bytes)}

    def head(self, uid: int, limit: int) -> bytes:
        """The first `limit` bytes of the message; b"" when the server gives nothing."""
        with self._speaking() as client:
            answer = _answer(client, [uid], _ask(client, [uid], [f"BODY.PEEK[]<0.{limit}>"]), given_up=True).get(uid, {})
        start = answer.get(b"BODY[]<0>")
        return start if isinstance(start, bytes) else b""

    def wait(self, seconds: float, stop: Callable[[], bool]) -> bool:
        """Wait for new mail, at most `seconds` (and at most 9 minutes): True when some arrived. RFC 2177.

        Asks `stop` every second and ends IDLE properly when it says True. A server without IDLE is asked once, by NOOP,
        when the time is over. A session that ended meanwhile raises ImapUnavailable at once.
        """
        with self._speaking() as client:
            if _take_news(client):
                return True
            idle = client.has_capability("IDLE")
            if idle:
                client.idle()
            self._watch(client, min(seconds, IDLE_SECONDS), stop)
            if idle:
                client.idle_done()
            else:
                client.noop()
            return _take_news(client)

    def _watch(self, client: Any, seconds: float, stop: Callable[[], bool]) -> None:
        """Read what the server pushes until a mail arrives, `stop` says so or the time is over."""
        connection = client._imap
        deadline = time.monotonic() + seconds
        while "EXISTS" not in connection.untagged_responses and not stop() and (left := deadline - time.monotonic()) > 0:
            if connection.ready(min(left, LOOK_SECONDS)):
                connection._get_response()
                connection._check_bye()

    def _search(self, first: int, criteria: list[str | date]) -> list[int]:
        with self._speaking() as client:
            found = client.search(["UID", f"{first}:*", *criteria])
        return sorted({uid for uid in found if uid >= first})

    def _fetch(self, uids: Sequence[int], items: list[str]) -> dict[int, dict[bytes, Any]]:
        answers: dict[int, dict[bytes, Any]] = {}
        with self._speaking() as client:
            for start in range(0, len(uids), UIDS_PER_FETCH):
                some = uids[start : start + UIDS_PER_FETCH]
                answers.update(_answer(client, some, _ask(client, some, items)))
        return answers

    @contextmanager
    def _speaking(self) -> Iterator[Any]:
        if self._client is None:
            raise ImapUnavailable("the IMAP session is closed")
        try:
            self._read_asked(self._client)
            yield self._client
        except FOREIGN as error:
            text = parting_words(self._client) or describe(error)
            self._cut()
            raise unavailable(text) from error

    def _read_asked(self, client: Any) -> None:
        if self._asked is not None:
            uids, tag = self._asked
            answers = _answer(client, uids, tag)
            self._asked, self._came = None, (uids, answers)

    def _cut(self) -> None:
        if self._client is not None:
            with suppress(*FOREIGN):
                self._client.shutdown()
            self._client = None


def _take_news(client: Any) -> bool:
    """Whether new mail was announced since the last look; servers do it with the answer to any command, so a wait looks here before it
    idles."""
    _, exists = client._imap.response("EXISTS")
    for unused in ("EXPUNGE", "RECENT", "FETCH", "OK"):
        client._imap.response(unused)
    return exists[-1] is not None


def _ask(client: Any, uids: Sequence[int], items: Sequence[str]) -> bytes:
    """The tag of a UID FETCH whose answer `_answer` reads: the two halves of IMAPClient.fetch."""
    tag: bytes = client._imap._command("UID", "FETCH", ",".join(map(str, uids)), f"({' '.join(items)})")
    return tag


def _answer(client: Any, uids: Sequence[int], tag: bytes, *, given_up: bool = False) -> dict[int, dict[bytes, Any]]:
    """What the server told of `uids`. A message that it cannot give is absent, whether it says OK or that some failed; where it says that
    and gives none, it may be the server that fails. `given_up`: nothing is expected of it."""
    verdict, said = client._imap._command_complete("FETCH", tag)
    text = describe(imaplib.IMAP4.error(*said))
    _, data = client._imap._untagged_response("OK", said, "FETCH")
    found = parse_fetch_response(data, client.normalise_times, client.use_uid)
    answers = {uid: found[uid] for uid in uids if uid in found}
    partly = (answers or given_up) and _SOME_FAILED.search(text) and not throttled(text)
    if not (partly or _SOME_GONE.search(text)):
        client._checkok("fetch", verdict, said)
    return answers


def list_mailboxes(endpoint: ImapEndpoint, account: str, secret: str) -> tuple[list[Listed], tuple[str, ...]]:
    """(what the account shows over IMAP, the special uses that a Gmail has and this one hides from IMAP).

    LIST, and a STATUS for each mailbox. Raises what entering an ImapMailbox raises.
    """
    with translated(endpoint, lambda: None), closing(connect(endpoint, lambda: None)) as client:
        log_in(client, endpoint.login, account, secret)
        gmail = client.has_capability("X-GM-EXT-1")
        listed = [_listed(client, flags, name) for flags, _, name in client.list_folders()]
        client.logout()
    shown = {mailbox.special_use for mailbox in listed}
    return listed, tuple(use for use in GMAIL_USES if use not in shown) if gmail else ()


def _listed(client: Any, flags: Sequence[bytes], name: str) -> Listed:
    held = _attributes(flags)
    use = next((use for use in SPECIAL_USES if use.casefold() in held), "")
    if held & {"\\noselect", "\\nonexistent"}:
        return Listed(name, use, None)
    try:
        return Listed(name, use, int(client.folder_status(name, ["MESSAGES"])[b"MESSAGES"]))
    except imaplib.IMAP4.abort:
        raise
    except imaplib.IMAP4.error:
        return Listed(name, use, None)


def _attributes(flags: Sequence[bytes]) -> set[str]:
    return {flag.decode("ascii", "replace").casefold() for flag in flags}


def _examine(client: Any, mailbox: str) -> Folder:
    gmail = b"X-GM-EXT-1" in client.capabilities()  # asked here: EXAMINE drops the list that came with the login
    name = _holding(client, mailbox) if mailbox.startswith("\\") else mailbox
    try:
        answer = client.select_folder(name, readonly=True)
    except imaplib.IMAP4.error as error:
        text = describe(error)
        if text.startswith("select failed: ") and not throttled(text):
            raise MailboxMissing(f"no mailbox {mailbox!r}: {text.removeprefix('select failed: ')}") from error
        raise
    client._imap.response("EXISTS")
    client._imap.response("RECENT")
    return Folder(name, answer[b"UIDVALIDITY"], answer[b"EXISTS"], gmail)


def _holding(client: Any, use: str) -> str:
    """The name of the mailbox that has this special use (RFC 6154)."""
    for flags, _, name in client.list_folders():
        if use.casefold() in _attributes(flags):
            return str(name)
    raise MailboxMissing(
        f"the server shows no mailbox for the special use {use}; is it hidden from IMAP? python producer.py --list-mailboxes"
    )


def _meta(uid: int, answer: dict[bytes, Any], gmail: bool) -> Meta | None:
    size, header = answer.get(b"RFC822.SIZE"), answer.get(b"BODY[HEADER]<0>")
    if not isinstance(size, int) or b"INTERNALDATE" not in answer:
        return None
    if gmail and not {b"X-GM-MSGID", b"X-GM-THRID", b"X-GM-LABELS"} <= answer.keys():
        return None
    if not gmail and not isinstance(header, bytes):
        return None
    return Meta(
        uid=uid,
        internal_date=_utc(answer[b"INTERNALDATE"]),
        size=size,
        gm_msgid=str(answer[b"X-GM-MSGID"]) if gmail else "",
        gm_thrid=str(answer[b"X-GM-THRID"]) if gmail else "",
        gm_labels=tuple(map(_label, answer[b"X-GM-LABELS"] or ())) if gmail else (),
        header=b"" if gmail else header or b"",
    )


def _utc(moment: datetime | None) -> str:
    if moment is None:
        return ""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    try:
        return iso(aware)
    except (ValueError, OverflowError):
        return ""


def _label(raw: bytes | int | None) -> str:
    """A Gmail label as text; the parser makes a number of `2024` and None of `NIL`."""
    if raw is None:
        return "NIL"
    if isinstance(raw, int):
        return str(raw)
    try:
        return str(decode_utf7(raw))
    except ValueError:
        return raw.decode("utf-8", "replace")
