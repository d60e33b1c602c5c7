"""`scripts/backup.py` and `scripts/restore.py` as a user runs them, on real servers."""

from __future__ import annotations

import hashlib
import json
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest

from src.backup.commands import PAGE
from src.backup.restore import Restore, Target
from src.backup.source import opened
from src.backup.take import Backup, Taken
from src.common.clock import SYSTEM
from src.common.exceptions import BackupError, ConfigurationError
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.registry import Registration, leave, register
from src.common.shutdown import Shutdown
from src.sandbox.server import Sandbox
from tests.integration.test_commands import finished
from tests.support import acl
from tests.support.account import GROUP
from tests.support.daemons import ROOT, Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import free_port
from tests.support.proxy import FaultProxy
from tests.support.servers import RedisServer, have_redis, make_certificate, need
from tests.support.wait import until

STREAM = "email_ingestion_stream"
KEYS = Keys(STREAM)
FORMATS = pytest.mark.parametrize("form", ["rdb", "jsonl.zst"])


def said_of(output: str) -> dict[str, Any]:
    """What a script said as JSON, in its last line."""
    said: dict[str, Any] = json.loads(output.splitlines()[-1])
    return said


class Desk:
    """Runs the two scripts on a server; backups go to `tmp / "backups"`."""

    def __init__(self, server: RedisServer, tmp: Path, url: str = "") -> None:
        self.env = {"REDIS_URL": url or server.url, "LOG_FORMAT": "text"}
        self.tmp = tmp

    def script(self, name: str, *args: str, **env: str) -> Daemon:
        return Daemon(f"scripts/{name}.py", *args, env={**self.env, **env}, tmp=self.tmp)

    def run(self, name: str, *args: str, code: int = 0, **env: str) -> str:
        return finished(self.script(name, *args, **env), code)

    def backup(self, *args: str, **env: str) -> tuple[Path, dict[str, Any]]:
        """The file, and what was said of it."""
        said = said_of(self.run("backup", *args, **env))
        return self.tmp / said["file"], said

    def restore(self, file: Path, *args: str, code: int = 0, **env: str) -> str:
        return self.run("restore", "--file", str(file), *args, code=code, **env)


@pytest.fixture
def hurried(either_redis: RedisServer) -> RedisServer:
    quick(either_redis)
    return either_redis


@pytest.fixture
def quick_valkey(valkey: RedisServer) -> RedisServer:
    quick(valkey)
    return valkey


def quick(server: RedisServer) -> Any:
    """Its client. It sends a snapshot without the wait for further replicas."""
    client = server.client()
    client.config_set("repl-diskless-sync-delay", "0")
    return client


def furnish(server: RedisServer) -> None:
    """One key of each kind that we have, pending entries of two consumers, letters that are no UTF-8; and two keys that are not ours."""
    with server.client(decode_responses=False) as client:
        ids = [client.xadd(STREAM, {b"email_id": b"m%d" % number, b"subject": b"Gr\xc3\xbc\xc3\x9fe"}) for number in range(1, 8)]
        ids.append(client.xadd(STREAM, {b"foreign": b"\xff\xfe\x00\r\n"}))
        client.xgroup_create(STREAM, GROUP, "0")
        client.xreadgroup(GROUP, "w1", {STREAM: ">"}, count=3)
        client.xreadgroup(GROUP, "w2", {STREAM: ">"}, count=2)
        client.xclaim(STREAM, GROUP, "w2", 0, [ids[0]], retrycount=7)
        client.xack(STREAM, GROUP, ids[1])  # a mail that waits: in the stream, in nobody's hands
        client.xdel(STREAM, ids[2])  # deleted by hand while in flight
        client.zadd(KEYS.due, {ids[1] + b"|m2": 1795461855235})
        client.hset(KEYS.index, mapping={b"m%d" % number: b"S:" + ids[number - 1] for number in range(1, 8)})
        client.hset(KEYS.starts, b"m1", b"0|1-1:1")
        client.hset(KEYS.tries, b"m2", b"1|1|1795461855102")
        client.hset(KEYS.open, b"a@example.org|INBOX|20260131", 7)
        client.hset(KEYS.steps("m1"), b"charge", b'{"paid":1}')
        client.sadd(KEYS.run("r1"), b"m8")
        client.sadd(KEYS.processed_day("a@example.org", "20260130"), *(str(number) for number in range(3000)))
        client.expire(KEYS.processed_day("a@example.org", "20260130"), 86_400)
        client.xadd(KEYS.dlq, {b"email_id": b"m0", b"dead_reason": b"permanent"})
        client.xtrim(KEYS.dlq, maxlen=0, approximate=False)  # empty, but it knows its last id
        client.xadd(KEYS.results, {b"email_id": b"m9", b"outcome": b"done", b"result": b"{}"})
        own = KEYS.mailbox("a@example.org", "Büro/[x]*")
        for key, value in ((own.uidvalidity, "6"), (own.last_uid, "9"), (own.last_poll, "now"), (own.email_count, "9")):
            client.set(key, value)
        client.hset(own.intake, mapping={"owner": "n", "batch": "b", "epoch": "2"})
        client.set("somebody:else", "keep me")
        client.set("email_ingestion_streams", "keep me too")
        client.select(3)
        client.set(STREAM, "of another database")
        client.select(0)


