"""Put a backup into Redis. `python scripts/restore.py --help`."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

import _path  # noqa: F401  # before the project's own modules
from _bulk import report
from _command import run_command
from _steps import Steps
from config.settings import Settings
from src.backup.commands import Size, counts, measured, ours, sentence
from src.backup.restore import Restore, Target
from src.backup.source import Source, opened
from src.common.clock import SYSTEM
from src.common.embedded import open_redis, server_url
from src.common.exceptions import BackupError
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Put a backup of scripts/backup.py (or an RDB file of a server) into Redis, all of it or nothing, whatever the "
        "version of the server. Touched are the keys of STREAM_NAME and all of producer_state:*, which name no stream: a database is for "
        "one stream. Stop the daemons first.",
        epilog="The backup is proved whole before anything is written, laid aside in Redis, counted, and put in place in one step; "
        "until then Redis holds what it held, also if this is killed. Mail since the backup is read again from the mailboxes: what a "
        "handler did for it may be done twice. Exit code: 0 restored (--dry-run: it could be), 1 not, 2 a wrong argument or setting. "
        "docs/runbooks/backup-and-recovery.md tells more.",
    )
    parser.add_argument("--file", type=Path, required=True, metavar="F", help="the backup; its manifest is looked for beside it")
    parser.add_argument("--dry-run", action="store_true", help="prove the file, say what would be done, change nothing")
    parser.add_argument(
        "--force", action="store_true", help="also while daemons of this stream are at work, and over what stands in Redis"
    )
    return parser


class Desk:
    def __init__(
        self, settings: Settings, redis: RedisClient, shutdown: Shutdown, given: argparse.Namespace, tell: Steps
    ) -> None:
        self.redis, self.shutdown, self.given, self.tell = redis, shutdown, given, tell
        self.keys = Keys(settings.stream.name)

    def run(self) -> tuple[int, dict[str, object], list[str]]:
        """Exit code, what to say as JSON, and as lines."""
        target = Target.look(self.redis, self.keys)
        with opened(self.given.file, self.keys, self.redis.database, self.shutdown, self.tell) as source:
            held = counts(source.sizes, self.keys)
            if not held["keys"]:
                raise BackupError(f"{self.given.file.name} is empty: nothing was changed")
            refusal = target.refusal(force=self.given.force)
            if self.given.dry_run:
                return self._dry_run(source, held, target, refusal)
            if refusal:
                raise BackupError(refusal)
            restore = Restore(self.redis, self.keys, secrets.token_hex(8), lambda: self.shutdown.requested, self._told)
            sizes = restore.run(source.commands(), target, force=self.given.force)
        return self._done(sizes, target)

    def _told(self, done: int) -> None:
        self.tell("commands carried out", done, 0)

    def _dry_run(
        self, source: Source, held: dict[str, int], target: Target, refusal: str
    ) -> tuple[int, dict[str, object], list[str]]:
        stands = counts(measured(self.redis, target.names), self.keys)
        taken_at = source.manifest.taken_at if source.manifest else "an unknown time"
        lines = [
            f"The backup is whole, of {taken_at}: {sentence(held)}",
            f"In Redis now: {sentence(stands)}",
            f"{len(target.left)} keys that a restore laid aside before it was killed would be removed" if target.left else "",
            f"It would be refused: {refusal}" if refusal else "It would be restored. Nothing was changed",
        ]
        facts: dict[str, object] = {"taken_at": taken_at, "backup": held, "redis": stands, "refusal": refusal, "restored": False}
        return int(bool(refusal)), facts, lines

    def _done(self, sizes: dict[str, Size], target: Target) -> tuple[int, dict[str, object], list[str]]:
        """What stands there now is counted once more: with daemons at work it may have moved on."""
        seconds, _ = self.redis.call("TIME")
        expected = counts(
            {key: size for key, size in sizes.items() if not size.expires or int(size.expires) > (int(seconds) + 1) * 1000},
            self.keys,
        )
        stands = counts(measured(self.redis, ours(self.redis, self.keys)), self.keys)
        agree = stands == expected
        lines = [
            f"Restored: {sentence(stands)}",
            "" if agree else f"The backup holds {sentence(expected)}: something is at work in this Redis",
            "Start the daemons: mail since the backup is read again from the mailboxes",
        ]
        facts: dict[str, object] = {"restored": True, "redis": stands, "backup": expected, "replaced_keys": len(target.names)}
        return int(not agree and not target.alive), facts, lines


def main() -> int:
    given = arguments().parse_args()

    def run(settings: Settings, shutdown: Shutdown) -> int:
        shutdown.on_signals()
        with open_redis(settings, shutdown):
            client = RedisClient.connect(
                server_url(settings), max_connections=4, socket_timeout=settings.redis.socket_timeout, not_utf8="surrogateescape"
            )
            with client as redis, Steps(SYSTEM) as tell:
                code, facts, lines = Desk(settings, redis, shutdown, given, tell).run()
        report(facts, *lines)
        return code

    return run_command(run, log_level="WARNING")


if __name__ == "__main__":
    sys.exit(main())
