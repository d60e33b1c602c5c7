"""Raw mail: kept whole or not at all, verified, found again by handlers, swept only when nobody needs it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest

from config.settings import SettingsError, load_settings
from src.common.archive import Archive, Folder, open_archive, ref_of, references
from src.common.bucket import Bucket
from src.common.exceptions import ArchiveMissing, ArchiveUnavailable, ConfigurationError, Permanent, Transient
from src.common.redis_client import RedisClient
from src.mail.parse import parse
from src.mail.record import Attachment, Email, Envelope, Record, record_to_json, to_fields
from src.sandbox.generator import generate
from src.worker import dlq
from tests.support.fake import Store, fields_of
from tests.support.wait import until

DAY = 86_400.0
WEEK = 7 * DAY
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
MAIL = b"Subject: x\r\n\r\n" + bytes(range(256)) * 50
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["folder", "memory", "local"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Archive]:
    """An empty archive in a folder, and in two file systems of fsspec: one like an object store, one with folders."""
    url = {"folder": f"file:{tmp_path}/raw", "memory": f"memory://{tmp_path.name}", "local": f"local://{tmp_path}/raw"}
    opened = open_archive(url[request.param], tmp_path)
    assert opened is not None
    yield opened
    if request.param == "memory":
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def folder(root: Path) -> Archive:
    return Archive(Folder(root))


def path_of(raw_ref: str) -> str:
    digest = raw_ref.removeprefix("sha256:")
    return f"{digest[0]}/{digest}"


def files_below(root: Path) -> set[str]:
    return {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()} - {"archive"}


def aged(file: Path, days: float) -> None:
    moment = (NOW - timedelta(days=days)).timestamp()
    os.utime(file, (moment, moment))


def in_child(work: Callable[[], object]) -> int:
    """The exit code of a forked process that does `work`: 0, or minus the signal that ended it."""
    child = FORK.Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode is not None
    return child.exitcode


# --- keeping and reading -------------------------------------------------------------------------------------------------


def test_a_mail_is_read_as_it_was_kept(archive: Archive) -> None:
    """What `get` gives is what `put` was given, under the SHA-256 of its bytes."""
    raw_ref = archive.put(MAIL)
    assert raw_ref == f"sha256:{hashlib.sha256(MAIL).hexdigest()}" == ref_of(MAIL)
    assert archive.get(raw_ref) == MAIL
    assert archive.get(archive.put(b"")) == b""


def test_a_mail_is_kept_once(archive: Archive) -> None:
    """Keeping a mail again gives the same reference and no second file."""
    assert archive.put(MAIL) == archive.put(MAIL)
    assert [path for path, _ in archive.store.files()] == [path_of(ref_of(MAIL))]


def test_mail_that_cannot_be_kept_takes_no_room(folder: Archive, root: Path) -> None:
    """What was written aside is removed at once: a full disk has its room again for the next try."""
    folder.put(b"so that it is an archive")
    (root / path_of(ref_of(MAIL))).parent.write_text("in the way")
    with pytest.raises(ArchiveUnavailable):
        folder.put_all([MAIL, b"another"])
    assert not list((root / "tmp").iterdir())


def test_the_files_are_the_owners_alone_and_named_by_their_hash(folder: Archive, root: Path) -> None:
    """0600 and 0700 whatever the umask; `sha256sum` of a file is its name."""
    before = os.umask(0)
    try:
        raw_ref = folder.put(MAIL)
    finally:
        os.umask(before)
    file = root / path_of(raw_ref)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (root, *root.rglob("*")) if path.is_dir()} == {0o700}


def test_many_keep_the_same_mail_at_once(folder: Archive, root: Path) -> None:
    """Two processes with four threads each: one whole file, nothing left beside it."""

    def keep() -> None:
        threads = [threading.Thread(target=lambda: [folder.put(MAIL) for _ in range(10)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    children = [FORK.Process(target=keep) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    assert files_below(root) == {path_of(ref_of(MAIL))}
    assert folder.get(ref_of(MAIL)) == MAIL


def test_a_kill_at_any_step_leaves_a_whole_mail_or_none(folder: Archive, root: Path, tmp_path: Path) -> None:
    """SIGKILL at each step of `put` that touches the disk: the mail is whole or missing, and can be kept by the next try."""
    killed, states = 0, set()
    while True:
        target = Archive(Folder(tmp_path / f"raw{killed}"))

        def work(target: Archive = target, step: int = killed) -> None:
            steps = iter(range(1_000))

            def strike(event: str, _: object) -> None:
                if (
                    event in ("open", "os.mkdir", "os.rename", "fcntl.flock", "tempfile.mkstemp", "os.remove")
                    and next(steps) == step
                ):
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(strike)
            target.put(MAIL)

        if in_child(work) == 0:
            break
        killed += 1
        try:
            assert target.get(ref_of(MAIL)) == MAIL
            states.add("whole")
        except (ArchiveMissing, ArchiveUnavailable):
            states.add("missing")
        assert target.get(target.put(MAIL)) == MAIL
    assert killed >= 8, "the steps were not seen"
    assert states == {"whole", "missing"}


def test_a_kill_in_the_middle_of_the_write_leaves_a_piece_that_is_swept(folder: Archive, root: Path) -> None:
    """The kernel ends the process after 4 KiB: the mail is missing, not damaged; the piece lies aside until a sweep."""
    folder.put(b"small")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, 4_096))
        folder.put(MAIL)

    assert in_child(work) == -signal.SIGXFSZ
    with pytest.raises(ArchiveMissing, match="is not in"):
        folder.get(ref_of(MAIL))
    [piece] = files_below(root) - {path_of(ref_of(b"small"))}
    assert (piece.startswith("tmp/"), (root / piece).stat().st_size) == (True, 4_096)
    assert folder.get(folder.put(MAIL)) == MAIL
    later = datetime.now(UTC) + timedelta(days=9)
    assert folder.sweep([ref_of(MAIL), ref_of(b"small")], older_than=WEEK, now=later) == 1
    assert files_below(root) == {path_of(ref_of(MAIL)), path_of(ref_of(b"small"))}


def test_a_full_disk_is_said_and_leaves_nothing(folder: Archive, root: Path) -> None:
    """The write fails in the middle: ArchiveUnavailable says what to do, no piece stays, and with room the same mail goes in."""
    folder.put(b"small")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, 4_096))
        with pytest.raises(ArchiveUnavailable, match=r"full .* Make room there or lower RAW_RETENTION"):
            folder.put(MAIL)

    assert in_child(work) == 0
    assert files_below(root) == {path_of(ref_of(b"small"))}
    assert folder.get(folder.put(MAIL)) == MAIL


# --- what is not there, or not right --------------------------------------------------------------------------------------


def test_a_damaged_file_is_noticed_and_healed(folder: Archive, root: Path) -> None:
    """One flipped bit, or a file cut short: never handed out; keeping the mail again mends it."""
    file = root / path_of(folder.put(MAIL))
    for damaged in (bytes([MAIL[0] ^ 1]) + MAIL[1:], MAIL[:-1], b""):
        file.write_bytes(damaged)
        with pytest.raises(ArchiveMissing, match="damaged"):
            folder.get(ref_of(MAIL))
        folder.put(MAIL)
        assert folder.get(ref_of(MAIL)) == MAIL


def test_a_mail_that_is_not_there_is_missing(archive: Archive) -> None:
    """Permanent, where the archive itself can be had."""
    archive.put(MAIL)
    with pytest.raises(ArchiveMissing, match="is not in"):
        archive.get(ref_of(b"another"))
    assert issubclass(ArchiveMissing, Permanent)


def test_a_place_that_never_was_an_archive_is_away_not_empty(archive: Archive, tmp_path: Path) -> None:
    """A mount that is missing must not bury mail: unavailable (transient), at start and when read, until the first mail is kept."""
    (tmp_path / "raw").mkdir()
    for call in (archive.check, lambda: archive.get(ref_of(MAIL))):
        with pytest.raises(ArchiveUnavailable, match="set RAW_ARCHIVE to a place that producer and workers share"):
            call()
    assert issubclass(ArchiveUnavailable, Transient)
    archive.put(MAIL)
    archive.check()


def test_an_archive_that_cannot_be_had_says_so(folder: Archive, root: Path) -> None:
    """Each call names the place and what to do."""
    root.write_text("a file where the folder should be")
    for call in (folder.check, lambda: folder.get(ref_of(MAIL)), lambda: folder.put(MAIL)):
        with pytest.raises(ArchiveUnavailable, match=rf"{root} cannot be had .* change RAW_ARCHIVE"):
            call()


@pytest.mark.parametrize(
    "raw_ref", ["", "sha256:", "sha256:../../etc/passwd", f"md5:{'a' * 64}", f"sha256:{'A' * 64}", f"sha256:{'a' * 64}\n"]
)
def test_only_a_hash_is_a_reference(folder: Archive, raw_ref: str) -> None:
    """No path can be smuggled in by an entry of the stream."""
    folder.put(MAIL)
    with pytest.raises(ArchiveMissing, match="no reference"):
        folder.get(raw_ref)


def test_a_mount_that_is_missing_is_no_new_archive(tmp_path: Path) -> None:
    """What was an archive and is an empty folder now, or no folder, waits for its mount; nothing is written below it."""
    mount, away = tmp_path / "mnt", tmp_path / "away"
    archive = open_archive(f"file:{mount}/raw", tmp_path / "data")
    assert archive is not None
    reference = archive.put(MAIL)
    mount.rename(away)
    for below in (mount.mkdir, mount.joinpath("raw").mkdir, lambda: shutil.rmtree(mount)):
        below()
        with pytest.raises(
            ArchiveUnavailable, match=r"raw cannot be had \(it was an archive and is none now; .* remove .*\)\. Mount"
        ):
            archive.put(b"other")
    assert not mount.exists()
    away.rename(mount)
    archive.put(b"other")
    assert (archive.get(reference), archive.get(ref_of(b"other"))) == (MAIL, b"other")
    shutil.rmtree(mount)
    [memory] = (tmp_path / "data" / "archives").iterdir()
    assert memory.read_text() == f"{mount}/raw\n"
    memory.unlink()
    assert archive.get(archive.put(MAIL)) == MAIL


# --- sweeping -----------------------------------------------------------------------------------------------------------


def test_swept_is_what_nobody_needed_for_the_retention(folder: Archive, root: Path) -> None:
    """Referenced mail stays at any age, and so does what is young; pieces of a crashed write go, foreign files stay."""
    kept = {name: root / path_of(folder.put(name.encode())) for name in ("new", "nearly", "old", "dead")}
    for name, days in {"new": 0.5, "nearly": 7.9, "old": 8.1, "dead": 300}.items():
        aged(kept[name], days)
    piece, foreign = root / "tmp" / "tmpabc", kept["old"].with_name("notes.txt")
    for file in (piece, foreign):
        file.write_text("x")
        aged(file, 300)
    assert folder.sweep([ref_of(b"dead"), ref_of(b"never kept")], older_than=WEEK, now=NOW) == 2
    assert files_below(root) == {
        file.relative_to(root).as_posix() for file in (kept["new"], kept["nearly"], kept["dead"], foreign)
    }
    assert kept["dead"].stat().st_mtime == NOW.timestamp()


def test_every_kind_of_archive_is_swept(archive: Archive) -> None:
    """Nine days later the mail that is referred to is left, the other one is gone, and nothing else is touched later."""
    needed, other = archive.put(b"needed"), archive.put(b"other")
    later = datetime.now(UTC) + timedelta(days=9)
    assert archive.sweep([needed, other], older_than=WEEK, now=datetime.now(UTC)) == 0
    assert archive.sweep([needed], older_than=WEEK, now=later) == 1
    assert archive.get(needed) == b"needed"
    with pytest.raises(ArchiveMissing):
        archive.get(other)
    assert archive.sweep([needed], older_than=WEEK, now=later) == 0


def test_the_retention_counts_from_the_end_of_the_mail(folder: Archive, root: Path) -> None:
    """Dead for 30 days and then done: kept for 7 more days, gone by the ninth; a sweep that overlooks it once does no harm."""
    raw_ref = folder.put(MAIL)
    file = root / path_of(raw_ref)
    aged(file, 0)
    there = {}
    for day in range(45):
        referenced = [raw_ref] if day <= 30 and day != 20 else []
        folder.sweep(referenced, older_than=WEEK, now=NOW + timedelta(days=day))
        there[day] = file.exists()
    assert next(day for day, kept in there.items() if not kept) in (38, 39)


def test_a_mail_kept_again_is_young_again(folder: Archive, root: Path) -> None:
    """Between `put` and its place in the stream nobody refers to a mail: its age protects it, also against a sweep on its way."""
    path = path_of(folder.put(MAIL))
    aged(root / path, 300)
    moment = NOW.timestamp()
    os.utime(root / path, (moment, moment))
    assert not folder.store.remove_older(path, moment - WEEK)
    aged(root / path, 300)
    assert [found for found, _ in folder.store.files()] == [path]
    folder.put(MAIL)
    assert folder.sweep([], older_than=WEEK, now=datetime.now(UTC)) == 0
    assert folder.get(ref_of(MAIL)) == MAIL


def test_a_sweep_looks_and_removes_in_one_step(folder: Archive, root: Path) -> None:
    """While a sweep has the lock a mail kept anew waits, so it cannot slip in between its look and its removal."""
    folder.put(b"first")
    mark = root / "archive"
    with mark.open() as lock:
        flock(lock, LOCK_EX)
        keeper = threading.Thread(target=folder.put, args=[MAIL])
        keeper.start()
        waiting = f":{mark.stat().st_ino} "
        until(lambda: any("->" in line and waiting in line for line in Path("/proc/locks").read_text().splitlines()))
        assert not (root / path_of(ref_of(MAIL))).exists()
    keeper.join(10)
    assert folder.get(ref_of(MAIL)) == MAIL


# --- what refers to mail --------------------------------------------------------------------------------------------------


def entry_with(number: int, raw_ref: str, **record: Any) -> dict[str, str]:
    return fields_of(f"gm:a:{number}", record=record_to_json(Record(raw_ref=raw_ref, **record)))


def test_unfinished_and_dead_mail_refers_to_its_raw_mail(store: Store) -> None:
    """Over many pages of the stream and the dead letters; a text that looks like a reference is none."""
    refs = [ref_of(b"%d" % number) for number in range(1, 321)]
    store.put({})
    for number, raw_ref in enumerate(refs[:250], start=1):
        store.add(f"{number}-0", entry_with(number, raw_ref, body_text=json.dumps({"raw_ref": ref_of(b"fake")})))
    for number, raw_ref in enumerate(refs[250:], start=251):
        store.redis.call(
            "XADD", store.keys.dlq, f"{number}-0", *[part for pair in entry_with(number, raw_ref).items() for part in pair]
        )
    store.add("999-0", {"not": "ours"})
    assert references(store.redis, store.keys) == set(refs)


def test_a_letter_replayed_while_references_are_collected_counts(store: Store) -> None:
    """The stream was read, then the letter moves there from the dead letters: it is not overlooked."""
    store.put({"open": {"a|INBOX|20260131": "1"}})
    fields = entry_with(1, ref_of(MAIL), body_text="x")
    store.redis.call("XADD", store.keys.dlq, "1-0", *[part for pair in fields.items() for part in pair])
    store.redis.call("HSET", store.keys.index, "gm:a:1", "D:1-0")

    class Replaying:
        def entries(self, stream: str, start: str = "-", end: str = "+", *, count: int) -> list[tuple[str, dict[str, str]]]:
            letters = dlq.look(store.redis, store.keys)
            if stream == store.keys.dlq and letters:
                assert dlq.replay(store.redis, store.keys, letters) == ["OK"]
            return store.redis.entries(stream, start, end, count=count)

    redis: RedisClient = Replaying()  # type: ignore[assignment]
    assert references(redis, store.keys) == {ref_of(MAIL)}
    assert store.redis.length(store.keys.dlq) == 0


# --- where it is ----------------------------------------------------------------------------------------------------------


def test_the_setting_names_the_place(tmp_path: Path) -> None:
    """Unset: below DATA_DIR; file: with a relative and an absolute folder; off: none."""
    assert open_archive("off", tmp_path) is None
    assert open_archive(None, tmp_path) == Archive(Folder(tmp_path / "raw"))
    opened = [open_archive(url, tmp_path) for url in ("file:data/raw", "file:///var/mail-raw")]
    assert [str(archive.store.root) for archive in opened if archive] == ["data/raw", "/var/mail-raw"]
    assert open_archive("memory://x", tmp_path) == Archive(Bucket("memory://x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["data/raw", "file:", "file://host/raw", "OFF", "s3:bucket"])
def test_a_wrong_setting_is_refused(value: str) -> None:
    """In one line that names the variable and does not show a password that the address may hold."""
    with pytest.raises(SettingsError, match=r"^RAW_ARCHIVE=\*\*\*: must be off, file:<folder>, or the URL of a folder"):
        load_settings({"RAW_ARCHIVE": value}, env_file=None)


def test_an_unknown_file_system_is_a_wrong_setting(tmp_path: Path) -> None:
    """So is one whose package is not installed: the message says which."""
    with pytest.raises(ConfigurationError, match="RAW_ARCHIVE=nosuch://"):
        open_archive("nosuch://bucket", tmp_path)
    fsspec.register_implementation("testneeds", "no_such_package.System", errtxt="Install testneeds", clobber=True)
    with pytest.raises(ConfigurationError, match=r"Install testneeds; run: \.venv/bin/python -m pip install no_such_package$"):
        open_archive("testneeds://bucket", tmp_path)


class Odd(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A backend with errors of its own."""

    protocol = "testodd"

    def __getattribute__(self, name: str) -> Any:
        if name in ("pipe_file", "cat_file", "exists", "find"):
            raise RuntimeError("no credentials")
        return super().__getattribute__(name)


