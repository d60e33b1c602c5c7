"""A process of its own that keeps raw mail: it hashes, writes and syncs while the producer's threads parse.

All threads of the producer share one interpreter, and keeping was a third of its time. Mails go over through a file in memory; their
lengths, and as an answer their references or why the archive cannot be had, over a Unix socket: both together are a channel, and a group
of mails has one for itself. No mail is published before the answer, and a mail that is kept again is kept once: so either process may
die at any moment. This one ends when its control socket is closed: when the producer has ended, however it ended.

Over a channel's socket go lines of JSON: [length, …] there, [reference, …] or "why not" back.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn, TextIO

from src.common.archive import Archive, open_archive
from src.common.exceptions import ArchiveUnavailable

PLACE = "ARCHIVER_PLACE"  # in the environment of the process: [url, data_dir] for `open_archive`, as JSON
KEPT_BYTES = 1 << 20  # of a channel's memory, while it waits for its next mails
END_SECONDS = 5.0  # for the process to end by itself
OF_A_GROUP = (
    signal.SIGINT,
    signal.SIGTERM,
)  # a terminal or a service manager sends them to all; the producer decides when this ends


@dataclass(frozen=True)
class Channel:
    """See above. `memory`: mails, one behind the other. `process`: of the producer's end, whose channel it is."""

    lines: TextIO
    memory: FileIO
    process: subprocess.Popen[bytes] | None = None

    def say(self, what: object) -> None:
        print(json.dumps(what), file=self.lines, flush=True)

    def hear(self) -> Any:
        line = self.lines.readline()
        if not line.endswith("\n"):
            raise ConnectionResetError("it does not answer")
        return json.loads(line)

    def write(self, mails: Sequence[bytes]) -> None:
        """With a map, want of memory would be a signal and not an error."""
        at = 0
        for mail in mails:
            rest = memoryview(mail)
            while rest:
                taken = os.pwrite(self.memory.fileno(), rest, at)
                at, rest = at + taken, rest[taken:]

    def read(self, lengths: Sequence[int]) -> list[bytes]:
        starts = accumulate(lengths, initial=0)
        return [os.pread(self.memory.fileno(), length, at) for at, length in zip(starts, lengths, strict=False)]


class Archiver:
    """The producer's end. `url`, `data_dir`: as for `open_archive`. Safe to use from several threads.

    The process is started for the first mail, and anew for the next one where it has ended.
    """

    def __init__(self, url: str | None, data_dir: Path) -> None:
        self._place = json.dumps([url, str(data_dir)])
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._free: list[Channel] = []

    def keep(self, mails: Sequence[bytes]) -> Callable[[], list[str]]:
        """Begin to keep these mails; what waits until they are kept, and returns their references.

        It raises ArchiveUnavailable. If nobody waits the mails are kept all the same, where they can be.
        """
        try:
            channel = self._channel()
            channel.write(mails)
            channel.say([len(mail) for mail in mails])
        except OSError as error:
            return partial(self._fail, error)
        return partial(self._references, channel)

    def _references(self, channel: Channel) -> list[str]:
        try:
            told: list[str] | str = channel.hear()
            channel.memory.truncate(KEPT_BYTES)
        except OSError as error:
            self._fail(error)
        with self._lock:
            if channel.process is self._process:
                self._free.append(channel)
        if isinstance(told, str):
            raise ArchiveUnavailable(told)
        return told

    def _fail(self, error: OSError) -> NoReturn:
        why = self._ended(1.0) or error.strerror or str(error)
        raise ArchiveUnavailable(
            f"raw mail cannot be kept: the process that does it cannot be had ({why}). It is tried anew; nothing is lost meanwhile"
        ) from error

    def _channel(self) -> Channel:
        """One that nobody uses. Raises OSError where none can be had."""
        with self._lock:
            control = self._control
            if control is None or self._process is None or self._process.poll() is not None:
                control = self._start()
            if self._free:
                return self._free.pop()
            memory = _file_in_memory()
            ours, theirs = socket.socketpair()
            with ours, theirs:
                socket.send_fds(control, [b"+"], [theirs.fileno(), memory.fileno()])
                return Channel(ours.makefile("rw", encoding="ascii"), memory, self._process)

    def _start(self) -> socket.socket:
        control, theirs = socket.socketpair()
        if self._control:
            self._control.close()
        self._free.clear()
        self._control, self._process = control, None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_A_GROUP)  # a new process begins with what is blocked here
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "src.producer.archiver"],
                    stdin=theirs.fileno(),
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), PLACE: self._place},
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return control

    def end(self) -> None:
        """End the process. What it is at nobody waits for by now: it is kept whole or not at all."""
        if self._process and self._control:
            self._control.shutdown(socket.SHUT_WR)
            if not self._ended(END_SECONDS):
                self._process.kill()

    def _ended(self, seconds: float) -> str:
        """How the process ended, within `seconds`; "" if it did not."""
        with self._lock:
            if not (self._process and self._control and wait([self._control], seconds)):  # nothing comes over it but its end
                return ""
            code = self._process.wait()
            return f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"


def _file_in_memory() -> FileIO:
    """A file without a name; on the disk where the system has none in memory (macOS), or refuses it (vm.memfd_noexec=2)."""
    with suppress(AttributeError, PermissionError):
        return FileIO(os.memfd_create("raw mail"), "r+b")
    with tempfile.TemporaryFile() as file:
        return FileIO(os.dup(file.fileno()), "r+b")


# the process


def main() -> None:
    url, data_dir = json.loads(os.environ[PLACE])
    archive = open_archive(url, Path(data_dir))
    assert archive is not None, "with RAW_ARCHIVE=off nothing is asked for"
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as control:  # that one stays open to the very end, and tells of it
        while handles := socket.recv_fds(control, 1, 2)[1]:
            lines = socket.socket(fileno=handles[0]).makefile("rw", encoding="ascii")
            channel = Channel(lines, FileIO(handles[1], "r+b"))
            threading.Thread(target=_serve, args=(channel, archive), daemon=True).start()


def _serve(channel: Channel, archive: Archive) -> None:
    """Keep what is asked for over a channel until its other end is closed."""
    with suppress(ConnectionError), channel.lines, channel.memory:
        while True:
            try:
                told: list[str] | str = archive.put_all(channel.read(channel.hear()))
            except ArchiveUnavailable as error:
                told = str(error)
            channel.say(told)


if __name__ == "__main__":
    main()
