"""Into a running server, all or nothing: the keys of a backup are laid aside under other names, counted, and take their places in one
script (`lua/restore.lua`). Until then the server holds what it held; killed before, only what was laid aside is left, which the next
restore removes. Keys that are not ours are never touched; but `producer_state:*` are every stream's in that database.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from src.backup.commands import PAGE, Command, Size, Tally, key_of, measured, ours, renamed, scan
from src.common.exceptions import BackupError, IngestionError, RedisFull, RedisUnavailable
from src.common.keys import ALL_DAEMONS, Keys
from src.common.redis_client import RedisClient
from src.common.registry import SILENT_SECONDS, Seen, registered

log = logging.getLogger(__name__)

BATCH_BYTES = 1 << 20
MOST_KEYS = 300_000  # a script takes about a million words, and each key is up to three of them; those that go count too


@dataclass(frozen=True)
class Target:
    """What stands in the server before a restore. `others`: streams of the same database that have daemons alive. `names`: keys that the
    backup would replace. `left`: what a killed restore laid aside."""

    alive: list[Seen]
    others: list[str]
    names: list[str]
    left: list[str]

    @classmethod
    def look(cls, redis: RedisClient, keys: Keys) -> Target:
        streams = sorted({Keys.of_daemons(key).stream for key in scan(redis, ALL_DAEMONS, "TYPE", "hash")} - {keys.stream})
        others = [stream for stream in streams if _alive(redis, Keys(stream))]
        return cls(_alive(redis, keys), others, ours(redis, keys), list(scan(redis, keys.restoring_pattern())))

    def refusal(self, *, force: bool) -> str:
        """Why nothing may be restored; "" if it may."""
        if self.others:
            return (
                f"daemons of another stream are at work in this database: {', '.join(self.others)}. Their producer_state:* would be "
                "replaced too, also with --force: restore into a database of its own (the number at the end of REDIS_URL)"
            )
        if force:
            return ""
        if self.alive:
            names = ", ".join(f"{seen.daemon.role} {seen.daemon.name}" for seen in self.alive)
            return f"daemons are at work: {names}. Stop them first (one that was killed counts for {SILENT_SECONDS:g} s), or use --force"
        if self.names:
            return f"this Redis is not empty: {len(self.names)} keys of ours stand there. --force replaces them by the backup"
        return ""


def _alive(redis: RedisClient, keys: Keys) -> list[Seen]:
    return [seen for seen in registered(redis, keys) if seen.alive]


class Restore:
    """One restore of `commands`. `nonce` names what it lays aside. `tell` hears how many commands were carried out."""

    def __init__(
        self, redis: RedisClient, keys: Keys, nonce: str, stopped: Callable[[], bool], tell: Callable[[int], None]
    ) -> None:
        self._redis, self._keys, self._nonce = redis, keys, nonce
        self._stopped, self._tell = stopped, tell
        self._aside: dict[str, str] = {}

    def run(self, commands: Iterable[Command], target: Target, *, force: bool) -> dict[str, Size]:
        """All of it; what stands in the server then. Raises BackupError or what RedisClient raises; the text says what stands."""
        try:
            self._forget(target.left)
            sizes = self._lay_aside(commands)
            self._count(sizes)
            gone = [name for name in target.names if name not in self._aside]
            if len(self._aside) + len(gone) > MOST_KEYS:
                raise BackupError(
                    f"{len(self._aside)} keys of the backup and {len(gone)} that would go are more than {MOST_KEYS}: one step cannot do "
                    "that; restore into an empty database"
                )
        except IngestionError as error:
            raise self._given_up(error) from error
        self._switch(sizes, gone, force=force)
        return sizes

    def _lay_aside(self, commands: Iterable[Command]) -> dict[str, Size]:
        tally = Tally()
        batch: list[Command] = []
        size = 0
        for command in commands:
            key = key_of(command)
            if not self._keys.is_data(key):
                raise BackupError(f"the backup holds {key!r:.100}, which is no key of stream {self._keys.stream}")
            tally.add(command)
            if command[0] == "PEXPIREAT":
                continue  # when it takes its place: what is laid aside must not vanish meanwhile
            name = self._aside.setdefault(key, self._keys.restoring(self._nonce, len(self._aside)))
            if len(self._aside) > MOST_KEYS:
                raise BackupError(f"the backup holds more than {MOST_KEYS} keys: one step cannot put so many in place")
            batch.append(renamed(command, name))
            size += sum(map(len, command))
            if len(batch) >= PAGE or size >= BATCH_BYTES:
                self._send(batch, tally)
                batch, size = [], 0
        self._send(batch, tally)
        return tally.sizes

    def _send(self, batch: list[Command], tally: Tally) -> None:
        if self._stopped():
            raise BackupError("stopped as asked")
        self._redis.call_all(batch)
        self._tell(tally.commands)

    def _count(self, sizes: dict[str, Size]) -> None:
        """What was laid aside is as much as the backup holds."""
        found = measured(self._redis, list(self._aside.values()))
        for key, name in self._aside.items():
            there, wanted = found[name], sizes[key]
            if (there.kind, there.length, there.pending) != (wanted.kind, wanted.length, wanted.pending):
                raise BackupError(
                    f"{key} did not arrive whole: {there.length} of {wanted.length}, in flight {there.pending} of {wanted.pending}"
                )

    def _switch(self, sizes: dict[str, Size], gone: list[str], *, force: bool) -> None:
        silence = "" if force else str(round(SILENT_SECONDS * 1000))
        names = [name for key, aside in self._aside.items() for name in (aside, key)]
        try:
            verdict, *what = self._redis.run(
                "restore",
                [self._keys.daemons, *names, *gone],
                [silence, len(self._aside), *(sizes[key].expires for key in self._aside)],
            )
        except RedisUnavailable as error:
            raise BackupError(
                f"the answer to the last step was lost ({error}): either all is as in the backup, or as it was before. "
                "The same command with --dry-run shows which"
            ) from error
        except IngestionError as error:
            raise self._given_up(error) from error
        if verdict == "LIVE":
            raise self._given_up(BackupError(f"the daemon {what[0]} was started meanwhile: stop it"))
        if verdict == "TAKEN":
            raise self._given_up(BackupError(f"{what[0]} was written meanwhile: something is at work there"))
        if verdict == "GONE":
            raise self._given_up(BackupError("what was laid aside was removed meanwhile: is another restore at work?"))

    def _given_up(self, error: BaseException) -> BackupError:
        """What to say once the target is as it was."""
        full = "; Redis has no room for the backup beside what it holds (maxmemory, disk)" if isinstance(error, RedisFull) else ""
        why = str(error) or type(error).__name__
        try:
            self._forget(list(self._aside.values()))
        except IngestionError as second:
            pattern = self._keys.restoring_pattern()
            return BackupError(
                f"{why}{full}. The server holds what it held, and {len(self._aside)} keys {pattern} laid aside, which could not be "
                f"removed ({second}): the next restore removes them"
            )
        return BackupError(f"{why}{full}. Nothing was restored: the server holds what it held")

    def _forget(self, names: list[str]) -> None:
        for first in range(0, len(names), PAGE):
            self._redis.call("UNLINK", *names[first : first + PAGE])
