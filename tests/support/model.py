"""The life of mail as a plain Python model: what each transition answers and leaves behind, said without Redis.

Two things it cannot know and is told: the ids that the server gives to new entries, and which of the due mails `promote` took.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from src.worker.idempotency import DEATH


@dataclass(frozen=True)
class Entry:
    """An entry of the stream. `owner` and `count` are the fence while it is in flight; `count` is kept while it waits.

    `handed_back`: released, and claimed or renewed by nobody since.
    """

    mail: str
    place: Literal["new", "flight", "due"] = "new"
    owner: str = ""
    count: int = 0
    handed_back: bool = False


@dataclass(frozen=True)
class Hand:
    """A delivery as its worker remembers it, whether it still holds or not. `started`: begin said GO."""

    worker: str
    sid: str
    count: int
    started: bool = False

    @property
    def tag(self) -> str:
        return f"{self.sid}:{self.count}"


@dataclass
class Model:
    """`days`: email_id → its field in `Keys.open`. `poison`: suspicion at which a mail is buried.

    `entries` in stream order. `index`, `starts`, `tries` by email_id.
    `starts`: (solo starts, tag of the unfinished start). `tries`: (failed attempts, last delivery count).
    `letters`: dead-letter id → (email_id, reason). `runs`: what each run of reprocess brought back; `lives`: how often a
    mail came back after it was done.
    """

    days: dict[str, str]
    poison: int
    entries: dict[str, Entry] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)
    starts: dict[str, tuple[int, str]] = field(default_factory=dict)
    tries: dict[str, tuple[int, int]] = field(default_factory=dict)
    letters: dict[str, tuple[str, str]] = field(default_factory=dict)
    results: Counter[tuple[str, str]] = field(default_factory=Counter)
    processed: set[str] = field(default_factory=set)
    open: Counter[str] = field(default_factory=Counter)
    runs: dict[str, set[str]] = field(default_factory=dict)
    lives: Counter[str] = field(default_factory=Counter)

    def in_place(self, place: str) -> list[str]:
        return [sid for sid, entry in self.entries.items() if entry.place == place]

    def holds(self, hand: Hand) -> bool:
        """The fence."""
        entry = self.entries.get(hand.sid)
        return entry is not None and entry.place == "flight" and entry.owner == hand.worker and entry.count == hand.count

    def held_by(self, worker: str) -> list[str]:
        return [sid for sid in self.in_place("flight") if self.entries[sid].owner == worker]

    def known(self, mail: str) -> bool:
        return mail in self.index or mail in self.processed

    # intake

    def fresh(self, mails: Sequence[str]) -> list[bool]:
        """Which of a batch `publish` adds."""
        return [not self.known(mail) and mail not in mails[:i] for i, mail in enumerate(mails)]

    def published(self, mail: str, sid: str) -> None:
        self.entries[sid] = Entry(mail)
        self.index[mail] = f"S:{sid}"
        self._count(mail, 1)

    def seen_in_stream(self, sid: str, mail: str) -> None:
        """Someone else's XADD."""
        self.entries[sid] = Entry(mail)

    # what someone else broke, and `repair.examine` mended

    def put_back(self, sid: str, ahead: int) -> None:
        """An entry that was in no pending list and not due."""
        mail = self.entries[sid].mail
        tag = self.starts.get(mail, (0, ""))[1]
        attempts, last = self.tries.get(mail, (0, 0))
        count = max(int(tag.rpartition(":")[2] or 0), last) + ahead
        if mail in self.index:
            self.tries[mail] = (attempts, count)
        self.entries[sid] = replace(self.entries[sid], place="flight", owner="audit", count=count, handed_back=True)

    def came_again(self, sid: str, new: str) -> None:
        """A deleted entry's mail was published once more: it was counted already."""
        mail = self.entries.pop(sid).mail
        self.entries[new] = Entry(mail)
        self.index[mail] = f"S:{new}"

    def index_of_stream(self) -> list[str]:
        """Mails that the index says are unfinished."""
        return sorted(mail for mail, location in self.index.items() if location.startswith("S:"))

    def copies(self) -> bool:
        """Whether two entries are of one mail, or one is known to no index."""
        return len({entry.mail for entry in self.entries.values()}) < len(self.entries) or bool(self.strays())

    def strays(self) -> dict[str, str]:
        """email_id → its last entry, of mails in the stream that no index knows."""
        return {
            entry.mail: sid for sid, entry in self.entries.items() if entry.mail in self.days and entry.mail not in self.index
        }

    def place(self, mail: str) -> str:
        """As lua/audit.lua says it."""
        if mail in self.processed:
            return "done"
        location = self.index.get(mail)
        if location is None:
            return "unknown"
        return (
            {"new": "unread", "flight": "flight", "due": "waiting"}[self.entries[location[2:]].place]
            if location[0] == "S"
            else "dead"
        )

    # taking

    def read(self, worker: str, most: int) -> list[Hand]:
        taken = self.in_place("new")[:most]
        return [self._claimed(sid, worker, 1) for sid in taken]

    def recover(self, worker: str, most: int, busy: Collection[str], *, only_handed_back: bool) -> list[Hand]:
        found = [
            sid
            for sid in sorted(self.in_place("flight"), key=stream_order)
            if sid not in busy and (self.entries[sid].handed_back or not only_handed_back)
        ]
        return [self._claimed(sid, worker, self.entries[sid].count + 1) for sid in found[:most]]

    def promoted(self, worker: str, sids: Sequence[str]) -> list[Hand]:
        return [self._claimed(sid, worker, self.entries[sid].count + 1) for sid in sids]

    def _claimed(self, sid: str, worker: str, count: int) -> Hand:
        self.entries[sid] = replace(self.entries[sid], place="flight", owner=worker, count=count, handed_back=False)
        return Hand(worker, sid, count)

    # holding

    def renew(self, hands: Sequence[Hand]) -> list[str]:
        """The stream ids that are lost."""
        for hand in hands:
            if self.holds(hand):
                self.entries[hand.sid] = replace(self.entries[hand.sid], handed_back=False)
        return [hand.sid for hand in hands if not self.holds(hand)]

    def release(self, hands: Sequence[Hand]) -> int:
        held = [hand for hand in hands if self.holds(hand)]
        for hand in held:
            mail = self.entries[hand.sid].mail
            solo, tag = self.starts.get(mail, (0, ""))
            if tag == hand.tag and solo == 0:
                del self.starts[mail]
            elif tag == hand.tag:
                self.starts[mail] = (solo - 1, "")
            self.entries[hand.sid] = replace(self.entries[hand.sid], handed_back=True)
        return len(held)

    # begin

    def begin(self, hand: Hand, mail: str, *, solo: bool) -> tuple[str, int]:
        """(verdict, failed attempts). POISON is followed by `buried` with the id of the letter."""
        attempts = self.tries.get(mail, (0, 0))[0]
        if not self.holds(hand):
            return "LOST", attempts
        location = self.index.get(mail)
        if mail in self.processed or location not in (None, f"S:{hand.sid}"):
            del self.entries[hand.sid]
            return "DUP", attempts
        if location is None:
            self.index[mail] = f"S:{hand.sid}"
            self._count(mail, 1)
        return self._start(hand, mail, solo=solo), attempts

    def _start(self, hand: Hand, mail: str, *, solo: bool) -> str:
        if mail not in self.starts:
            self.starts[mail] = (0, hand.tag)
            return "GO"
        alone, tag = self.starts[mail]
        if tag == hand.tag:
            return "GO"
        if alone >= self.poison:
            return "POISON"
        if solo:
            self.starts[mail] = (alone + 1, hand.tag)
            return "GO"
        return "SUSPECT"

    # settling

    def complete(self, batch: Sequence[tuple[Hand, str]]) -> list[str]:
        """Of (delivery, email_id) each. All are judged before anything is written."""
        verdicts = ["OK" if self.holds(hand) else "ALREADY" if mail in self.processed else "LOST" for hand, mail in batch]
        for (hand, mail), verdict in zip(batch, verdicts, strict=True):
            if verdict == "OK":
                self.results[mail, "done"] += 1
                self.processed.add(mail)
                self._count(mail, -1)
                del self.entries[hand.sid], self.index[mail]
                self.starts.pop(mail, None)
                self.tries.pop(mail, None)
        return verdicts

    def fail(self, hand: Hand, mail: str, verb: str) -> tuple[str, int]:
        """DEAD is followed by `buried` with the id of the letter."""
        attempts, last = self.tries.get(mail, (0, 0))
        if not self.holds(hand):
            return ("ALREADY" if last == hand.count else "LOST"), attempts
        if verb in ("retry", "crash", "postpone"):
            attempts += verb != "postpone"
            self.tries[mail] = (attempts, hand.count)
            self.entries[hand.sid] = replace(self.entries[hand.sid], place="due", owner="")
            suspicion, tag = self.starts.pop(mail, (0, ""))
            if verb == "crash":
                self.starts[mail] = (suspicion + DEATH - 1, tag)
            return ("POSTPONED" if verb == "postpone" else "RETRY"), attempts
        return "DEAD", attempts + 1

    def buried(self, hand: Hand, letter: str, reason: str) -> None:
        """The entry left the stream as dead letter `letter`."""
        mail = self.entries.pop(hand.sid).mail
        self.letters[letter] = (mail, reason)
        self.starts.pop(mail, None)
        self.tries.pop(mail, None)
        if mail in self.index:  # a foreign entry is in no index
            self.index[mail] = f"D:{letter}"

    # the dead

    def replay(self, letter: str) -> str:
        """OK is followed by `replayed` with the id of the entry."""
        if letter not in self.letters:
            return "NONE"
        return "OK" if self.letters[letter][0] in self.index else "FOREIGN"

    def replayed(self, letter: str, sid: str) -> None:
        mail, _ = self.letters.pop(letter)
        self.entries[sid] = Entry(mail)
        self.index[mail] = f"S:{sid}"

    def discard(self, letter: str) -> str:
        if letter not in self.letters:
            return "NONE"
        mail, _ = self.letters.pop(letter)
        if self.index.pop(mail, None):
            self.processed.add(mail)
            self.results[mail, "discarded"] += 1
            self._count(mail, -1)
        return "OK"

    def expire(self, most: int) -> int:
        """The oldest letters, given up; how many."""
        return [self.discard(letter) for letter in sorted(self.letters, key=stream_order)[:most]].count("OK")

    # the done

    def bring_back(self, run: str, mail: str, *, most_live: int) -> str:
        """OK is followed by `brought_back` with the id of the entry."""
        if mail in self.runs.get(run, ()):
            return "ALREADY"
        if mail in self.index:
            return "DEAD" if self.index[mail].startswith("D:") else "LIVE"
        if mail not in self.processed:
            return "UNKNOWN"
        return "FULL" if len(self.entries) >= most_live else "OK"

    def brought_back(self, run: str, mail: str, sid: str) -> None:
        self.runs.setdefault(run, set()).add(mail)
        self.lives[mail] += 1
        self.processed.discard(mail)
        self.published(mail, sid)

    def _count(self, mail: str, change: int) -> None:
        self.open[self.days[mail]] += change
        if not self.open[self.days[mail]]:
            del self.open[self.days[mail]]


def stream_order(sid: str) -> tuple[int, int]:
    milliseconds, _, sequence = sid.partition("-")
    return int(milliseconds), int(sequence)
