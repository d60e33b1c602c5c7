"""Look at dead letters, send them back, or give them up. `python scripts/dlq.py --help`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice

import _path  # noqa: F401  # before the project's own modules
from _bulk import Pace, Progress, age, agreed, counted, positive, rate, report
from _command import run_command, say
from config.settings import Settings
from src.common.batch import split
from src.common.clock import SYSTEM
from src.common.embedded import open_redis
from src.common.error_groups import grouped
from src.common.exceptions import ConfigurationError, RedisFull, Transient
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.mail.record import sent_by
from src.worker import dlq
from src.worker.dlq import DeadLetter

PAGE_BYTES = 1 << 20  # most bytes of letters in one call: a script over more holds the server too long
WATCHED_PAGE = 10  # letters at once where each page is waited for
LOOK_SECONDS = 0.2
GONE_FOR_GOOD = "Their mail will not come back: its ids count as processed from then on."
MEANINGS = {
    "NONE": ("gone", "were gone already"),
    "STALE": ("stale", "were removed: their mail is live or done elsewhere"),
    "FOREIGN": ("foreign", "cannot be replayed: they are no mail of ours; discard them"),
}


@dataclass(frozen=True)
class Filter:
    """Which letters are meant; "" or None: all. `older`, `newer`: ids (ms) before and from which a letter must have died."""

    error: str = ""
    account: str = ""
    sender: str = ""
    handler: str = ""
    older: int | None = None
    newer: int | None = None

    def takes(self, letter: DeadLetter) -> bool:
        fields, died = letter.fields, int(letter.id.partition("-")[0])
        return (
            (not self.error or self.error in (fields.get("dead_error_type"), letter.group))
            and (not self.account or fields.get("account", "").casefold() == self.account.casefold())
            and (not self.sender or sent_by(fields.get("from", ""), self.sender))
            and (not self.handler or fields.get("dead_handler") == self.handler)
            and (self.older is None or died < self.older)
            and (self.newer is None or died >= self.newer)
        )


def arguments() -> argparse.ArgumentParser:
    filters = argparse.ArgumentParser(add_help=False)
    which = filters.add_argument_group("which letters")
    which.add_argument("--error", default="", metavar="GROUP", help="an error group (see: groups), or an error type")
    which.add_argument("--older-than", type=age, metavar="AGE", help="died longer ago than this: 30m, 2h, 3d")
    which.add_argument("--newer-than", type=age, metavar="AGE", help="died within this time: 30m, 2h, 3d")
    which.add_argument("--account", default="", metavar="U", help="of this account")
    which.add_argument("--sender", default="", metavar="A", help="from this address, or with @example.org from this domain")
    which.add_argument("--handler", default="", metavar="H", help="failed in this handler")

    bulk = argparse.ArgumentParser(add_help=False)
    bulk.add_argument("--limit", type=positive, metavar="N", help="at most N letters, the oldest first")
    bulk.add_argument("--rate", type=rate, metavar="R", help="at most so many: 5/s, 100/m")
    bulk.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    bulk.add_argument("--yes", action="store_true", help="do not ask")

    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("ids", nargs="*", metavar="ID", help="id from the list, or an email_id")
    named.add_argument("--all", action="store_true", help="every dead letter")

    parser = argparse.ArgumentParser(
        description="Look at dead letters, send them back, or give them up.",
        epilog="Exit code: 0 done, 1 something is left undone, 2 a wrong argument or setting. docs/dead-letters.md tells more.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|groups|replay|discard|clear|export")
    listing = commands.add_parser("list", parents=[filters], help="one line a letter, the oldest first (JSON lines when piped)")
    listing.add_argument("--limit", type=positive, default=100, metavar="N", help="most letters shown (default: 100)")
    show = commands.add_parser("show", help="everything about some letters, as JSON")
    show.add_argument("ids", nargs="+", metavar="ID", help="id from the list, or an email_id")
    commands.add_parser("groups", parents=[filters], help="which errors, how often, since when (JSON lines when piped)")
    replay = commands.add_parser(
        "replay", parents=[named, filters, bulk], help="send letters back into the stream, with a fresh count of attempts"
    )
    replay.add_argument("--stop-on-failure", action="store_true", help="stop when a replayed mail dies again")
    replay.add_argument(
        "--wait", type=age, default="5m", metavar="AGE", help="with it: how long to wait for what becomes of a page (default: 5m)"
    )
    commands.add_parser("discard", parents=[named, filters, bulk], help="give letters up for good: the mail will not come back")
    commands.add_parser("clear", parents=[bulk], help="give all letters up for good: the mail will not come back")
    export = commands.add_parser("export", parents=[filters], help="whole letters, one JSON object a line")
    export.add_argument("--limit", type=positive, metavar="N", help="most letters")
    return parser


@dataclass(frozen=True)
class Desk:
    """What every command works with. `until`: the newest letter when the command began; later ones are left alone."""

    settings: Settings
    redis: RedisClient
    keys: Keys
    given: argparse.Namespace
    until: str

    def matching(self) -> Iterator[DeadLetter]:
        """The letters that the filters take, the oldest first, read page by page."""
        given = self.given
        if getattr(given, "error", None) is None:  # clear: every letter
            wanted = Filter()
        else:
            [seconds, _] = self.redis.call("TIME")
            older, newer = (
                None if ago is None else round((int(seconds) - ago.total_seconds()) * 1000)
                for ago in (given.older_than, given.newer_than)
            )
            wanted = Filter(given.error, given.account, given.sender, given.handler, older, newer)
        return islice(filter(wanted.takes, dlq.letters(self.redis, self.keys, self.until)), getattr(given, "limit", None))

    def named(self, ids: Sequence[str]) -> list[DeadLetter]:
        """The letters with these ids. Raises ConfigurationError naming those that are not there."""
        found = dlq.find(self.redis, self.keys, ids)
        unknown = [wanted for wanted in ids if wanted not in found]
        if unknown:
            raise ConfigurationError(f"no such dead letter: {', '.join(unknown)} (python scripts/dlq.py list shows them)")
        return list({letter.id: letter for letter in found.values()}.values())


def print_list(desk: Desk) -> int:
    for letter in desk.matching():
        fields = letter.fields
        if sys.stdout.isatty():
            error = f"{fields.get('dead_error_type', '')}: {fields.get('dead_error', '')}"
            print(
                f"{letter.id:<18} {fields.get('dead_at', ''):<20} {fields.get('dead_attempts', ''):>3}x  {_plain(error, 50):<50} "
                f"{_plain(fields.get('subject', ''), 40)}"
            )
        else:
            short = {name: value for name, value in fields.items() if name not in ("record", "dead_traceback")}
            print(json.dumps({"id": letter.id, "group": letter.group, **short}, ensure_ascii=False))
    if sys.stdout.isatty():
        total = desk.redis.length(desk.keys.dlq)
        print(counted(total, "dead letter") if total else "no dead letters")
    return 0


def print_letters(desk: Desk) -> int:
    for letter in desk.named(desk.given.ids):
        print(json.dumps(_whole(letter), ensure_ascii=False, indent=2))
    return 0


def export(desk: Desk) -> int:
    for letter in desk.matching():
        print(json.dumps(_whole(letter), ensure_ascii=False))
    return 0


def print_groups(desk: Desk) -> int:
    groups = grouped((letter.id, letter.group, letter.fields.get("dead_at", "")) for letter in desk.matching())
    if not sys.stdout.isatty():
        for group in groups:
            print(json.dumps(asdict(group), ensure_ascii=False))
        return 0
    for group in groups:
        print(f"{group.count:>7}  {group.first:<20}  {group.last:<20}  {group.example:<18}  {group.group}")
    if groups:
        print(f"One of them, whole: python scripts/dlq.py show {groups[0].example}")
        print(f"All of a group again: python scripts/dlq.py replay --error {shlex.quote(groups[0].group)}")
    else:
        print("no dead letters")
    return 0


def _whole(letter: DeadLetter) -> dict[str, object]:
    fields: dict[str, object] = dict(letter.fields)
    with suppress(ValueError):
        fields["record"] = json.loads(letter.fields.get("record", "null"))
    return {"id": letter.id, "group": letter.group, **fields}


def settle(desk: Desk, shutdown: Shutdown) -> int:
    """Replay or discard; 1 if something is left undone."""
    given = desk.given
    chosen_by = [
        name for name in ("error", "older_than", "newer_than", "account", "sender", "handler") if getattr(given, name, None)
    ]
    ids = getattr(given, "ids", [])
    everything = given.command == "clear" or given.all
    if bool(ids) + bool(chosen_by) + bool(everything) != 1:
        raise ConfigurationError(f"{given.command}: name dead letters, or say which by --error, --account, …, or say --all")
    total, by_group = _count(desk.named(ids)[: given.limit] if ids else desk.matching())
    if not total:
        report({"command": given.command, "chosen": 0}, "no dead letters are meant: nothing to do")
        return 0
    what = "replay" if given.command == "replay" else "discard"
    listed = "; ".join(f"{count} x {group}" for group, count in by_group.most_common(5))
    question = f"{what} {counted(total, 'dead letter')} ({listed})?" + (f" {GONE_FOR_GOOD}" if what == "discard" else "")
    if given.dry_run:
        report({"command": given.command, "dry_run": True, "chosen": total, "groups": by_group}, f"would {question[:-1]}")
        return 0
    if not ids and not agreed(question[:1].upper() + question[1:], yes=given.yes):
        print("nothing was changed", file=sys.stderr)
        return 1
    shutdown.on_signals()  # from here on Ctrl-C ends between two pages
    return _settle(desk, desk.named(ids)[: given.limit] if ids else desk.matching(), total, shutdown)


def _count(letters: Iterable[DeadLetter]) -> tuple[int, Counter[str]]:
    groups = Counter(letter.group for letter in letters)
    return groups.total(), groups


def _settle(desk: Desk, letters: Iterable[DeadLetter], total: int, shutdown: Shutdown) -> int:
    given, stream = desk.given, desk.settings.stream
    replays = given.command == "replay"
    watch = replays and given.stop_on_failure
    pace, progress = Pace(given.rate, shutdown, SYSTEM), Progress(total, SYSTEM)
    answers: Counter[str] = Counter()
    stopped = ""
    try:
        for page in _pages(letters, min(pace.page, WATCHED_PAGE) if watch else pace.page):
            if replays:
                verdicts = dlq.replay(desk.redis, desk.keys, page)
            else:
                verdicts = dlq.discard(
                    desk.redis, desk.keys, page, processed_days=stream.processed_days, results_max=stream.results_max
                )
            answers.update(verdicts)
            progress.advance(len(page))
            back = [letter.email_id for letter, verdict in zip(page, verdicts, strict=True) if verdict == "OK"]
            stopped = _dies_again(desk, back, shutdown) if watch else ""
            if stopped or (pace.wait(len(page)) and answers.total() < total):
                stopped = stopped or "stopped as asked"
                break
    except RedisFull as error:
        stopped = f"Redis is full ({error}): make room (discard, or raise maxmemory), then run the same line again"
    except Transient as error:
        stopped = f"{error}: run the same line again, what was done is not done twice"
    progress.end()
    return _summary(given.command, answers, total, stopped)


def _pages(letters: Iterable[DeadLetter], most: int) -> Iterator[list[DeadLetter]]:
    rest = iter(letters)
    while page := list(islice(rest, most)):
        yield from split(page, lambda letter: sum(map(len, letter.fields.values())), most=most, most_bytes=PAGE_BYTES)


def _dies_again(desk: Desk, email_ids: list[str], shutdown: Shutdown) -> str:
    """Wait until each of these mails is done. Why to stop: one died again, no verdict in time, somebody asked; "" if all are done."""
    deadline = SYSTEM.monotonic() + desk.given.wait.total_seconds()
    waiting = list(email_ids)
    while waiting:
        places = desk.redis.call("HMGET", desk.keys.index, *waiting)
        for email_id, place in zip(waiting, places, strict=True):
            if place and place.startswith("D:"):
                return f"{email_id} died again: python scripts/dlq.py show {place[2:]}"
        waiting = [email_id for email_id, place in zip(waiting, places, strict=True) if place]
        if waiting and SYSTEM.monotonic() > deadline:
            seconds = desk.given.wait.total_seconds()
            return f"{counted(len(waiting), 'replayed mail')}: neither done nor dead after {seconds:g} s (does a worker run?)"
        if waiting and shutdown.wait(LOOK_SECONDS):
            return "stopped as asked"
    return ""


def _summary(command: str, answers: Counter[str], total: int, stopped: str) -> int:
    done = "replayed" if command == "replay" else "discarded"
    summary: dict[str, object] = {"command": command, "chosen": total, done: answers["OK"]}
    summary |= {name: answers[answer] for answer, (name, _) in MEANINGS.items()} | {"stopped": stopped}
    report(
        summary,
        f"{answers['OK']} of {counted(total, 'dead letter')} {done}" + (f". {GONE_FOR_GOOD}" if done == "discarded" else ""),
        *(f"{answers[answer]} {meaning}" for answer, (_, meaning) in MEANINGS.items() if answers[answer]),
    )
    if stopped:
        say(str(stopped))
    return 1 if stopped or answers["FOREIGN"] else 0


def _plain(text: str, width: int) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:width]


def main() -> int:
    given = arguments().parse_args()

    def run(settings: Settings, shutdown: Shutdown) -> int:
        keys = Keys(settings.stream.name)
        with open_redis(settings, shutdown) as redis:
            desk = Desk(settings, redis, keys, given, dlq.newest(redis, keys))
            printers = {"list": print_list, "show": print_letters, "groups": print_groups, "export": export}
            return printers[given.command](desk) if given.command in printers else settle(desk, shutdown)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
