"""A PostgreSQL of our own in a temporary directory: a context manager that leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from tests.support.processes import ChildProcess
from tests.support.servers import ENVIRONMENT, START_TIMEOUT
from tests.support.wait import until

DEBIAN = Path("/usr/lib/postgresql")  # <version>/bin, outside every PATH
OWNER = "postgres"

_names = itertools.count()


def bin_directory() -> Path | None:
    """Where initdb and postgres of the newest installed version stand; None without any."""
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if versions:
        return versions[-1].parent
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def have_postgres() -> bool:
    """Is a PostgreSQL server installed (as root: with its user and setpriv)?"""
    return bin_directory() is not None and (os.geteuid() != 0 or (shutil.which("setpriv") is not None and _owner() is not None))


def _owner() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(OWNER)
    except KeyError:
        return None


class PostgresServer:
    """Runs as the user postgres when we are root (it refuses root), else as ourselves; reached by a unix socket only."""

    def __init__(self) -> None:
        binaries = bin_directory()
        assert binaries is not None, "postgresql is not installed"
        self._binaries = binaries
        self._directory = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._as_owner: list[str] = []
        if os.geteuid() == 0:
            owner = pwd.getpwnam(OWNER)
            os.chown(self._directory, owner.pw_uid, owner.pw_gid)
            self._as_owner = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        self._process: ChildProcess | None = None

    def __enter__(self) -> Self:
        options = ["-D", self._directory / "data", "-U", OWNER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        argv = [*self._as_owner, self._binaries / "initdb", *options]
        subprocess.run(argv, check=True, capture_output=True, env=ENVIRONMENT, cwd=self._directory)
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Start on the same data; returns once it answers."""
        options = {"listen_addresses": "", "unix_socket_directories": str(self._directory), "dynamic_shared_memory_type": "mmap"}
        argv: list[str | Path] = [*self._as_owner, self._binaries / "postgres", "-D", self._directory / "data"]
        for name, value in options.items():
            argv += ["-c", f"{name}={value}"]
        self._process = ChildProcess(argv, log=self._directory / "log", env=ENVIRONMENT, cwd=self._directory)
        until(self._answers, START_TIMEOUT, "PostgreSQL answers")

    def stop(self) -> None:
        """Its fast shutdown: open transactions are rolled back, sessions end."""
        assert self._process is not None, "the server is not running"
        self._process.send(signal.SIGINT)
        self._process.wait(20)
        self._process.kill()
        self._process = None

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(host=str(self._directory), user=OWNER, dbname=database, autocommit=True)

    def new_database(self) -> str:
        """The name of a fresh, empty database."""
        name = f"test{next(_names)}"
        with self.connect() as session:
            session.execute(f"CREATE DATABASE {name}".encode())
        return name

    def url(self, database: str) -> str:
        return f"postgresql://{OWNER}@/{database}?host={self._directory}"

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.running(), f"PostgreSQL ended while starting:\n{self._process.tail()}"
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True
