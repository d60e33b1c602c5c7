"""A backup, from the snapshot of the server to the file with its manifest.

Both forms come from one snapshot, so they are of one moment: keys that are read one by one while mail moves from one to the other would
miss some. The snapshot is loaded into a server of our own before it gets its name: a backup that nobody can read is none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src.backup import files, snapshot
from src.backup.commands import Command, Tally, counts, measured, ours, read
from src.backup.files import FORMAT, Manifest
from src.backup.local_server import BeyondUs, loaded
from src.common.clock import Clock, iso
from src.common.exceptions import BackupError
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)

Kind = Literal["rdb", "jsonl.zst"]
Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much in all (0: not known)


@dataclass(frozen=True)
class Taken:
    """`removed`: older backups. `left`: why not all that should be are; "" if they are."""

    path: Path
    manifest: Manifest
    removed: list[Path]
    left: str


@dataclass(frozen=True)
class Backup:
    """`keep`: how many backups of the stream stay in `out`, this one included; 0 for all."""

    redis: RedisClient
    keys: Keys
    out: Path
    kind: Kind
    keep: int
    clock: Clock
    shutdown: Shutdown
    tell: Tell

    def run(self) -> Taken:
        """Raises BackupError, DiskUnavailable, ConfigurationError or what RedisClient raises; then no file is left."""
        with files.folder(self.out):
            moment = self.clock.wall()
            path = files.fresh_path(self.out, moment, self.kind)
            server = self.redis.version()
            held = self._snapshot(path) if self.kind == "rdb" else self._portable(path, iso(moment), server)

            def manifest(file: Path) -> Manifest:
                database = self.redis.database
                return Manifest(
                    FORMAT,
                    path.name,
                    files.checksum(file),
                    file.stat().st_size,
                    self.keys.stream,
                    database,
                    iso(moment),
                    server,
                    held,
                )

            written = files.publish(path, manifest)
            something = bool(held and held["keys"])
            removed, left = files.prune(path, self.keys.stream, self.keep) if self.keep and something else ([], "")
            return Taken(path, written, removed, left)

    def _snapshot(self, path: Path) -> dict[str, int] | None:
        with files.part(path) as file:
            snapshot.take(self.redis, file, stopped=lambda: self.shutdown.requested, tell=self._bytes)
            file.flush()
            try:
                with loaded(Path(file.name), self.redis.database, self.shutdown.wait) as server:
                    return counts(measured(server, ours(server, self.keys)), self.keys)
            except BeyondUs as error:
                log.warning("the backup is kept, but it was not tried: %s", error)
                return None

    def _portable(self, path: Path, taken_at: str, server: str) -> dict[str, int]:
        head: dict[str, object] = {
            "stream": self.keys.stream,
            "database": self.redis.database,
            "taken_at": taken_at,
            "server": server,
        }
        tally = Tally()
        whole = path.with_name(path.name.replace(self.kind, "rdb"))
        with files.part(whole) as file:
            snapshot.take(self.redis, file, stopped=lambda: self.shutdown.requested, tell=self._bytes)
            file.flush()
            with loaded(Path(file.name), self.redis.database, self.shutdown.wait) as local, files.part(path) as packed:
                names = ours(local, self.keys)
                files.write_portable(packed, head, self._counted(read(local, names), tally, len(names)))
        Path(file.name).unlink()
        return counts(tally.sizes, self.keys)

    def _counted(self, commands: Iterator[Command], tally: Tally, keys: int) -> Iterator[Command]:
        for command in commands:
            if self.shutdown.requested:
                raise BackupError("stopped as asked: no backup was written")
            tally.add(command)
            self.tell("keys", len(tally.sizes), keys)
            yield command

    def _bytes(self, done: int) -> None:
        self.tell("snapshot, bytes", done, 0)
