"""The portable form of keys: the Redis commands that make them again, one list of words each. Pure, but for `read`.

Nothing in it depends on the version of a server: whatever wrote a stream, its entries, its group with the position it has read to, and
each pending entry (consumer, time and count of deliveries) are written by commands that Redis 7.0 knows. Pending entries whose mail
was deleted by hand are left out, as any server drops them at the next XCLAIM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.common.exceptions import BackupError
from src.common.keys import Keys
from src.common.redis_client import RedisClient, pairs

log = logging.getLogger(__name__)

Command = list[str]

# Where the key stands. Nothing else is taken from a file: it may come from anywhere.
KEY_AT = {"SET": 1, "HSET": 1, "SADD": 1, "ZADD": 1, "XGROUP": 2, "XADD": 1, "XSETID": 1, "XCLAIM": 1, "PEXPIREAT": 1}
PAGE = 500
KEYS_AT_ONCE = 100
WHOLE = {
    "string": ("GET",),
    "hash": ("HGETALL",),
    "set": ("SMEMBERS",),
    "zset": ("ZRANGE", "0", "-1", "WITHSCORES"),
}  # asks for a key
LENGTH = {"hash": "HLEN", "set": "SCARD", "zset": "ZCARD", "stream": "XLEN"}


def ours(redis: RedisClient, keys: Keys) -> list[str]:
    """Every key that belongs into a backup, in order."""
    return sorted({key for pattern in keys.patterns() for key in scan(redis, pattern) if keys.is_data(key)})


def scan(redis: RedisClient, pattern: str, *kind: str) -> Iterator[str]:
    """`kind`: nothing, or `TYPE` and one."""
    cursor = "0"
    while True:
        cursor, page = redis.call("SCAN", cursor, "MATCH", pattern, "COUNT", 1000, *kind)
        yield from page
        if str(cursor) == "0":
            return


# a server's keys as commands


def read(redis: RedisClient, names: Sequence[str]) -> Iterator[Command]:
    """The commands that make the keys `names` again. Who reads while others write gets no single moment."""
    for first in range(0, len(names), KEYS_AT_ONCE):
        page = names[first : first + KEYS_AT_ONCE]
        kinds = dict(zip(page, redis.call_all([["TYPE", name] for name in page]), strict=True))
        expiries = redis.call_all([["PEXPIRETIME", name] for name in page])
        small = [name for name in page if kinds[name] in WHOLE]
        wholes = dict(zip(small, redis.call_all([_asking(kinds[name], name) for name in small]), strict=True))
        for name, expires in zip(page, expiries, strict=True):
            kind = kinds[name]
            if kind in WHOLE:
                made = list(_whole(name, kind, wholes[name]))
                yield from made
                if made and int(expires) >= 0:
                    yield ["PEXPIREAT", name, str(expires)]
            elif kind == "stream":
                yield from _stream(redis, name)
            elif kind != "none":  # none: its time was over
                log.warning("%s is a %s, which we do not use: left out", name, kind)


def _asking(kind: str, name: str) -> Command:
    verb, *rest = WHOLE[kind]
    return [verb, name, *rest]


def _whole(name: str, kind: str, content: Any) -> Iterator[Command]:
    """Of a key whose content came in one reply; none of one whose time was over by then."""
    if kind == "string":
        yield from [["SET", name, content]] if content is not None else []
    elif kind == "zset":
        scored = [word for at in range(0, len(content), 2) for word in (content[at + 1], content[at])]
        yield from _in_pages(["ZADD", name], scored)
    else:
        yield from _in_pages(["HSET" if kind == "hash" else "SADD", name], content)


def _in_pages(head: Command, words: Sequence[str]) -> Iterator[Command]:
    for first in range(0, len(words), 2 * PAGE):
        yield [*head, *words[first : first + 2 * PAGE]]


def _stream(redis: RedisClient, name: str) -> Iterator[Command]:
    about = pairs(redis.call("XINFO", "STREAM", name))
    groups = [pairs(group) for group in redis.call("XINFO", "GROUPS", name)]
    for group in groups:
        read_so_far = group.get("entries-read")
        counted = ["ENTRIESREAD", str(read_so_far)] if read_so_far is not None else []
        yield ["XGROUP", "CREATE", name, group["name"], group["last-delivered-id"], "MKSTREAM", *counted]
    if not groups and not int(about["length"]):  # no other command makes an empty stream
        yield ["XGROUP", "CREATE", name, "nobody", "0", "MKSTREAM"]
        yield ["XGROUP", "DESTROY", name, "nobody"]
    standing = set()
    for entry_id, words in _pages(lambda start: redis.call("XRANGE", name, start, "+", "COUNT", PAGE)):
        if groups:
            standing.add(entry_id)
        yield ["XADD", name, entry_id, *words]
    counts = ["ENTRIESADDED", str(about["entries-added"]), "MAXDELETEDID", about["max-deleted-entry-id"]]
    yield ["XSETID", name, about["last-generated-id"], *counts]
    for group in groups:
        seconds, micros = redis.call("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        pages = _pages(lambda start, group=group: redis.call("XPENDING", name, group["name"], start, "+", PAGE))  # type: ignore[misc]  # its default
        gone = 0
        for entry_id, consumer, idle, deliveries in pages:
            gone += entry_id not in standing
            if entry_id in standing:
                fate = ["TIME", str(now - int(idle)), "RETRYCOUNT", str(deliveries), "FORCE", "JUSTID"]
                yield ["XCLAIM", name, group["name"], consumer, "0", entry_id, *fate]
        if gone:
            log.warning("%s: %d mails in flight were deleted by hand: nobody holds them any more", name, gone)


def _pages(page: Callable[[str], list[list[str]]]) -> Iterator[list[str]]:
    """All rows of a range that is read in pages, each row's id in front."""
    start = "-"
    while True:
        rows = page(start)
        yield from rows
        if len(rows) < PAGE:
            return
        start = f"({rows[-1][0]}"


