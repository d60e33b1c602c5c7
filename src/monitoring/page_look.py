"""What the status page and the metrics of the stream know: one thread looks at Redis, and what it saw last is kept.

No request waits for Redis longer than a moment.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from src.common import overview, registry
from src.common.clock import Clock
from src.common.digits import number_in
from src.common.error_groups import Group, group_of, grouped
from src.common.exceptions import IngestionError, ScriptRefused, Transient
from src.common.keys import Keys
from src.common.overview import Overview
from src.common.redis_client import Fields, RedisClient, pairs
from src.common.registry import Seen
from src.common.shutdown import Shutdown
from src.monitoring.page_flow import Flow, Minute

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between two looks while nobody reads the page
FRESH_SECONDS = 1.5  # what was seen so lately is shown as it is
WAIT_SECONDS = 1.0  # a reader waits so long for a newer look
ASKED_SECONDS = 30.0  # the page was read so lately: the costlier things are looked at too
MOST_LETTERS = 1_000
LETTERS_BYTES = 16 << 20
LETTERS_PAGE = 50
MOST_GROUPS = 50
MOST_RETRIES = 8

LEAVES_OUT = ("record", "dead_traceback")


@dataclass(frozen=True)
class Letter:
    """A dead letter in short. `at`: when it died, ISO 8601."""

    id: str
    group: str
    at: str
    subject: str


@dataclass(frozen=True)
class Letters:
    """Dead letters by group, the largest first. `looked_at` of `total`: the newest. `newest`: id → letter, of each group's newest one."""

    total: int = 0
    looked_at: int = 0
    groups: tuple[Group, ...] = ()
    more_groups: int = 0
    newest: dict[str, Letter] = field(default_factory=dict)


@dataclass(frozen=True)
class Retry:
    """A mail that waits for its next attempt. `due`: in so many seconds. `failed`: attempts."""

    email_id: str
    subject: str
    due: float
    failed: int


