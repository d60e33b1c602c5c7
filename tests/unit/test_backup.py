"""The parts of backup and restore that need no server: the portable form, manifests, names, the wire."""

from __future__ import annotations

import errno
import importlib
import json
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import load_settings
from src.backup import files
from src.backup.commands import KEY_AT, Command, Size, Tally, counts, key_of, renamed
from src.backup.files import Manifest, Portable
from src.backup.restore import Restore, Target
from src.backup.snapshot import Wire, announced
from src.backup.take import Taken
from src.common.exceptions import BackupError, ConfigurationError, RedisUnavailable, ScriptRefused
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.registry import Registration, register
from src.common.shutdown import Shutdown
from tests.support.servers import RedisServer

for name in ("_path", "_bulk", "_command", "_steps"):
    sys.modules[name] = importlib.import_module(f"scripts.{name}")  # its own folder is not on our path
script = importlib.import_module("scripts.restore")
say_taken = importlib.import_module("scripts.backup").say_taken

KEYS = Keys("s")
HEAD: dict[str, object] = {"stream": "s", "database": 0, "taken_at": "2026-01-31T00:00:00Z", "server": "Redis 7.0.15"}
COMMANDS: list[Command] = [
    ["XGROUP", "CREATE", "s", "g", "3-0", "MKSTREAM", "ENTRIESREAD", "3"],
    ["XADD", "s", "1-0", "email_id", "m1", "odd", "\udcff\udcfe \x00 ü"],
    ["XADD", "s", "2-0", "email_id", "m2"],
    ["XSETID", "s", "3-0", "ENTRIESADDED", "3", "MAXDELETEDID", "3-0"],
    ["XCLAIM", "s", "g", "w1", "0", "1-0", "TIME", "5", "RETRYCOUNT", "2", "FORCE", "JUSTID"],
    ["ZADD", "s:due", "17", "2-0|m2"],
    ["SADD", "s:processed:a:20260131", "1", "2", "3"],
    ["SADD", "s:processed:a:20260131", "4"],
    ["PEXPIREAT", "s:processed:a:20260131", "99"],
    ["SET", "producer_state:a:INBOX:last_uid", "4"],
    ["HSET", "s:index", "m1", "S:1-0", "m2", "S:2-0"],
]


def portable(path: Path, commands: list[Command] = COMMANDS, head: dict[str, object] = HEAD) -> Path:
    with path.open("wb") as file:
        files.write_portable(file, head, commands)
    return path


# the portable form


def test_commands_come_back_as_they_were(tmp_path: Path) -> None:
    """Also bytes that are no UTF-8, NUL and letters; and twice, since it is read once to be proved and once to be carried out."""
    backup = Portable(portable(tmp_path / "b"))
    assert backup.head["server"] == "Redis 7.0.15"
    assert list(backup.commands()) == list(backup.commands()) == COMMANDS


