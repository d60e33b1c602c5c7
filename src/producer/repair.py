"""Redis checked against itself: what someone else's XDEL, XTRIM, XACK, HDEL or XGROUP DELCONSUMER leaves behind, found and mended.

No transition ever leaves such a state, and each script judges at one moment: nothing is found wrong while daemons only do their work.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from src.common.clock import Clock
from src.common.keys import Keys, open_field
from src.common.redis_client import RedisClient
from src.mail.record import member_of, split_email_id

log = logging.getLogger(__name__)

Item = TypeVar("Item")

PAGE = 100
MARKS_PAGE = 500  # their page costs no entry to be read
MOST_LATER = 500  # entries that `recount` reads in one script
MOST_COUNTED = 2_000  # places of one day in one script
_INTERNAL_DATE = re.compile(r"|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

WORDS = {
    "lost": "in the stream, but no worker would ever see them (XACK or XGROUP DELCONSUMER by hand)",
    "stray": "in the stream, but in no index",
    "nothing due": "waiting for an attempt without an entry",
    "mark": "marks of mail that is no longer unfinished",
    "dangling": "taken out of the stream or the dead letters by hand (XDEL, XTRIM)",
}


@dataclass(frozen=True, slots=True)
class Stray:
    """A mail in the stream that no index knows. `sid`: id of its entry."""

    email_id: str
    sid: str
    account: str
    mailbox: str
    internal_date: str


@dataclass
class Findings:
    """`found`: how many of each kind (the keys of `WORDS`). `dangling`: email_id → where the index says that it is.

    `strays`: by email_id. `miscount`: how far the counters of `Keys.open` are off in all. `mended`: what is right again by now.
    """

    found: Counter[str] = field(default_factory=Counter)
    dangling: dict[str, str] = field(default_factory=dict)
    strays: dict[str, Stray] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    miscount: int = 0
    mended: bool = False

    def dangling_of(self, account: str) -> set[str]:
        return {email_id for email_id in self.dangling if (split_email_id(email_id) or ("", ""))[1] == account}

    def lines(self) -> list[str]:
        """For a person, one a kind."""
        lines = [f"{count} mails {WORDS[kind]}" for kind, count in self.found.items() if kind != "mark" and count]
        lines += [f"{self.found['mark']} {WORDS['mark']}"] if self.found["mark"] else []
        return lines + ([f"the counters of unfinished days are off by {self.miscount}"] if self.miscount else [])


def examine(redis: RedisClient, keys: Keys, group: str, *, mend: bool) -> Findings:
    """Look through all that stands in Redis, page by page; without `mend` nothing is changed.

    Mended: lost entries (any worker takes them at its next tick), strays, due times and marks of nothing. Dangling mail is only named: it
    is published again by whoever reads its mailbox. Raises what RedisClient raises; safe to repeat.
    """
    findings = Findings(mended=mend)

    def walk(what: str) -> Iterator[list[str]]:
        return _walk(redis, keys, group, what, mend=mend)

    for kind, email_id, sid, *more in walk("stream"):
        if kind == "LOST":
            findings.found["lost"] += 1
            findings.lost.add(email_id)
        elif _is_ours(email_id, more):
            findings.strays[email_id] = Stray(email_id, sid, *more)
    findings.found["stray"] = len(findings.strays)
    if mend:
        adopt(redis, keys, list(findings.strays.values()))
    findings.dangling = {email_id: place for _, email_id, place in walk("index") if email_id not in findings.strays}
    findings.found["dangling"] = len(findings.dangling)
    findings.found["nothing due"] = sum(1 for _ in walk("due"))
    findings.found["mark"] = sum(
        1 for what in ("starts", "tries") for _, email_id, _ in walk(what) if email_id not in findings.strays
    )
    findings.miscount = _miscount(redis, keys, group)
    if mend and findings.miscount and not findings.dangling:
        recount(redis, keys)
    findings.found = +findings.found
    return findings


def adopt(redis: RedisClient, keys: Keys, strays: Sequence[Stray]) -> list[str]:
    """Entries that no index knows become the mails that they are; for each OK, GONE, KNOWN (another copy lives) or DONE (done already)."""
    answers: list[str] = []
    for page in _pages(strays, PAGE):
        sets: dict[str, int] = {}
        args: list[str | int] = []
        for stray in page:
            number = sets.setdefault(keys.processed(stray.account, stray.internal_date), len(sets) + 1)
            day = open_field(stray.account, stray.mailbox, stray.internal_date)
            args += [stray.sid, stray.email_id, member_of(stray.email_id), number, day]
        answers += redis.run("adopt", [keys.stream, keys.index, keys.dlq, keys.open, *sets], args)
    return answers


def forget(redis: RedisClient, keys: Keys, group: str, dangling: dict[str, str]) -> int:
    """Mail that someone deleted here and that is in no mailbox any more: nothing is left of it. How many; the counters are still off."""
    own = [keys.stream, keys.index, keys.starts, keys.tries, keys.due, keys.dlq]
    pages = _pages(dangling.items(), PAGE)
    return sum(redis.run("forget", own, [group, *(part for pair in page for part in pair)]).count("OK") for page in pages)


def recount(redis: RedisClient, keys: Keys) -> int:
    """Set the counters of `Keys.open` that are off to what they ought to be; how many. Reads every entry of stream and dead letters.

    Work may go on: an entry never changes, so what was read stays true, and the script reads what came later. A day of too much mail
    keeps its counter: one that is too high only makes the marker more careful.
    """
    last = {"S": "0-0", "D": "0-0"}
    places: defaultdict[str, list[str]] = defaultdict(list)
    for kind, key in (("S", keys.stream), ("D", keys.dlq)):
        while page := redis.entries(key, f"({last[kind]}", count=PAGE):
            for entry_id, fields in page:
                if split_email_id(fields.get("email_id", "")):
                    day = open_field(fields.get("account", ""), fields.get("mailbox", ""), fields.get("internal_date", ""))
                    places[day] += [fields["email_id"], f"{kind}:{entry_id}"]
            last[kind] = page[-1][0]
    changed = 0
    for day in redis.hash(keys.open):
        places.setdefault(day, [])
    for day, known in places.items():
        if len(known) <= 2 * MOST_COUNTED:
            own = [keys.stream, keys.index, keys.dlq, keys.open]
            verdict, *counts = redis.run("recount", own, [day, last["S"], last["D"], MOST_LATER, *known])
            changed += verdict == "OK" and counts[0] != counts[1]
    return changed


@dataclass
class Checkup:
    """`examine` with mending, for all mailboxes of a process together: the first that asks does it, the others are told what it found.
    `every`: seconds, less than lie between two questions of one mailbox."""

    redis: RedisClient
    keys: Keys
    group: str
    clock: Clock
    every: float
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _until: float = float("-inf")
    _last: Findings = field(default_factory=Findings)

    def __call__(self, *, anew: bool) -> Findings:
        """`anew`: whatever was found lately."""
        with self._lock:
            if anew or self.clock.monotonic() >= self._until:
                self._last = examine(self.redis, self.keys, self.group, mend=True)
                self._until = self.clock.monotonic() + self.every
                for line in self._last.lines():
                    log.warning("%s: %s (docs/audit.md)", self.keys.stream, line)
            return self._last


def no_checkup(*, anew: bool) -> Findings:
    """Where there is nothing to check: under a reader of its own."""
    return Findings()


def _walk(redis: RedisClient, keys: Keys, group: str, what: str, *, mend: bool) -> Iterator[list[str]]:
    """Each finding of one walk of lua/repair.lua, once, though a scan may name it twice."""
    own = [keys.stream, keys.index, keys.starts, keys.tries, keys.due, keys.dlq, keys.open]
    cursor, seen = "0", set[tuple[str, ...]]()
    while True:
        page = PAGE if what in ("stream", "index") else MARKS_PAGE
        cursor, *found = redis.run("repair", own, [group, what, cursor, page, int(mend)])
        for row in found:
            if tuple(row) not in seen:
                seen.add(tuple(row))
                yield row
        if cursor == "0":
            return


def _is_ours(email_id: str, more: Sequence[str]) -> bool:
    parts = split_email_id(email_id)
    return parts is not None and parts[1] == more[0] and _INTERNAL_DATE.fullmatch(more[2]) is not None


def _miscount(redis: RedisClient, keys: Keys, group: str) -> int:
    rows = list(_walk(redis, keys, group, "open", mend=False))
    return sum(abs(int(counted) - int(known)) for _, _, counted, known in rows)


def _pages(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while page := list(islice(rest, size)):
        yield page
