"""The project installed in a folder of its own, for the tests of what an operator runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.registry import registered
from tests.support.daemons import ROOT
from tests.support.endpoint import Asked
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import adopt, release

COPIED = ("scripts", "src", "config", "tests", "producer.py", "worker.py", "requirements.txt")


class Installed:
    """The project in a folder of its own, by links, with the settings of `pipeline`; run from elsewhere."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.root = pipeline.tmp / "installed"
        venv = self.root / ".venv"
        venv.mkdir(parents=True)
        for name in COPIED:
            (self.root / name).symlink_to(ROOT / name)
        for path in Path(sys.prefix).iterdir():
            if not path.name.startswith("."):
                (venv / path.name).symlink_to(path)
        version = f"Python {sys.version.split()[0]}\n"  # what setup_python looks at: nothing is to be installed
        (venv / ".installed-runtime").write_text(version + (ROOT / "requirements.txt").read_text())
        self.env = {
            **{name: value for name, value in os.environ.items() if name.startswith(("PATH", "COVERAGE_"))},
            "HOME": str(pipeline.tmp),
            "LANG": "C.UTF-8",
            **pipeline.env,
            "TOKEN_DIR": str(pipeline.tmp / "tokens"),
        }
        self.seen: set[int] = set()

    def run(self, script: str, *args: str, code: int = 0, **env: str) -> str:
        """What it wrote; AssertionError for another exit code than `code`."""
        command = [self.root / "scripts" / script, *args]
        try:
            done = subprocess.run(command, env=self.env | env, cwd="/", capture_output=True, text=True, timeout=DEADLINE)
        finally:
            for pid in set(self.pids().values()) - self.seen:
                self.seen.add(pid)
                adopt(pid)
        assert done.returncode == code, f"{script} {args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def pids(self) -> dict[str, int]:
        """Name → process id, as the pid files say."""
        files = sorted((self.root / "data" / "run").glob("*.pid"))
        return {path.stem: int(path.read_text().split()[0]) for path in files}

    def asked(self, pid: int) -> Asked:
        """The endpoint of a daemon."""
        with RedisClient.connect(self.pipeline.redis.url, max_connections=4, socket_timeout=10) as redis:
            [address] = [
                seen.daemon.address for seen in registered(redis, Keys("email_ingestion_stream")) if seen.daemon.pid == pid
            ]
        return Asked(int(address.rpartition(":")[2]))

    def close(self) -> None:
        for pid in self.seen:
            if _folder_of(pid) == str(self.root):
                os.killpg(pid, signal.SIGKILL)
            release(pid)


def _folder_of(pid: int) -> str:
    """Its working directory: by it a test knows its own daemons. "" where it has ended."""
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return ""
