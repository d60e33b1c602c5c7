"""Erase a mail, or all mail of a sender, from everything the twins keep. `python scripts/erase.py --help`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping

import _path  # noqa: F401  # before the project's own modules
from _bulk import Progress, agreed, counted, report
from _command import run_command, say
from config.settings import Settings
from src.common.archive import Archive, open_archive
from src.common.clock import SYSTEM
from src.common.embedded import open_redis
from src.common.exceptions import Transient
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.mail.record import split_email_id
from src.worker import erase
from src.worker.erase import Traces

ROUNDS = 3  # what changes its place while we look is found by the next look
WHY_LEFT = {
    "HELD": "a worker has it in its hands: run the same line again when it is done",
    "LIVE": "it is unfinished: let it be handled and run the same line again, or add --force to erase it unhandled",
    "DANGLING": "its entry was deleted by hand: python scripts/audit.py --repair, then the same line again",
}
WHY_NOT_ANEW = {"GROUPS": "it has consumer groups", "AGAIN": "it changes too fast, or another erase.py is at work"}
TOO_WIDE = "an entry that somebody else put there has too many fields: redis-cli XDEL {0} {1} takes it away"
ONE = {
    "mails": "mail",
    "stream entries": "stream entry",
    "dead letters": "dead letter",
    "results": "result",
    "raw mails": "raw mail",
    "stored steps": "hash of stored steps",
    "mentions in reprocess runs": "mention in reprocess runs",
}
STAYS = (
    "stays: in the mailbox, which is never changed (what was not read yet comes as ever); as a number among the processed ids, so that "
    "the mail does not come again",
    "stays: in logs, in what your handler wrote elsewhere, in backups; in Redis' own files until they are written anew: "
    "redis-cli BGREWRITEAOF (append-only file), redis-cli BGSAVE (snapshots)",
)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Erase a mail, or all mail of a sender, from results, dead letters, stored steps, reprocess runs and the raw archive.",
        epilog="The mailbox is not touched, and the mail does not come again. Killed half-way, the same line does the rest. "
        "Exit code: 0 all is erased, 1 something is left and why, 2 a wrong argument or setting.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--email-id", type=email_id, metavar="ID", help="this mail (see scripts/trace.py, the logs, the results)")
    which.add_argument(
        "--sender", type=address, metavar="ADDRESS", help="all mail whose From is exactly this address; case does not matter"
    )
    parser.add_argument("--force", action="store_true", help="also unfinished mail that no worker has: it is never handled")
    parser.add_argument("--dry-run", action="store_true", help="say what would be erased, change nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def email_id(text: str) -> str:
    if split_email_id(text) is None and not text.startswith("foreign:"):
        raise argparse.ArgumentTypeError(f"{text} is no email_id (gm:<account>:<number> or h:<account>:<hash>)")
    return text


def address(text: str) -> str:
    if not text or text.startswith("@"):
        raise argparse.ArgumentTypeError(f"{text!r} is no single address like ann@example.org")
    return text


class Eraser:
    """`went`: what was erased, how much of each. `left`: email_id → why it is not. `troubles`: what else is left undone.

    `raw`: raw mails of the sender in the archive, also those that nothing in Redis knows any more. `stays`: what is meant to stay.
    """

    def __init__(self, settings: Settings, redis: RedisClient, given: argparse.Namespace, shutdown: Shutdown) -> None:
        self.settings, self.redis, self.given, self.shutdown = settings, redis, given, shutdown
        self.keys = Keys(settings.stream.name)
        place = settings.run.raw_archive
        self.archive: Archive | None = open_archive(place.get_secret_value() if place else None, settings.run.data_dir)
        self.began = SYSTEM.wall()
        self.went: Counter[str] = Counter()
        self.left: dict[str, str] = {}
        self.troubles: list[str] = []
        self.stays = [*STAYS]
        self.raw = set(erase.find_raw(self.archive, given.sender)) if given.sender and self.archive else set[str]()

    def found(self) -> dict[str, Traces]:
        wanted, sender = self.given.email_id, self.given.sender
        found = erase.find(self.redis, self.keys, erase.of_mail(wanted) if wanted else erase.of_sender(sender))
        if wanted and split_email_id(wanted) and wanted not in found and erase.is_known(self.redis, self.keys, wanted):
            found[wanted] = Traces(wanted)  # steps or a place in the index are all that is left
        return found

    def do(self) -> None:
        """Raises Transient where Redis or the archive is away: the same line does the rest."""
        for _ in range(ROUNDS):
            if not self._round() or self.shutdown.requested:
                break
        self._remove_raw()
        for stream, left in erase.rewrite(self.redis, self.keys).items():
            why = WHY_NOT_ANEW.get(left) or TOO_WIDE.format(stream, left)
            self.troubles.append(
                f"{stream} could not be written anew ({why}): the server's memory and files hold the bytes of what "
                "was deleted until the entries beside it are gone; run the same line again"
            )
        if self.shutdown.requested:
            self.troubles.append("stopped as asked: run the same line again")

    def _round(self) -> int:
        """Erase what is found now; how many mails something went of."""
        found, touched = self.found(), 0
        run_keys = erase.runs(self.redis, self.keys)
        progress = Progress(len(found), SYSTEM)
        self.left = {}
        for mail in found.values():
            if self.shutdown.requested:
                break
            verdict, counts = erase.erase(
                self.redis,
                self.keys,
                self.settings.stream.group,
                mail,
                run_keys,
                unfinished=self.given.force,
                processed_days=self.settings.stream.processed_days,
            )
            progress.advance(1)
            self.went.update(counts)
            self.went["mails"] += bool(counts)
            touched += bool(counts)
            if verdict != "OK":
                self.left[mail.email_id] = WHY_LEFT[verdict]
        progress.end()
        return touched

    def _remove_raw(self) -> None:
        if self.archive is not None:
            removed, shared, young = erase.remove_raw(self.redis, self.keys, self.archive, self.began, self.raw)
            self.went["raw mails"] += removed
            if shared:
                self.stays.append(
                    f"stays: {counted(shared, 'raw mail')} in the archive, since other or unfinished mail has the same bytes"
                )
            if young:
                self.troubles.append(
                    f"not removed yet: {counted(young, 'raw mail')} in the archive that a producer may be about to publish; run the same "
                    "line again in an hour or so"
                )
        rest = sum(name.startswith("sha256:") for name in self.redis.call("SMEMBERS", self.keys.erasing))
        if rest:
            why = (
                "RAW_ARCHIVE=off: name the place" if self.archive is None else f"{self.archive.store.place} does not give them up"
            )
            self.troubles.append(f"still in the archive: {counted(rest, 'raw mail')} ({why}), then run the same line again")


def act(settings: Settings, redis: RedisClient, given: argparse.Namespace, shutdown: Shutdown) -> int:
    eraser = Eraser(settings, redis, given, shutdown)
    found = eraser.found()
    raw = eraser.raw.union(*(mail.raw_refs for mail in found.values()))
    pending = int(redis.call("SCARD", eraser.keys.erasing))
    if sys.stderr.isatty() or given.dry_run:
        for mail in found.values():
            print(f"  {mail.email_id}: {described(mail)}", file=sys.stderr)
    plan = {
        "mails": len(found),
        "stream entries": sum(len(mail.entries) for mail in found.values()),
        "dead letters": sum(len(mail.letters) for mail in found.values()),
        "results": sum(len(mail.results) for mail in found.values()),
        "raw mails": len(raw),
    }
    listed = _listed(plan)
    if given.dry_run:
        report({"dry_run": True, **plan}, f"would erase {listed or 'nothing'}")
        return 0
    if not found and not raw and not pending:
        say("nothing is known of such mail: nothing to do")
        report({"erased": {}, "left": {}}, *STAYS)
        return 0
    question = f"Erase {listed or 'what an earlier run left'} for good?"
    if not agreed(question, yes=given.yes):
        print("nothing was changed", file=sys.stderr)
        return 1
    shutdown.on_signals()  # from here on Ctrl-C ends between two mails
    try:
        eraser.do()
    except Transient as error:
        eraser.troubles.append(f"{error}: run the same line again, it does the rest")
    return summary(eraser)


def described(mail: Traces) -> str:
    parts = [("unfinished", mail.entries), ("dead", mail.letters), ("results", mail.results), ("raw", mail.raw_refs)]
    return ", ".join(f"{name} {len(found)}" for name, found in parts if found) or "nothing but, perhaps, its steps"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {ONE[name] if count == 1 else name}" for name, count in counts.items() if count)


def summary(eraser: Eraser) -> int:
    went = {name: count for name, count in eraser.went.items() if count}
    report(
        {"erased": went, "left": eraser.left, "troubles": eraser.troubles, "stays": eraser.stays},
        f"erased: {_listed(went) or 'nothing'}",
        *eraser.stays,
    )
    for name, why in eraser.left.items():
        say(f"{name} is left: {why}")
    for trouble in eraser.troubles:
        say(trouble)
    return 1 if eraser.left or eraser.troubles else 0


def main() -> int:
    given = arguments().parse_args()

    def run(settings: Settings, shutdown: Shutdown) -> int:
        with open_redis(settings, shutdown) as redis:
            return act(settings, redis, given, shutdown)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