@dataclass(frozen=True)
class Snapshot:
    """What was seen last. `at`: when Redis last told it all; None: never yet. `since`: since when the flow is watched. `faults`: what
    could not be asked → why."""

    since: datetime
    at: datetime | None = None
    overview: Overview | None = None
    daemons: tuple[Seen, ...] = ()
    retries: tuple[Retry, ...] = ()
    letters: Letters = Letters()
    flow: tuple[Minute | None, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()


class Onlooker:
    """`start` it, ask it for `last`, `seen()` and `letter(id)` from any thread, `stop` it."""

    def __init__(self, redis: RedisClient, keys: Keys, group: str, clock: Clock) -> None:
        self._redis = redis
        self._keys = keys
        self._group = group
        self._clock = clock
        self._flow = Flow()
        self._snapshot = Snapshot(since=clock.wall())
        self._looked = self._asked = float("-inf")  # monotonic
        self._whole = False  # the last look saw also what is looked at for a reader only
        self._graves: dict[str, Letter] = {}  # the newest letters, the oldest of them first
        self._buried = (0, 0)  # (letters that stand there, letters that ever did) when they were read
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, shutdown: Shutdown) -> None:
        self._thread = shutdown.guard("page", self._run)

    def stop(self) -> None:
        self._orders.put(None)
        if self._thread is not None:
            self._thread.join(timeout=3)

    @property
    def last(self) -> Snapshot:
        """What was seen last, for those that look by themselves all the time."""
        return self._snapshot

    def seen(self, *, patient: bool = True) -> Snapshot:
        """What was seen last: a moment ago, or, where Redis does not answer in WAIT_SECONDS, or not `patient`, before that."""
        now = self._clock.monotonic()
        self._asked = now
        if patient and not (self._whole and now - self._looked <= FRESH_SECONDS):
            with suppress(TimeoutError):
                self._order(self._look)
        return self._snapshot

    def letter(self, letter_id: str) -> Fields | None:
        """A dead letter as it stands there; None: it does not. Raises TimeoutError where Redis takes too long, and what it raises."""
        found: list[tuple[str, Fields]] = self._order(lambda: self._redis.entries(self._keys.dlq, letter_id, letter_id, count=1))
        return found[0][1] if found else None

    def _order(self, call: Callable[[], Any]) -> Any:
        """`call()` in the thread of the page, which alone waits for Redis."""
        answer: Future[Any] = Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(call())
                except IngestionError as error:
                    answer.set_exception(error)

        self._orders.put(run)
        try:
            return answer.result(WAIT_SECONDS)
        except TimeoutError:
            answer.cancel()
            raise

    def _run(self) -> None:
        self._look()
        while True:
            try:
                order = self._orders.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                order = self._look
            if order is None:
                return
            order()

    # a look

    def _look(self) -> None:
        """Each thing by itself: what cannot be asked keeps its last answer, and says why. Not one after the other while Redis is away."""
        watched = self._clock.monotonic() - self._asked < ASKED_SECONDS
        if self._clock.monotonic() - self._looked < FRESH_SECONDS and (self._whole or not watched):
            return
        faults: dict[str, str] = {}
        parts: dict[str, Callable[[Snapshot], Snapshot]] = {
            "the stream": lambda old: replace(old, overview=overview.look(self._redis, self._keys, self._group)),
            "the daemons": lambda old: replace(old, daemons=tuple(registry.registered(self._redis, self._keys))),
            "the flow": self._with_flow,
        }
        if watched:
            parts |= {"the retries": lambda old: replace(old, retries=self._retries()), "the dead letters": self._with_letters}
        snapshot = self._snapshot
        for name, look in parts.items():
            try:
                snapshot = look(snapshot)
            except Transient as error:
                faults[name] = str(error)
                break
            except IngestionError as error:
                faults[name] = str(error)
                if name not in dict(self._snapshot.faults):
                    log.warning("%s: not seen by the status page and the metrics: %s", name, error)
        now = self._clock.wall()
        away = any(name in faults for name in ("the stream", "the daemons"))
        self._snapshot = replace(
            snapshot,
            at=snapshot.at if away else now,
            flow=tuple(self._flow.last_hour(now.timestamp())),
            faults=tuple(faults.items()),
        )
        self._looked, self._whole = self._clock.monotonic(), watched

    def _with_flow(self, snapshot: Snapshot) -> Snapshot:
        """`entered` and `done` and `dead` are Redis' own counters of entries; what is retried only the workers count."""
        counters = {
            (kind, "Redis"): self._ever_added(stream)
            for kind, stream in {"entered": self._keys.stream, "done": self._keys.results, "dead": self._keys.dlq}.items()
        }
        counters |= {("retried", seen.daemon.name): seen.news.counts.get("retried", 0) for seen in snapshot.daemons}
        live, oldest = (snapshot.overview.live, snapshot.overview.oldest) if snapshot.overview else (0, 0.0)
        self._flow.add(self._clock.wall().timestamp(), counters, live, oldest)
        return snapshot

    def _ever_added(self, stream: str) -> int:
        try:
            return int(pairs(self._redis.call("XINFO", "STREAM", stream))["entries-added"])
        except ScriptRefused as error:
            if "no such key" in str(error):
                return 0
            raise

    def _retries(self) -> tuple[Retry, ...]:
        """The next ones that are due."""
        reply = self._redis.call("ZRANGEBYSCORE", self._keys.due, "-inf", "(+inf", "WITHSCORES", "LIMIT", 0, MOST_RETRIES)
        seconds, micros = self._redis.call("TIME")
        now = int(seconds) + int(micros) / 1e6
        waiting = [
            (*str(member).partition("|")[::2], float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)
        ]
        tries = self._redis.call("HMGET", self._keys.tries, *(email_id for _, email_id, _ in waiting)) if waiting else []
        found = []
        for (stream_id, email_id, due), tried in zip(waiting, tries, strict=True):
            entries = self._redis.entries(self._keys.stream, stream_id, stream_id, count=1)
            failed = str(tried or "0").partition("|")[0]
            subject = entries[0][1].get("subject", "") if entries else ""
            found.append(Retry(email_id, subject, due / 1000 - now, number_in(failed) or 0))
        return tuple(found)

    # the dead letters

    def _with_letters(self, snapshot: Snapshot) -> Snapshot:
        """Read again only where one was taken away; else those that came. At most the newest MOST_LETTERS."""
        total = self._redis.length(self._keys.dlq)
        buried = (total, self._ever_added(self._keys.dlq))
        if buried == self._buried:
            return snapshot
        removed = buried[1] - buried[0] != self._buried[1] - self._buried[0]
        known = {} if removed else self._graves
        fresh = self._newest_letters(after=next(reversed(known), ""))
        self._graves = dict(list({**known, **fresh}.items())[-MOST_LETTERS:])
        self._buried = buried
        groups = grouped((letter.id, letter.group, letter.at) for letter in self._graves.values())
        newest = {group.example: self._graves[group.example] for group in groups[:MOST_GROUPS]}
        letters = Letters(total, len(self._graves), tuple(groups[:MOST_GROUPS]), max(0, len(groups) - MOST_GROUPS), newest)
        return replace(snapshot, letters=letters)

    def _newest_letters(self, after: str) -> dict[str, Letter]:
        """Those that died after the letter `after`, the oldest first; the newest ones where they are too many or too large."""
        found: list[Letter] = []
        end, size = "+", 0
        while len(found) < MOST_LETTERS and size < LETTERS_BYTES:
            reply = self._redis.call("XREVRANGE", self._keys.dlq, end, f"({after}" if after else "-", "COUNT", LETTERS_PAGE)
            for letter_id, flat in reply:
                fields = pairs(flat or ())
                size += sum(map(len, fields.values()))
                found.append(Letter(letter_id, group_of(fields), fields.get("dead_at", ""), fields.get("subject", "")[:200]))
            if len(reply) < LETTERS_PAGE:
                break
            end = f"({reply[-1][0]}"
        return {letter.id: letter for letter in reversed(found[:MOST_LETTERS])}


def record_of(fields: Fields) -> dict[str, Any]:
    """The record of a dead letter; {} where somebody else put it there."""
    try:
        record = json.loads(fields.get("record", "{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
