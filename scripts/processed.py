"""The ids of finished mail: count them, ask for one, clear old days. `python scripts/processed.py --help`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date

import _path  # noqa: F401  # before the project's own modules
from _bulk import agreed, day, report
from _command import run_command
from config.settings import Settings
from src.common.clock import SYSTEM
from src.common.embedded import open_redis
from src.common.exceptions import ConfigurationError
from src.common.keys import Keys, day_of
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.worker import processed
from src.worker.processed import UNDATED, Day


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="The ids of finished mail: a set for each account and INTERNALDATE day (UTC). "
        "What stands in one is not handled again.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="count|has|clear")
    count = commands.add_parser("count", help="mails and memory for each account and day (JSON lines when piped)")
    count.add_argument("--account", metavar="U", help="of this account")
    has = commands.add_parser("has", help="whether a mail is done; exit code 1 if not")
    has.add_argument("email_id", metavar="EMAIL_ID")
    has.add_argument("--date", type=day, metavar="DATE", help="its INTERNALDATE day; else all days of its account are looked at")
    clear = commands.add_parser("clear", help="forget finished mail of old days")
    clear.add_argument("--before", type=day, required=True, metavar="DATE", help="days before this one (never the undated)")
    clear.add_argument("--account", metavar="U", help="of this account")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def count(redis: RedisClient, keys: Keys, given: argparse.Namespace) -> int:
    found = sorted(processed.days(redis, keys, given.account))
    total = _totals(found)
    if not sys.stdout.isatty():
        for row in found:
            print(json.dumps(asdict(row), ensure_ascii=False))
        print(json.dumps({"total": total["mails"], "bytes": total["bytes"], "sets": len(found)}))
        return 0
    for row in found:
        expires = "never" if row.seconds < 0 else f"in {row.seconds / 86_400:.0f} days"
        print(f"{row.day:<8}  {row.mails:>9,} mails  {row.bytes:>11,} bytes  expires {expires:<12}  {row.account}")
    print(f"{total['mails']:,} finished mails, {total['bytes']:,} bytes in {len(found)} sets")
    return 0


def has(redis: RedisClient, keys: Keys, given: argparse.Namespace) -> int:
    candidates = [day_of(given.date.isoformat())] if given.date else None
    try:
        found = processed.days_of(redis, keys, given.email_id, candidates)
    except ValueError:
        raise ConfigurationError(f"{given.email_id} is no email_id (gm:<account>:<number> or h:<account>:<SHA-256>)") from None
    report(
        {"email_id": given.email_id, "done": bool(found), "days": found},
        f"{given.email_id}: {'done, of ' + ', '.join(found) if found else 'not done, as far as Redis knows'}",
    )
    return 0 if found else 1


def clear(redis: RedisClient, keys: Keys, given: argparse.Namespace, settings: Settings, today: date) -> int:
    before = day_of(given.before.isoformat())
    found = sorted(processed.days(redis, keys, given.account), key=lambda row: row.day)
    chosen = [row for row in found if row.day != UNDATED and row.day < before]
    totals = _totals(chosen)
    if not chosen:
        report({"cleared": 0, **totals}, f"no finished mail before {given.before}: nothing to do")
        return 0
    span = f"{chosen[0].day} to {chosen[-1].day}"
    warning = _warning(settings, (today - given.before).days)
    question = f"Forget {totals['mails']:,} finished mails of {len(chosen)} sets ({span})? {warning}"
    if not agreed(question, yes=given.yes):
        print("nothing was changed", file=sys.stderr)
        return 1
    cleared = processed.clear(redis, chosen)
    report({"cleared": cleared, **totals}, f"{cleared} days cleared: {totals['mails']:,} mails, {totals['bytes']:,} bytes")
    return 0


def _warning(settings: Settings, days_ago: int) -> str:
    days = settings.stream.processed_days
    if days_ago >= days:
        return f"The producer takes mail older than PROCESSED_DAYS={days:g} for finished, unless --resync-from asks for it."
    return (
        "Such mail is handled again when it is read again, and the producer looks at the end of each folder again every "
        f"RELIST_INTERVAL. What is older than PROCESSED_DAYS={days:g} it takes for finished: lower that to {max(1, days_ago)} first."
    )


def _totals(found: list[Day]) -> dict[str, int]:
    return {"mails": sum(row.mails for row in found), "bytes": sum(row.bytes for row in found)}


def main() -> int:
    given = arguments().parse_args()

    def run(settings: Settings, shutdown: Shutdown) -> int:
        keys = Keys(settings.stream.name)
        with open_redis(settings, shutdown) as redis:
            if given.command == "count":
                return count(redis, keys, given)
            if given.command == "has":
                return has(redis, keys, given)
            return clear(redis, keys, given, settings, SYSTEM.wall().date())

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
