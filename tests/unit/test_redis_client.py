"""The connection to Redis: one round trip a call, every foreign error translated, no hidden retry."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from src.common.exceptions import (
    ConfigurationError,
    GroupMissing,
    IngestionError,
    RedisFull,
    RedisUnavailable,
    ScriptRefused,
)
from src.common.redis_client import Arg, RedisClient, pairs, translated
from src.common.scripts import LUA, load
from tests.support.fake import Store
from tests.support.processes import free_port
from tests.support.proxy import FaultProxy
from tests.support.servers import RedisServer
from tests.support.wait import until


def connect(url: str, *, timeout: float = 10) -> RedisClient:
    return RedisClient.connect(url, max_connections=4, socket_timeout=timeout)


# commands, on fakeredis and on Valkey


def test_commands_come_back_as_plain_data(store: Store) -> None:
    """Text in, text out; what is not there is empty."""
    client = store.redis
    client.ping()
    assert client.call("SET", "k", "é 🎉") == "OK"
    assert client.call("GET", "k") == "é 🎉"
    assert client.call("GET", "no") is None
    assert client.call("INCRBY", "n", 5) == 5
    client.call("HSET", "h", "a", "1", "b", "2")
    assert client.hash("h") == {"a": "1", "b": "2"}
    assert client.hash("no") == {}
    client.call("SADD", "s", "1", "3")
    assert client.are_members("s", ["1", "2", "3"]) == [True, False, True]
    assert client.are_members("no", ["1"]) == [False]
    assert client.are_members("s", []) == []


def test_streams_come_back_as_ids_and_fields(store: Store) -> None:
    """Read once by a group, looked at as often as one likes, counted."""
    client = store.redis
    for number in (1, 2, 3):
        client.call("XADD", "s", f"{number}-0", "n", number)
    client.call("XGROUP", "CREATE", "s", "g", "0")
    assert client.read_new("s", "g", "c", count=2, block_ms=1) == [("1-0", {"n": "1"}), ("2-0", {"n": "2"})]
    assert client.read_new("s", "g", "c", count=2, block_ms=1) == [("3-0", {"n": "3"})]
    assert client.read_new("s", "g", "c", count=2, block_ms=1) == []
    assert client.entries("s", count=2) == [("1-0", {"n": "1"}), ("2-0", {"n": "2"})]
    assert client.entries("s", "2-0", "2-0", count=9) == [("2-0", {"n": "2"})]
    assert (client.length("s"), client.length("no"), client.entries("no", count=1)) == (3, 0, [])


def test_a_key_of_another_type_is_refused(store: Store) -> None:
    """Repeating cannot help."""
    store.redis.call("SET", "s", "text")
    with pytest.raises(ScriptRefused, match="WRONGTYPE"):
        store.redis.length("s")


def test_an_error_inside_a_script_keeps_its_code(store: Store) -> None:
    """The refused kind, not an unknown one: the batch is repeated mail by mail."""
    store.redis.call("SET", store.keys.dlq, "text")
    store.redis.call("HSET", store.keys.index, "gm:a:1", "D:1-0")
    keys = store.keys
    with pytest.raises(ScriptRefused, match="WRONGTYPE"):
        store.redis.run("discard", [keys.index, keys.dlq, keys.open, keys.results, "set"], [1, 1, "1-0", "gm:a:1", "1", 1, "o"])


# on real Valkey: what no fake shows


@pytest.fixture
def client(valkey: RedisServer) -> Iterator[RedisClient]:
    with connect(valkey.url) as client:
        yield client


@pytest.mark.parametrize("scheme", ["unix", "redis"])
def test_it_connects_by_socket_and_by_port(valkey: RedisServer, scheme: str) -> None:
    with connect(valkey.url if scheme == "unix" else valkey.tcp_url) as client:
        client.ping()


def test_connecting_sends_nothing_yet() -> None:
    """The address need not answer: who calls decides how to wait."""
    client = connect(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(RedisUnavailable):
        client.ping()


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1", "127.0.0.1:6379", "redis://127.0.0.1:port/0", "redis://u:sec/ret@127.0.0.1:1/0"],
)
def test_an_address_that_cannot_be_one_is_a_setting_to_mend(url: str) -> None:
    """One line that names the variable and shows no part of a password."""
    with pytest.raises(ConfigurationError, match=r"^REDIS_URL") as caught:
        connect(url)
    assert "sec" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_transition_that_the_server_forgot_is_sent_again_whole(client: RedisClient) -> None:
    """NOSCRIPT → EVAL: after a restart of the server, once; then the short form works again."""
    for _ in range(2):
        client.call("SCRIPT", "FLUSH")
        sha = load("missing").sha
        assert client.call("SCRIPT", "EXISTS", sha) == [0]
        assert client.run("missing", ["i", "p"], ["gm:a:1", "1", 1]) == [1]
        assert client.call("SCRIPT", "EXISTS", sha) == [1]
        assert client.run("missing", ["i", "p"], ["gm:a:1", "1", 1]) == [1]


def test_every_transition_loads_on_the_server(client: RedisClient) -> None:
    """Each file of lua/ that is one (it has a `#!lua` line) compiles under the sha by which it is called."""
    names = [path.stem for path in LUA.glob("*.lua") if path.read_text().startswith("#!lua")]
    assert len(names) >= 14
    for name in names:
        script = load(name)
        assert "--#include" not in script.source
        assert client.call("SCRIPT", "LOAD", script.source) == script.sha


def test_bytes_that_are_no_utf8_are_replaced_not_fatal(client: RedisClient, valkey: RedisServer) -> None:
    """A foreign entry may hold anything."""
    valkey.client(decode_responses=False).xadd("s", {b"\xff\xfe": b"a\x80b"}, id="1-0")
    assert client.entries("s", count=1) == [("1-0", {"��": "a�b"})]


def test_text_that_is_no_utf8_is_refused_not_fatal(client: RedisClient) -> None:
    """A lone surrogate of ours: this mail is refused, the process goes on."""
    with pytest.raises(ScriptRefused, match="surrogates"):
        client.call("SET", "k", "a\ud800b")
    with pytest.raises(ScriptRefused, match="surrogates"):
        client.run("missing", ["k"], ["a\ud800b"])


def test_reading_without_a_group_says_so(client: RedisClient) -> None:
    """FLUSHALL while a worker runs: it joins again. (fakeredis words it in its own way.)"""
    with pytest.raises(GroupMissing):
        client.read_new("s", "g", "c", count=1, block_ms=1)


def test_an_empty_read_waits_its_block_time_and_ends(client: RedisClient) -> None:
    """A quiet stream is no lost connection."""
    client.call("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
    assert client.read_new("s", "g", "c", count=1, block_ms=50) == []


def test_a_read_is_woken_up_by_new_mail(client: RedisClient, valkey: RedisServer) -> None:
    """It does not wait for the end of its block time."""
    client.call("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.extend(client.read_new("s", "g", "c", count=1, block_ms=9000)), daemon=True)
    reader.start()
    other = valkey.client()
    until(lambda: other.info("clients")["blocked_clients"] == 1, what="the reader blocks")
    other.xadd("s", {"n": "1"}, id="1-0")
    reader.join(20)
    assert found == [("1-0", {"n": "1"})]


def test_a_group_destroyed_under_a_waiting_reader_says_group_missing(client: RedisClient, valkey: RedisServer) -> None:
    """DEL or XGROUP DESTROY by hand: the worker joins again, it does not wait for ever."""
    client.call("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
    errors: list[IngestionError] = []

    def read() -> None:
        try:
            client.read_new("s", "g", "c", count=1, block_ms=9000)
        except IngestionError as error:
            errors.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    other = valkey.client()
    until(lambda: other.info("clients")["blocked_clients"] == 1, what="the reader blocks")
    other.xgroup_destroy("s", "g")
    reader.join(20)
    assert [type(error) for error in errors] == [GroupMissing]


def test_a_call_whose_reply_is_lost_is_sent_once(valkey: RedisServer) -> None:
    """redis-py's own defaults would send it again: three XADD would stand in the stream."""
    with FaultProxy(valkey.port) as proxy, connect(f"redis://127.0.0.1:{proxy.port}/0", timeout=0.3) as client:
        client.ping()
        proxy.stall(True)
        with pytest.raises(RedisUnavailable):
            client.call("XADD", "s", "*", "n", "1")
        proxy.stall(False)
        other = valkey.client()
        until(lambda: other.xlen("s") == 1, what="the stalled XADD arrives")
        client.ping()
        assert other.xlen("s") == 1