def contents(server: RedisServer, *, expiries: bool = True) -> dict[str, Any]:
    """All of the server but the registered daemons, in words that do not depend on its version; each stream with its group."""
    found: dict[str, Any] = {}
    with server.client(decode_responses=False) as client:
        for name in client.scan_iter("*", count=1000):
            kind, key = client.type(name).decode(), name.decode(errors="surrogateescape")
            if key == KEYS.daemons:
                continue
            value: Any = None
            if kind == "stream":
                about, groups = client.xinfo_stream(name), client.xinfo_groups(name)
                value = [client.xrange(name), [about["last-generated-id"], about["entries-added"], about["max-deleted-entry-id"]]]
                for group in groups:
                    rows = client.xpending_range(name, group["name"], "-", "+", 10_000)
                    value.append([group["name"], group["last-delivered-id"], group["entries-read"]])
                    value.append([(row["message_id"], row["consumer"], row["times_delivered"]) for row in rows])
            elif kind == "string":
                value = client.get(name)
            elif kind == "hash":
                value = client.hgetall(name)
            elif kind == "set":
                value = client.smembers(name)
            elif kind == "zset":
                value = client.zrange(name, 0, -1, withscores=True)
            found[key] = [kind, value, client.pexpiretime(name) if expiries else None]
    return found


def known(said: dict[str, Any]) -> dict[str, Any]:
    """`contents` as a restore leaves them: without the pending entry whose mail was deleted by hand."""
    entries, rows = said[STREAM][1][0], said[STREAM][1][3]
    standing = {entry_id for entry_id, _ in entries}
    rows[:] = [row for row in rows if row[0] in standing]
    return said


def ours(said: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if KEYS.is_data(key)}


# there and back


@pytest.mark.parametrize("form", ["rdb", pytest.param("jsonl.zst", marks=pytest.mark.full)])
def test_a_backup_under_load_survives_the_loss_of_redis(
    sandbox: Sandbox, quick_valkey: RedisServer, tmp_path: Path, form: str
) -> None:
    """Taken while mail arrives and is worked at, wiped, restored: every mail ends once, and what was done before is not done again.

    Effects of what was done after the backup repeat.
    """
    pipeline = Pipeline(sandbox, quick_valkey, tmp_path)
    desk = Desk(quick_valkey, tmp_path, pipeline.env["REDIS_URL"])
    dead = pipeline.deliver("permanent", "permanent")
    retried = pipeline.deliver(*["again go"] * 4)
    held = pipeline.deliver(*["hold go"] * 6)
    pipeline.deliver(*(f"slow {20 + number % 30}" for number in range(150)))
    with pipeline.producer() as producer, pipeline.worker(WORKER_CONCURRENCY="16") as worker, pipeline.worker() as other:
        pipeline.wait_for_begun(held)
        pipeline.wait_for_books(lambda books: len(books.done) > 10 and set(dead) <= books.fates(), "work has begun")
        with desk.script("backup", "--format", form) as script:
            pipeline.deliver(*(f"slow {number}" for number in range(40)))
            assert script.exit_code(DEADLINE) == 0, script.output()
            said = said_of(script.output())
        assert said["counts"]["in_flight"] >= len(held), "the backup was taken in the middle of the work"
        before = pipeline.books()
        pipeline.deliver("after the backup", "fail 1")
        pipeline.wait_for_books(lambda books: len(books.done) > len(before.done), "work goes on after the backup")
        for daemon in (producer, worker, other):
            daemon.kill9()
    pipeline.client.flushall()
    begun = len(pipeline.lines("begin"))

    restored = said_of(desk.restore(tmp_path / said["file"]))
    assert restored["redis"] == said["counts"]
    done = set(pipeline.books().done)
    assert len(done) > 10 and set(pipeline.books().reasons) == set(dead)

    pipeline.open_gate("go")
    with pipeline.producer(), pipeline.worker(), pipeline.worker():
        pipeline.wait_until_settled()
        again = {line.email_id for line in pipeline.lines("begin")[begun:]}
    pipeline.assert_accounted(dead=dict.fromkeys(dead, "permanent"))
    assert not again & done, "what the backup knows as done is not begun again"
    assert {*held, *retried} <= again


