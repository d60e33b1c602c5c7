"""The daemons that start.sh started: their pid files, and whether the process of that number is still the one that was started."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import _path  # noqa: F401  # before the project's own modules
from src.common.exceptions import ConfigurationError

TAIL_BYTES = 10_000


class Refused(Exception):
    """Nothing is done, as things stand (exit code 1)."""


@dataclass(frozen=True)
class Process:
    """`name`: producer, worker-3. `began`: when, as the system tells it, "" if it ended at once. `args`: it was started with."""

    name: str
    pid: int
    began: str
    args: tuple[str, ...]

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]

    @property
    def number(self) -> int:
        return int(self.name.partition("-")[2] or 0)

    @property
    def alive(self) -> bool:
        """The number alone proves nothing: it may be another program's by now."""
        began, command = life_of(self.pid)
        return began != "" and began == self.began and (not command or script_of(self.name) in command)


def script_of(name: str) -> str:
    return f"{name.partition('-')[0]}.py"


def life_of(pid: int) -> tuple[str, str]:
    """(when the process began, its command line); "" for both where there is none, or only its remains. A process that just began has
    no command line yet."""
    if sys.platform == "linux":
        try:
            facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return "", ""
        return ("", "") if facts[0] in "ZX" else (facts[19], command)
    told = subprocess.run(["ps", "-ww", "-p", str(pid), "-o", "stat=,lstart=,command="], capture_output=True, text=True)
    words = told.stdout.split()  # S Tue Nov 24 10:00:12 2026 python producer.py
    return ("", "") if len(words) < 6 or words[0].startswith("Z") else (" ".join(words[1:6]), " ".join(words[6:]))


@dataclass(frozen=True)
class Launched:
    """A daemon that was just started, our child. `offset`: where in `log` its own lines begin."""

    process: Process
    child: subprocess.Popen[bytes]
    log: Path
    offset: int


class Folder:
    """`DATA_DIR/run` with a pid file for each daemon, `DATA_DIR/logs` with what they write."""

    def __init__(self, data_dir: Path) -> None:
        self.run, self.logs = data_dir / "run", data_dir / "logs"

    def processes(self) -> list[Process]:
        """All that have a pid file, alive or not: the producer first, then the workers in the order of their start."""
        found = []
        for path in self.run.glob("*.pid"):
            try:
                pid, facts = path.read_text().split("\n", 1)
                told = json.loads(facts)
                found.append(Process(path.stem, int(pid), told["began"], tuple(told["args"])))
            except (ValueError, KeyError, TypeError, OSError):
                found.append(Process(path.stem, 0, "", ()))
        return sorted((process for process in found if process.role in ("producer", "worker")), key=_order)

    def log_of(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def last_words(self, role: str) -> str:
        """The line with which the last of `role` that wrote a log said why it cannot run; "" where its log ends otherwise."""
        logs = [path for path in self.logs.glob("*.log") if path.stem.partition("-")[0] == role]
        if not logs:
            return ""
        with max(logs, key=lambda path: path.stat().st_mtime).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return lines[-1] if lines and lines[-1].startswith(f"{script_of(role)}: ") else ""

    def launch(self, name: str, args: Sequence[str]) -> Launched:
        """Start `producer.py` or `worker.py` in a session of its own, what it writes appended to its log.

        Raises Refused where that or its pid file cannot be written: then it does not run.
        """
        child = None
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            with self.log_of(name).open("ab") as log:
                offset = log.tell()
                child = subprocess.Popen(
                    [sys.executable, script_of(name), *args],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            process = Process(name, child.pid, life_of(child.pid)[0], tuple(args))
            facts = {"began": process.began, "args": args}
            written = self.run / f"{name}.tmp"
            written.write_text(f"{child.pid}\n{json.dumps(facts)}\n")
            written.replace(self.run / f"{name}.pid")
        except OSError as error:
            if child:  # one without a pid file would be known to nobody
                child.terminate()
                child.wait()
            raise Refused(f"{name} cannot be started: {error}; make room, or mend the rights of {self.run.parent}") from error
        return Launched(process, child, self.log_of(name), offset)

    def forget(self, process: Process) -> None:
        (self.run / f"{process.name}.pid").unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One script at a time starts and stops. Raises Refused where another is at it, ConfigurationError where nothing can be written."""
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"{self.run} cannot be written ({error.strerror}); choose another DATA_DIR") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise Refused("another start.sh, stop.sh or scale.sh is at work: wait for its end") from None
        finally:
            os.close(handle)


def _order(process: Process) -> tuple[str, int]:
    return process.role, process.number
