"""A snapshot of a running server without its file system: we ask as a replica does, and keep what it sends first (an RDB file).

It is of one moment, whatever is written meanwhile, and holds every database of the server. The server forks for it, and sends it
without writing to its own disk where it can (`$EOF:`); it waits `repl-diskless-sync-delay` (5 s) before it begins.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from typing import BinaryIO

import redis as redis_py

from src.common.exceptions import BackupError, ConfigurationError, RedisUnavailable
from src.common.redis_client import RedisClient, translated

CHUNK = 1 << 18
TICK_SECONDS = 1.0
SILENT_SECONDS = 60.0  # a server at work on a snapshot sends a newline every second or so
MARK_BYTES = 40  # at the end of a snapshot whose length was not known at its start

RIGHTS = "a user of the server's ACL needs +psync +replconf to take a backup (with them it reads all keys): docs/security.md"


def take(redis: RedisClient, into: BinaryIO, *, stopped: Callable[[], bool], tell: Callable[[int], None]) -> None:
    """Write the server's snapshot to `into`. `tell` hears how many bytes have come, from time to time.

    Raises BackupError (no snapshot is given, or stopped as asked), RedisUnavailable (it broke off), ConfigurationError (the ACL).
    """
    with redis.bare_connection() as connection:
        wire = Wire(connection, stopped)
        for words in (("REPLCONF", "capa", "eof"), ("REPLCONF", "rdb-only", "1")):
            wire.send(*words)
            _accepted(wire.line(), "REPLCONF")
        wire.send("PSYNC", "?", "-1")
        _accepted(wire.line(), "PSYNC")
        length, mark = announced(wire.line())
        done = 0
        for chunk in wire.until_mark(mark) if mark else wire.exactly(length):
            into.write(chunk)
            done += len(chunk)
            tell(done)


def announced(line: bytes) -> tuple[int, bytes]:
    """(length, b"") or (0, end mark) of the snapshot that follows `line`. Raises BackupError for anything else."""
    match = re.fullmatch(rb"\$(?:EOF:([0-9a-zA-Z]{40})|(\d+))", line)
    if not match:
        raise BackupError(f"Redis answered {line[:80]!r} instead of a snapshot: is there a proxy before it?")
    return (0, match[1]) if match[1] else (int(match[2]), b"")


def _accepted(line: bytes, command: str) -> None:
    """`line` is no refusal."""
    if line.startswith(b"+"):
        return
    text = line[1:].decode(errors="replace")
    if not line.startswith(b"-"):
        raise BackupError(f"Redis answered {line[:80]!r} to {command}: is there a proxy before it?")
    error = translated(redis_py.ResponseError(text))
    if isinstance(error, ConfigurationError):
        raise ConfigurationError(f"Redis refuses {command} ({text}): {RIGHTS}")
    if isinstance(error, RedisUnavailable):
        raise error
    raise BackupError(
        f"this Redis gives no snapshot over {command} ({text}). Services that run Redis for you often switch it off: use their own backups"
    )


class Wire:
    """Bytes of a connection, waited for `SILENT_SECONDS` at most; `stopped` is asked every second."""

    def __init__(self, connection: socket.socket, stopped: Callable[[], bool]) -> None:
        self._connection, self._stopped = connection, stopped
        self._read = b""
        connection.settimeout(TICK_SECONDS)

    def send(self, *words: str) -> None:
        parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        try:
            self._connection.sendall(f"*{len(words)}\r\n{parts}".encode())
        except OSError as error:
            raise RedisUnavailable(f"the connection broke off: {error}") from error

    def line(self) -> bytes:
        """The next line that is not empty: newlines only say that the server is at work."""
        while True:
            line, end, rest = self._read.partition(b"\n")
            if not end:
                self._read += self._more()
                continue
            self._read = rest
            if line.strip():
                return line.strip()

    def exactly(self, length: int) -> Iterator[bytes]:
        """The next `length` bytes, in chunks."""
        while length:
            chunk = self._read or self._more()
            self._read = chunk[length:]
            chunk = chunk[:length]
            length -= len(chunk)
            yield chunk

    def until_mark(self, mark: bytes) -> Iterator[bytes]:
        """Everything before `mark`, which is the last that comes, in chunks."""
        held, self._read = self._read, b""
        while not held.endswith(mark):
            if len(held) > MARK_BYTES:
                yield held[:-MARK_BYTES]
                held = held[-MARK_BYTES:]
            held += self._more()
        yield held[:-MARK_BYTES]

    def _more(self) -> bytes:
        waited = 0.0
        while True:
            if self._stopped():
                raise BackupError("stopped as asked: no backup was written")
            try:
                chunk = self._connection.recv(CHUNK)
            except TimeoutError:
                waited += TICK_SECONDS
                if waited >= SILENT_SECONDS:
                    raise RedisUnavailable(f"Redis has sent nothing for {SILENT_SECONDS:g} s: no backup was written") from None
                continue
            except OSError as error:
                raise RedisUnavailable(f"the connection broke off: {error}") from error
            if not chunk:
                raise RedisUnavailable("Redis broke the snapshot off: its log says why (often: no memory for a fork)")
            return chunk
