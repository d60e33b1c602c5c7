"""What a server does not give of single mails, and how long it is asked for: none of them may hold up those behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn, Protocol, TypeVar

from src.common.clock import Clock
from src.common.exceptions import ImapIncomplete, ImapUnavailable

log = logging.getLogger(__name__)

TRIES = 3  # for a mail whose data does not come; sessions that break off in one FETCH, before each of its mails is fetched alone
BREAKS, BREAKS_SECONDS = 20, 3600.0  # sessions that break off at one mail, in so long at least, before it is fetched no more
OLD_SECONDS = 86_400.0  # after which a session that broke off tells nothing any more

Lack = Literal["data", "body", "line"]  # what cannot be had of a mail: anything; its octets; a session that outlives its FETCH
Result = TypeVar("Result")


class Searchable(Protocol):
    def has(self, uid: int) -> bool: ...


@dataclass
class Withheld:
    """Of one mailbox, whose `title` the log has; by UID, so of one numbering. `gone`: what the folder did not show when it was asked."""

    title: str
    clock: Clock
    gone: set[int] = field(default_factory=set)
    _numbering: int = 0
    _tries: dict[tuple[Lack, int], int] = field(default_factory=dict)
    _breaks: dict[tuple[Lack, int], list[float]] = field(default_factory=dict)  # when, monotonic
    _given_up: set[tuple[Lack, int]] = field(default_factory=set)

    def numbered(self, uidvalidity: int) -> None:
        """The session that begins counts in `uidvalidity`: what an earlier numbering withheld says nothing of it."""
        if uidvalidity != self._numbering:
            self._numbering = uidvalidity
            self.gone, self._tries, self._breaks, self._given_up = set(), {}, {}, set()

    def settle(self, session: Searchable) -> None:
        """Mail that the folder does not show twice is gone; what was asked for often enough is given up."""
        for (lack, uid), tries in list(self._tries.items()):
            if not session.has(uid) and not session.has(uid):
                log.info("%s: UID %d is gone from the folder", self.title, uid)
                self.gone.add(uid)
                del self._tries[lack, uid]
            elif tries >= TRIES:
                log.error(
                    "%s: UID %d was asked for %d times without an answer: it enters as a stub, if it was not read before",
                    self.title,
                    uid,
                    tries,
                )
                self._given_up.add((lack, uid))
                del self._tries[lack, uid]
        for (lack, uid), breaks in list(self._breaks.items()):
            if self.clock.monotonic() - breaks[-1] > OLD_SECONDS:
                del self._breaks[lack, uid]
            elif len(breaks) >= BREAKS and breaks[-1] - breaks[0] >= BREAKS_SECONDS:
                log.error(
                    "%s: the session broke off %d times while UID %d was fetched: it enters as a stub, if it was not read before",
                    self.title,
                    len(breaks),
                    uid,
                )
                self._given_up.add(("line", uid))
                del self._breaks[lack, uid]

    # what is to be fetched

    @property
    def in_doubt(self) -> bool:
        """Some FETCH broke a session off and was not made since."""
        return bool(self._breaks)

    def alone(self) -> set[int]:
        """UIDs to fetch alone: sessions broke off there."""
        return {uid for (_, uid), breaks in self._breaks.items() if len(breaks) >= TRIES}

    def tried(self, uids: Iterable[int]) -> bool:
        """Whether all of them were asked for often enough, and told nothing."""
        return all(self._tries.get(("data", uid), 0) >= TRIES for uid in uids)

    def least_doubtful(self, uids: Sequence[int]) -> Sequence[int]:
        """All of them together; where sessions broke off at them one alone, the last of those at which the fewest did."""
        breaks = {uid: len(self._breaks.get(("data", uid), ())) for uid in uids}
        return [min(uids, key=lambda uid: (breaks[uid], -uid))] if max(breaks.values()) >= TRIES else uids

    def lacks(self, lack: Lack, uid: int) -> bool:
        return (lack, uid) in self._given_up

    def why(self, uid: int) -> str:
        """Why a mail enters as a stub; "" where nothing of it is given up."""
        if self.lacks("line", uid):
            return "the session broke off again and again while this mail was fetched"
        if self.lacks("data", uid) or self.lacks("body", uid):
            return f"the server did not give this mail in {TRIES} tries"
        return ""

    # what came of it

    def fetched(self, lack: Lack, uids: Sequence[int], fetch: Callable[[], Result]) -> Result:
        """`fetch()`, of these mails. Where sessions break off in it again and again the server fails at one, or we at its answer."""
        try:
            found = fetch()
        except ImapUnavailable:
            for uid in uids:
                self._breaks.setdefault((lack, uid), []).append(self.clock.monotonic())
            raise
        if self._breaks:
            for uid in uids:
                self._breaks.pop((lack, uid), None)
        return found

    def missed(self, lack: Lack, uids: Sequence[int]) -> NoReturn:
        """A FETCH was answered without these. Raises ImapIncomplete."""
        for uid in uids:
            self._tries[lack, uid] = self._tries.get((lack, uid), 0) + 1
        raise ImapIncomplete(list(uids))

    def came(self, lack: Lack, uids: Collection[int]) -> None:
        """The server gave it, or the mail has its fate without."""
        if self._tries or self._given_up:
            for uid in uids:
                self._tries.pop((lack, uid), None)
                self._given_up.discard((lack, uid))
