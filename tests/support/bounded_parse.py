"""Parses mails in child processes that may take so much CPU time and address space and no more.

`python -m tests.support.bounded_parse` reads mails from its standard input (8 bytes of length, the mail) and forks for each;
`BoundedParser` talks to it.
"""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType

from src.mail.parse import parse, stub
from src.mail.record import RECORD_BYTES, Envelope, record_from_json, to_fields

SMALL = 8 << 20
"""Bytes: up to here a mail has CPU_SECONDS and ADDRESS_SPACE."""
CPU_SECONDS = 2
ADDRESS_SPACE = 200 * 1000 * 1000
"""Bytes, the interpreter, its libraries and the mail itself included."""
TIMES_ITS_SIZE = 8
"""A larger mail has that many times its size beside the interpreter, the mail itself included."""

_ROOT = Path(__file__).parents[2]
_HEAD = struct.Struct(">Q")
_ENVELOPE = Envelope("ann@example.org", "INBOX", 7, 3, "2024-05-01T12:00:00Z", 1234, "gm:ann@example.org:5", "c-1", "")


class BoundedParser:
    """A context manager; `parse(raw)` answers "" or what went wrong."""

    def __init__(self, program: tuple[str, ...] = ("-m", "tests.support.bounded_parse")) -> None:
        uncovered = {
            name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
        }  # it costs more than parsing
        self._server = subprocess.Popen(
            [sys.executable, *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT, env=uncovered
        )

    def __enter__(self) -> BoundedParser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.communicate()

    def parse(self, raw: bytes) -> str:
        """Parsed whole and as a stub, made into an entry and read back; "ended by signal 24": it took too much CPU time."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(_HEAD.pack(len(raw)) + raw)
        self._server.stdin.flush()
        return self._server.stdout.readline().decode().strip()


def _serve() -> None:
    source = sys.stdin.buffer
    while head := source.read(_HEAD.size):
        raw = source.read(*_HEAD.unpack(head))
        child = os.fork()
        if child == 0:
            os._exit(_parse_in_bounds(raw))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print("" if code == 0 else f"ended by signal {-code}" if code < 0 else f"exit code {code}, see stderr", flush=True)
        del raw


def _parse_in_bounds(raw: bytes) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if len(raw) <= SMALL:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        address_space = ADDRESS_SPACE
    else:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        address_space = in_use + (TIMES_ITS_SIZE - 1) * len(raw)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    try:
        for record in (parse(raw, _ENVELOPE), stub(_ENVELOPE, raw[: 64 * 1024], "a stub")):
            fields = to_fields(_ENVELOPE, record)
            assert len(fields["record"].encode()) <= RECORD_BYTES, "the record is too large"
            for text in fields.values():
                text.encode()
            record_from_json(fields["record"])
    except BaseException:  # noqa: BLE001  # whatever it is, the parent must hear of it
        traceback.print_exc(limit=-4)
        return 1
    return 0


if __name__ == "__main__":
    _serve()