@pytest.mark.parametrize(
    ("either_redis", "form", "diskless"),
    [("redis7", "rdb", "no"), ("valkey", "rdb", "yes"), ("redis7", "jsonl.zst", "yes"), ("valkey", "jsonl.zst", "no")],
    indirect=["either_redis"],
)
def test_all_of_it_comes_back_and_nothing_else_is_touched(hurried: RedisServer, tmp_path: Path, form: str, diskless: str) -> None:
    """Every key, group, pending entry, expiry and odd byte; other keys, databases and registrations stay. Both ways to send a snapshot."""
    desk, client = Desk(hurried, tmp_path), hurried.client()
    client.config_set("repl-diskless-sync", diskless)
    furnish(hurried)
    before = contents(hurried)
    file, said = desk.backup("--format", form)
    client.config_set("repl-diskless-sync", "yes")
    assert contents(hurried) == before, "a backup changes nothing"
    assert said["counts"] == {
        "unfinished": 7,
        "in_flight": 4 - (form == "jsonl.zst"),
        "waiting": 1,
        "dead": 0,
        "processed_ids": 3000,
        "results": 1,
        "mailboxes": 1,
        "keys": len(ours(before)),
    }
    assert file.stat().st_mode & 0o777 == 0o600
    assert hashlib.sha256(file.read_bytes()).hexdigest() == said["sha256"]

    client.delete(*ours(before))
    client.set("somebody:else", "changed since")
    desk.restore(file)
    after = contents(hurried)
    assert after.pop("somebody:else")[1] == b"changed since"
    assert ours(after) == ours(known(before))
    assert set(after) == set(before) - {"somebody:else"}
    assert hurried.client(db=3).get(STREAM) == "of another database"


@FORMATS
def test_from_a_newer_server_into_an_older_one_and_back(
    quick_valkey: RedisServer, redis7: RedisServer, tmp_path: Path, form: str
) -> None:
    """Valkey 9 → Redis 7.0, whose own RDB reader refuses such a file, and back again: equal, groups and pending entries included."""
    quick(redis7)
    furnish(quick_valkey)
    there, back = Desk(quick_valkey, tmp_path), Desk(redis7, tmp_path)
    back.restore(there.backup("--format", form)[0])
    assert contents(redis7) == ours(known(contents(quick_valkey)))
    middle = contents(redis7)
    file, _ = back.backup("--format", form)
    there.restore(file, "--force")
    assert ours(contents(quick_valkey)) == middle


def test_the_printed_command_restores_the_backup(quick_valkey: RedisServer, tmp_path: Path) -> None:
    """The line that a backup prints is run as it stands, from any folder; a file of spaces in its path too."""
    furnish(quick_valkey)
    desk = Desk(quick_valkey, tmp_path)
    _, said = desk.backup("--out", "my backups")
    quick_valkey.client().delete(*ours(contents(quick_valkey)))
    python, script, *args = shlex.split(said["restore"])
    assert python == "python" and Path(script).is_absolute()
    (tmp_path / "elsewhere").mkdir()
    finished(Daemon(script, *args, env=desk.env, tmp=tmp_path / "elsewhere"))
    assert quick_valkey.client().xlen(STREAM) == 7