def test_a_connection_that_is_cut_under_a_call_is_an_error_once_and_replaced(valkey: RedisServer) -> None:
    """The next call connects anew."""
    with FaultProxy(valkey.port) as proxy, connect(f"redis://127.0.0.1:{proxy.port}/0") as client:
        client.ping()
        proxy.cut_after(0, "to_client")
        with pytest.raises(RedisUnavailable):
            client.ping()
        client.ping()


def test_leaving_the_context_closes_the_connections(valkey: RedisServer) -> None:
    """Nothing of ours stays at the server."""
    with connect(valkey.url) as client:
        client.call("CLIENT", "SETNAME", "ours")
        other = valkey.client()
        assert "ours" in {row["name"] for row in other.client_list()}
    until(lambda: "ours" not in {row["name"] for row in other.client_list()}, what="the connection is closed")


def test_more_threads_than_connections_wait_for_their_turn(valkey: RedisServer) -> None:
    """16 threads on 4 connections: every call is answered, and the server never sees a fifth."""
    with connect(valkey.url) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: client.call("LPUSH", "k", number), range(800)))
        assert client.call("LLEN", "k") == 800
        assert len(client.call("CLIENT", "LIST").splitlines()) <= 4


def test_who_waits_for_a_connection_comes_before_the_thread_that_gave_it_back(valkey: RedisServer) -> None:
    """A renewal of leases is not passed by handlers that ask again and again."""
    with RedisClient.connect(valkey.url, max_connections=1, socket_timeout=20) as client, ThreadPoolExecutor(3) as pool:
        waiting = client._transport.connection_pool.pool._waiting

        def busy() -> None:
            client.call("BLPOP", "gate", 0)
            for number in range(50):
                client.call("RPUSH", "k", f"busy {number}")

        pool.submit(busy)
        until(lambda: valkey.client().info("clients")["blocked_clients"], what="the one connection is at work")
        for number in (1, 2):
            pool.submit(client.call, "RPUSH", "k", f"renewal {number}")
            until(lambda number=number: len(waiting) == number, what=f"{number} wait")  # type: ignore[misc]
        valkey.client().rpush("gate", "open")
        pool.shutdown()
        assert client.call("LRANGE", "k", 0, 3) == ["renewal 1", "renewal 2", "busy 0", "busy 1"]


