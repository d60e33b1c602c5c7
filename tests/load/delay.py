"""A way of some milliseconds between a client and a server on this machine: every byte comes later, none is slower."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import Self

from tests.support.processes import free_port

CHUNK = 1 << 18


class DelayLine:
    """Listens on 127.0.0.1:`port` and passes everything to the port `target`, `seconds` later in each direction."""

    def __init__(self, target: int, seconds: float) -> None:
        self._target, self._seconds = target, seconds
        self.port = free_port()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed by __exit__
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((client, server), (server, client)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    threading.Thread(target=self._take, args=(source, held), daemon=True).start()
                    threading.Thread(target=self._give, args=(sink, held), daemon=True).start()

    def _take(self, source: socket.socket, held: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(CHUNK)
            except OSError:  # cut
                data = b""
            held.put((time.monotonic() + self._seconds, data))

    def _give(self, sink: socket.socket, held: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        pause = threading.Event()
        with contextlib.suppress(OSError):
            while True:
                due, data = held.get()
                pause.wait(max(0.0, due - time.monotonic()))
                if not data:
                    break
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
