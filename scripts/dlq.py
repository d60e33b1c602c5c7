"""Look at dead letters, send them back, or give them up. `python scripts/dlq.py --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import _path  # noqa: F401  # before the project's own modules
from config.settings import SettingsError, load_settings
from src.common.embedded import open_redis
from src.common.exceptions import ConfigurationError, IngestionError
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.worker import dlq
from src.worker.dlq import DeadLetter

PAGE = 100


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at dead letters, send them back, or give them up.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|replay|discard")
    listing = commands.add_parser("list", help="one line a dead letter, the oldest first (JSON lines when piped)")
    listing.add_argument("--limit", type=int, default=100, metavar="N", help="most letters shown (default: 100)")
    show = commands.add_parser("show", help="everything about some dead letters, as JSON")
    show.add_argument("ids", nargs="+", metavar="ID", help="id from the list, or an email_id")
    for name, what in (
        ("replay", "send letters back into the stream, with a fresh count of attempts"),
        ("discard", "give letters up for good: the mail will not come back"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("ids", nargs="*", metavar="ID", help="id from the list, or an email_id")
        command.add_argument("--all", action="store_true", help="every dead letter")
    return parser


def letters(redis: RedisClient, keys: Keys) -> Iterator[DeadLetter]:
    """All dead letters, the oldest first, read page by page; those that come meanwhile are left out."""
    newest = redis.call("XREVRANGE", keys.dlq, "+", "-", "COUNT", 1)
    start = "-"
    while newest:
        page = dlq.look(redis, keys, after=start, count=PAGE)
        for letter in page:
            yield letter
            if letter.id == newest[0][0]:
                return
        if len(page) < PAGE:
            return
        start = f"({page[-1].id}"


def chosen(redis: RedisClient, keys: Keys, ids: Sequence[str]) -> list[DeadLetter]:
    """The letters with these ids. Raises ConfigurationError naming those that are not there."""
    found = {wanted: letter for letter in letters(redis, keys) for wanted in ids if wanted in (letter.id, letter.email_id)}
    unknown = [wanted for wanted in ids if wanted not in found]
    if unknown:
        raise ConfigurationError(f"no such dead letter: {', '.join(unknown)} (python scripts/dlq.py list shows them)")
    return list(found.values())


def print_list(redis: RedisClient, keys: Keys, limit: int) -> int:
    total = redis.length(keys.dlq)
    for number, letter in enumerate(letters(redis, keys)):
        if number == limit:
            break
        fields = letter.fields
        if sys.stdout.isatty():
            error = f"{fields.get('dead_error_type', '')}: {fields.get('dead_error', '')}"
            print(
                f"{letter.id:<18} {fields.get('dead_at', ''):<20} {fields.get('dead_attempts', ''):>3}x  {_plain(error, 50):<50} "
                f"{_plain(fields.get('subject', ''), 40)}"
            )
        else:
            print(json.dumps({"id": letter.id, **_without_record(fields)}, ensure_ascii=False))
    if sys.stdout.isatty():
        print(f"{total} dead letters" if total else "no dead letters")
    return 0


def print_letters(redis: RedisClient, keys: Keys, ids: Sequence[str]) -> int:
    for letter in chosen(redis, keys, ids):
        fields = dict(letter.fields)
        try:
            record = json.loads(fields.pop("record", "null"))
        except ValueError:
            record = fields.get("record")
        print(json.dumps({"id": letter.id, **fields, "record": record}, ensure_ascii=False, indent=2))
    return 0


def settle(redis: RedisClient, keys: Keys, given: argparse.Namespace) -> int:
    """Replay or discard; prints how many of each answer. 1 if a letter could not be settled."""
    if given.all == bool(given.ids):
        raise ConfigurationError(f"{given.command}: name dead letters, or say --all")
    stream = load_settings().stream
    wanted = list(letters(redis, keys)) if given.all else chosen(redis, keys, given.ids)
    answers: Counter[str] = Counter()
    for first in range(0, len(wanted), PAGE):
        page = wanted[first : first + PAGE]
        if given.command == "replay":
            answers.update(dlq.replay(redis, keys, page))
        else:
            answers.update(dlq.discard(redis, keys, page, processed_days=stream.processed_days, results_max=stream.results_max))
    print(f"{answers['OK']} of {len(wanted)} dead letters {'replayed' if given.command == 'replay' else 'discarded'}")
    for answer, meaning in (
        ("NONE", "were gone already"),
        ("STALE", "were removed: their mail is live or done elsewhere"),
        ("FOREIGN", "cannot be replayed: they are no mail of ours; discard them"),
    ):
        if answers[answer]:
            print(f"{answers[answer]} {meaning}")
    return 1 if answers["FOREIGN"] else 0


def _without_record(fields: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if name not in ("record", "dead_traceback")}


def _plain(text: str, width: int) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:width]


def main() -> int:
    given = arguments().parse_args()
    try:
        settings = load_settings()
        keys = Keys(settings.stream.name)
        with open_redis(settings, Shutdown()) as redis:
            if given.command == "list":
                return print_list(redis, keys, given.limit)
            if given.command == "show":
                return print_letters(redis, keys, given.ids)
            return settle(redis, keys, given)
    except (SettingsError, IngestionError) as error:
        print(f"dlq.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, (SettingsError, ConfigurationError)) else 1


if __name__ == "__main__":
    sys.exit(main())
