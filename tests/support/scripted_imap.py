"""A scripted IMAP server on 127.0.0.1 that says, cuts and holds back exactly what a test needs."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

from src.imap.connection import ImapEndpoint
from src.imap.imap_client import ImapMailbox

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


def idle_then(*pushes: bytes) -> Reply:
    def reply(server: Server) -> bytes:
        for push in pushes:
            server.push(push)
        assert server.line() == "DONE"
        return OK

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
