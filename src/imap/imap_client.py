"""One read-only IMAP session on one mailbox: connect, log in, EXAMINE, search, fetch, wait.

The only importer of imapclient, and the one boundary where everything foreign (sockets, TLS, imaplib, the parser) becomes
an error of ours. Nothing here marks, moves or deletes: EXAMINE and BODY.PEEK only (RFC 3501 6.3.2, 6.4.5). After any
failure the session is dead: its socket is closed and each further call raises ImapUnavailable.
"""

from __future__ import annotations

import base64
import imaplib
import io
import json
import re
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from types import TracebackType
from typing import Any, Literal, Self

import imapclient  # type: ignore[import-untyped]
from imapclient.exceptions import LoginError  # type: ignore[import-untyped]
from imapclient.imap_utf7 import decode as decode_utf7  # type: ignore[import-untyped]
from imapclient.response_parser import parse_fetch_response  # type: ignore[import-untyped]

from src.common.clock import iso
from src.common.exceptions import (
    ConfigurationError,
    ImapThrottled,
    ImapUnavailable,
    IngestionError,
    LoginRefused,
    MailboxMissing,
    ReauthRequired,
)

HEADER_BYTES = 65536
CHUNK_BYTES = 65536
UIDS_PER_FETCH = 500  # keeps a command line under 6 KB; servers may stop reading at 8 KB
IDLE_SECONDS = 540.0  # RFC 2177 allows 29 minutes; Gmail ends quiet sessions after about 10
LOOK_SECONDS = 1.0  # how often a wait asks whether it should stop
LOGOUT_SECONDS = 2.0
LINE_BYTES = 64_000_000  # SEARCH answers in one line; imaplib's own limit of 1,000,000 ends at about 130,000 mails
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# A peer that is gone without a word is noticed by the kernel within 80 s, also where nothing is to be said for longer (a long poll).
# TCP_KEEPALIVE is macOS' word for TCP_KEEPIDLE; TCP_USER_TIMEOUT (ms) is for what was sent and never acknowledged.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 80_000}

# What Gmail shows under these attributes (RFC 6154, RFC 8457), unless the account's owner hides it from IMAP.
GMAIL_USES = ("\\All", "\\Drafts", "\\Flagged", "\\Important", "\\Junk", "\\Sent", "\\Trash")
SPECIAL_USES = (*GMAIL_USES, "\\Archive")

# What sockets, imaplib and IMAPClient's parser let out on a broken or malformed answer (UnicodeDecodeError and
# binascii.Error are ValueErrors, SSLError and time outs are OSErrors, nested brackets end in RecursionError).
FOREIGN = (OSError, imaplib.IMAP4.error, ValueError, LookupError, TypeError, AttributeError, RecursionError)

_PAUSES: dict[Literal["OVERQUOTA", "THROTTLED", "CONNECTIONS"], re.Pattern[str]] = {
    "OVERQUOTA": re.compile(r"\[OVERQUOTA\]|bandwidth limits", re.IGNORECASE),
    "THROTTLED": re.compile(r"\[THROTTLED\]", re.IGNORECASE),
    "CONNECTIONS": re.compile(r"too many simultaneous connections|\[LIMIT\]", re.IGNORECASE),
}

_MESSAGE_ID = re.compile(rb"^message-id[ \t]*:[ \t]*\S", re.IGNORECASE | re.MULTILINE)

# Refusals that say nothing about the token: response codes of RFC 5530 and Gmail's own codes and sentences.
_THROTTLED = re.compile(
    r"\[(UNAVAILABLE|INUSE|LIMIT|OVERQUOTA|THROTTLED|SERVERBUG)\b"
    r"|too many simultaneous connections|bandwidth limits|try again later",
    re.IGNORECASE,
)

# What Google's and others' servers say when a session's time is over, its token's most of all: no fault of anybody.
_SESSION_OVER = re.compile(r"session expired|log ?in again|idle for too long|autologout", re.IGNORECASE)