def test_a_file_that_the_server_wrote_itself(quick_valkey: RedisServer, tmp_path: Path) -> None:
    """An RDB file without a manifest, under any name: restored, with a word about what was not proved."""
    furnish(quick_valkey)
    client = quick_valkey.client()
    client.save()
    shutil.copy(quick_valkey.directory / "dump.rdb", tmp_path / "backup.rdb")
    before = contents(quick_valkey)
    output = Desk(quick_valkey, tmp_path).restore(tmp_path / "backup.rdb", "--force")
    assert "no backup.rdb.manifest.json: the file is proved by its own checksum alone" in output
    assert contents(quick_valkey) == known(before)


# what is refused, before anything is written


@FORMATS
def test_a_cut_or_altered_backup_is_refused(quick_valkey: RedisServer, tmp_path: Path, form: str) -> None:
    """Cut, one byte altered, with and without the manifest, a damaged manifest, another stream: a line that says so."""
    furnish(quick_valkey)
    file, _ = Desk(quick_valkey, tmp_path).backup("--format", form)
    whole, beside = file.read_bytes(), file.with_name(f"{file.name}.manifest.json")
    manifest = beside.read_bytes()
    middle = len(whole) // 2
    altered = whole[:middle] + bytes([whole[middle] ^ 0x20]) + whole[middle + 1 :]
    cases = [
        (whole[:-9], manifest, STREAM, rf"{file.name} is cut or altered: \d+ bytes, its manifest says {len(whole)}"),
        (altered, manifest, STREAM, f"{file.name} is altered: its SHA-256"),
        (whole[:-9], None, STREAM, f"{file.name} is cut or altered"),
        (altered, None, STREAM, f"{file.name} is cut or altered"),
        (whole, manifest[:-20], STREAM, "manifest.json is damaged"),
        (b"not a backup at all", None, STREAM, "neither an RDB file nor a .jsonl.zst"),
        (whole, manifest, "other", "set STREAM_NAME=email_ingestion_stream"),
        (whole, None, "other", "STREAM_NAME"),
    ]
    if form == "rdb":
        newer = whole.replace(b"REDIS0011", b"REDIS0099", 1)
        cases.append(
            (newer, None, STREAM, r"is of a server that none of this machine can stand in for \(Can't handle RDB format version")
        )
    for content, beside_it, stream, line in cases:
        file.write_bytes(content)
        beside.write_bytes(beside_it) if beside_it else beside.unlink(missing_ok=True)
        with (
            pytest.raises((BackupError, ConfigurationError), match=line),
            opened(file, Keys(stream), 0, Shutdown(), lambda *_: None),
        ):
            pass


def test_a_refused_file_changes_nothing(quick_valkey: RedisServer, tmp_path: Path) -> None:
    """Exit codes of the command: 1 for an altered file, 2 for none; with --force too, the server holds what it held."""
    furnish(quick_valkey)
    desk = Desk(quick_valkey, tmp_path)
    file, _ = desk.backup()
    before = contents(quick_valkey)
    file.write_bytes(file.read_bytes()[:-1])
    assert "is cut or altered" in desk.restore(file, "--force", code=1).splitlines()[-1]
    assert "cannot be read (No such file or directory)" in desk.restore(tmp_path / "none.rdb", code=2)
    assert contents(quick_valkey) == before


def test_a_target_with_daemons_or_data_needs_force(quick_valkey: RedisServer, tmp_path: Path) -> None:
    """Refused with the reason, also by --dry-run, which changes nothing; --force replaces all of ours and leaves no key of before."""
    furnish(quick_valkey)
    desk, client = Desk(quick_valkey, tmp_path), quick_valkey.client()
    file, _ = desk.backup()
    kept = ours(known(contents(quick_valkey)))
    client.set("producer_state:new@example.org:INBOX:last_uid", "5")
    client.xadd(STREAM, {"email_id": "m10"})
    before = contents(quick_valkey)
    reason = "this Redis is not empty: "
    assert reason in desk.restore(file, code=1)
    said = said_of(desk.restore(file, "--dry-run", code=1))
    assert reason in said["refusal"] and said["redis"]["unfinished"] == 8 and said["backup"]["unfinished"] == 7
    with RedisClient.connect(quick_valkey.url, max_connections=4, socket_timeout=10) as redis:
        worker = Registration("worker", "vm-1-abc", "", "0.1.0", "vm", 1, "2026-01-31T00:00:00Z")
        register(redis, KEYS, worker)
        assert "daemons are at work: worker vm-1-abc" in desk.restore(file, code=1)
        assert not said_of(desk.restore(file, "--dry-run", "--force"))["refusal"]
        assert contents(quick_valkey) == before
        desk.restore(file, "--force")
        assert client.hexists(KEYS.daemons, "vm-1-abc")
        leave(redis, KEYS, worker)
    assert ours(contents(quick_valkey)) == kept


