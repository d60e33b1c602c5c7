"""Take a backup of everything that stands in Redis. `python scripts/backup.py --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import _path  # noqa: F401  # before the project's own modules
from _bulk import positive, report
from _command import run_command, say
from _steps import Steps
from config.settings import Settings
from src.backup.commands import sentence
from src.backup.take import Backup, Taken
from src.common.clock import SYSTEM
from src.common.embedded import open_redis
from src.common.keys import Keys
from src.common.shutdown import Shutdown


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Take a backup of Redis while everything goes on: a snapshot of one moment, had as a replica has it, so that the "
        "server's file system is not needed. It is loaded into a server of our own before it gets its name, which takes as much "
        "memory as Redis holds.",
        epilog="A user of an ACL needs +psync +replconf, which let it read all keys. Neither tokens nor settings nor the archive of raw "
        "mail are in a backup. Exit code: 0 written, 1 not, and no half file is left (or it is, and --keep could not remove an older one), "
        "2 a wrong argument or setting. "
        "docs/runbooks/backup-and-recovery.md tells more.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("backups"), metavar="DIR", help="folder (default: backups, in the current one)"
    )
    parser.add_argument(
        "--keep",
        type=positive,
        default=0,
        metavar="N",
        help="afterwards remove all backups of this stream in DIR but this one and the newest N - 1 others (default: none)",
    )
    parser.add_argument(
        "--format",
        choices=("rdb", "jsonl.zst"),
        default="rdb",
        help="rdb: the server's own file, with every key and database of it (default). jsonl.zst: our keys only, as commands that "
        "every server from Redis 7.0 on knows",
    )
    return parser


def say_taken(taken: Taken) -> int:
    manifest = taken.manifest
    command = shlex.join(["python", str(Path(__file__).resolve().with_name("restore.py")), "--file", str(taken.path)])
    held = manifest.counts
    report(
        {
            "file": str(taken.path),
            "size": manifest.size,
            "sha256": manifest.sha256,
            "taken_at": manifest.taken_at,
            "server": manifest.server,
            "counts": held,
            "removed": [str(path) for path in taken.removed],
            "left": taken.left,
            "restore": command,
        },
        f"{taken.path}  {manifest.size / 1e6:,.1f} MB, {manifest.server} as of {manifest.taken_at}",
        sentence(held) if held else "",
        f"removed: {len(taken.removed)} older" if taken.removed else "",
        f"Restore it: {command}",
    )
    if held and not held["keys"]:
        say(f"nothing of the stream {manifest.stream} stands in this Redis: the backup is empty, and --keep removes none for it")
    if taken.left:
        say(f"the backup is written, but {taken.left}: older ones than --keep says are left")
    return int(bool(taken.left))


def main() -> int:
    given = arguments().parse_args()

    def run(settings: Settings, shutdown: Shutdown) -> int:
        shutdown.on_signals()
        with open_redis(settings, shutdown) as redis, Steps(SYSTEM) as tell:
            keys = Keys(settings.stream.name)
            taken = Backup(redis, keys, given.out.resolve(), given.format, given.keep, SYSTEM, shutdown, tell).run()
        return say_taken(taken)

    return run_command(run, log_level="WARNING")


if __name__ == "__main__":
    sys.exit(main())
