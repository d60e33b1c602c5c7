"""Finished mail once more, as a new life: after a handler's bug. Found in the results and the archive, or in IMAP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Literal

from src.common.batch import split
from src.common.clock import iso
from src.common.correlation import traceparent_of
from src.common.digits import number_in
from src.common.keys import Keys, day_of, open_field
from src.common.redis_client import Fields, RedisClient
from src.imap.imap_client import Folder, Meta
from src.mail.parse import parse, stub
from src.mail.record import Envelope, member_of, sent_by, split_email_id, to_fields
from src.producer.plan import before
from src.producer.reader import FETCH_BYTES, STUB_BYTES, Session, identity_of

Verdict = Literal["OK", "ALREADY", "LIVE", "DEAD", "UNKNOWN", "FULL"]
RUN_SECONDS = 7 * 86_400  # how long an interrupted run can be gone on with
REPLAYS = "1"  # how often such a mail came back before is not known
PAGE = 100
WITHOUT_IMAP = "brought back from the archive: uidvalidity, thread and labels are not known"


@dataclass(frozen=True, slots=True)
class Finished:
    """What the results say of a finished mail. `sender`: as the entry's `from`."""

    email_id: str
    outcome: str
    handler: str
    mailbox: str
    uid: int
    internal_date: str
    sender: str
    raw_ref: str

    @property
    def account(self) -> str:
        parts = split_email_id(self.email_id)
        return parts[1] if parts else ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which mail. `since`, `until`: INTERNALDATE days (UTC), both included; "" for any account, sender, handler."""

    since: date
    until: date
    account: str = ""
    sender: str = ""
    handler: str = ""

    def day(self, internal_date: str) -> bool:
        return self.since.isoformat() <= internal_date[:10] <= self.until.isoformat()

    def of_account(self, account: str) -> bool:
        return not self.account or account.casefold() == self.account.casefold()

    def takes(self, mail: Finished) -> bool:
        return (
            mail.outcome != "discarded"  # given up for good
            and self.day(mail.internal_date)
            and self.of_account(mail.account)
            and (not self.sender or sent_by(mail.sender, self.sender))
            and (not self.handler or mail.handler == self.handler)
        )

    @property
    def days(self) -> list[str]:
        """As they stand in the keys of the processed sets."""
        return [day_of((self.since + timedelta(days=n)).isoformat()) for n in range((self.until - self.since).days + 1)]


def results(redis: RedisClient, keys: Keys) -> Iterator[Finished]:
    """The entries of the results stream, the oldest first; a mail that was finished twice comes twice."""
    start = "-"
    while page := redis.entries(keys.results, start, count=1000):
        for _, fields in page:
            if split_email_id(fields.get("email_id", "")) is None:
                continue
            yield Finished(
                fields["email_id"],
                fields.get("outcome", ""),
                fields.get("handler", ""),
                fields.get("mailbox", ""),
                number_in(fields.get("uid", "")) or 0,
                fields.get("internal_date", ""),
                fields.get("from", ""),
                fields.get("raw_ref", ""),
            )
        start = f"({page[-1][0]}"


def bring_back(redis: RedisClient, keys: Keys, run: str, mails: Sequence[Fields], *, most_live: int) -> list[Verdict]:
    """Into the stream as new lives, in one round trip. Safe to repeat: `run` (its name) brings a mail back once, whatever became of it.

    A mail: OK | ALREADY (this run did it before) | LIVE (unfinished) | DEAD (a dead letter) | UNKNOWN (never finished: that is the
    producer's business) | FULL (the stream holds `most_live` mails). Raises what RedisClient raises.
    """
    args: list[str | int] = [most_live, RUN_SECONDS, len(mails)]
    sets: dict[str, int] = {}
    for fields in mails:
        account, internal_date, email_id = fields["account"], fields["internal_date"], fields["email_id"]
        number = sets.setdefault(keys.processed(account, internal_date), len(sets) + 1)
        args += [email_id, member_of(email_id), number, open_field(account, fields["mailbox"], internal_date), 2 * len(fields)]
        for name, value in fields.items():
            args += [name, value]
    steps = [keys.steps(fields["email_id"]) for fields in mails]
    own = [keys.stream, keys.index, keys.open, keys.run(run)]
    return list(redis.run("reprocess", [*own, *steps, *sets], args)) if mails else []


def judge(redis: RedisClient, keys: Keys, mails: Sequence[Finished]) -> list[Verdict]:
    """What `bring_back` would say of a first try; changes nothing."""
    answers: list[Verdict] = []
    located = redis.call("HMGET", keys.index, *(mail.email_id for mail in mails)) if mails else []
    for mail, location in zip(mails, located, strict=True):
        done = redis.are_members(keys.processed(mail.account, mail.internal_date), [member_of(mail.email_id)]) == [True]
        answers.append(("DEAD" if location.startswith("D:") else "LIVE") if location else "OK" if done else "UNKNOWN")
    return answers


def entry_from_archive(mail: Finished, raw: bytes, *, new_id: str, now: datetime) -> Fields:
    """The stream entry of a finished mail whose raw bytes are at hand. What only IMAP knows is left out; `defects` says so."""
    envelope = Envelope(
        account=mail.account,
        mailbox=mail.mailbox,
        uid=mail.uid,
        uidvalidity=0,
        internal_date=mail.internal_date,
        size=len(raw),
        email_id=mail.email_id,
        correlation_id=new_id,
        traceparent=traceparent_of(new_id),
        ingested_at=iso(now),
        raw_ref=mail.raw_ref,
        defects=(WITHOUT_IMAP,),
    )
    return {**to_fields(envelope, parse(raw, envelope)), "replays": REPLAYS}


@dataclass(frozen=True, slots=True)
class Located:
    """A finished mail where IMAP shows it."""

    email_id: str
    meta: Meta


def in_folder(
    session: Session, account: str, mailbox: str, scope: Literal["account", "mailbox"], wanted: Wanted
) -> Iterator[Located]:
    """The mails of a folder that lie in the days wanted, identified as the producer does it."""
    uids = session.uids_since(before(wanted.since))  # the server's zone may be a day off
    for first in range(0, len(uids), PAGE):
        for _, meta in sorted(session.meta(uids[first : first + PAGE]).items()):
            if wanted.day(meta.internal_date):
                yield Located(identity_of(account, mailbox, session.folder, meta, scope).email_id, meta)


def is_sent_by(session: Session, mail: Located, sender: str) -> bool:
    """Asks the server for the head of the mail; "" is anybody, without asking."""
    if not sender:
        return True
    head = session.head(mail.meta.uid, STUB_BYTES)
    return sent_by(str(parse(head, Envelope("", "", 0, 0, "", 0, "", "", "", truncated=True)).from_), sender)


def fetched(
    session: Session, located: Sequence[Located], *, most_bytes: int, keep: Callable[[Sequence[bytes]], list[str]]
) -> Iterator[tuple[Located, bytes | None, str]]:
    """(mail, its raw bytes or None where it is larger than `most_bytes`, its reference). `keep`: into the archive.

    What the server does not give is left out.
    """
    sizes = {mail.meta.uid: min(mail.meta.size, most_bytes) for mail in located}
    for group in split(located, lambda mail: sizes[mail.meta.uid], most=PAGE, most_bytes=FETCH_BYTES):
        bodies = session.bodies([mail.meta.uid for mail in group if mail.meta.size <= most_bytes])
        raw_refs = dict(zip(bodies, keep(list(bodies.values())), strict=True))
        for mail in group:
            uid = mail.meta.uid
            if uid in bodies or mail.meta.size > most_bytes:
                yield mail, bodies.get(uid), raw_refs.get(uid, "")


def entry_from_imap(
    session: Session, account: str, mailbox: str, mail: Located, raw: bytes | None, raw_ref: str, *, new_id: str, now: datetime
) -> Fields:
    """The stream entry of a finished mail, as the producer would make it."""
    folder: Folder = session.folder
    meta = mail.meta
    envelope = Envelope(
        account=account,
        mailbox=mailbox,
        uid=meta.uid,
        uidvalidity=folder.uidvalidity,
        internal_date=meta.internal_date,
        size=meta.size,
        email_id=mail.email_id,
        correlation_id=new_id,
        traceparent=traceparent_of(new_id),
        ingested_at=iso(now),
        gm_thrid=meta.gm_thrid,
        gm_labels=meta.gm_labels,
        raw_ref=raw_ref,
    )
    if raw is None:
        record = stub(envelope, session.head(meta.uid, STUB_BYTES) or meta.header, f"{meta.size} bytes, above MAX_MESSAGE_BYTES")
    else:
        record = parse(raw, envelope)
    return {**to_fields(envelope, record), "replays": REPLAYS}
