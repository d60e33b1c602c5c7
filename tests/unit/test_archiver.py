"""The process that keeps raw mail: what it keeps, what is said when it cannot, and that nothing depends on its life."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from src.common.archive import Archive, Folder, ref_of
from src.common.exceptions import ArchiveUnavailable
from src.producer.archiver import KEPT_BYTES, PLACE, Archiver, Channel
from tests.support.processes import family
from tests.support.wait import until

MAILS = [b"Subject: %d\r\n\r\n" % number + bytes(range(256)) * number for number in range(40)]
REFS = list(map(ref_of, MAILS))

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="the process is found in /proc")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def archiver(tmp_path: Path) -> Iterator[Archiver]:
    archiver = Archiver(None, tmp_path)
    yield archiver
    archiver.end()
    assert processes() == []


def processes() -> list[int]:
    """The archivers that this process has started."""
    found = []
    for pid in family(os.getpid()):
        with suppress(OSError):
            if b"src.producer.archiver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def gone(pid: int) -> bool:
    """Ended with all its threads; a zombie until somebody asks how it ended."""
    proc = Path(f"/proc/{pid}")
    try:
        return (
            proc.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            and len(list(proc.joinpath("task").iterdir())) == 1
        )
    except OSError:
        return True


def held() -> int:
    """Bytes of memory in the files that this process shares with archivers."""
    found = 0
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(handle.readlink()).startswith("/memfd:raw mail"):
                found += handle.stat().st_blocks * 512
    return found


def test_each_mail_is_kept_byte_for_byte(archiver: Archiver, root: Path) -> None:
    """An empty one, small ones and one of 5 MB, in two groups at once; no file is left beside them."""
    large = os.urandom(5_000_000)
    some, others = archiver.keep([b"", *MAILS]), archiver.keep([large, MAILS[0]])
    assert others() == [ref_of(large), REFS[0]]
    assert some() == [ref_of(b""), *REFS]
    assert [Archive(Folder(root)).get(ref) for ref in (ref_of(b""), *REFS, ref_of(large))] == [b"", *MAILS, large]
    assert list((root / "tmp").iterdir()) == []
    assert held() <= 2 * KEPT_BYTES, "the memory of a large group is given back"


def test_many_mailboxes_share_one_process(archiver: Archiver, root: Path) -> None:
    """Eight threads with twenty groups each: everybody gets the answer to what they asked."""

    def groups(thread: int) -> list[bool]:
        mails = [[b"%d/%d/%d" % (thread, group, number) for number in range(5)] for group in range(20)]
        return [archiver.keep(group)() == list(map(ref_of, group)) for group in mails]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(groups, range(8))) == [[True] * 20] * 8
    assert len(processes()) == 1
    assert len(list(root.glob("[0-9a-f]/*"))) == 800


def test_an_answer_that_nobody_waits_for_is_nobody_elses(archiver: Archiver, root: Path) -> None:
    """Its mails are kept all the same."""
    archiver.keep(MAILS[:20])
    assert archiver.keep(MAILS[20:])() == REFS[20:]
    until(lambda: len(list(root.glob("[0-9a-f]/*"))) == 40, 20, "all are kept")


def test_a_process_that_ended_between_two_groups_is_missed_by_nobody(archiver: Archiver) -> None:
    """The next group starts another one."""
    archiver.keep(MAILS[:1])()
    [first] = processes()
    os.kill(first, signal.SIGKILL)
    until(lambda: gone(first), 20, "it is gone")
    assert archiver.keep(MAILS)() == REFS
    assert processes() not in ([], [first])


def test_a_process_that_ends_with_mails_in_hand_says_so(archiver: Archiver) -> None:
    """Every group that waits is told; what is asked again is kept."""
    archiver.keep(MAILS[:1])()
    [pid] = processes()
    os.kill(pid, signal.SIGSTOP)
    waiting = [archiver.keep(MAILS[:20]), archiver.keep(MAILS[20:])]
    os.kill(pid, signal.SIGKILL)
    for answer in waiting:
        with pytest.raises(
            ArchiveUnavailable, match=r"cannot be had \(it was ended by signal 9\)\. It is tried anew; nothing is lost"
        ):
            answer()
    assert archiver.keep(MAILS)() == REFS


def test_an_archive_that_cannot_be_had_is_told_in_its_own_words(archiver: Archiver, root: Path) -> None:
    """And the same process keeps the mails when it can."""
    root.write_text("in the way")
    with pytest.raises(ArchiveUnavailable, match=f"raw mail cannot be kept: {root} cannot be had .* change RAW_ARCHIVE"):
        archiver.keep(MAILS)()
    before = processes()
    root.unlink()
    assert archiver.keep(MAILS)() == REFS
    assert processes() == before


def test_a_process_that_cannot_be_started_is_an_archive_that_is_away(archiver: Archiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said, and tried again by the next group."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/nowhere/python")
        with pytest.raises(ArchiveUnavailable, match=r"cannot be had \(No such file or directory\)"):
            archiver.keep(MAILS)()
    assert archiver.keep(MAILS)() == REFS


def test_signals_that_go_to_all_do_not_end_it(archiver: Archiver) -> None:
    """A terminal sends SIGINT and a service manager SIGTERM to the whole group: mail in hand is kept first."""
    archiver.keep(MAILS[:1])()
    [pid] = processes()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert archiver.keep(MAILS)() == REFS
    assert processes() == [pid]


def test_the_end_of_one_that_was_killed_is_no_error(archiver: Archiver) -> None:
    """A producer stops in order although its archiver is gone; ending twice does nothing more."""
    archiver.keep(MAILS[:1])()
    [pid] = processes()
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid), 20, "it is gone")
    archiver.end()
    archiver.end()
    assert processes() == []


def test_an_archive_that_hangs_holds_no_end_up(archiver: Archiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs that never return: the process is killed in the end, which it could not bring about itself."""
    patch = tmp_path / "patch"
    patch.mkdir()
    patch.joinpath("sitecustomize.py").write_text(
        f"""
import os, threading
def hang(handle, sync=os.fsync):
    if os.path.exists({str(patch / "now")!r}):
        open({str(patch / "hangs")!r}, "w").close()
        threading.Event().wait()
    sync(handle)
if {PLACE!r} in os.environ:
    os.fsync = hang
"""
    )
    with monkeypatch.context() as patched:
        patched.syspath_prepend(patch)
        patched.setattr("src.producer.archiver.END_SECONDS", 0.5)
        assert archiver.keep([MAILS[1]])() == [REFS[1]]
        patch.joinpath("now").touch()
        archiver.keep(MAILS)
        until(patch.joinpath("hangs").exists, 60, "it hangs")
        [pid] = processes()
        with ThreadPoolExecutor() as pool:
            pool.submit(archiver.end).result(60)
        until(lambda: gone(pid), 60, "it is killed")
    assert archiver.keep(MAILS)() == REFS


