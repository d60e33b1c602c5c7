"""Backups on disk: their names, what is written beside each, and how a cut or altered one is told.

`email-ingestion-<UTC time>.rdb` (the server's own snapshot) or `.jsonl.zst` (the portable form: a line of JSON that says what it is, then
a command a line, then a line that says how many there were; zstd). Beside it `<name>.manifest.json` with SHA-256 and counts. Files are
0600, written under another name, fsynced and renamed: what bears its name is whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from src.backup.commands import Command, key_of
from src.common.exceptions import BackupError, ConfigurationError, DiskUnavailable

FORMAT = 1
NAME = re.compile(r"email-ingestion-\d{8}T\d{6}Z(-\d+)?\.(rdb|jsonl\.zst)")
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
RDB_MAGIC = (b"REDIS", b"VALKEY")
PART = ".part"
CHUNK = 1 << 20
PACKED_CHUNK = 1 << 16


@dataclass(frozen=True)
class Manifest:
    """What is known of a backup. `taken_at`: ISO 8601 in UTC; all that was written before is in it. `database`: the number of the one that
    is ours. `counts`: as `src.backup.commands.counts` has them; None where no server of this machine could read the snapshot."""

    format: int
    file: str
    sha256: str
    size: int
    stream: str
    database: int
    taken_at: str
    server: str
    counts: dict[str, int] | None


# writing


@contextmanager
def folder(out: Path) -> Iterator[None]:
    """`out` is there, nobody else writes a backup into it, and what a backup that was killed left in it is gone.

    Raises ConfigurationError (no such folder can be had), BackupError (another backup is at work).
    """
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(f"another backup is being written to {out}: wait for it, or use another --out") from None
        _sweep(out)
        try:
            yield
        finally:
            _sweep(out)
    finally:
        os.close(lock)


def _sweep(out: Path) -> None:
    with suppress(OSError):
        for left in out.glob(f"email-ingestion-*{PART}"):
            left.unlink(missing_ok=True)


def fresh_path(out: Path, moment: datetime, kind: str) -> Path:
    """Where the backup of `moment` (UTC) goes, with a number behind the second of one second. `kind`: rdb or jsonl.zst."""
    name, number = f"email-ingestion-{moment:%Y%m%dT%H%M%SZ}", 1
    while True:
        stem = f"{name}{f'-{number}' if number > 1 else ''}"
        if not any((out / f"{stem}.{form}").exists() for form in ("rdb", "jsonl.zst")):
            return out / f"{stem}.{kind}"
        number += 1


@contextmanager
def part(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, 0600; gone if what is done with it fails. Raises DiskUnavailable."""
    aside = path.with_name(path.name + PART)
    try:
        with _disk(aside), open(aside, "wb", opener=_private) as file:  # Path.open takes no opener
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a stop too: what is half-written goes, the error goes on
        with suppress(OSError):
            aside.unlink()
        raise


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def publish(path: Path, manifest: Callable[[Path], Manifest]) -> Manifest:
    """Give the whole file beside `path` its name, with its manifest; `manifest` makes it of the file. Raises DiskUnavailable."""
    aside, beside = path.with_name(path.name + PART), manifest_path(path)
    try:
        with _disk(beside):
            content = manifest(aside)
            with part(beside) as file:
                file.write((json.dumps(asdict(content), indent=2) + "\n").encode())
            beside.with_name(beside.name + PART).replace(beside)
            aside.replace(path)
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except BaseException:  # a stop too: what is half-written goes, the error goes on
        for left in (aside, *([beside] if not path.exists() else [])):
            with suppress(OSError):
                left.unlink(missing_ok=True)
        raise
    return content


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the disk: a connection that broke off has none
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room, or give another folder with --out" if full else "mend that, or give another folder with --out"
        raise DiskUnavailable(f"{path} cannot be written ({error.strerror}): no backup was made; {remedy}") from error


def write_portable(file: BinaryIO, head: dict[str, object], commands: Iterable[Command]) -> None:
    """`commands` behind `head`, as the portable form."""
    compressor = zstandard.ZstdCompressor(level=6, write_checksum=True)
    count = 0
    with compressor.stream_writer(file, closefd=False) as packed:
        packed.write(_line({"backup": "email-ingestion", "format": FORMAT, **head}))
        for command in commands:
            packed.write(_line(command))
            count += 1
        packed.write(_line({"end": count}))


def _line(content: object) -> bytes:
    """ASCII: bytes that are no UTF-8 stand as lone surrogates, which UTF-8 has no form for."""
    return (json.dumps(content, separators=(",", ":")) + "\n").encode("ascii")