def test_no_cut_and_no_altered_byte_passes(tmp_path: Path) -> None:
    """Cut after each byte, and each byte altered: BackupError, without a manifest's help; only bytes that carry nothing may differ."""
    whole = portable(tmp_path / "b").read_bytes()
    path = tmp_path / "c"
    for at in range(4, len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(BackupError):
            list(Portable(path).commands())
    for at in range(4, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        try:
            got = list(Portable(path).commands())
        except BackupError:
            continue
        assert got == COMMANDS, f"byte {at}"


@pytest.mark.parametrize(
    "line",
    [["FLUSHALL"], ["DEL", "s"], ["EVAL", "x", "0"], ["SET"], [], ["SET", 1, "x"], ["XGROUP", "CREATE"], [["SET", "a", "b"]]],
)
def test_only_commands_of_a_backup_are_taken(tmp_path: Path, line: Any) -> None:
    """A file may come from anywhere: whatever else stands in it is refused, when it is read and when it is carried out."""
    with pytest.raises(BackupError):
        key_of(line)
    with pytest.raises(BackupError):
        list(Portable(portable(tmp_path / "b", [*COMMANDS, line])).commands())


@pytest.mark.parametrize(
    ("head", "line"), [({"format": 2}, "another version"), ({"backup": "x"}, "no backup of scripts/backup.py")]
)
def test_a_form_that_is_not_known_is_refused(tmp_path: Path, head: dict[str, object], line: str) -> None:
    with pytest.raises(BackupError, match=line):
        Portable(portable(tmp_path / "b", head=HEAD | head))


def test_a_command_is_carried_out_on_another_key() -> None:
    """Every verb: only the key changes."""
    for command in COMMANDS:
        assert key_of(renamed(command, "aside")) == "aside"
        assert [word for word in renamed(command, "aside") if word != "aside"] == [
            word for at, word in enumerate(command) if at != KEY_AT[command[0]]
        ]


def test_sizes_are_told_from_the_commands() -> None:
    tally = Tally()
    for command in COMMANDS:
        tally.add(command)
    assert tally.sizes["s"] == Size("stream", 2, {"g": 1})
    assert tally.sizes["s:processed:a:20260131"] == Size("set", 4, {}, "99")
    assert counts(tally.sizes, KEYS) == {
        "unfinished": 2,
        "in_flight": 1,
        "waiting": 1,
        "dead": 0,
        "processed_ids": 4,
        "results": 0,
        "mailboxes": 1,
        "keys": 5,
    }
    with pytest.raises(BackupError, match="expires before it is there"):
        tally.add(["PEXPIREAT", "s:none", "1"])


@pytest.mark.parametrize(
    "command",
    [
        ["XCLAIM", "s", "nobody", "w1", "0", "1-0"],
        ["XCLAIM", "s"],
        ["XGROUP", "CREATE", "s"],
        ["PEXPIREAT", "s:due"],
        ["PEXPIREAT", "s:due", "soon"],
    ],
    ids=" ".join,
)
def test_a_file_that_was_put_together_wrongly_is_told(command: Command) -> None:
    """By hand: a word too few, a group that was not made, a time that is none."""
    tally = Tally()
    for before in COMMANDS:
        tally.add(before)
    with pytest.raises(BackupError, match="no command of a backup"):
        tally.add(command)


# which keys


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("s", True),
        ("s:dlq", True),
        ("s:anything to come", True),
        ("producer_state:a:INBOX:last_uid", True),
        ("s:daemons", False),
        ("s:restoring:abc:0", False),
        ("s2", False),
        ("sx:index", False),
        ("somebody", False),
    ],
)
def test_which_keys_belong_into_a_backup(key: str, ours: bool) -> None:
    """All of the stream's and the producer's, but who is at work now and what a restore has laid aside."""
    assert KEYS.is_data(key) is ours


# beside another stream


def test_nothing_is_restored_beside_daemons_of_another_stream(valkey: RedisServer, tmp_path: Path) -> None:
    """Their producer_state keys name no stream and would go: refused, with --force too, and they stand; a silent daemon is none."""
    file = portable(tmp_path / "b.jsonl.zst")
    given = Namespace(file=file, force=True, dry_run=False)
    settings = load_settings({"STREAM_NAME": "s"}, env_file=None)
    theirs, place = Keys("t"), Keys("t").mailbox("b", "INBOX").last_uid
    producer = Registration("producer", "p1", "", "0.1.0", "vm", 1, "2026-01-31T00:00:00Z")
    with RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10, not_utf8="surrogateescape") as redis:
        redis.call("SET", place, "77")
        redis.call("SADD", "s:run:daemons", "m1")  # a name alone makes no registry
        register(redis, theirs, producer)
        desk = script.Desk(settings, redis, Shutdown(), given, lambda *_: None)
        with pytest.raises(BackupError, match=r"another stream are at work in this database: t\. .* database of its own"):
            desk.run()
        assert redis.call("GET", place) == "77"
        entry = redis.hash(theirs.daemons)["p1"].partition("|")[2]
        redis.call("HSET", theirs.daemons, "p1", f"1|{entry}")  # its last heartbeat is long ago
        assert desk.run()[1]["restored"] is True


