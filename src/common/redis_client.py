"""The connection to Redis: one round trip a call, every foreign error translated here, no retries hidden inside.

redis-py's own defaults repeat a call up to ten times; an XADD whose reply was lost then writes twice. Here a call is sent once.
Who calls decides whether to repeat it (`src.common.retry`), and every transition is safe to repeat.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Full, SimpleQueue
from types import TracebackType
from typing import Any, Literal, Protocol

import hiredis
import redis
from redis._parsers import Encoder
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from src.common.circuit_breaker import CircuitBreaker
from src.common.exceptions import (
    BreakerOpen,
    ConfigurationError,
    GroupMissing,
    IngestionError,
    RedisFull,
    RedisUnavailable,
    ScriptRefused,
)
from src.common.health import Memory
from src.common.scripts import load
from src.common.timing import NO_STOPWATCH

Arg = str | bytes | int | float
Fields = dict[str, str]

NOT_NOW = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "UNBLOCKED")
NOT_NOW_ERRORS = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.InvalidResponse,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    OSError,
)
NO_ROOM = ("OOM", "MISCONF")
NOT_ALLOWED = ("NOAUTH", "WRONGPASS", "NOPERM")


REDIS_OPEN_SECONDS = 1.0  # longest time that a breaker leaves Redis alone: everything waits for it, and asking costs one packet


class Transport(Protocol):
    """What is needed of a `redis.Redis`: tests hand in one that fails on demand."""

    def execute_command(self, *args: Arg) -> Any: ...

    def pipeline(self, transaction: bool) -> Any: ...

    @property
    def connection_pool(self) -> Any: ...

    def close(self) -> None: ...


class RedisClient:
    """Commands and transitions on one server. A context manager: leaving it closes the connections.

    Every method may raise RedisUnavailable (repeat later), RedisFull (OOM or MISCONF: someone must make room), GroupMissing
    (NOGROUP), ScriptRefused (the data cannot be taken as they are), ConfigurationError (password or ACL).

    `breaker`: set by a daemon, so that of all its threads one asks a server that is away, and the others are told so at once,
    by RedisUnavailable; who repeats calls does not notice. `stopwatch`: set by a daemon; times each call that is answered, but not
    XREADGROUP, which waits for mail on purpose.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.breaker: CircuitBreaker | None = None
        self.stopwatch = NO_STOPWATCH

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        max_connections: int,
        socket_timeout: float,
        not_utf8: Literal["replace", "surrogateescape"] = "replace",
    ) -> RedisClient:
        """A client of `url` (redis://, rediss://, unix://). Nothing is sent yet. `socket_timeout` in seconds, above any block time.
        A call that finds `max_connections` at work waits for its turn, as long at most. `not_utf8`: what becomes of bytes that are no
        UTF-8: U+FFFD, or surrogates that are sent back as the same bytes.

        Raises ConfigurationError for an address that cannot be one.
        """
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                protocol=2,
                decode_responses=True,
                encoding_errors=not_utf8,
                socket_timeout=socket_timeout,
                socket_connect_timeout=min(socket_timeout, 5.0),
                retry=Retry(NoBackoff(), 0),
                max_connections=max_connections,
                timeout=socket_timeout,
                queue_class=_InTurn,
                health_check_interval=0,
                command_packer=_BarePacker() if not_utf8 == "replace" else _packer(not_utf8),
                driver_info=None,  # no CLIENT SETINFO at each connect: Redis 7.0 does not know it, and an ACL would have to allow it
            )
        except ValueError:  # its text may hold a part of the password
            raise ConfigurationError(
                "REDIS_URL: host, port or an option of the address cannot be read "
                "(special characters in user and password are written as %XX)"
            ) from None
        authorities = pool.connection_kwargs.get("ssl_ca_certs")
        if authorities and not Path(authorities).is_file():
            raise ConfigurationError(f"REDIS_URL: there is no file {authorities} (ssl_ca_certs)")
        transport = redis.Redis.from_pool(pool)
        transport.response_callbacks.clear()  # replies as RESP2 sends them: no per-command reshaping in the hot path
        return cls(transport)

    def __enter__(self) -> RedisClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def call(self, *command: Arg) -> Any:
        """One command, its RESP2 reply with text decoded as UTF-8 (what is not UTF-8 becomes U+FFFD)."""
        return self._guarded(lambda: self.stopwatch.time(lambda: self._transport.execute_command(*command)))

    def call_all(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """Several commands in one round trip, each by itself. The first refusal is raised; the others are done nevertheless."""

        def send() -> list[Any]:
            with self._transport.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return list(pipeline.execute())

        return list(self._guarded(send)) if commands else []

    def run(self, name: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """The transition `lua/<name>.lua` in one round trip (EVALSHA; a server that does not know it yet gets it by EVAL)."""
        script = load(name)

        def send() -> Any:
            try:
                return self._transport.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
            except redis.exceptions.NoScriptError:
                return self._transport.execute_command("EVAL", script.source, len(keys), *keys, *args)

        return self._guarded(lambda: self.stopwatch.time(send))

    def _guarded(self, send: Callable[[], Any]) -> Any:
        """`send()`, its errors as ours, and what became of it told to the breaker."""
        if self.breaker is None:
            return _translated(send)
        try:
            return self.breaker.call(lambda: _translated(send))
        except BreakerOpen as error:
            raise RedisUnavailable(str(error)) from error

    def ping(self) -> None:
        self.call("PING")

    @contextmanager
    def bare_connection(self) -> Iterator[socket.socket]:
        """A connection of its own, encrypted and logged in as all are, for what is no command and reply. Closed at the end."""
        connection = self._transport.connection_pool.make_connection()
        try:
            _translated(connection.connect)
            yield connection._sock
        finally:
            connection.disconnect()

    @property
    def database(self) -> int:
        """The number of the database that the address names."""
        return int(self._transport.connection_pool.connection_kwargs.get("db") or 0)

    # streams

    def read_new(self, stream: str, group: str, consumer: str, *, count: int, block_ms: int) -> list[tuple[str, Fields]]:
        """XREADGROUP … > : up to `count` new entries, waiting up to `block_ms` for the first. [(stream id, fields)]"""
        command = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "BLOCK", block_ms, "STREAMS", stream, ">")
        reply = self._guarded(lambda: self._transport.execute_command(*command))
        return _entries(reply[0][1]) if reply else []

    def entries(self, stream: str, start: str = "-", end: str = "+", *, count: int) -> list[tuple[str, Fields]]:
        """XRANGE: entries in order of id."""
        return _entries(self.call("XRANGE", stream, start, end, "COUNT", count))

    def length(self, stream: str) -> int:
        """XLEN; 0 where there is none."""
        return int(self.call("XLEN", stream))

    # sets and plain values

    def are_members(self, key: str, members: Sequence[str]) -> list[bool]:
        """SMISMEMBER: which of `members` stand in the set `key`."""
        return [reply == 1 for reply in self.call("SMISMEMBER", key, *members)] if members else []

    def hash(self, key: str) -> Fields:
        """HGETALL; {} where there is none."""
        return pairs(self.call("HGETALL", key))

    # the server

    def info(self, section: str) -> Fields:
        """INFO `section` as {name: value}."""
        lines = str(self.call("INFO", section)).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))

    def persists(self) -> bool | None:
        """Whether the server writes what it holds to disk (append-only file or snapshots); None where it may not be asked."""
        try:
            if self.info("persistence").get("aof_enabled") == "1":
                return True
            return bool(pairs(self.call("CONFIG", "GET", "save")).get("save"))
        except (ConfigurationError, ScriptRefused):
            return None

    def memory(self) -> Memory | None:
        """How full the server is and what it does at its limit; None where it may not be asked."""
        try:
            info = self.info("memory")
        except (ConfigurationError, ScriptRefused):
            return None
        return Memory(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)), info.get("maxmemory_policy", ""))

    def version(self) -> str:
        """`Redis 7.0.15`, `Valkey 9.1.2`; "" where it may not be asked."""
        try:
            info = self.info("server")
        except (ConfigurationError, ScriptRefused):
            return ""
        return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info.get('redis_version', '')}"


