"""Child processes that never outlive the tests, and the ports they listen on.

Each child leads a process group of its own. One reaper per pytest process knows the groups and kills them when its
stdin ends, which the kernel sees to even when pytest is killed with SIGKILL.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

# Below the range from which Linux and macOS take ports for outgoing connections: while a server is down for a restart,
# no client can be given its port.
PORTS = range(20_000, 32_000)

REAPER = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    sign, group = line[0], int(line[1:])
    groups.add(group) if sign == "+" else groups.discard(group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on now."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no free port among 100 tried in {PORTS}")


@cache
def _reaper() -> IO[str]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", REAPER], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    return process.stdin


def _tell_reaper(sign: str, group: int) -> None:
    print(f"{sign}{group}", file=_reaper(), flush=True)


def adopt(group: int) -> None:
    """A process group that a child of ours left running: killed when pytest ends before its test ended it."""
    _tell_reaper("+", group)


def release(group: int) -> None:
    _tell_reaper("-", group)


def family(pid: int) -> list[int]:
    """A process and all that it has started, theirs too."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):  # the thread has ended meanwhile
                found += [int(child) for child in task.read_text().split()]
    return found


class ChildProcess:
    """One running child in its own process group, its stdout and stderr appended to `log`. `pass_fds`: see subprocess.Popen."""

    def __init__(
        self, argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str], cwd: Path, pass_fds: Sequence[int] = ()
    ) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        self.pid = self._process.pid
        _tell_reaper("+", self.pid)

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float) -> int:
        """The exit code (negative: ended by that signal). Raises AssertionError with the end of its log when still running."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"pid {self.pid} still runs after {timeout:g} s:\n{self.tail()}") from None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the child alone; nothing happens when it has ended."""
        self._process.send_signal(number)

    def send_group(self, number: signal.Signals) -> None:
        """Send a signal to the child and all it has started."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """End the whole group with SIGKILL and forget it."""
        self.send_group(signal.SIGKILL)
        self._process.wait(10)
        _tell_reaper("-", self.pid)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.output().splitlines()[-lines:])