def test_want_of_handles_is_an_archive_that_is_away(archiver: Archiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a new process would have to be started: it is said, tried again, and the end is none the worse for it."""
    assert archiver.keep([MAILS[1]])() == [REFS[1]]
    [pid] = processes()
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid), 20, "it ended")

    def none_left(*args: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr("socket.socketpair", none_left)
        for _ in range(2):
            with pytest.raises(ArchiveUnavailable, match=r"Too many open files|ended by signal 9"):
                archiver.keep([MAILS[2]])()
        archiver.end()
    assert archiver.keep([MAILS[2]])() == [REFS[2]]


def test_an_answer_of_one_that_ended_meanwhile_leaves_nothing_behind(archiver: Archiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its channel is not given to the next group, which the next process keeps at once."""
    waited_for = archiver.keep([MAILS[1]])
    hear = Channel.hear

    def late(channel: Channel) -> Any:
        told = hear(channel)
        monkeypatch.setattr(Channel, "hear", hear)
        [pid] = processes()
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(pid), 20, "it ended")
        assert archiver.keep([MAILS[2]])() == [REFS[2]], "another thread's group"
        return told

    monkeypatch.setattr(Channel, "hear", late)
    assert waited_for() == [REFS[1]]
    both = [archiver.keep([MAILS[3]]), archiver.keep([MAILS[4]])]
    assert [group() for group in both] == [[REFS[3]], [REFS[4]]]


def test_where_memory_is_refused_mails_go_over_through_a_file(archiver: Archiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """vm.memfd_noexec=2, or a system that has no such memory: nothing else is different."""

    def refused(name: str) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "memfd_create", refused)
    assert archiver.keep(MAILS)() == REFS
    assert held() == 0