class _InTurn:
    """The free connections of a pool, the last one given back first; who finds none gets one in the order of asking.

    From a LifoQueue a busy thread takes the one it has just given back, again and again: with 64 of them on 20 connections a renewal of
    leases waited for up to two seconds, here for 20 ms.
    """

    def __init__(self, maxsize: int) -> None:
        self.queue: list[Any] = []
        self._maxsize = maxsize
        self._lock = threading.Lock()
        self._waiting: deque[SimpleQueue[Any]] = deque()

    def put_nowait(self, connection: Any) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(connection)
            elif len(self.queue) < self._maxsize:
                self.queue.append(connection)
            else:
                raise Full

    def get(self, block: bool, timeout: float) -> Any:
        with self._lock:
            if self.queue:
                return self.queue.pop()
            mine: SimpleQueue[Any] = SimpleQueue()
            self._waiting.append(mine)
        try:
            return mine.get(timeout=timeout)
        except Empty:
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    raise
            return mine.get()  # it came in that moment


class _BarePacker:
    """hiredis alone. redis-py's own looks at each argument for types that we never send, which costs as much again."""

    def pack(self, *args: Arg) -> list[bytes]:
        return [hiredis.pack_command(args)]  # type: ignore[arg-type]  # its stub takes one argument for all of them


def _packer(not_utf8: str) -> PythonRespSerializer:
    """hiredis' own knows no surrogates."""
    return PythonRespSerializer(6_000, Encoder("utf-8", not_utf8, decode_responses=True).encode)  # type: ignore[no-untyped-call]  # no types


def is_away(error: Exception) -> bool:
    """What the breaker of Redis counts: a server that is full or refuses us does answer."""
    return isinstance(error, RedisUnavailable)


def _translated(send: Callable[[], Any]) -> Any:
    try:
        return send()
    except (redis.RedisError, OSError, UnicodeEncodeError) as error:
        raise translated(error) from error


def pairs(reply: list[str] | tuple[()] | Mapping[str, str]) -> Fields:
    """RESP2's flat [name, value, name, value] as a dict."""
    if isinstance(reply, list):
        return dict(zip(reply[::2], reply[1::2], strict=True))
    return dict(reply)


def _entries(reply: Sequence[Any]) -> list[tuple[str, Fields]]:
    return [(entry[0], pairs(entry[1] or ())) for entry in reply]


def translated(error: Exception) -> IngestionError:
    """The project's error for one of redis-py's, by its class or, where redis-py has none, by the code the server put first."""
    text = str(error)
    code = text.partition(" ")[0]
    if isinstance(error, redis.exceptions.OutOfMemoryError) or code in NO_ROOM:
        return RedisFull(text)
    if isinstance(error, (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError)) or code in NOT_ALLOWED:
        return ConfigurationError(f"Redis refuses us ({text}): check user and password in REDIS_URL and the server's ACL")
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"the certificate of Redis is not trusted ({error.__context__.verify_message}): nothing was sent. "
            "A server with an authority of its own: REDIS_URL=rediss://…?ssl_ca_certs=/path/of/ca.pem"
        )
    if isinstance(error, NOT_NOW_ERRORS) or code in NOT_NOW:
        return RedisUnavailable(text or type(error).__name__)
    if code == "NOGROUP":
        return GroupMissing(text)
    return ScriptRefused(text)