def test_errors_of_a_backend_are_translated_and_hold_no_password(tmp_path: Path) -> None:
    """Whatever it raises, the archive is unavailable; the place is shown without user and password."""
    fsspec.register_implementation("testodd", Odd, clobber=True)
    odd = open_archive("testodd://user:secret@host/folder", tmp_path)
    assert odd is not None
    calls: list[Callable[[], object]] = [
        odd.check,
        lambda: odd.get(ref_of(MAIL)),
        lambda: odd.put(MAIL),
        lambda: odd.sweep([], older_than=WEEK, now=NOW),
    ]
    for call in calls:
        with pytest.raises(
            ArchiveUnavailable, match=r"testodd://host/folder cannot be had \(RuntimeError: no credentials\)"
        ) as caught:
            call()
        assert "secret" not in str(caught.value)


# --- what a handler sees ---------------------------------------------------------------------------------------------------


def email_of(archive: Archive, raw: bytes) -> Email:
    """The mail as it goes through archive, parser and stream."""
    envelope = Envelope("a", "INBOX", 7, 1, "2026-01-31T00:00:00Z", len(raw), "gm:a:7", "c", "", raw_ref=archive.put(raw))
    return Email(to_fields(envelope, parse(raw, envelope)), archive.get)


def two_attachments(first: bytes, second: bytes) -> bytes:
    return b"\r\n".join(
        [
            b'Content-Type: multipart/mixed; boundary="b"\r\n',
            b"--b\r\n\r\nthe text",
            b"--b\r\nContent-Type: application/pdf; name=../../etc/passwd\r\n\r\n" + first,
            b"--b\r\nContent-Disposition: attachment\r\n\r\n" + second,
            b"--b--",
        ]
    )


