"""A real HTTP server that answers as a test says: well, late, in drops, broken, or not at all."""

from __future__ import annotations

import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import h11


@dataclass(frozen=True)
class Request:
    """`headers`: names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Reset(Exception):
    """Raised by an answer: the connection is reset (RST)."""


Reply = Callable[[Request], Iterable[bytes]]


def answering(status: int, *headers: str, body: bytes = b"") -> Reply:
    """Every request gets this answer."""
    lines = [f"HTTP/1.1 {status} Some Reason", *headers, f"Content-Length: {len(body)}", "", ""]
    return lambda request: ["\r\n".join(lines).encode() + body]


class HookServer:
    """Listens on `host` at a free port; `requests` are those that came complete, `connections` counts all."""

    def __init__(self, reply: Reply, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.reply = reply
        self.requests: list[Request] = []
        self.connections = 0
        self.stopped = threading.Event()
        hook = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                hook.connections += 1
                hook.serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            request_queue_size = 64

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, peer = super().get_request()
                return (tls.wrap_socket(connection, server_side=True) if tls else connection), peer

        self._server = Server((host, port), Handler)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def drops(self, text: bytes, seconds: float = 0.05) -> Iterator[bytes]:
        """An answer that comes byte by byte, and after its last byte nothing, until the server ends."""
        for number in range(len(text)):
            yield text[number : number + 1]
            if self.stopped.wait(seconds):
                return
        self.stopped.wait(30)

    def serve(self, connection: socket.socket) -> None:
        try:
            request = _read(connection)
            if request is None:
                return
            self.requests.append(request)
            for part in self.reply(request):
                connection.sendall(part)
        except Reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        except OSError:
            return


def _read(connection: socket.socket) -> Request | None:
    """One request; None when the client went away before its end."""
    http = h11.Connection(our_role=h11.SERVER)
    head: h11.Request | None = None
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(connection.recv(65_536))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            headers = {name.decode(): value.decode() for name, value in head.headers}
            return Request(head.method.decode(), head.target.decode(), headers, body)
        else:
            return None
