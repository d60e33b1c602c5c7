"""What is to be restored: a file, proved whole, as commands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from src.backup import files
from src.backup.commands import Command, Size, Tally, measured, ours, read
from src.backup.files import Manifest, Portable
from src.backup.local_server import loaded
from src.common.exceptions import BackupError, ConfigurationError
from src.common.keys import Keys
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """`sizes`: of its keys. `commands`: makes them again, each time from the beginning. `manifest`: None where none stands beside it."""

    manifest: Manifest | None
    sizes: dict[str, Size]
    commands: Callable[[], Iterator[Command]]


@contextmanager
def opened(path: Path, keys: Keys, database: int, shutdown: Shutdown, tell: Callable[[str, int, int], None]) -> Iterator[Source]:
    """The backup `path`, looked through to its end. `database`: where to look in an RDB file without a manifest.

    Raises ConfigurationError (not a backup, or one of another stream), BackupError (cut, altered, of a server unknown here).
    """
    kind = files.kind_of(path)
    manifest = files.read_manifest(path)
    if manifest is None:
        log.warning("no %s: the file is proved by its own checksum alone", files.manifest_path(path).name)
    else:
        _of_stream(manifest.stream, keys)
        files.verify(path, manifest, lambda done: tell("checksum, bytes", done, manifest.size))
    if kind == "jsonl.zst":
        portable = Portable(path)
        _of_stream(str(portable.head.get("stream")), keys)
        tally = Tally()
        for command in portable.commands():
            if shutdown.requested:
                raise BackupError("stopped as asked: nothing was changed")
            tally.add(command)
            tell("commands read", tally.commands, 0)
        yield Source(manifest, tally.sizes, portable.commands)
        return
    with loaded(path, manifest.database if manifest else database, shutdown.wait) as server:
        names = ours(server, keys)
        if manifest is None and not any(keys.is_of_stream(name) for name in names):
            raise BackupError(f"{path.name} holds nothing of the stream {keys.stream}: is STREAM_NAME right? Nothing was changed")
        yield Source(manifest, measured(server, names), lambda: read(server, names))


def _of_stream(stream: str, keys: Keys) -> None:
    if stream != keys.stream:
        raise ConfigurationError(f"the backup is of the stream {stream}, STREAM_NAME is {keys.stream}: set STREAM_NAME={stream}")