def prune(written: Path, stream: str, keep: int) -> tuple[list[Path], str]:
    """Remove the backups of `stream` beside `written`, but that one and the newest `keep` - 1 others: what was removed, and why not all
    ("": all). Whatever the clock said when they were named, `written` stays; so does what no manifest says to be of this stream.
    """
    removed: list[Path] = []
    try:
        others = [path for path in written.parent.iterdir() if path != written and _is_of(path, stream)]
        newest_first = sorted(others, key=_age, reverse=True)
        for path in reversed(newest_first[keep - 1 :]):
            path.unlink()
            removed.append(path)
            manifest_path(path).unlink(missing_ok=True)
    except OSError as error:
        return removed, f"{error.filename} cannot be removed ({error.strerror})"
    return removed, ""


def _is_of(path: Path, stream: str) -> bool:
    try:
        manifest = read_manifest(path) if NAME.fullmatch(path.name) and path.is_file() else None
    except (BackupError, OSError):  # damaged, or not ours to read: nobody knows whose it is
        return False
    return manifest is not None and manifest.stream == stream


def _age(path: Path) -> tuple[str, int]:
    match = re.match(r"email-ingestion-(\d{8}T\d{6}Z)(?:-(\d+))?", path.name)
    assert match
    return match[1], int(match[2] or 1)


# reading


def manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.manifest.json")


def kind_of(path: Path) -> str:
    """rdb or jsonl.zst, by its first bytes. Raises ConfigurationError for what is neither or cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise ConfigurationError(f"--file {path}: cannot be read ({error.strerror})") from None
    if start.startswith(ZSTD_MAGIC):
        return "jsonl.zst"
    if start.startswith(RDB_MAGIC):
        return "rdb"
    raise ConfigurationError(
        f"--file {path}: neither an RDB file nor a .jsonl.zst of scripts/backup.py, or its beginning is altered"
    )


def read_manifest(path: Path) -> Manifest | None:
    """What stands beside the backup `path`; None where nothing does. Raises BackupError for a damaged one."""
    beside = manifest_path(path)
    try:
        content = json.loads(beside.read_bytes())
        if content["format"] > FORMAT:
            raise BackupError(
                f"{path.name} was made by a newer version of this software (format {content['format']}): use that one"
            )
        return Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise BackupError(f"{beside} is damaged, nothing was changed: another copy of it is needed, or another backup") from None


def checksum(path: Path, tell: Callable[[int], None] = lambda done: None) -> str:
    """SHA-256, hex. `tell` hears how many bytes were read."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            tell(done)
    return digest.hexdigest()


def verify(path: Path, manifest: Manifest, tell: Callable[[int], None]) -> None:
    """Raises BackupError where the file is not the one that its manifest speaks of."""
    size = path.stat().st_size
    if size != manifest.size:
        raise BackupError(
            f"{path.name} is cut or altered: {size} bytes, its manifest says {manifest.size}. Nothing was changed; use another backup"
        )
    if checksum(path, tell) != manifest.sha256:
        raise BackupError(
            f"{path.name} is altered: its SHA-256 is not the one of its manifest. Nothing was changed; use another backup"
        )


class Portable:
    """A backup in the portable form. `head`: what its first line says."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.head: dict[str, object] = self._parsed(next(self._lines(), b""), dict)
        if self.head.get("backup") != "email-ingestion":
            raise BackupError(f"{path.name} is no backup of scripts/backup.py")
        if self.head.get("format") != FORMAT:
            raise BackupError(f"{path.name} was made by another version of this software: use that one")

    def commands(self) -> Iterator[Command]:
        """Its commands. Raises BackupError at the end of a cut file, and wherever it was altered."""
        lines = self._lines()
        next(lines, b"")
        for count, line in enumerate(lines):
            if line.startswith(b"{"):
                if self._parsed(line, dict).get("end") != count or next(lines, None) is not None:
                    raise self._damaged()
                return
            command = self._parsed(line, list)
            key_of(command)
            yield command
        raise self._damaged()

    def _lines(self) -> Iterator[bytes]:
        """At their end the frame has ended too, with its checksum, and nothing follows it."""
        packed, rest = zstandard.ZstdDecompressor().decompressobj(), b""
        with self._path.open("rb") as file:
            while chunk := file.read(PACKED_CHUNK):
                try:
                    *lines, rest = (rest + packed.decompress(chunk)).split(b"\n")
                except zstandard.ZstdError:
                    raise self._damaged() from None
                yield from lines
        if rest or not packed.eof or packed.unused_data:
            raise self._damaged()

    def _parsed(self, line: bytes, kind: type) -> Any:
        try:
            content = json.loads(line)
        except ValueError:
            raise self._damaged() from None
        if not isinstance(content, kind):
            raise self._damaged()
        return content

    def _damaged(self) -> BackupError:
        return BackupError(f"{self._path.name} is cut or altered. Nothing was changed; use another backup")