def test_a_handler_reads_the_raw_mail_and_each_attachment(folder: Archive) -> None:
    """Of the odd mails on file and of many generated ones: the bytes, and contents with the listed size and hash."""
    opened = 0
    odd = [file.read_bytes() for file in sorted(Path(__file__).with_name("mails").glob("*.eml"))]
    for raw in (*odd, *(sample.raw for sample in generate(3, 150))):
        email = email_of(folder, raw)
        assert email.raw() == raw
        for attachment in email.attachments:
            content = attachment.open().read()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (attachment.size, attachment.sha256)
            opened += 1
    assert opened > 20


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n", b"\r"])
def test_each_attachment_has_its_own_content(folder: Archive, line_end: bytes) -> None:
    """Also two with the same content, and whatever ends the lines; what was listed equals what can be opened."""
    for first, second in ((b"one", b"two"), (b"same", b"same")):
        email = email_of(folder, two_attachments(first, second).replace(b"\r\n", line_end))
        assert [attachment.open().read() for attachment in email.attachments] == [first, second]
        assert email.attachments == email.record.attachments


def test_nothing_is_fetched_before_it_is_asked_for(folder: Archive) -> None:
    """The list of attachments comes from the record; the raw mail is fetched once, however often it is asked for."""
    raw = two_attachments(b"one", b"two")
    asked = []

    def fetch(raw_ref: str) -> bytes:
        asked.append(raw_ref)
        return folder.get(raw_ref)

    envelope = Envelope("a", "INBOX", 7, 1, "", len(raw), "gm:a:7", "c", "", raw_ref=folder.put(raw))
    email = Email(to_fields(envelope, parse(raw, envelope)), fetch)
    assert (len(email.attachments), asked) == (2, [])
    assert (email.attachments[1].open().read(), email.raw(), asked) == (b"two", raw, [ref_of(raw)])


def test_what_was_not_archived_is_missing() -> None:
    """A stub, a mail from before RAW_ARCHIVE, a record alone: Permanent; an archive switched off only here: Transient."""
    with pytest.raises(ArchiveMissing, match="not archived"):
        Email({"record": record_to_json(Record())}).raw()
    with pytest.raises(ArchiveMissing, match=r"take it from Email\.attachments"):
        Attachment("a", "text/plain", 1, "").open()
    with pytest.raises(ArchiveUnavailable, match="RAW_ARCHIVE is off here"):
        Email({"record": record_to_json(Record(raw_ref=ref_of(MAIL)))}).raw()


def test_another_mail_is_never_taken_for_the_attachment(folder: Archive) -> None:
    """A record whose hash no part of the raw mail has gets an error, not some content."""
    raw = two_attachments(b"one", b"two")
    record = Record(raw_ref=folder.put(raw), attachments=(Attachment("a", "application/pdf", 3, "0" * 64),))
    email = Email({"record": record_to_json(record)}, folder.get)
    with pytest.raises(ArchiveMissing, match="no part"):
        email.attachments[0].open()
