"""The daemons that start.sh started: their pid files, and whether the process of that number is still the one that was started."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import _path  # noqa: F401  # before the project's own modules
from src.common.exceptions import ConfigurationError


class Refused(Exception):
    """Nothing is done, as things stand (exit code 1)."""


@dataclass(frozen=True)
class Process:
    """`name`: producer, worker-3. `life`: what tells this process from a later one of the same number. `args`: it was started with."""

    name: str
    pid: int
    life: str
    args: tuple[str, ...]

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]

    @property
    def number(self) -> int:
        return int(self.name.partition("-")[2] or 0)

    @property
    def alive(self) -> bool:
        return bool(self.life) and life_of(self.pid) == self.life


def life_of(pid: int) -> str:
    """When the process began, and its command line; "" where there is none, or only its remains."""
    if sys.platform == "linux":
        try:
            facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
        return "" if facts[0] in "ZX" else f"{facts[19]} {command}"
    told = subprocess.run(["ps", "-ww", "-p", str(pid), "-o", "stat=,lstart=,command="], capture_output=True, text=True)
    state, _, rest = told.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else rest.strip()


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
                found.append(Process(path.stem, int(pid), **{**json.loads(facts), "args": tuple(json.loads(facts)["args"])}))
            except (ValueError, KeyError, TypeError, OSError):
                found.append(Process(path.stem, 0, "", ()))
        return sorted((process for process in found if process.role in ("producer", "worker")), key=_order)

    def log_of(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def launch(self, name: str, args: Sequence[str]) -> tuple[Process, subprocess.Popen[bytes]]:
        """Start `producer.py` or `worker.py` in a session of its own, what it writes appended to its log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        script = f"{name.partition('-')[0]}.py"
        with self.log_of(name).open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, script, *args], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        process = Process(name, child.pid, life_of(child.pid), tuple(args))
        facts = {key: value for key, value in asdict(process).items() if key in ("life", "args")}
        written = self.run / f"{name}.tmp"
        written.write_text(f"{child.pid}\n{json.dumps(facts)}\n")
        written.replace(self.run / f"{name}.pid")
        return process, child

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