def test_a_turn_that_does_not_come_is_an_outage(valkey: RedisServer) -> None:
    """Nobody waits longer than for an answer, and who gave up takes no connection with it."""
    with RedisClient.connect(valkey.url, max_connections=1, socket_timeout=0.2) as client:
        connections = client._transport.connection_pool
        taken = connections.get_connection()
        with pytest.raises(RedisUnavailable, match="No connection available"):
            client.ping()
        connections.release(taken)
        client.ping()


def test_a_server_that_keeps_nothing_on_disk_is_recognised() -> None:
    """Append-only file or snapshots: either persists."""
    with RedisServer("valkey") as server, connect(server.url) as client:
        assert client.info("server")["redis_version"]
        assert client.persists() is False
        client.call("CONFIG", "SET", "save", "3600 1")
        assert client.persists() is True
        client.call("CONFIG", "SET", "save", "")
        client.call("CONFIG", "SET", "appendonly", "yes")
        assert client.persists() is True
        client.call("ACL", "SETUSER", "limited", "on", ">p", "+@all", "-info", "-config", "~*")
        with connect(server.tcp_url.replace("redis://", "redis://limited:p@")) as limited:
            assert limited.persists() is None


def test_a_full_server_refuses_intake_and_lets_workers_finish() -> None:
    """OOM: publish is refused whole (RedisFull), complete is not: the memory can only be freed by finishing."""
    from datetime import UTC, datetime

    from src.common.keys import Keys
    from src.producer.plan import State
    from src.producer.state_manager import Lease, Mail, StateManager
    from src.worker import recovery
    from src.worker.delivery import Delivery, Seat
    from src.worker.idempotency import Done, begin, complete
    from tests.support.fake import fields_of

    now = datetime(2026, 2, 1, tzinfo=UTC)
    with RedisServer("valkey") as server, connect(server.url) as client:
        keys = Keys("s")
        states, seat = StateManager(client, keys, "a", "INBOX", "p"), Seat(client, keys, "g", "w")
        recovery.join(seat)
        assert isinstance(states.acquire(60), Lease)

        def publish(last: State | None, uid: int) -> State:
            state = State(7, uid, "", 0, first_complete=True)
            mails = [Mail(uid, fields_of(f"gm:a:{uid}"))]
            answer = states.publish(mails, batch=f"b{uid}", expected=last, state=state, now=now, most_live=10)
            assert answer.verdict == "OK"
            return state

        first = publish(None, 1)
        client.call("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(RedisFull):
            publish(first, 2)
        [(entry, fields)] = client.read_new("s", "g", "w", count=9, block_ms=1)
        mail = Delivery(entry, 1, fields)
        assert begin(seat, [mail], solo=False, poison=3, now=now)[0].verdict == "GO"
        done = [Done(mail, "done", "{}")]
        assert complete(seat, done, processed_days=1, results_max=9, results_days=1) == ["OK"]
        client.call("CONFIG", "SET", "maxmemory", "0")
        assert states.look() == first
        publish(first, 2)


# answers of a server, word for word


class Answering(socketserver.StreamRequestHandler):
    """Answers every command with one line, after the greeting commands of redis-py."""

    line = b""

    def handle(self) -> None:
        while header := self.rfile.readline():
            words = []
            for _ in range(int(header[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2].upper())
            self.wfile.write(b"+OK\r\n" if words[0] in (b"CLIENT", b"HELLO", b"SELECT") else self.line + b"\r\n")


@contextmanager
def said(line: str) -> Iterator[str]:
    """The address of a server that answers `line` to everything."""
    handler = type("Handler", (Answering,), {"line": line.encode()})

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join(20)


ANSWERS: list[tuple[str, type[IngestionError]]] = [
    ("LOADING Valkey is loading the dataset in memory", RedisUnavailable),
    ("READONLY You can't write against a read only replica.", RedisUnavailable),
    ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", RedisUnavailable),
    ("CLUSTERDOWN The cluster is down", RedisUnavailable),
    ("TRYAGAIN Multiple keys request during rehashing of slot", RedisUnavailable),
    ("BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", RedisUnavailable),
    ("NOREPLICAS Not enough good replicas to write.", RedisUnavailable),
    ("UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)", RedisUnavailable),
    ("ERR max number of clients reached", RedisUnavailable),
    ("MISCONF Errors writing to the AOF file: No space left on device", RedisFull),
    ("OOM command not allowed when used memory > 'maxmemory'.", RedisFull),
    ("OOM command not allowed when used memory > 'maxmemory'. script: abc, on @user_script:1.", RedisFull),
    ("MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk.", RedisFull),
    ("NOAUTH Authentication required.", ConfigurationError),
    ("WRONGPASS invalid username-password pair or user is disabled.", ConfigurationError),
    ("NOPERM User limited has no permissions to run the 'set' command", ConfigurationError),
    ("NOGROUP No such key 's' or consumer group 'g' in XREADGROUP with GROUP option", GroupMissing),
    ("BUSYGROUP Consumer Group name already exists", ScriptRefused),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", ScriptRefused),
    ("ERR unknown command 'FOO', with args beginning with: ", ScriptRefused),
]


@pytest.mark.parametrize(
    ("line", "kind"), ANSWERS, ids=[line.split(" ", 3)[0] + " " + str(n) for n, (line, _) in enumerate(ANSWERS)]
)
def test_each_answer_of_a_server_becomes_what_the_caller_can_do(line: str, kind: type[IngestionError]) -> None:
    """Wait, make room, mend a setting, join again, or leave this mail alone: in a command and in a transition."""
    with said(f"-{line}") as url, connect(url, timeout=5) as client:
        with pytest.raises(IngestionError) as by_command:
            client.call("SET", "k", "v")
        with pytest.raises(IngestionError) as by_script:
            client.run("missing", ["i"], [])
    assert (type(by_command.value), type(by_script.value)) == (kind, kind)
    assert str(by_command.value)


def test_a_server_that_speaks_something_else_is_unavailable() -> None:
    """An HTTP server on that port: no crash, a line that helps."""
    with said("HTTP/1.1 400 Bad Request") as url, connect(url, timeout=1) as client, pytest.raises(RedisUnavailable):
        client.ping()


def test_a_server_that_never_answers_is_unavailable_after_the_timeout() -> None:
    """Half-open connections end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with connect(f"redis://127.0.0.1:{port}/0", timeout=0.2) as client, pytest.raises(RedisUnavailable):
            client.ping()


# the pieces


class Failing:
    """A transport that fails as the network does."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.closed = False

    def execute_command(self, *args: Arg) -> Any:
        raise self.error

    def close(self) -> None:
        self.closed = True


def test_errors_of_the_system_are_translated_too() -> None:
    """A socket file that is gone, a host without a route; and a silent error still says what it was."""
    transport = Failing(FileNotFoundError(2, "No such file"))
    with RedisClient(transport) as client:
        with pytest.raises(RedisUnavailable, match="No such file"):
            client.ping()
        with pytest.raises(RedisUnavailable):
            client.run("missing", [], [])
    assert transport.closed
    assert str(translated(redis.TimeoutError())) == "TimeoutError"


def test_what_is_no_error_of_redis_is_not_hidden() -> None:
    """A programming error stays one."""
    with pytest.raises(ZeroDivisionError):
        RedisClient(Failing(ZeroDivisionError())).ping()


def test_pairs_of_a_flat_reply() -> None:
    assert pairs(["a", "1", "b", "2"]) == {"a": "1", "b": "2"}
    assert pairs({"a": "1"}) == {"a": "1"}
    assert pairs([]) == {}
    with pytest.raises(ValueError, match="zip"):
        pairs(["a"])
