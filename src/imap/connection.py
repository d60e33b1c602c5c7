"""How an IMAP server is reached and logged in to, and what its refusals and failures mean.

Here everything foreign (sockets, TLS, imaplib, IMAPClient's parser) becomes an error of ours. Only this package imports imapclient.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import imapclient  # type: ignore[import-untyped]
from imapclient.exceptions import LoginError  # type: ignore[import-untyped]

from src.common.exceptions import ConfigurationError, ImapThrottled, ImapUnavailable, IngestionError, LoginRefused, ReauthRequired

CHUNK_BYTES = 65536
LINE_BYTES = 64_000_000  # SEARCH answers in one line; imaplib's own limit of 1,000,000 ends at about 130,000 mails
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# A peer that is gone without a word is noticed by the kernel within 80 s, also where nothing is to be said for longer (a long poll).
# TCP_KEEPALIVE is macOS' word for TCP_KEEPIDLE; TCP_USER_TIMEOUT (ms) is for what was sent and never acknowledged.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 80_000}

# What sockets, imaplib and IMAPClient's parser let out on a broken or malformed answer (UnicodeDecodeError and
# binascii.Error are ValueErrors, SSLError and time outs are OSErrors, nested brackets end in RecursionError).
FOREIGN = (OSError, imaplib.IMAP4.error, ValueError, LookupError, TypeError, AttributeError, RecursionError)

_PAUSES: dict[Literal["OVERQUOTA", "THROTTLED", "CONNECTIONS"], re.Pattern[str]] = {
    "OVERQUOTA": re.compile(r"\[OVERQUOTA\]|bandwidth limits", re.IGNORECASE),
    "THROTTLED": re.compile(r"\[THROTTLED\]", re.IGNORECASE),
    "CONNECTIONS": re.compile(r"too many simultaneous connections|\[LIMIT\]", re.IGNORECASE),
}

# Refusals that say nothing about the token: response codes of RFC 5530 and Gmail's own codes and sentences.
_THROTTLED = re.compile(
    r"\[(UNAVAILABLE|INUSE|LIMIT|OVERQUOTA|THROTTLED|SERVERBUG)\b"
    r"|too many simultaneous connections|bandwidth limits|try again later",
    re.IGNORECASE,
)

# What Google's and others' servers say when a session's time is over, its token's most of all: no fault of anybody.
_SESSION_OVER = re.compile(r"session expired|log ?in again|idle for too long|autologout", re.IGNORECASE)

_IMAP_IS_OFF = re.compile(r"IMAP access is disabled|not enabled for IMAP", re.IGNORECASE)


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


def connect(endpoint: ImapEndpoint, alive: Callable[[], None]) -> Any:
    """`alive`: called whenever a piece of a long answer has come: on a slow line one takes minutes."""
    context = _tls_context(endpoint) if endpoint.security == "tls" else None
    client = _Client(endpoint.host, endpoint.port, ssl=context is not None, ssl_context=context, timeout=endpoint.timeout)
    client.normalise_times = False
    client._imap.debug = 0  # IMAPClient sets 5: each literal would be formatted twice
    client._imap.alive = alive
    return client


def _tls_context(endpoint: ImapEndpoint) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if endpoint.ca_file:
        try:
            context.load_verify_locations(endpoint.ca_file)
        except OSError as error:
            raise ConfigurationError(f"the IMAP CA file {endpoint.ca_file} cannot be used: {error}") from error
    return context


class _Client(imapclient.IMAPClient):  # type: ignore[misc]  # its base has no types
    def _create_IMAP4(self) -> _Connection:
        return _Connection(self.host, self.port, self.ssl_context, self._timeout.connect)

    def close(self) -> None:
        with suppress(*FOREIGN):
            self.shutdown()


class _Connection(imaplib.IMAP4):
    """imaplib over a socket of ours, through its overridable methods, with a buffer that can be looked into.

    IDLE needs that: imaplib's own buffer may hold a line that polling the socket does not show, and a time out while
    reading breaks it for good. TLS where a context is given.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, timeout: float) -> None:
        self._context = context
        self._patience = timeout
        self._received = bytearray()
        self.alive: Callable[[], None] = lambda: None
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
            self.alive()
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


def log_in(client: Any, login: Literal["xoauth2", "password"], account: str, secret: str) -> None:
    challenges: list[bytes] = []
    try:
        if login == "password":
            _log_in_by_password(client, account, secret)
        else:
            _log_in_by_token(client, account, secret, challenges)
    except LoginError as error:
        text = describe(error)
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
            raise unavailable(text) from error
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


def xoauth2(account: str, access_token: str) -> str:
    """The XOAUTH2 initial client response before base64 (https://developers.google.com/workspace/gmail/imap/xoauth2-protocol)."""
    return f"user={account}\x01auth=Bearer {access_token}\x01\x01"


def _challenge_text(challenge: bytes) -> str:
    """`status=400 schemes=Bearer …` of Google's JSON challenge; of anything else, its printable start."""
    try:
        fields = json.loads(challenge)
    except ValueError:
        fields = None
    if isinstance(fields, dict):
        return _one_line(" ".join(f"{key}={value}" for key, value in fields.items()))
    return _one_line(challenge.decode("utf-8", "replace"))


@contextmanager
def translated(endpoint: ImapEndpoint, cut: Callable[[], None]) -> Iterator[None]:
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
        raise unavailable(f"{endpoint.host}:{endpoint.port}: {describe(error)}") from error


def unavailable(text: str) -> ImapUnavailable | ImapThrottled:
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


def describe(error: BaseException) -> str:
    """The server's or the system's words in one printable line; imaplib puts raw bytes into some of its errors."""
    words = [arg.decode("utf-8", "replace") if isinstance(arg, bytes) else str(arg) for arg in error.args]
    text = str(error) if isinstance(error, OSError) else " ".join(words)
    return _one_line(text) or type(error).__name__


def parting_words(client: Any) -> str:
    """The text of BYE, where the server said it: IMAPClient reads on after it and reports the end of the stream."""
    bye = client._imap.untagged_responses.get("BYE") or [b""]
    return _one_line(bytes(bye[-1]).decode("utf-8", "replace"))


def _one_line(text: str) -> str:
    return re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]+", " ", text).strip()[:500]
