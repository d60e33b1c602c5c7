"""Each mail as one line of JSON at the end of a file: `WORKER_HANDLER=src.handlers.jsonl:handle`, JSONL_PATH.

A line is on the disk (fsync) before its mail counts as done. Any number of processes may write one file, on one machine: a lock
(flock) keeps their lines apart. At least once: a crash between the line and its acknowledgement writes the line again, with
the same `email_id`.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from src.common.exceptions import ConfigurationError, DiskUnavailable
from src.handlers.document import document
from src.handlers.settings import HandlerSettings, read
from src.mail.record import Email

START = b'{"email_id"'
MOST_TORN = 1024 * 1024  # bytes; a line has at most some 130 KiB
BLOCK = 64 * 1024


class JsonlSettings(HandlerSettings):
    model_config = SettingsConfigDict(env_prefix="JSONL_")

    path: Path = Field(description="the file that lines are appended to; its folder must exist")


def handle(email: Email, context: object) -> None:
    """Raises DiskUnavailable: the mail is retried."""
    path = prepare()
    try:
        append(path, f"{document(email)}\n".encode())
    except (OSError, ValueError) as error:
        raise DiskUnavailable(f"{path}: {error}") from error


@cache
def prepare() -> Path:
    """The path, once; the file exists then and its last line is whole. Raises ConfigurationError."""
    path = read(JsonlSettings).path.absolute()
    try:
        append(path, b"")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"JSONL_PATH={path}: {error}") from None
    return path


def append(path: Path, line: bytes) -> None:
    """Put `line` behind the last whole line and wait until the disk has it. What a crash left of a line is cut away first.

    Raises OSError (then nothing of the line stays), ValueError when what stands at the end is no line of ours.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = heal(file)
        try:
            write(file, line)
        except OSError:
            os.ftruncate(file, end)
            raise
        fcntl.flock(file, fcntl.LOCK_UN)  # others may write while the disk works
        os.fsync(file)
    finally:
        os.close(file)
    if end == 0:
        _sync_folder(path.parent)


def heal(file: int) -> int:
    """Make the file end with a whole line; its length in bytes. Raises ValueError and changes nothing where that is not sure."""
    length = os.fstat(file).st_size
    tail = tail_of(file, length)
    if not tail:
        return length
    if is_object(tail):
        write(file, b"\n")
        return length + 1
    if not is_torn(tail):
        raise ValueError("its last line has no end and is none of this handler's: is it the right file?")
    os.ftruncate(file, length - len(tail))
    return length - len(tail)


def tail_of(file: int, length: int) -> bytes:
    """What stands behind the last line feed, b"" in a whole file; its last MOST_TORN bytes and more, when it is longer."""
    tail = b""
    while length > 0 and len(tail) <= MOST_TORN:
        start = max(0, length - (BLOCK if tail else 1))  # a whole file shows itself by its last byte
        tail = os.pread(file, length - start, start) + tail
        length = start
        if b"\n" in tail:
            return tail.rpartition(b"\n")[2]
    return tail


def is_torn(tail: bytes) -> bool:
    """Whether it is the beginning of one of our lines, or the zeros that a file system leaves after a power cut."""
    written = tail.rstrip(b"\0")
    return len(tail) <= MOST_TORN and written.startswith(START[: len(written)])


def is_object(text: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(text), dict)
    return False


def write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    """The name of a new file is on the disk too."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