# what goes wrong on the way


@pytest.fixture
def much(quick_valkey: RedisServer, tmp_path: Path) -> Path:
    """A backup of 4 MB in many commands; the server holds something else by now."""
    with quick_valkey.client() as client, client.pipeline(transaction=False) as pipe:
        for number in range(4000):
            pipe.xadd(KEYS.results, {"email_id": f"m{number}", "outcome": "done", "result": "x" * 1000})
        pipe.execute()
    file, _ = Desk(quick_valkey, tmp_path).backup()
    quick_valkey.client().flushall()
    furnish(quick_valkey)
    return file


def left(server: RedisServer) -> list[str]:
    return list(server.client().scan_iter(KEYS.restoring_pattern(), count=1000))


def test_kill_9_of_a_restore_leaves_the_target_as_it_was(much: Path, quick_valkey: RedisServer, tmp_path: Path) -> None:
    """Killed half-way: Redis holds what it held, beside what was laid aside; the next restore removes that and succeeds."""
    before = contents(quick_valkey)
    with FaultProxy(quick_valkey.port) as proxy:
        proxy.delay(30)
        desk = Desk(quick_valkey, tmp_path, f"redis://127.0.0.1:{proxy.port}/0")
        with desk.script("restore", "--file", str(much), "--force") as restore:
            until(lambda: left(quick_valkey), DEADLINE, "something is laid aside")
            proxy.stall(True)
            restore.kill9()
    aside = left(quick_valkey)
    assert aside
    assert {key: value for key, value in contents(quick_valkey).items() if key not in aside} == before
    Desk(quick_valkey, tmp_path).restore(much, "--force")
    assert not left(quick_valkey)
    assert quick_valkey.client().xlen(KEYS.results) == 4000


def test_a_restore_that_is_stopped_or_cut_off_says_what_stands(much: Path, quick_valkey: RedisServer, tmp_path: Path) -> None:
    """SIGTERM: nothing is left. A connection that breaks: what is left and who removes it. Redis holds what it held."""
    before = contents(quick_valkey)
    with FaultProxy(quick_valkey.port) as proxy:
        proxy.delay(30)
        desk = Desk(quick_valkey, tmp_path, f"redis://127.0.0.1:{proxy.port}/0")
        with desk.script("restore", "--file", str(much), "--force") as restore:
            until(lambda: left(quick_valkey), DEADLINE, "something is laid aside")
            assert restore.terminate() == 1
            assert "stopped as asked. Nothing was restored: the server holds what it held" in restore.output()
        assert contents(quick_valkey) == before
        with desk.script("restore", "--file", str(much), "--force") as restore:
            until(lambda: left(quick_valkey), DEADLINE, "something is laid aside")
            proxy.refuse(True)
            proxy.cut()
            assert restore.exit_code() == 1
            assert "The server holds what it held, and" in restore.output()
            assert "the next restore removes them" in restore.output()
    assert {key: value for key, value in contents(quick_valkey).items() if ":restoring:" not in key} == before


def restored_meanwhile(server: RedisServer, commands: list[list[str]], meanwhile: Callable[[Any], object]) -> str:
    """Why a restore of `commands` into a server that was found empty gave up; `meanwhile` happens before its last step."""
    with RedisClient.connect(server.url, max_connections=4, socket_timeout=10, not_utf8="surrogateescape") as redis:
        target = Target.look(redis, KEYS)
        assert not target.refusal(force=False)

        def carried_out() -> Iterator[list[str]]:
            yield from commands
            meanwhile(server.client())

        with pytest.raises(BackupError) as refusal:
            Restore(redis, KEYS, "n", lambda: False, lambda done: None).run(carried_out(), target, force=False)
    assert not left(server)
    return str(refusal.value)