_IMAP_IS_OFF = re.compile(r"IMAP access is disabled|not enabled for IMAP", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Folder:
    """A mailbox as EXAMINE showed it. `name`: the server's own, also where a special use was asked for.

    `uidnext`: the lowest UID the next mail may get, as far as this session knows (0: the server did not say).
    `exists`: number of messages. `gmail`: X-GM-EXT-1 is advertised.
    """

    name: str
    uidvalidity: int
    uidnext: int
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


@dataclass(frozen=True)
class ImapEndpoint:
    """Where to connect. `security`: "tls", or "none" for this machine only. `timeout`: seconds a connect or read may stall.

    `ca_file`: a PEM file trusted beside the system's authorities. `login`: what the secret of a session is, an access token
    ("xoauth2") or a password. Raises ConfigurationError when it would travel in the clear.
    """

    host: str
    port: int
    security: str
    timeout: float
    ca_file: str | None
    login: Literal["xoauth2", "password"] = "xoauth2"

    def __post_init__(self) -> None:
        if self.security not in ("tls", "none"):
            raise ConfigurationError(f"IMAP security must be tls or none, not {self.security!r}")
        if self.security == "none" and self.host not in LOOPBACK:
            raise ConfigurationError(f"IMAP security none would send the token to {self.host} in the clear; use tls")


def xoauth2(account: str, access_token: str) -> str:
    """The XOAUTH2 initial client response before base64 (https://developers.google.com/workspace/gmail/imap/xoauth2-protocol)."""
    return f"user={account}\x01auth=Bearer {access_token}\x01\x01"


def _unavailable(text: str) -> ImapUnavailable | ImapThrottled:
    """The error for a session that ended with `text`: Gmail's requests for a long pause are told apart by their wording
    (https://support.google.com/a/answer/1071518 and /mail/answer/7126229)."""
    for kind, pattern in _PAUSES.items():
        if pattern.search(text):
            return ImapThrottled(kind, text)
    return ImapUnavailable(text)


def session_over(text: str) -> bool:
    """True when a server ended the session because its time was over: the normal path, about once an hour at Gmail."""
    return _SESSION_OVER.search(text) is not None


def throttled(text: str) -> bool:
    """True when a server's text is 'not now' (limits, quotas, maintenance) and no verdict on the token or the mailbox."""
    return _THROTTLED.search(text) is not None


class ImapMailbox:
    """A context manager: entering connects, logs in and EXAMINEs; leaving logs out and never raises.

    `mailbox`: a name, or a special use (`\\All`) under whatever name the server has it. `secret`: see `ImapEndpoint.login`.
    Every call raises ImapUnavailable once the session is broken. Entering also raises LoginRefused (AUTHENTICATE or LOGIN
    answered NO; the text holds the bracketed code and the XOAUTH2 challenge), ReauthRequired (IMAP is switched off for the
    account), MailboxMissing, ConfigurationError (`ca_file`, no way to log in with a password). Not for use by several threads.
    """

    folder: Folder

    def __init__(self, endpoint: ImapEndpoint, account: str, mailbox: str, secret: str) -> None:
        self._endpoint = endpoint
        self._account = account
        self._mailbox = mailbox
        self._secret = secret
        self._client: Any = None
        self._asked: tuple[Sequence[int], bytes] | None = None  # (UIDs, tag) of a FETCH whose answer was not read yet
        self._came: tuple[Sequence[int], dict[int, dict[bytes, Any]]] = ((), {})

    def __enter__(self) -> Self:
        with _translated(self._endpoint, self._cut):
            self._client = _connect(self._endpoint)
            _log_in(self._client, self._endpoint.login, self._account, self._secret)
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
            self._asked = (list(uids), client._imap._command("UID", "FETCH", ",".join(map(str, uids)), "(BODY.PEEK[])"))

    def bodies(self, uids: Sequence[int]) -> dict[int, bytes]:
        """Whole messages, byte for byte. An absent one may be gone, or an OK without data: `has` tells them apart."""
        with self._speaking():
            (asked, answers), self._came = self._came, ((), {})
        if asked != list(uids):
            answers = self._fetch(uids, ["BODY.PEEK[]"])
        return {uid: body for uid, answer in answers.items() if isinstance(body := answer.get(b"BODY[]"), bytes)}

    def head(self, uid: int, limit: int) -> bytes:
        """The first `limit` bytes of the message; b"" when the server gives nothing."""
        answer = self._fetch([uid], [f"BODY.PEEK[]<0.{limit}>"]).get(uid, {})
        start = answer.get(b"BODY[]<0>")
        return start if isinstance(start, bytes) else b""

    def refresh(self) -> Folder:
        """Ask for news (NOOP, one round trip) and return the folder with the number of messages it now has.

        `uidvalidity` and `uidnext` stay those of EXAMINE: only a new session learns new ones.
        """
        with self._speaking() as client:
            client.noop()
            self._take_news(client)
        return self.folder

    def wait(self, seconds: float, stop: Callable[[], bool]) -> bool:
        """Wait for new mail, at most `seconds` (and at most 9 minutes): True when some arrived. RFC 2177.

        Asks `stop` every second and ends IDLE properly when it says True. A server without IDLE is asked once, by NOOP,
        when the time is over. A session that ended meanwhile raises ImapUnavailable at once.
        """
        with self._speaking() as client:
            if self._take_news(client):
                return True
            idle = client.has_capability("IDLE")
            if idle:
                client.idle()
            self._watch(client, min(seconds, IDLE_SECONDS), stop)
            if idle:
                client.idle_done()
            else:
                client.noop()
            return self._take_news(client)

    def _watch(self, client: Any, seconds: float, stop: Callable[[], bool]) -> None:
        """Read what the server pushes until a mail arrives, `stop` says so or the time is over."""
        connection = client._imap
        deadline = time.monotonic() + seconds
        while "EXISTS" not in connection.untagged_responses and not stop() and (left := deadline - time.monotonic()) > 0:
            if connection.ready(min(left, LOOK_SECONDS)):
                connection._get_response()
                connection._check_bye()

    def _take_news(self, client: Any) -> bool:
        """Bring `folder.exists` up to date with what was pushed since the last look; True when new mail was announced.

        Servers announce it with the answer to any command, so a wait must look here before it idles.
        """
        _, exists = client._imap.response("EXISTS")
        _, gone = client._imap.response("EXPUNGE")
        for unused in ("RECENT", "FETCH", "OK"):
            client._imap.response(unused)
        if exists[-1] is not None:
            self.folder = replace(self.folder, exists=int(exists[-1]))
        elif gone[-1] is not None:
            self.folder = replace(self.folder, exists=max(0, self.folder.exists - len(gone)))
        return exists[-1] is not None

    def _search(self, first: int, criteria: list[str | date]) -> list[int]:
        with self._speaking() as client:
            found = client.search(["UID", f"{first}:*", *criteria])
        return sorted({uid for uid in found if uid >= first})

    def _fetch(self, uids: Sequence[int], items: list[str]) -> dict[int, dict[bytes, Any]]:
        answers: dict[int, dict[bytes, Any]] = {}
        with self._speaking() as client:
            for start in range(0, len(uids), UIDS_PER_FETCH):
                answers.update(client.fetch(list(uids[start : start + UIDS_PER_FETCH]), items))
        return answers

    @contextmanager
    def _speaking(self) -> Iterator[Any]:
        if self._client is None:
            raise ImapUnavailable("the IMAP session is closed")
        try:
            self._read_asked(self._client)
            yield self._client
        except FOREIGN as error:
            text = _parting_words(self._client) or _describe(error)
            self._cut()
            raise _unavailable(text) from error

    def _read_asked(self, client: Any) -> None:
        """The second half of IMAPClient.fetch, for what `ask_bodies` asked for."""
        if self._asked is None:
            return
        uids, tag = self._asked
        answer, data = client._imap._command_complete("FETCH", tag)
        client._checkok("fetch", answer, data)
        answer, data = client._imap._untagged_response(answer, data, "FETCH")
        found = parse_fetch_response(data, client.normalise_times, client.use_uid)
        self._asked, self._came = None, (uids, {uid: found[uid] for uid in uids if uid in found})

    def _cut(self) -> None:
        if self._client is not None:
            with suppress(*FOREIGN):
                self._client.shutdown()
            self._client = None


def list_mailboxes(endpoint: ImapEndpoint, account: str, secret: str) -> tuple[list[Listed], tuple[str, ...]]:
    """(what the account shows over IMAP, the special uses that a Gmail has and this one hides from IMAP).

    LIST, and a STATUS for each mailbox. Raises what entering an ImapMailbox raises.
    """
    with _translated(endpoint, lambda: None), closing(_connect(endpoint)) as client:
        _log_in(client, endpoint.login, account, secret)
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


@contextmanager
def _translated(endpoint: ImapEndpoint, cut: Callable[[], None]) -> Iterator[None]:
    """Foreign errors become ours; `cut` runs before any error leaves."""
    try:
        yield
    except IngestionError:
        cut()
        raise
    except ssl.SSLCertVerificationError as error:
        cut()
        raise ConfigurationError(
            f"the certificate of {endpoint.host}:{endpoint.port} is not trusted ({error.verify_message}): nothing was sent. "
            "A server with an authority of its own: IMAP_CA_FILE"
        ) from error
    except FOREIGN as error:
        cut()
        raise _unavailable(f"{endpoint.host}:{endpoint.port}: {_describe(error)}") from error


class _Connection(imaplib.IMAP4):
    """imaplib over a socket of ours, through its overridable methods, with a buffer that can be looked into.

    IDLE needs that: imaplib's own buffer may hold a line that polling the socket does not show, and a time out while
    reading breaks it for good. TLS where a context is given.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, timeout: float) -> None:
        self._context = context
        self._patience = timeout
        self._received = bytearray()
        super().__init__(host, port)

    def open(self, host: str = "", port: int = 143, timeout: float | None = None) -> None:
        raw = socket.create_connection((host, port), self._patience)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.sock = self._context.wrap_socket(raw, server_hostname=host) if self._context else raw

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end of the stream."""
        literal = io.BytesIO()
        literal.write(self._take(size))
        while (missing := size - literal.tell()) > 0 and (data := self.sock.recv(min(missing, CHUNK_BYTES))):
            literal.write(data)
        return literal.getvalue()

    def readline(self) -> bytes:
        """A line with its end; without one only at the end of the stream."""
        seen = 0
        while (end := self._received.find(b"\n", seen)) < 0:
            seen = len(self._received)
            if seen > LINE_BYTES:
                raise self.error(f"a line of more than {LINE_BYTES} bytes")
            data = self.sock.recv(CHUNK_BYTES)
            if not data:
                return self._take(seen)
            self._received += data
        return self._take(end + 1)

    def ready(self, seconds: float) -> bool:
        """Whether bytes have come, waiting at most `seconds`. Raises ConnectionResetError at the end of the stream."""
        return bool(self._received) or (self._readable(seconds) and self._receive_now())

    def shutdown(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _readable(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def _receive_now(self) -> bool:
        """Take what is there. A readable socket may hold half a TLS record, which is nothing yet, and no end either."""
        self.sock.setblocking(False)
        try:
            data = self.sock.recv(CHUNK_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        finally:
            self.sock.settimeout(self._patience)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._received += data
        return True


class _Client(imapclient.IMAPClient):  # type: ignore[misc]
    def _create_IMAP4(self) -> _Connection:
        return _Connection(self.host, self.port, self.ssl_context, self._timeout.connect)

    def close(self) -> None:
        with suppress(*FOREIGN):
            self.shutdown()


def _tls_context(endpoint: ImapEndpoint) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if endpoint.ca_file:
        try:
            context.load_verify_locations(endpoint.ca_file)
        except OSError as error:
            raise ConfigurationError(f"the IMAP CA file {endpoint.ca_file} cannot be used: {error}") from error
    return context


def _connect(endpoint: ImapEndpoint) -> Any:
    context = _tls_context(endpoint) if endpoint.security == "tls" else None
    client = _Client(endpoint.host, endpoint.port, ssl=context is not None, ssl_context=context, timeout=endpoint.timeout)
    client.normalise_times = False
    client._imap.debug = 0  # IMAPClient sets 5: each literal would be formatted twice
    return client


def _log_in(client: Any, login: Literal["xoauth2", "password"], account: str, secret: str) -> None:
    challenges: list[bytes] = []
    try:
        if login == "password":
            _log_in_by_password(client, account, secret)
        else:
            _log_in_by_token(client, account, secret, challenges)
    except LoginError as error:
        text = _describe(error)
        # IMAPClient calls a lost connection a LoginError too; what it caught stands in the context.
        lost = isinstance(error.__context__, imaplib.IMAP4.abort)
        for hidden in (secret, base64.b64encode(xoauth2(account, secret).encode()).decode()):
            text = text.replace(hidden, "***")
        if _IMAP_IS_OFF.search(text):
            raise ReauthRequired(
                f"IMAP is switched off for {account} ({text}): the Workspace's administrator, or in an older account its owner, "
                "switches it on (docs/OAUTH2_SETUP.md, section 1, IMAP)"
            ) from error
        if lost or throttled(text):
            raise _unavailable(text) from error
        raise LoginRefused(" ".join([text, *map(_challenge_text, challenges)])) from error


def _log_in_by_token(client: Any, account: str, access_token: str, challenges: list[bytes]) -> None:
    """AUTHENTICATE XOAUTH2. A refusal comes as a JSON challenge that wants an empty line before the tagged NO."""
    answers = iter([xoauth2(account, access_token)])

    def answer(challenge: bytes) -> str:
        if challenge:
            challenges.append(challenge)
        return next(answers, "")

    client.sasl_login("XOAUTH2", answer)


def _log_in_by_password(client: Any, account: str, password: str) -> None:
    """AUTHENTICATE PLAIN (RFC 4616) where it is offered, else LOGIN, which carries ASCII only (RFC 3501 6.2.3)."""
    if client.has_capability("AUTH=PLAIN"):
        client.plain_login(account, password)
    elif client.has_capability("LOGINDISABLED"):
        raise ConfigurationError("the server offers no log in with a password (LOGINDISABLED); AUTH_METHOD=oauth2?")
    elif not (account + password).isascii():
        raise ConfigurationError("the server offers LOGIN only, which cannot carry a password with other than ASCII characters")
    else:
        client.login(account, password)


def _challenge_text(challenge: bytes) -> str:
    """`status=400 schemes=Bearer …` of Google's JSON challenge; of anything else, its printable start."""
    try:
        fields = json.loads(challenge)
    except ValueError:
        fields = None
    if isinstance(fields, dict):
        return _one_line(" ".join(f"{key}={value}" for key, value in fields.items()))
    return _one_line(challenge.decode("utf-8", "replace"))


def _examine(client: Any, mailbox: str) -> Folder:
    gmail = b"X-GM-EXT-1" in client.capabilities()  # asked here: EXAMINE drops the list that came with the login
    name = _holding(client, mailbox) if mailbox.startswith("\\") else mailbox
    try:
        answer = client.select_folder(name, readonly=True)
    except imaplib.IMAP4.error as error:
        text = _describe(error)
        if text.startswith("select failed: ") and not throttled(text):
            raise MailboxMissing(f"no mailbox {mailbox!r}: {text.removeprefix('select failed: ')}") from error
        raise
    client._imap.response("EXISTS")
    client._imap.response("RECENT")
    return Folder(name, answer[b"UIDVALIDITY"], answer.get(b"UIDNEXT", 0), answer[b"EXISTS"], gmail)


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


def _describe(error: BaseException) -> str:
    """The server's or the system's words in one printable line; imaplib puts raw bytes into some of its errors."""
    words = [arg.decode("utf-8", "replace") if isinstance(arg, bytes) else str(arg) for arg in error.args]
    text = str(error) if isinstance(error, OSError) else " ".join(words)
    return _one_line(text) or type(error).__name__


def _parting_words(client: Any) -> str:
    """The text of BYE, where the server said it: IMAPClient reads on after it and reports the end of the stream."""
    bye = client._imap.untagged_responses.get("BYE") or [b""]
    return _one_line(bytes(bye[-1]).decode("utf-8", "replace"))


def _one_line(text: str) -> str:
    return re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]+", " ", text).strip()[:500]
