"""A TCP proxy that breaks connections on purpose, between a daemon and its server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from tests.support.processes import free_port
from tests.support.wait import until

Direction = Literal["to_server", "to_client"]

CHUNK = 65_536
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Connection:
    client: socket.socket
    server: socket.socket

    def end(self, *, reset: bool) -> None:
        """Close both sides, by RST or after what was already sent (FIN). The pumps' blocking recv returns."""
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):  # this side has gone before
                if reset:
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                side.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            side.close()


class FaultProxy:
    """Listens on 127.0.0.1:`port` and passes every byte to `target`: a port on 127.0.0.1 or the path of a unix socket.

    Each fault holds from the return of its method on: bytes that come in later meet it. `keep`: remember what passed.
    """

    def __init__(self, target: int | Path, *, keep: bool = False) -> None:
        self._target = target
        self.port = free_port()
        self._changed = threading.Condition()
        self._connections: set[_Connection] = set()
        self._deaf: set[_Connection] = set()
        self._listener: socket.socket | None = None
        self._stalled = self._closed = False
        self._delay = 0.0
        self._budget: dict[Direction, int] = {}
        self._accepted = 0
        self._passed: dict[Direction, bytearray] | None = {"to_server": bytearray(), "to_client": bytearray()} if keep else None

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.refuse(True)
        self.cut()

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        with self._changed:
            return len(self._connections)

    @property
    def accepted(self) -> int:
        """How many connections were ever passed on to the server."""
        with self._changed:
            return self._accepted

    def passed(self, direction: Direction) -> bytes:
        """What went in `direction` over all connections so far (`keep`)."""
        assert self._passed is not None, "keep=True remembers it"
        with self._changed:
            return bytes(self._passed[direction])

    def cut(self) -> None:
        """Reset every open connection (RST to both sides); new ones are welcome."""
        with self._changed:
            doomed, self._connections = self._connections, set()
            self._changed.notify_all()
        for connection in doomed:
            connection.end(reset=True)

    def refuse(self, on: bool) -> None:
        """True: nobody listens, so new connections are refused; open ones live on. False: listen on the same port again."""
        if not on:
            self._listen()
        elif self._listener is not None:
            listener, self._listener = self._listener, None
            with contextlib.suppress(OSError):  # macOS: a listener is not connected
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def stall(self, on: bool) -> None:
        """True: connections stay open and new ones are accepted, but no byte passes. False: what was held back passes."""
        with self._changed:
            self._stalled = on
            self._changed.notify_all()

    def deafen(self) -> None:
        """From now on every open connection passes nothing and stays open, as after a router lost it; new ones are welcome."""
        with self._changed:
            self._deaf |= self._connections

    def lead_to(self, target: int | Path) -> None:
        """New connections go to another server, as a virtual address does; open ones are cut."""
        self._target = target
        self.cut()

    def delay(self, milliseconds: int) -> None:
        """Hold back each read (up to 64 KiB), in both directions, for this long."""
        with self._changed:
            self._delay = milliseconds / 1000

    def cut_after(self, n_bytes: int, direction: Direction) -> None:
        """Let `n_bytes` more pass in `direction`, over all connections; byte n + 1 is dropped and its connection ended. Once.

        cut_after(0, "to_client") loses the next reply after the server has done the work.
        """
        with self._changed:
            self._budget[direction] = n_bytes

    def cut_is_pending(self, direction: Direction) -> bool:
        """Has the cut that cut_after() ordered yet to come?"""
        with self._changed:
            return direction in self._budget

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed by refuse(True)
                return
            try:
                server = self._connect()
            except OSError:  # the server is down: the client sees its connection closed
                client.close()
                continue
            connection = _Connection(client, server)
            with self._changed:
                self._connections.add(connection)
                self._accepted += 1
            for source, sink, direction in ((client, server, "to_server"), (server, client, "to_client")):
                threading.Thread(target=self._pump, args=(connection, source, sink, direction), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target))
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(self._target))
        return server

    def _pump(self, connection: _Connection, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        with contextlib.suppress(OSError):  # either side has closed or was cut
            while data := source.recv(CHUNK):
                allowed = self._admit(connection, len(data), direction)
                if self._passed is not None:
                    with self._changed:
                        self._passed[direction] += data[:allowed]
                sink.sendall(data[:allowed])
                if allowed < len(data):
                    break
        with self._changed:
            if connection not in self._connections:
                return
            self._connections.remove(connection)
        connection.end(reset=False)

    def _held(self, connection: _Connection) -> bool:
        return self._stalled or connection in self._deaf

    def _admit(self, connection: _Connection, size: int, direction: Direction) -> int:
        """How many of `size` bytes may pass, once the delay and a stall are over; 0 for a connection cut meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or connection not in self._connections, self._delay or 0)
            self._changed.wait_for(lambda: self._closed or connection not in self._connections or not self._held(connection))
            if self._closed or connection not in self._connections:
                return 0
            left = self._budget.get(direction)
            if left is None:
                return size
            if size > left:
                del self._budget[direction]
                return left
            self._budget[direction] = left - size
            return size


def wait_for_connections(proxy: FaultProxy, count: int, timeout: float = 20.0) -> None:
    """Wait until exactly `count` connections are open through the proxy."""
    until(lambda: proxy.connections == count, timeout, f"{count} connections through the proxy")
