"""Lines of JSON at the end of a file: whole, on the disk, from many writers, after any crash."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from src.common.exceptions import ConfigurationError, DiskUnavailable
from src.handlers import jsonl
from src.handlers.jsonl import append
from src.mail.record import Email
from src.testing import context
from tests.support.daemons import ROOT
from tests.support.wait import until

CONTEXT = context(Email({"email_id": "gm:a@example.org:1"}))
LINE = b'{"email_id":"gm:a@example.org:1","n":1}\n'
OTHER = b'{"email_id":"gm:a@example.org:2","n":2}\n'


def mail(number: int = 1, text: str = "hello\nworld \u2028 é") -> Email:
    record: dict[str, Any] = {"body_text": text, "from": {"name": "A", "address": "a@example.org"}, "size": 7}
    return Email(
        {
            "email_id": f"gm:a@example.org:{number}",
            "account": "a@example.org",
            "mailbox": "INBOX",
            "uid": str(number),
            "internal_date": "2026-11-01T10:00:00Z",
            "subject": "s",
            "record": json.dumps(record),
        }
    )


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JSONL_PATH, read anew by each test."""
    monkeypatch.setenv("JSONL_PATH", str(tmp_path / "mail.jsonl"))
    jsonl.prepare.cache_clear()
    return tmp_path / "mail.jsonl"


def test_one_line_a_mail(path: Path) -> None:
    """A mail with line breaks in its text is one line of JSON that holds all of it; nobody else may read the file."""
    jsonl.handle(mail(1), CONTEXT)
    jsonl.handle(mail(2), CONTEXT)
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    first, second = map(json.loads, lines)
    assert (first["email_id"], second["uid"]) == ("gm:a@example.org:1", 2)
    assert first["record"]["body_text"] == "hello\nworld \u2028 é"
    assert first["record"]["from"] == {"name": "A", "address": "a@example.org"}
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", range(1, len(OTHER) - 1))
def test_a_torn_line_is_cut_away(tmp_path: Path, cut: int) -> None:
    """Wherever a crash cut the last line, it goes and the next line stands whole behind the others."""
    path = tmp_path / "f"
    path.write_bytes(LINE + OTHER[:cut])
    append(path, OTHER)
    assert path.read_bytes() == LINE + OTHER


@pytest.mark.parametrize("torn", [b"\0" * 5000, OTHER[:20] + b"\0" * 70_000, b'{"email_id":"' + b"x" * 200_000])
def test_what_a_power_cut_leaves_is_cut_away(tmp_path: Path, torn: bytes) -> None:
    """Zeros where data should be, and a long torn line, behind the last whole one."""
    path = tmp_path / "f"
    path.write_bytes(LINE + torn)
    append(path, OTHER)
    assert path.read_bytes() == LINE + OTHER


@pytest.mark.parametrize("whole", [OTHER[:-1], b'{"somebody": "else\'s"}'])
def test_a_whole_object_gets_its_line_end(tmp_path: Path, whole: bytes) -> None:
    """A last line that lacks only its end loses nothing."""
    path = tmp_path / "f"
    path.write_bytes(LINE + whole)
    append(path, OTHER)
    assert path.read_bytes() == LINE + whole + b"\n" + OTHER


@pytest.mark.parametrize(
    "content", [b"not a line of ours", LINE + b"secret notes", b'{"email_id"' + b"x" * 2_000_000, b"\0" * 2_000_000]
)
def test_another_file_is_left_alone(path: Path, content: bytes) -> None:
    """A file that does not end as this handler's files do is not touched; the worker does not start on it."""
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"^JSONL_PATH=.*is it the right file\?$"):
        jsonl.prepare()
    assert path.read_bytes() == content


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A write that stops in the middle (file size limit, like a full disk) raises, and nothing of the line stays."""
    path = tmp_path / "f"
    path.write_bytes(LINE)
    code = (
        "import resource, signal, sys; from pathlib import Path; from src.handlers.jsonl import append\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))\n"
        "try: append(Path(sys.argv[1]), b'{\"email_id\":' + b'x' * 100 + b'}\\n')\n"
        "except OSError as error: print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "27", done.stderr  # EFBIG
    assert path.read_bytes() == LINE


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="looks at Linux's table of locks")
def test_a_line_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    """Another writer is in the middle of its line: it is not taken for a torn one, the next line comes behind it."""
    path = tmp_path / "f"
    with path.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(LINE[:20])
        writer = threading.Thread(target=append, args=(path, OTHER))
        writer.start()
        waits = re.compile(rf"-> FLOCK .*:{path.stat().st_ino} ")
        until(lambda: waits.search(Path("/proc/locks").read_text()), what="the second writer waits for the lock")
        other.write(LINE[20:])
    writer.join()
    assert path.read_bytes() == LINE + OTHER


def test_many_processes_and_a_kill(tmp_path: Path) -> None:
    """Four processes write one file, one is killed on the way: every line is whole, and none of the others' is missing."""
    path = tmp_path / "f"
    code = (
        "import sys; from pathlib import Path; from src.handlers.jsonl import append\n"
        "for n in range(int(sys.argv[3])):\n"
        '    append(Path(sys.argv[1]), b\'{"email_id":"%s-%d","text":"%s"}\\n\' % (sys.argv[2].encode(), n, b"x" * 20_000))\n'
        "    print(n, flush=True)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name, count], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name, count in [("victim", "1000000"), ("a", "60"), ("b", "60"), ("c", "60")]
    ]
    victim = writers[0]
    assert victim.stdout is not None
    said = [int(victim.stdout.readline()) for _ in range(20)]
    victim.send_signal(signal.SIGKILL)
    for writer in writers:
        writer.communicate(timeout=60)
    append(path, b"")
    seen = Counter(json.loads(line)["email_id"] for line in path.read_bytes().splitlines())
    assert {name for name in seen if not name.startswith("victim")} == {f"{name}-{n}" for name in "abc" for n in range(60)}
    assert {f"victim-{n}" for n in said} <= set(seen)
    assert set(seen.values()) == {1}
    assert path.read_bytes().endswith(b"}\n")


def test_a_renamed_file_is_left_behind(path: Path) -> None:
    """After logrotate has renamed the file the next line starts a new one."""
    jsonl.handle(mail(1), CONTEXT)
    path.rename(path.with_suffix(".old"))
    jsonl.handle(mail(2), CONTEXT)
    assert json.loads(path.read_text())["uid"] == 2
    assert json.loads(path.with_suffix(".old").read_text())["uid"] == 1


def test_settings_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path, and a path in no folder, are told at the start."""
    monkeypatch.delenv("JSONL_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    jsonl.prepare.cache_clear()
    with pytest.raises(ConfigurationError, match=r"^JSONL_PATH is not set: the file that lines are appended to"):
        jsonl.prepare()
    monkeypatch.setenv("JSONL_PATH", str(tmp_path / "none" / "f"))
    with pytest.raises(ConfigurationError, match=r"^JSONL_PATH=.*No such file or directory"):
        jsonl.prepare()


def test_a_lost_folder_is_retried(path: Path) -> None:
    """The folder goes away while the worker runs: transient, no line lost unseen."""
    jsonl.prepare()
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(DiskUnavailable, match="No such file"):
        jsonl.handle(mail(), CONTEXT)
