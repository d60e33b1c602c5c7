"""Which Redis is used, and the embedded Valkey: started once, shared, ended by the last one out, never orphaned.

Port 6379 is never touched: what the module takes for it is a free port of the test.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config.settings import Settings, load_settings
from src.common import embedded
from src.common.embedded import Embedded, chosen_server, existing_redis, open_redis
from src.common.exceptions import ConfigurationError, RedisUnavailable
from src.common.shutdown import Shutdown
from tests.support.processes import free_port
from tests.support.servers import RedisServer
from tests.support.wait import until


@pytest.fixture(autouse=True)
def local_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """What stands for 127.0.0.1:6379; nobody listens there."""
    port = free_port()
    monkeypatch.setattr(embedded, "LOCAL", ("127.0.0.1", port))
    monkeypatch.delenv("REDIS_URL", raising=False)
    return port


@pytest.fixture
def data() -> Iterator[Path]:
    """A DATA_DIR short enough for a unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="data-"))
    yield folder
    shutil.rmtree(folder)


def settings(data: Path, **more: object) -> Settings:
    return load_settings({"DATA_DIR": str(data), **more}, env_file=None)


def answers(data: Path) -> bool:
    """Whether the embedded server of `data` is up."""
    try:
        socket_path = str(data / "redis" / "valkey.sock")
        with redis.Redis(unix_socket_path=socket_path, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def pid_of(server: Embedded) -> int:
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        return int(client.info("server")["process_id"])


class Saying(threading.Thread):
    """Listens on `port` and answers the first connection's bytes with `reply`."""

    def __init__(self, port: int, reply: bytes) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", port))
        self._reply = reply
        self.start()

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            connection.recv(64)
            connection.sendall(self._reply)


# the choice


def test_where_nothing_answers_the_embedded_server_is_chosen_and_remembered(data: Path, local_port: int) -> None:
    """A server that comes later does not replace it."""
    assert chosen_server(data / "new") == "embedded"
    Saying(local_port, b"+PONG\r\n")
    assert chosen_server(data / "new") == "embedded"
    assert json.loads((data / "new" / "redis.json").read_text()) == {"use": "embedded"}


@pytest.mark.parametrize(
    "reply",
    [
        b"+PONG\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.\r\n",
        b"-MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.\r\n",
        b"-ERR max number of clients reached\r\n",
    ],
    ids=["idle", "loading", "script", "disk", "clients"],
)
def test_a_server_that_answers_is_chosen_and_waited_for_later(data: Path, local_port: int, reply: bytes) -> None:
    """Missing at the next start, it is not replaced by an empty one."""
    Saying(local_port, reply)
    assert [chosen_server(data), chosen_server(data)] == ["local", "local"]


def test_something_else_on_that_port_is_no_redis(data: Path, local_port: int) -> None:
    Saying(local_port, b"HTTP/1.1 400 Bad Request\r\n")
    assert chosen_server(data) == "embedded"


def test_a_server_that_wants_a_password_is_not_replaced(data: Path, local_port: int) -> None:
    """The user has one: say what to set, remember nothing."""
    Saying(local_port, b"-NOAUTH Authentication required.\r\n")
    with pytest.raises(ConfigurationError, match=r"wants a password: set REDIS_URL=redis://user:password@"):
        chosen_server(data)
    assert not (data / "redis.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"use": "other"}'])
def test_a_damaged_memory_is_an_error_not_a_new_choice(data: Path, content: str) -> None:
    """A new choice could leave all unfinished mail behind on the other server."""
    (data / "redis.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"redis\.json is damaged"):
        chosen_server(data)


def test_a_data_dir_that_cannot_be_made_is_a_setting_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"DATA_DIR=.*/file/data: cannot be written"):
        chosen_server(tmp_path / "file" / "data")


# the server


def test_it_is_shared_and_the_last_one_out_ends_it(data: Path) -> None:
    """One process, one append-only file, whoever comes first and leaves first."""
    with Embedded(data, tcp=False) as second:
        with Embedded(data, tcp=False) as first:
            assert pid_of(first) == pid_of(second)
        assert answers(data)
    assert not answers(data)


def test_what_was_written_is_there_after_the_last_one_left(data: Path) -> None:
    """The append-only file is flushed before the process ends."""
    for number in range(3):
        with Embedded(data, tcp=False) as server, redis.Redis(unix_socket_path=str(server.socket)) as client:
            assert client.incr("n") == number + 1


def test_a_server_that_was_killed_is_started_again_on_its_data(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """kill -9: within a second or so, with what it had answered."""
    shutdown = Shutdown()
    with Embedded(data, tcp=False, shutdown=shutdown) as server:
        with redis.Redis(unix_socket_path=str(server.socket)) as client:
            client.config_set("appendfsync", "always")
            client.set("k", "v")
        keeper = threading.Thread(target=server.keep_alive, daemon=True)
        keeper.start()
        os.kill(pid_of(server), signal.SIGKILL)
        until(lambda: not answers(data) or "gone" in caplog.text, what="the server is gone")
        until(lambda: answers(data), what="it answers again")
        with redis.Redis(unix_socket_path=str(server.socket)) as client:
            assert client.get("k") == b"v"
        shutdown.request("end")
        keeper.join(20)
    assert not answers(data)
    assert "is gone: starting it again" in caplog.text


class Ticks(Shutdown):
    """Never requested, but its waits end after some turns: a process that ends without a signal (--once)."""

    turns = 1000

    def wait(self, seconds: float) -> bool:
        self.turns -= 1
        return self.turns < 0


def test_a_server_that_we_ended_is_not_started_again(data: Path) -> None:
    """The thread that keeps it alive must not take our own end for its death: an orphan would stay behind."""
    ticks = Ticks()
    with Embedded(data, tcp=False, shutdown=ticks) as server:
        ticks.turns = 1
        server.keep_alive()
        assert answers(data)
    ticks.turns = 3
    server.keep_alive()
    orphan = answers(data)
    if orphan:
        os.kill(pid_of(server), signal.SIGKILL)
    assert not orphan


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """That process stands still, as in a frozen machine or behind a disk that hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def starts(data: Path) -> int:
    """How many servers have begun on the append-only file of `data`."""
    return (data / "redis" / "valkey.log").read_text().count("Server initialized")


def test_a_server_that_only_does_not_answer_gets_no_second_one(
    data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would write to one append-only file. It is said once, waited for, and its pid is in the line."""
    monkeypatch.setattr(embedded, "LOOK_SECONDS", 0.2)
    shutdown = Shutdown()
    with Embedded(data, tcp=False, shutdown=shutdown) as server:
        pid = pid_of(server)
        with stopped(pid):
            keeper = threading.Thread(target=server.keep_alive, daemon=True)
            keeper.start()
            until(lambda: "embedded Valkey" in caplog.text, what="the keeper has seen it")
        until(lambda: answers(data), what="it goes on")
        assert (pid_of(server), starts(data)) == (pid, 1)
        shutdown.request("end")
        keeper.join(20)
    assert f"the embedded Valkey lives (pid {pid}) and does not answer: waiting for it" in caplog.messages
    assert not answers(data)


def test_a_server_that_is_busy_answers(data: Path) -> None:
    """A script that runs long: who joins it meanwhile waits for what it asks for, and not for a server."""
    with Embedded(data, tcp=False) as server:
        admin = redis.Redis(unix_socket_path=str(server.socket), retry=Retry(NoBackoff(), 0), socket_timeout=30)
        admin.config_set("busy-reply-threshold", 10)

        def work() -> None:
            with pytest.raises(redis.ResponseError):
                admin.eval("while true do end", 0)

        script = threading.Thread(target=work)
        script.start()

        def busy() -> bool:
            try:
                admin.ping()
            except redis.ResponseError:
                return True
            return False

        try:
            until(busy, 20, "it is busy")
            with Embedded(data, tcp=False):
                assert busy()
        finally:
            admin.script_kill()
            script.join(20)


def test_a_command_says_which_server_does_not_answer(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after START_SECONDS or when it is stopped, and leaves the server to those who use it."""
    monkeypatch.setattr(embedded, "START_SECONDS", 0.3)
    monkeypatch.setattr(embedded, "LOOK_SECONDS", 0.1)
    with Embedded(data, tcp=False) as server:
        pid = pid_of(server)
        with stopped(pid):
            with pytest.raises(RedisUnavailable, match=rf"\(pid {pid}\) and did not answer within 0\.3 s: see .*valkey\.log"):
                Embedded(data, tcp=False).__enter__()
            shutdown = Shutdown()
            shutdown.request("SIGTERM")
            with pytest.raises(RedisUnavailable, match="stopped before the embedded Valkey answered"):
                Embedded(data, tcp=False, shutdown=shutdown).__enter__()
        until(lambda: answers(data), what="it goes on")
        assert (pid_of(server), starts(data)) == (pid, 1)


def test_what_a_killed_server_left_running_is_waited_for(data: Path) -> None:
    """Its child that rewrites the append-only file has inherited its lock: the next server starts when that is gone."""
    other = Embedded(data, tcp=False)
    with Embedded(data, tcp=False) as server, redis.Redis(unix_socket_path=str(server.socket)) as client:
        client.config_set("rdb-key-save-delay", 100_000)  # microseconds: the child is at it for long enough
        client.mset({f"key {number}": "v" for number in range(100)})
        client.bgrewriteaof()
        [child] = until(lambda: children(pid_of(server)), what="the child that rewrites")
        with stopped(child):
            os.kill(pid_of(server), signal.SIGKILL)
            entering = threading.Thread(target=other.__enter__, daemon=True)
            entering.start()
            entering.join(0.3)
            assert (answers(data), starts(data)) == (False, 1)
        entering.join(20)
        assert (answers(data), starts(data)) == (True, 2)
        other.__exit__()
    assert not answers(data)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def slow(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data` with an append-only file that takes its server about a second to load, longer than START_SECONDS."""
    with Embedded(data, tcp=False) as server, redis.Redis(unix_socket_path=str(server.socket)) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(8000):
            pipeline.set(f"key {number}", "v")
        pipeline.execute()
    binary = data / "slow-server"
    binary.write_text(f'#!/bin/sh\nexec {embedded.get_binary_path()} "$@" --key-load-delay 50\n')
    binary.chmod(0o700)
    monkeypatch.setattr(embedded, "get_binary_path", lambda: binary)
    monkeypatch.setattr(embedded, "START_SECONDS", 0.2)
    return data


def test_a_server_that_loads_has_the_time_it_takes(slow: Path) -> None:
    """However long: ended meanwhile it would begin anew at every start and never come up."""
    with Embedded(slow, tcp=False) as server, redis.Redis(unix_socket_path=str(server.socket)) as client:
        assert client.dbsize() == 8000


class StoppedWhileItLoads(Shutdown):
    """A signal comes while the server at `socket` loads."""

    def __init__(self, socket: Path) -> None:
        super().__init__()
        self._socket = socket

    def wait(self, seconds: float) -> bool:
        try:
            with redis.Redis(unix_socket_path=str(self._socket), retry=Retry(NoBackoff(), 0)) as client:
                client.ping()
        except redis.BusyLoadingError:
            return True
        except redis.ConnectionError:
            pass
        return False


def test_a_stop_while_the_server_loads_ends_both(slow: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for the server any more: it is no orphan."""
    shutdown = StoppedWhileItLoads(slow / "redis" / "valkey.sock")
    with pytest.raises(RedisUnavailable, match="stopped before"):
        Embedded(slow, tcp=False, shutdown=shutdown).__enter__()
    with (slow / "redis" / "server.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert caplog.messages == []


def test_the_socket_is_ours_alone_and_the_port_is_said(data: Path, local_port: int) -> None:
    """EMBEDDED_TCP: the port has no password, and the line at start says so."""
    with Embedded(data, tcp=True) as server:
        assert f"127.0.0.1:{local_port} (no password: any local user can read it)" in server.describe()
        with redis.Redis(port=local_port) as client:
            assert client.ping()
        assert server.socket.stat().st_mode & 0o077 == 0
        assert server.folder.stat().st_mode & 0o077 == 0
    with Embedded(data, tcp=False) as server:
        assert str(local_port) not in server.describe()
        with pytest.raises(redis.ConnectionError):
            redis.Redis(port=local_port, retry=Retry(NoBackoff(), 0)).ping()


def test_a_taken_port_is_left_alone(data: Path, local_port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody listens there: the embedded server does without, and says so."""
    with socket.create_server(("127.0.0.1", local_port)), Embedded(data, tcp=True) as server:
        assert answers(data)
        assert "no password" not in server.describe()
    assert f"port {local_port} is taken" in caplog.text


def test_it_never_evicts_and_keeps_an_append_only_file(data: Path) -> None:
    """Unfinished mail is no cache; the integer sets of processed ids stay compact."""
    with Embedded(data, tcp=False) as server, redis.Redis(unix_socket_path=str(server.socket), decode_responses=True) as client:
        config = client.config_get("*")
        assert (config["maxmemory-policy"], config["appendonly"], config["set-max-intset-entries"]) == (
            "noeviction",
            "yes",
            "4096",
        )


def test_a_server_that_cannot_start_says_where_to_look(data: Path) -> None:
    """A damaged append-only file: exit, not an empty server."""
    with Embedded(data, tcp=False) as server, redis.Redis(unix_socket_path=str(server.socket)) as client:
        client.set("k", "v")
    [manifest] = data.rglob("*.manifest")
    manifest.write_text("rubbish\n")
    with pytest.raises(ConfigurationError, match=r"does not start \(exit 1\): see .*valkey\.log"):
        Embedded(data, tcp=False).__enter__()
    manifest.unlink()


def test_a_long_data_dir_has_its_socket_elsewhere(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unix socket paths end at 103 bytes; the folder for it is ours alone, or refused."""
    monkeypatch.setattr(tempfile, "tempdir", str(data))
    long = data / ("x" * 100)
    with Embedded(long, tcp=False) as server:
        assert len(os.fsencode(server.socket)) <= 103
        assert server.socket.is_socket()
        assert server.socket.parent.stat().st_mode & 0o777 == 0o700
    server.socket.parent.chmod(0o755)
    with pytest.raises(ConfigurationError, match="must be a folder of yours with mode 0700"):
        Embedded(long, tcp=False)


# from the settings


def test_a_command_without_redis_says_which_one_and_what_to_do(data: Path, local_port: int) -> None:
    """Not the bare error of a socket: the setting, or the first run's choice and where it stands."""
    with (
        pytest.raises(RedisUnavailable, match=r"^Redis does not answer \(.*refused.*\): start it, or mend REDIS_URL$"),
        open_redis(settings(data, REDIS_URL=f"redis://127.0.0.1:{local_port}/0"), Shutdown()) as client,
    ):
        client.ping()
    (data / "redis.json").write_text('{"use": "local"}')
    chosen = (
        rf"the Redis on 127\.0\.0\.1:{local_port}, which the first run chose \({data}/redis\.json\), does not answer \(.*\): "
    )
    with (
        pytest.raises(RedisUnavailable, match=chosen + "start it, or set REDIS_URL"),
        open_redis(settings(data), Shutdown()) as client,
    ):
        client.ping()


def test_redis_url_is_used_and_nothing_is_started(data: Path, valkey: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A server without persistence is used, with a warning that says what to switch on."""
    with caplog.at_level(logging.INFO), open_redis(settings(data, REDIS_URL=valkey.url), Shutdown()) as client:
        client.call("SET", "k", "v")
    assert valkey.client().get("k") == "v"
    assert list(data.iterdir()) == []
    assert "Redis: REDIS_URL" in caplog.messages
    assert "keeps nothing on disk" in caplog.text
    assert str(valkey.socket_path) not in caplog.text


def test_a_redis_url_that_does_not_answer_is_waited_for_never_replaced(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    with open_redis(settings(data, REDIS_URL=url), Shutdown()):
        assert "does not answer yet" in caplog.text
    assert list(data.iterdir()) == []


def test_without_a_url_the_embedded_server_runs_while_it_is_used(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And is said at start, without a warning: it persists."""
    shutdown = Shutdown()
    with caplog.at_level(logging.INFO), open_redis(settings(data, EMBEDDED_TCP="false"), shutdown) as client:
        assert client.persists() is True
        assert answers(data)
        shutdown.request("end")
    assert not answers(data)
    assert any(message.startswith("Redis: embedded Valkey on ") for message in caplog.messages)
    assert "keeps nothing" not in caplog.text


def test_the_remembered_local_server_is_used(data: Path, valkey: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCAL", ("127.0.0.1", valkey.port))
    with open_redis(settings(data), Shutdown()) as client:
        client.call("SET", "k", "local")
    assert valkey.client().get("k") == "local"
    assert chosen_server(data) == "local"
    assert not (data / "redis").exists()


# a dry run


def test_a_dry_run_finds_what_is_there_and_starts_nothing(data: Path, valkey: RedisServer) -> None:
    """Neither a server nor a file: nothing answers, REDIS_URL, the embedded one while it runs."""
    assert existing_redis(settings(data)) is None
    assert existing_redis(settings(data, REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")) is None
    assert list(data.iterdir()) == []
    client = existing_redis(settings(data, REDIS_URL=valkey.url))
    assert client is not None
    client.close()
    chosen_server(data)
    assert existing_redis(settings(data)) is None
    with Embedded(data, tcp=False):
        client = existing_redis(settings(data))
        assert client is not None
        client.close()
    assert not answers(data)
