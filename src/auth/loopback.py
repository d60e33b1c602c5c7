"""The way back from Google's consent page: a port of this machine, or an address pasted into the terminal (RFC 8252, 7.3)."""

from __future__ import annotations

import os
import secrets
import select
import socket
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from types import TracebackType
from typing import TextIO
from urllib.parse import parse_qsl, urlsplit

from src.common.clock import Clock

LOOPBACK = "127.0.0.1"

_ARRIVED = b"Google's answer has arrived: the terminal says what it was. You may close this page.\n"
_STRAY = b"Not the answer that is waited for.\n"
_STILL_WAITING = "That was no answer to this request (an old tab, or not the whole address); still waiting.\n"


@dataclass(frozen=True)
class Answer:
    """What the browser brings back: a code, or the error that stands in its place (RFC 6749, 4.1.2)."""

    code: str
    error: str


def answer_in(text: str, state: str) -> Answer | None:
    """The answer in a redirected address or in its query; None: it holds none, or one to a request not ours."""
    fields = dict(parse_qsl(text.strip().rpartition("?")[2].partition("#")[0]))
    if not secrets.compare_digest(fields.get("state", "").encode(), state.encode()):
        return None
    answer = Answer(fields.get("code", ""), fields.get("error", ""))
    return answer if answer.code or answer.error else None


class WayBack:
    """A context manager that listens on 127.0.0.1 from construction (OSError: the port is taken) until it is left.

    Browsers open connections and say nothing, ask for a favicon, reload old tabs: each gets a thread of its own and ends
    nothing; only the answer to `state` does. `port`: 0 takes any free one; then it is the real one.
    """

    def __init__(self, port: int, state: str) -> None:
        self._state = state
        self._server = _Listener(port, state)
        self.port = int(self._server.server_address[1])
        self.redirect_uri = f"http://{LOOPBACK}:{self.port}/"

    def __enter__(self) -> WayBack:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="consent", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self, typed: int | None, out: TextIO, patience: float, clock: Clock) -> Answer | None:
        """The first answer from the port or from the lines of the file descriptor `typed`; None after `patience` seconds."""
        deadline = clock.monotonic() + patience
        sources: list[socket.socket | int] = [self._server.arrived] if typed is None else [self._server.arrived, typed]
        unfinished = b""
        while (left := deadline - clock.monotonic()) > 0:
            for source in select.select(sources, [], [], left)[0]:
                if isinstance(source, socket.socket):
                    lines = [source.recv(65536)]
                elif octets := os.read(source, 65536):
                    *lines, unfinished = (unfinished + octets).split(b"\n")
                else:
                    sources.remove(source)
                    lines, unfinished = [unfinished], b""
                for line in filter(None, (line.decode("utf-8", "replace").strip() for line in lines)):
                    if answer := answer_in(line, self._state):
                        return answer
                    out.write(_STILL_WAITING)
                    out.flush()
        return None


class _Listener(ThreadingTCPServer):
    """`arrived` gets the query of each request as a datagram, after the browser has got its page."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, state: str) -> None:
        self.state = state
        self.arrived, self.found = socket.socketpair(type=socket.SOCK_DGRAM)
        super().__init__((LOOPBACK, port), _Handler)

    def server_close(self) -> None:
        super().server_close()
        self.arrived.close()
        self.found.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Who leaves before the answer is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # typed `object` above, as it comes


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 10.0  # seconds for a request to come

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        ours = url.path == "/" and answer_in(url.query, self.server.state) is not None
        try:
            self._page(200, _ARRIVED) if ours else self._page(404, _STRAY)
        finally:
            if url.path == "/":
                self.server.found.send(url.query.encode())

    def _page(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the path holds the code."""