BEAT = json.dumps(asdict(Registration("worker", "late", "", "0.1.0", "vm", 1, "2026-01-31T00:00:00Z")))
MANY = [
    ["HSET", KEYS.index, str(number), "S:1-0"] for number in range(PAGE)
]  # a whole batch: carried out before the next is asked for


@pytest.mark.parametrize(
    ("meanwhile", "why"),
    [
        (
            lambda client: client.hset(KEYS.daemons, "late", f"{int(client.time()[0])}000|{BEAT}"),
            "the daemon late was started meanwhile",
        ),
        (lambda client: client.hset(KEYS.index, "m1", "S:1-0"), f"{KEYS.index} was written meanwhile"),
        (lambda client: client.delete(KEYS.restoring("n", 0)), f"{KEYS.index} did not arrive whole: 0 of {PAGE}"),
        (lambda client: client.hdel(KEYS.restoring("n", 0), "7"), f"{KEYS.index} did not arrive whole: {PAGE - 1} of {PAGE}"),
    ],
)
def test_what_happens_between_the_look_and_the_last_step(
    quick_valkey: RedisServer, meanwhile: Callable[[Any], object], why: str
) -> None:
    """A daemon starts, somebody writes, what was laid aside is lost: the last step looks again, and nothing is restored."""
    client = quick_valkey.client()
    assert why in restored_meanwhile(quick_valkey, [*MANY, ["PEXPIREAT", KEYS.index, "1"]], meanwhile)
    assert client.hlen(KEYS.index) <= 1, "nothing but what was written meanwhile"


def test_another_restore_takes_what_was_laid_aside(quick_valkey: RedisServer) -> None:
    """The last step itself sees that something is gone, before it writes anything."""
    keys = [KEYS.daemons, KEYS.restoring("n", 0), KEYS.index, KEYS.restoring("n", 1), KEYS.due, KEYS.dlq]
    quick_valkey.client().hset(keys[1], "m1", "S:1-0")
    quick_valkey.client().xadd(KEYS.dlq, {"stays": "here"})
    before = contents(quick_valkey)
    with RedisClient.connect(quick_valkey.url, max_connections=4, socket_timeout=10) as redis:
        assert redis.run("restore", keys, ["", 2, "", ""]) == ["GONE", keys[3]]
    assert contents(quick_valkey) == before


def test_a_target_without_room_is_left_as_it_was(much: Path, tmp_path: Path) -> None:
    """maxmemory is reached half-way: exit 1, said, nothing left of the restore."""
    with RedisServer("valkey", options={"maxmemory": "4mb", "maxmemory-policy": "noeviction"}) as small:
        small.client().set("producer_state:a:INBOX:last_uid", "1")
        output = Desk(small, tmp_path).restore(much, "--force", code=1)
        assert "Redis has no room for the backup" in output
        assert "Nothing was restored: the server holds what it held" in output
        assert set(contents(small)) == {"producer_state:a:INBOX:last_uid"}