# commands, wherever they come from


def key_of(command: Command) -> str:
    """The key it writes. Raises BackupError for what is no command of a backup."""
    if not all(isinstance(word, str) for word in command) or not command or len(command) <= KEY_AT.get(command[0], 1 << 30):
        raise BackupError(f"no command of a backup: {command!r:.80}")
    return command[KEY_AT[command[0]]]


def renamed(command: Command, name: str) -> Command:
    """The same for the key `name`."""
    at = KEY_AT[command[0]]
    return [*command[:at], name, *command[at + 1 :]]


@dataclass
class Size:
    """How much stands in a key. `length`: entries, members, fields. `pending`: group → entries in flight. `expires`: ms, "" for never."""

    kind: str
    length: int = 0
    pending: dict[str, int] = field(default_factory=dict)
    expires: str = ""


@dataclass
class Tally:
    """What a run of commands makes: the size of each key, so that it can be asked for afterwards."""

    sizes: dict[str, Size] = field(default_factory=dict)
    commands: int = 0

    def add(self, command: Command) -> None:
        """Raises BackupError as `key_of` does, and for what no backup of ours holds."""
        try:
            self._add(key_of(command), command)
        except (LookupError, ValueError):
            raise BackupError(f"no command of a backup, or not in its place: {command!r:.80}") from None

    def _add(self, key: str, command: Command) -> None:
        verb = command[0]
        kind = {"SET": "string", "HSET": "hash", "SADD": "set", "ZADD": "zset"}.get(verb, "stream")
        size = self.sizes.get(key)
        self.commands += 1
        if verb == "PEXPIREAT":
            if size is None:
                raise BackupError(f"{key} expires before it is there: the file was put together wrongly")
            size.expires = str(int(command[2]))
            return
        if size is None:
            size = self.sizes[key] = Size(kind)
        if verb == "XGROUP" and command[1] == "CREATE":
            size.pending[command[3]] = 0
        elif verb == "XGROUP":
            size.pending.pop(command[3], None)
        elif verb == "XCLAIM":
            size.pending[command[2]] += 1
        elif verb != "XSETID":
            size.length += {"HSET": (len(command) - 2) // 2, "ZADD": (len(command) - 2) // 2, "SADD": len(command) - 2}.get(
                verb, 1
            )


def measured(redis: RedisClient, names: Sequence[str]) -> dict[str, Size]:
    """How much stands in each of `names`; kind "none" where nothing does. When they expire is not asked."""
    found = {}
    for first in range(0, len(names), PAGE):
        page = names[first : first + PAGE]
        kinds = dict(zip(page, redis.call_all([["TYPE", name] for name in page]), strict=True))
        counted = [name for name in page if kinds[name] in LENGTH]
        lengths = dict(zip(counted, redis.call_all([[LENGTH[kinds[name]], name] for name in counted]), strict=True))
        for name in page:
            found[name] = Size(kinds[name], 1 if kinds[name] == "string" else int(lengths.get(name, 0)))
            if kinds[name] == "stream":
                groups = [pairs(group) for group in redis.call("XINFO", "GROUPS", name)]
                found[name].pending = {group["name"]: int(group["pending"]) for group in groups}
    return found


def counts(sizes: Mapping[str, Size], keys: Keys) -> dict[str, int]:
    """What people ask: how many mails stand where."""

    def length(key: str) -> int:
        return sizes[key].length if key in sizes else 0

    return {
        "unfinished": length(keys.stream),
        "in_flight": sum(sizes[keys.stream].pending.values()) if keys.stream in sizes else 0,
        "waiting": length(keys.due),
        "dead": length(keys.dlq),
        "processed_ids": sum(size.length for key, size in sizes.items() if keys.is_processed(key)),
        "results": length(keys.results),
        "mailboxes": sum(keys.is_last_uid(key) for key in sizes),
        "keys": len(sizes),
    }


def sentence(counts: Mapping[str, int]) -> str:
    """`counts` for people."""
    return (
        f"{counts['unfinished']:,} unfinished mails ({counts['in_flight']:,} in flight, {counts['waiting']:,} waiting for a retry), "
        f"{counts['dead']:,} dead letters, {counts['processed_ids']:,} processed ids, {counts['results']:,} results, "
        f"{counts['mailboxes']:,} mailboxes; {counts['keys']:,} keys"
    )
