"""Every mail of a folder accounted for: N in the mailbox = done + in the stream + waiting + dead + passed (why)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Literal

from src.common.exceptions import ImapIncomplete
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.producer import plan
from src.producer.plan import State, before
from src.producer.reader import Session, identity_of
from src.producer.reprocess import results
from src.producer.state_manager import Identity, Place, StateManager

PAGE = 100
SHOWN = 10  # UIDs that the sentence names
EVER = "1970-01-02"  # the day since which there is mail, where one has no date

LOST, DELETED = "in the stream, out of every worker's sight", "deleted by hand"
FORGOTTEN, NOWHERE, WITHHELD = "done, but its processed id is gone", "known nowhere", "the server gives no data"

Fate = Literal["done", "in the stream", "waiting", "dead", "passed", "to come", "unaccounted"]
FATES: tuple[Fate, ...] = ("done", "in the stream", "waiting", "dead", "passed", "to come")
_STANDS: dict[Place, Fate] = {
    "done": "done",
    "unread": "in the stream",
    "flight": "in the stream",
    "waiting": "waiting",
    "dead": "dead",
}


@dataclass(frozen=True, slots=True)
class Sighted:
    """A mail of the folder and where it stands in Redis. `internal_date`: ISO 8601 in UTC, "" where the server gave none."""

    uid: int
    identity: Identity
    place: Place


@dataclass(frozen=True, slots=True)
class Judged:
    """`why`: of what is passed or unaccounted. `mail` is None where the server shows a UID and gives nothing of it."""

    uid: int
    fate: Fate
    why: str = ""
    mail: Sighted | None = None


def judge(
    mail: Sighted, state: State | None, *, forgotten_before: str, strays: Collection[str] = (), finished: Collection[str] = ()
) -> Judged:
    """What became of a mail. Pure.

    `state`: how far its mailbox was read, None where that is not known in this numbering: then what is known nowhere is still to
    come. `strays`: email_ids in the stream that no index knows: the worker that gets one adopts it. `finished`: those that the results
    call done.
    """
    fate = _STANDS.get(mail.place)
    if fate:
        return Judged(mail.uid, fate, "", mail)
    if mail.identity.email_id in strays:
        return Judged(mail.uid, "in the stream", "", mail)
    if mail.place == "lost":
        return Judged(mail.uid, "unaccounted", LOST, mail)
    if mail.place == "dangling":
        return Judged(mail.uid, "unaccounted", DELETED, mail)
    if mail.identity.email_id in finished:
        return Judged(mail.uid, "unaccounted", FORGOTTEN, mail)
    if state is None:
        return Judged(mail.uid, "to come", "", mail)
    why = plan.passed_over(state, mail.uid, mail.identity.internal_date, forgotten_before)
    if why:
        return Judged(mail.uid, "passed", why, mail)
    return Judged(mail.uid, "to come", "", mail) if mail.uid > state.last_uid else Judged(mail.uid, "unaccounted", NOWHERE, mail)


@dataclass
class Balance:
    """The mails of one folder by what became of them. `since`: ISO date from which on it was looked at, "" for all.

    `unaccounted`: those that should stand somewhere and do not.
    """

    account: str
    mailbox: str
    since: str = ""
    counts: Counter[Fate] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    unaccounted: list[Judged] = field(default_factory=list)

    def add(self, mail: Judged) -> None:
        self.counts[mail.fate] += 1
        if mail.fate == "passed":
            self.passed[mail.why] += 1
        elif mail.fate == "unaccounted":
            self.unaccounted.append(mail)

    @property
    def mails(self) -> int:
        return self.counts.total()

    def sentence(self) -> str:
        parts = [f"{self.counts[fate]} {fate}" for fate in FATES if self.counts[fate] or fate == "done"]
        reasons = [why if len(self.passed) == 1 else f"{count} {why}" for why, count in sorted(self.passed.items())]
        equation = " + ".join(parts).replace(" passed", f" passed ({', '.join(reasons)})")
        equation += f" + {len(self.unaccounted)} unaccounted" if self.unaccounted else " · 0 unaccounted"
        since = f" since {self.since}" if self.since else ""
        return f"{self.account}/{self.mailbox}: {self.mails} in the mailbox{since} = {equation}"

    def reasons(self) -> list[str]:
        """What is unaccounted, one line a reason."""
        by_reason: dict[str, list[int]] = {}
        for mail in self.unaccounted:
            by_reason.setdefault(mail.why, []).append(mail.uid)
        return [
            f"{len(uids)} {why}: UID {', '.join(map(str, uids[:SHOWN]))}{', …' if len(uids) > SHOWN else ''}"
            for why, uids in by_reason.items()
        ]

    def facts(self) -> dict[str, object]:
        """For a program."""
        return {
            "account": self.account,
            "mailbox": self.mailbox,
            "since": self.since,
            "in_the_mailbox": self.mails,
            **{fate.replace(" ", "_"): self.counts[fate] for fate in FATES},
            "passed_why": dict(self.passed),
            "unaccounted": len(self.unaccounted),
            "unaccounted_why": dict(Counter(mail.why for mail in self.unaccounted)),
            "unaccounted_uids": [mail.uid for mail in self.unaccounted],
        }


@dataclass
class Auditor:
    """Looks at one folder; changes nothing. `forgotten_before`: ISO 8601, see `plan.counts`. `strays`: see `judge`."""

    redis: RedisClient
    keys: Keys
    group: str
    states: StateManager
    account: str
    mailbox: str
    scope: Literal["account", "mailbox"]
    forgotten_before: str
    strays: Collection[str] = ()

    def look(self, session: Session, since: date | None) -> Iterator[tuple[int, list[Judged]]]:
        """(mails still to look at, what became of a page of them), of the whole folder or of INTERNALDATE days from `since` on.

        The state is read before the folder: what it says was passed by then has had its fate by then.
        """
        state = self.states.look()
        if state is not None and state.uidvalidity != session.folder.uidvalidity:
            state = None
        uids = session.uids_since(before(since)) if since else session.uids_from(1)  # the server's zone may be a day off
        finished: set[str] | None = None
        for first in range(0, len(uids), PAGE):
            sighted, absent = self._sighted(session, uids[first : first + PAGE])
            wanted = [
                mail
                for mail in sighted
                if since is None or not mail.identity.internal_date or mail.identity.internal_date >= since.isoformat()
            ]
            if finished is None and any(mail.place == "unknown" for mail in wanted):
                finished = {mail.email_id for mail in results(self.redis, self.keys)}
                wanted = self._placed(wanted)  # again: what was done by then stands in its processed set by now
            judged = [
                judge(
                    mail,
                    state,
                    forgotten_before=self.forgotten_before,
                    strays=self.strays,
                    finished=finished or (),
                )
                for mail in wanted
            ]
            judged += [Judged(uid, "unaccounted", WITHHELD) for uid in absent]
            yield max(0, len(uids) - first - PAGE), judged

    def _sighted(self, session: Session, uids: Sequence[int]) -> tuple[list[Sighted], list[int]]:
        """(where they stand, the UIDs that the server shows without an answer). What is gone from the folder meanwhile is left out."""
        metas = session.meta(uids)
        absent = [uid for uid in uids if uid not in metas and session.has(uid)]
        if absent:
            metas.update(session.meta(absent))
        if not metas and absent:
            raise ImapIncomplete(absent)
        present = [uid for uid in uids if uid in metas]
        identities = [identity_of(self.account, self.mailbox, session.folder, metas[uid], self.scope) for uid in present]
        sighted = [Sighted(uid, identity, "unknown") for uid, identity in zip(present, identities, strict=True)]
        return self._placed(sighted), [uid for uid in absent if uid not in metas]

    def _placed(self, mails: Sequence[Sighted]) -> list[Sighted]:
        places = self.states.places([mail.identity for mail in mails], self.account, self.group)
        return [replace(mail, place=place) for mail, place in zip(mails, places, strict=True)]


def oldest_day(mails: Sequence[Judged]) -> str:
    """The INTERNALDATE day (ISO date) from which a look finds all of `mails`."""
    days = [mail.mail.identity.internal_date[:10] if mail.mail else "" for mail in mails]
    return min(day or EVER for day in days)