@FORMATS
def test_a_full_disk_leaves_no_half_backup(quick_valkey: RedisServer, tmp_path: Path, form: str) -> None:
    """A file may have 64 KiB: exit 1, a line that says what to do, and the folder holds what it held."""
    with quick_valkey.client() as client, client.pipeline(transaction=False) as pipe:
        for number in range(300):
            noise = hashlib.shake_128(str(number).encode()).hexdigest(500)
            pipe.xadd(KEYS.results, {"email_id": f"m{number}", "result": noise})
        pipe.execute()
    (tmp_path / "backups").mkdir()
    (tmp_path / "backups" / "mine.txt").write_text("not a backup")
    desk = Desk(quick_valkey, tmp_path)
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536)); "
        "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [sys.executable, "-c", limited, str(ROOT / "scripts" / "backup.py"), "--format", form]
    done = subprocess.run(argv, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **desk.env}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "no backup was made; make room, or give another folder with --out" in done.stderr.splitlines()[-1]
    assert {path.name for path in (tmp_path / "backups").iterdir()} == {".lock", "mine.txt"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_snapshot_that_breaks_off(quick_valkey: RedisServer, tmp_path: Path) -> None:
    """The connection ends in the middle of the snapshot: exit 1 and no file."""
    with quick_valkey.client() as client, client.pipeline(transaction=False) as pipe:
        for number in range(2000):
            pipe.xadd(KEYS.results, {"result": hashlib.shake_128(str(number).encode()).hexdigest(500)})
        pipe.execute()
    with FaultProxy(quick_valkey.port) as proxy:
        proxy.cut_after(500_000, "to_client")
        desk = Desk(quick_valkey, tmp_path, f"redis://127.0.0.1:{proxy.port}/0")
        output = desk.run("backup", code=1)
    assert "broke" in output.splitlines()[-1]
    assert [path.name for path in (tmp_path / "backups").iterdir()] == [".lock"]


# who keeps what


def test_keep_removes_older_backups_of_ours_only(quick_valkey: RedisServer, tmp_path: Path) -> None:
    """--keep 2 of four, both forms counted together, manifests with them; other files stay; an empty backup removes none."""
    furnish(quick_valkey)
    desk, out = Desk(quick_valkey, tmp_path), tmp_path / "backups"
    first = desk.backup()[0]
    (out / "email-ingestion-notes.rdb").touch()
    (out / "email-ingestion-20200101T000000Z.rdb.part").touch()
    second = desk.backup("--format", "jsonl.zst", "--keep", "2")[0]
    assert first.exists() and second.exists()
    third, said = desk.backup("--keep", "2")
    assert said["removed"] == [str(first)]
    files = {second, third, *(path.with_name(f"{path.name}.manifest.json") for path in (second, third))}
    assert set(out.iterdir()) == {*files, out / ".lock", out / "email-ingestion-notes.rdb"}
    quick_valkey.client().flushall()
    assert "the backup is empty, and --keep removes none for it" in desk.run("backup", "--keep", "1")
    assert files < set(out.iterdir())


class NewerServer:
    """What a backup asks of a server, answered by one whose snapshot no server of this machine reads."""

    database = 0

    def version(self) -> str:
        return "Redis 99.0.0"

    @contextmanager
    def bare_connection(self) -> Iterator[socket.socket]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b"+OK\r\n+OK\r\n+FULLRESYNC 0 0\r\n$20\r\nREDIS0099\xfe\x00not known")
            yield ours


def test_a_snapshot_that_nobody_here_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As .rdb it is kept, with a word that it was not tried and without counts; the portable form cannot be had, and nothing is left."""

    def backup(kind: Literal["rdb", "jsonl.zst"]) -> Taken:
        server: Any = NewerServer()
        return Backup(server, KEYS, tmp_path, kind, 1, SYSTEM, Shutdown(), lambda *_: None).run()

    older = tmp_path / "email-ingestion-20200101T000000Z.rdb"
    older.touch()
    taken = backup("rdb")
    assert "the backup is kept, but it was not tried" in caplog.text
    assert taken.manifest.counts is None and not taken.removed and older.exists()
    with pytest.raises(BackupError, match="none of this machine can stand in for"):
        backup("jsonl.zst")
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        older.name,
        taken.path.name,
        f"{taken.path.name}.manifest.json",
    }


# ways in


def test_over_tls_and_as_a_user_with_few_rights(tmp_path: Path) -> None:
    """rediss:// with the operator of docs/security.md: refused with the rights that are missing; with them, a backup and its restore."""
    need(have_redis(), "redis-server")
    key, certificate, port = tmp_path / "key.pem", tmp_path / "ca.pem", free_port()
    make_certificate(key, certificate, "DNS:localhost,IP:127.0.0.1")
    options = {"tls-port": str(port), "tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-auth-clients": "no"}
    with RedisServer("redis", options=options) as server:
        client = quick(server)
        acl.make_users(client)
        furnish(server)
        client.execute_command("ACL", "SETUSER", "operator", "-psync", "-replconf")
        url = acl.as_user(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}", "operator")
        desk = Desk(server, tmp_path, url)
        assert "needs +psync +replconf" in desk.run("backup", code=2)
        client.execute_command("ACL", "SETUSER", "operator", "+psync", "+replconf")
        file, _ = desk.backup()
        before = contents(server)
        client.delete(*ours(before))
        desk.restore(file)
        assert contents(server) == known(before)
