"""The raw bytes of each mail beside the stream: stored under their SHA-256, verified when read, swept when nobody needs them.

A mail `sha256:abcd…` is the file `a/abcd…` of the archive, the bytes as IMAP gave them: `sha256sum` proves it, any mail
program opens it. No name comes from a mail. (zlib would save 60 % of letters and 24 % of large attachments, at 30 MB/s of
intake; the retention bounds the space instead.) One archive belongs to one stream: the sweep of another would empty it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from src.common.exceptions import ArchiveMissing, ArchiveUnavailable

if TYPE_CHECKING:  # the producer's archiver knows nothing of Redis: a third of its memory, half of its start
    from src.common.keys import Keys
    from src.common.redis_client import RedisClient

PUBLISH_SECONDS = 3600.0  # a kept mail waits no longer for its place in the stream: then it is read, and kept, anew
REFRESH_SECONDS = 86_400.0  # how old the sign that a mail is still needed may become
PAGE = 100  # entries read at once while references are collected
MARK = "archive"  # a file that says: this is an archive, not the empty folder of a mount that is missing
ASIDE = "tmp"  # where files are written before they have their name

_REF = re.compile(r"sha256:([0-9a-f]{64})")
_REF_IN_RECORD = re.compile(r'"raw_ref":\s*"(sha256:[0-9a-f]{64})"')  # within a JSON text the quotes would be escaped
DIGEST = re.compile(r"[0-9a-f]{64}")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITERS = 8

Raw = bytes | memoryview
File = tuple[str, Raw]  # (path in the archive, what is to stand there)
Item = TypeVar("Item")


class Store(Protocol):
    """Where files are kept. `path`: relative, with slashes; times in seconds since 1970. Each method may raise OSError."""

    @property
    def place(self) -> str:
        """As a message names it; never with a password."""
        ...

    def begun(self) -> bool:
        """Whether this place ever was an archive."""
        ...

    def put(self, files: Sequence[File]) -> None:
        """Each is whole and durable under its name when this returns; whole or not there at all where it raises."""
        ...

    def read(self, path: str) -> bytes | None: ...

    def files(self) -> Iterator[tuple[str, float]]:
        """(path, when it was written or refreshed) of all files but the mark."""
        ...

    def refresh(self, path: str, now: float) -> None: ...

    def remove_older(self, path: str, moment: float) -> bool:
        """Remove the file unless it was refreshed since `moment`; whether it is gone by this call."""
        ...


@dataclass(frozen=True)
class Archive:
    """Raw mails in `store`. Safe to use from several threads and processes."""

    store: Store

    def put(self, raw: Raw) -> str:
        """Keep a mail; its reference. Safe to repeat; whoever keeps it again renews its time.

        A mail must be in the stream within a day and the retention, or it is swept. Raises ArchiveUnavailable.
        """
        return self.put_all([raw])[0]

    def put_all(self, raws: Sequence[Raw]) -> list[str]:
        """`put` for many mails, which together cost little more than one. Raises ArchiveUnavailable."""
        if not raws:
            return []
        refs = [ref_of(raw) for raw in raws]
        with self._reaching("kept"):
            self.store.put([(_path(ref), raw) for ref, raw in zip(refs, raws, strict=True)])
        return refs

    def get(self, raw_ref: str) -> bytes:
        """The mail of a reference, verified.

        Raises ArchiveMissing (swept, damaged, or no reference), ArchiveUnavailable (the archive itself cannot be had).
        """
        if not _REF.fullmatch(raw_ref):
            raise ArchiveMissing(f"{raw_ref[:100]!r} is no reference to an archived mail")
        with self._reaching("read"):
            raw = self.store.read(_path(raw_ref))
        if raw is None:
            self.check()
            raise ArchiveMissing(f"{raw_ref} is not in {self.store.place}: swept after RAW_RETENTION, or removed by hand")
        if ref_of(raw) != raw_ref:
            raise ArchiveMissing(f"{raw_ref} in {self.store.place} is damaged: its bytes have another SHA-256")
        return raw

    def check(self) -> None:
        """Raises ArchiveUnavailable where mail cannot be read from here, with what to do about it."""
        with self._reaching("read"):
            begun = self.store.begun()
        if not begun:
            raise ArchiveUnavailable(
                f"{self.store.place} is no archive (yet): the first mail of the producer makes it one. "
                "If mail was published already, mount it, or set RAW_ARCHIVE to a place that producer and workers share"
            )

    def sweep(self, referenced: Iterable[str], *, older_than: float, now: datetime) -> int:
        """Remove what nobody referred to for `older_than` seconds (and a day at most); how many files.

        `referenced`: see `references`. They are marked as needed at `now`, so a mail is kept for `older_than` after the last sweep
        that saw it unfinished or dead, and one sweep that overlooks a mail does no harm. To be called daily or more often.
        """
        needed = {_path(raw_ref) for raw_ref in referenced}
        moment = now.timestamp()
        removed = 0
        with self._reaching("swept"):
            for path, refreshed in self.store.files():
                if refreshed >= moment - REFRESH_SECONDS:
                    continue
                if path in needed:
                    self.store.refresh(path, moment)
                elif refreshed < moment - REFRESH_SECONDS - older_than:
                    removed += self.store.remove_older(path, moment - REFRESH_SECONDS - older_than)
        return removed

    def all(self) -> Iterator[tuple[str, bytes]]:
        """(reference, raw mail) of everything that is kept, as it stands there. Raises ArchiveUnavailable."""
        with self._reaching("read"):
            for path, _ in self.store.files() if self.store.begun() else ():
                if _REF.fullmatch(_ref(path)) and (raw := self.store.read(path)) is not None:
                    yield _ref(path), raw

    def remove(self, raw_ref: str, now: datetime) -> bool:
        """Remove a mail at once; whether it is gone. One that somebody keeps anew since `now` stays. Raises ArchiveUnavailable."""
        path = _path(raw_ref)
        with self._reaching("removed"):
            return self.store.begun() and (self.store.remove_older(path, now.timestamp()) or self.store.read(path) is None)

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if error.errno in _FULL:
                raise ArchiveUnavailable(
                    f"raw mail cannot be {what}: {self.store.place} is full ({reason}). "
                    "Make room there or lower RAW_RETENTION; nothing is lost meanwhile"
                ) from error
            raise ArchiveUnavailable(
                f"raw mail cannot be {what}: {self.store.place} cannot be had ({reason}). "
                "Mount it, mend its rights or its login, or change RAW_ARCHIVE; nothing is lost meanwhile"
            ) from error


def at_once(call: Callable[[Item], object], items: Collection[Item]) -> None:
    """`call` for each of the items, several at a time: a disk syncs eight files in little more time than one."""
    with ThreadPoolExecutor(max(1, min(len(items), WRITERS))) as pool:
        list(pool.map(call, items))


def ref_of(raw: Raw) -> str:
    """The reference of a mail: `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def raw_ref_in(record: str) -> str:
    """The reference in a record's JSON text, found without decoding it; "" where there is none."""
    behind_the_text = record.find('"raw_ref"')  # a pattern would look at each letter before
    found = _REF_IN_RECORD.search(record, behind_the_text) if behind_the_text >= 0 else None
    return found[1] if found else ""


def _path(raw_ref: str) -> str:
    digest = raw_ref.removeprefix("sha256:")
    return f"{digest[0]}/{digest}"  # 16 folders: a batch of mails syncs each of them once


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _ref(path: str) -> str:
    return f"sha256:{path.rpartition('/')[2]}"


def references(redis: RedisClient, keys: Keys) -> set[str]:
    """What all unfinished and dead mails refer to. A stream of 100,000 mails takes some seconds. Raises what RedisClient raises.

    The stream, the dead letters, then what entered the stream meanwhile: so a letter that is replayed is not overlooked.
    """
    found: set[str] = set()
    last = _collect(redis, keys.stream, "-", found)
    _collect(redis, keys.dlq, "-", found)
    _collect(redis, keys.stream, last, found)
    return found


def _collect(redis: RedisClient, stream: str, start: str, found: set[str]) -> str:
    """Adds the references of the entries from `start` on; from where to go on later."""
    while page := redis.entries(stream, start, count=PAGE):
        for entry_id, fields in page:
            found.update(_REF_IN_RECORD.findall(fields.get("record", "")))
            start = f"({entry_id}"
    return start


def open_archive(url: str | None, data_dir: Path) -> Archive | None:
    """The archive of RAW_ARCHIVE: `file:<folder>`, any fsspec URL, None for `<data_dir>/raw`; None for "off". Touches nothing.

    Raises ConfigurationError where the package for such a URL is not installed.
    """
    if url == "off":
        return None
    if url is None:
        return Archive(Folder(data_dir / "raw"))
    if url.startswith("file:"):
        root = Path(url.removeprefix("file:").removeprefix("//"))
        return Archive(Folder(root, data_dir / "archives" / hashlib.sha256(os.fsencode(root)).hexdigest()[:16]))
    from src.common.bucket import open_bucket  # asyncio and much else, which a folder needs not

    return Archive(open_bucket(url))


@dataclass(frozen=True)
class Folder:
    """A folder of this machine, or one that is mounted: files 0600, folders 0700, written aside, fsynced, renamed.

    The lock keeps a sweep from removing a file that is being kept anew at the same moment. `memory`: a file on another disk that says
    that this was an archive: where it is none any more a mount is missing, and mail kept below would be out of sight once it is back.
    """

    root: Path
    memory: Path | None = None

    @property
    def place(self) -> str:
        return str(self.root)

    def begun(self) -> bool:
        try:
            (self.root / MARK).open().close()
        except FileNotFoundError:
            return False
        return True

    def put(self, files: Sequence[File]) -> None:
        """All are written, then all synced, then all named: a journal is committed a few times and not once for each."""
        asides = [f"{self.root}/{ASIDE}/{secrets.token_hex(8)}" for _ in files]
        try:
            for aside, (_, data) in zip(asides, files, strict=True):
                self._lay(aside, data)
            at_once(_sync, asides)
            with self._lock(fcntl.LOCK_SH):
                for aside, (path, _) in zip(asides, files, strict=True):
                    self._name(aside, f"{self.root}/{path}")
        except OSError:
            for aside in asides:  # the next try needs their room
                with suppress(OSError):
                    os.unlink(aside)  # noqa: PTH108  # as in `_name`
            raise
        at_once(_sync, {f"{self.root}/{_folder(path)}" for path, _ in files})
        with suppress(OSError):  # of another disk: the next put tries again
            if self.memory and not self.memory.exists():
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                self.memory.write_text(f"{self.root}\n")

    def _lay(self, aside: str, data: Raw) -> None:
        try:
            handle = os.open(aside, _NEW, 0o600)
        except FileNotFoundError:
            if self.memory and self.memory.exists() and not self.begun():
                raise OSError(
                    errno.ENXIO, f"it was an archive and is none now; to begin anew there, remove {self.memory}"
                ) from None
            self.root.parent.mkdir(parents=True, exist_ok=True)
            _make(self.root)
            _make(self.root / ASIDE)
            handle = os.open(aside, _NEW, 0o600)
        try:
            _write(handle, data)
        finally:
            os.close(handle)

    def _name(self, aside: str, target: str) -> None:
        try:
            os.replace(aside, target)  # noqa: PTH105  # hundreds a second: a Path costs as much as the call
        except FileNotFoundError:
            _make(Path(target).parent)
            Path(aside).replace(target)

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def files(self) -> Iterator[tuple[str, float]]:
        for pattern in (f"{ASIDE}/*", "[0-9a-f]/*"):
            for file in self.root.glob(pattern):
                if pattern.startswith(ASIDE) or DIGEST.fullmatch(file.name):
                    with suppress(FileNotFoundError):
                        yield file.relative_to(self.root).as_posix(), file.stat().st_mtime

    def refresh(self, path: str, now: float) -> None:
        with suppress(FileNotFoundError):
            os.utime(self.root / path, (now, now))

    def remove_older(self, path: str, moment: float) -> bool:
        file = self.root / path
        with self._lock(fcntl.LOCK_EX), suppress(FileNotFoundError):
            if file.stat().st_mtime < moment:
                file.unlink()
                return True
        return False

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        handle = os.open(self.root / MARK, os.O_RDONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, kind)
            yield
        finally:
            os.close(handle)


def _write(handle: int, data: Raw) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]  # a disk that is nearly full takes a part
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # Linux begins to write it to the disk


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    _sync(str(folder.parent))


def _sync(path: str) -> None:
    """fsync of a file or a folder. It also tells of what went wrong since the file was written, whoever had it open (Linux 4.17)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