def test_the_keys_that_would_go_count_among_those_of_one_step(valkey: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to restore and two that stand, where two are the most: it is given up before the step, and what stood there stands alone."""
    monkeypatch.setattr("src.backup.restore.MOST_KEYS", 2)
    with RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10) as redis:
        redis.call("MSET", "s:a", "1", "s:b", "2")
        target = Target.look(redis, KEYS)
        with pytest.raises(BackupError, match=r"1 keys of the backup and 2 that would go .* Nothing was restored"):
            Restore(redis, KEYS, "n", lambda: False, lambda _: None).run([["SET", "s:c", "3"]], target, force=True)
        assert redis.call("MGET", "s:a", "s:b", "s:c") == ["1", "2", None]
        assert redis.call("DBSIZE") == 2


# bytes, and many commands at once


def test_bytes_that_are_no_utf8_go_there_and_back(valkey: RedisServer) -> None:
    """As surrogates here, as themselves in the server: in keys, values and the words of many commands at once; a refusal is raised."""
    odd, text = b"\xff\x00\xfe \xc3\xbc", "\udcff\x00\udcfe ü"
    with RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10, not_utf8="surrogateescape") as redis:
        redis.call("SET", text, text)
        assert redis.call_all([["GET", text], ["APPEND", text, text], ["STRLEN", text]]) == [text, 12, 12]
        assert redis.call_all([]) == []
        with pytest.raises(ScriptRefused, match="WRONGTYPE"):
            redis.call_all([["SADD", text, "1"], ["SET", "done", "nevertheless"]])
        assert redis.call("GET", "done") == "nevertheless"
    assert valkey.client(decode_responses=False).get(odd) == odd * 2


# files


def backup_file(folder: Path, name: str, stream: str = "s") -> Path:
    path = folder / name
    path.touch()
    manifest = Manifest(1, name, "0" * 64, 0, stream, 0, "2026-01-31T00:00:00Z", "Redis 7.0.15", None)
    files.manifest_path(path).write_text(json.dumps(asdict(manifest)))
    return path


def test_prune_keeps_the_newest_of_ours(tmp_path: Path) -> None:
    """By the time in the name, then by the number; both forms together, manifests with them; what has another name stays."""
    names = [
        "email-ingestion-20260101T000000Z.rdb",
        "email-ingestion-20260102T000000Z.jsonl.zst",
        "email-ingestion-20260102T000000Z-2.rdb",
        "email-ingestion-20260102T000000Z-10.rdb",
    ]
    mine = [backup_file(tmp_path, name) for name in names]
    others = {tmp_path / name for name in ("dump.rdb", "email-ingestion-20260101T000000Z.rdb.bak", "email-ingestion-old.rdb")}
    for path in others:
        path.touch()
    assert files.prune(mine[-1], "s", 2) == (mine[:2], "")
    assert set(tmp_path.iterdir()) == {*others, *mine[2:], *(files.manifest_path(path) for path in mine[2:])}


def test_prune_never_removes_what_was_just_written(tmp_path: Path) -> None:
    """Another was named by a clock that ran ahead: the one just written stays all the same, and is one of those that are kept."""
    ahead = backup_file(tmp_path, "email-ingestion-20360101T000000Z.rdb")
    older = backup_file(tmp_path, "email-ingestion-20260101T000000Z.rdb")
    written = backup_file(tmp_path, "email-ingestion-20260102T000000Z.rdb")
    assert files.prune(written, "s", 2) == ([older], "")
    assert files.prune(written, "s", 1) == ([ahead], "")
    assert set(tmp_path.iterdir()) == {written, files.manifest_path(written)}


def test_prune_removes_only_what_a_manifest_says_to_be_of_the_stream(tmp_path: Path) -> None:
    """Of two installations with one folder neither removes the other's; without a manifest, or with a damaged one, a backup stays."""
    other = backup_file(tmp_path, "email-ingestion-20260101T000000Z.rdb", "t")
    alone = backup_file(tmp_path, "email-ingestion-20260102T000000Z.rdb")
    files.manifest_path(alone).unlink()
    damaged = backup_file(tmp_path, "email-ingestion-20260103T000000Z.rdb")
    files.manifest_path(damaged).write_bytes(b"{")
    written = backup_file(tmp_path, "email-ingestion-20260104T000000Z.rdb")
    assert files.prune(written, "s", 1) == ([], "")
    assert {other, alone, damaged, written} < set(tmp_path.iterdir())


def test_a_backup_stands_though_an_older_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was in the way is said, and the exit code is 1; the one just written is there, and how to restore it is said."""
    older = backup_file(tmp_path, "email-ingestion-20260101T000000Z.rdb")
    written = backup_file(tmp_path, "email-ingestion-20260102T000000Z.rdb")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    removed, left = files.prune(written, "s", 1)
    assert (removed, left) == ([], f"{older} cannot be removed (Permission denied)")
    manifest = files.read_manifest(written)
    assert manifest and say_taken(Taken(written, manifest, removed, left)) == 1
    said = capsys.readouterr()
    assert f"the backup is written, but {left}" in said.err
    assert str(written) in json.loads(said.out)["restore"]


def test_backups_of_one_second_are_told_apart(tmp_path: Path) -> None:
    """By a number that both forms share, so that the order in which they were taken stays known."""
    moment = datetime(2026, 1, 31, 12, 0, 0, 999_999, UTC)
    names = []
    for kind in ("rdb", "jsonl.zst", "rdb"):
        path = files.fresh_path(tmp_path, moment, kind)
        backup_file(tmp_path, path.name)
        names.append(path.name)
    stem = "email-ingestion-20260131T120000Z"
    assert names == [f"{stem}.rdb", f"{stem}-2.jsonl.zst", f"{stem}-3.rdb"]
    assert [path.name for path in files.prune(path, "s", 1)[0]] == names[:2]


def test_a_second_backup_into_the_same_folder_waits_for_nobody(tmp_path: Path) -> None:
    """It is refused in one line; what a killed one left is removed by the next."""
    (tmp_path / "email-ingestion-20260101T000000Z.rdb.part").touch()
    with files.folder(tmp_path):
        assert not list(tmp_path.glob("*.part"))
        with pytest.raises(BackupError, match="another backup is being written"), files.folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_had_is_a_wrong_argument(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="choose another folder"), files.folder(tmp_path / "file" / "x"):
        pass


def test_a_part_that_fails_is_gone(tmp_path: Path) -> None:
    """Whatever ends it, a signal too."""
    with pytest.raises(KeyboardInterrupt), files.part(tmp_path / "b") as file:
        file.write(b"half")
        assert (tmp_path / "b.part").stat().st_mode & 0o777 == 0o600
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [b"", b"[]", b"{}", b'{"format": "x"}', b"\xff"])
def test_a_damaged_manifest_is_told(tmp_path: Path, change: bytes) -> None:
    files.manifest_path(tmp_path / "b.rdb").write_bytes(change)
    with pytest.raises(BackupError, match="is damaged"):
        files.read_manifest(tmp_path / "b.rdb")


def test_a_manifest_of_a_newer_form_is_told(tmp_path: Path) -> None:
    manifest = Manifest(2, "b.rdb", "0" * 64, 1, "s", 0, "2026-01-31T00:00:00Z", "Redis 7.0.15", None)
    files.manifest_path(tmp_path / "b.rdb").write_text(json.dumps({**asdict(manifest), "more": 1}))
    with pytest.raises(BackupError, match="newer version of this software"):
        files.read_manifest(tmp_path / "b.rdb")


# the wire


@contextmanager
def wire(*stopped: bool) -> Iterator[tuple[Wire, socket.socket]]:
    ours, theirs = socket.socketpair()
    answers = iter(stopped)
    with ours, theirs:
        yield Wire(ours, lambda: next(answers, False)), theirs


MARK = b"0123456789abcdef0123456789abcdef01234567"


@given(payload=st.binary(max_size=300), rest=st.integers(0, 39), sizes=st.lists(st.integers(1, 90), max_size=8))
def test_the_end_mark_is_found_however_it_is_cut(payload: bytes, rest: int, sizes: list[int]) -> None:
    """The mark comes in any pieces, and beginnings of it stand in the snapshot itself."""
    payload += MARK[:rest]
    line = b"\n\n+FULLRESYNC 0 0\r\n\n$EOF:" + MARK + b"\r\n"
    message = line + payload + MARK
    with wire() as (reader, server):
        for size in sizes:
            server.sendall(message[:size])
            message = message[size:]
        server.sendall(message)
        assert reader.line() == b"+FULLRESYNC 0 0"
        assert announced(reader.line()) == (0, MARK)
        assert b"".join(reader.until_mark(MARK)) == payload


def test_a_snapshot_of_known_length() -> None:
    """Of the next bytes only so many are of it."""
    assert announced(b"$5") == (5, b"")
    with wire() as (reader, server):
        server.sendall(b"$5\r\nREDIS*1\r\n")
        reader.line()
        assert b"".join(reader.exactly(5)) == b"REDIS"


@pytest.mark.parametrize("line", [b"+OK", b"$-1", b"$EOF:short", b"HTTP/1.1 400"])
def test_what_is_no_snapshot_is_told(line: bytes) -> None:
    with pytest.raises(BackupError, match="instead of a snapshot"):
        announced(line)


def test_a_connection_that_ends_and_one_that_is_stopped() -> None:
    with wire() as (reader, server):
        server.close()
        with pytest.raises(RedisUnavailable, match="broke the snapshot off"):
            reader.line()
    with wire(True) as (reader, _), pytest.raises(BackupError, match="stopped as asked"):
        reader.line()
