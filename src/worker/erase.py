"""Mail that somebody asks to be erased: found wherever it stands, taken out by one transition a mail, the rest by a list.

The list (`Keys.erasing`: raw mail to remove, streams to write anew) is written by the transition that forgets the mail: so a command
that was killed half-way is finished by the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from src.common.archive import PUBLISH_SECONDS, Archive, raw_ref_in, references
from src.common.keys import Keys, open_field
from src.common.redis_client import Fields, RedisClient
from src.mail.parse import parse
from src.mail.record import Envelope, member_of, sent_by, split_email_id
from src.worker.delivery import Delivery

PAGE = 100
HEAD_BYTES = 65_536
YOUNG_SECONDS = PUBLISH_SECONDS + 900.0  # clocks differ, and a batch is parsed before it is published
MOST_FIELDS = 3_900  # of an entry that is written anew: Lua hands some 8,000 words to a command, and no more
TRIES = 5  # entries of a stream that is written anew may be deleted meanwhile, by another run too
WENT = ("stream entries", "dead letters", "results", "stored steps", "mentions in reprocess runs")
Takes = Callable[[Fields], bool]


@dataclass
class Traces:
    """Where one mail stands: ids of its stream entries, dead letters and results, references of its raw mail.

    `ours`: False for an entry that is no mail of ours; then `email_id` is `foreign:<id>`. `mailbox` and `internal_date` are None where
    nothing that is left tells.
    """

    email_id: str
    ours: bool = True
    mailbox: str | None = None
    internal_date: str | None = None
    entries: list[str] = field(default_factory=list)
    letters: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    raw_refs: set[str] = field(default_factory=set)

    @property
    def account(self) -> str:
        known = split_email_id(self.email_id)
        return known[1] if known else ""


def of_mail(email_id: str) -> Takes:
    return lambda fields: email_id in (fields.get("email_id"), fields.get("dead_id"))


def of_sender(address: str) -> Takes:
    """Mail whose From is exactly this address; case does not matter."""
    return lambda fields: sent_by(fields.get("from", ""), address)


def find(redis: RedisClient, keys: Keys, takes: Takes) -> dict[str, Traces]:
    """email_id → all that Redis holds of it, of the mails that `takes` takes. Reads stream, dead letters and results page by page."""
    found: dict[str, Traces] = {}
    for stream in (keys.stream, keys.dlq, keys.results):
        for entry_id, fields in _entries(redis, stream):
            if takes(fields) or fields.get("email_id") in found:
                _note(found, keys, stream, entry_id, fields)
    return found


def is_known(redis: RedisClient, keys: Keys, email_id: str) -> bool:
    """Whether anything beside the streams still names the mail: the index, its attempts, its steps, a run of reprocess."""
    marks = (keys.index, keys.starts, keys.tries)
    return (
        any(redis.call("HEXISTS", mark, email_id) for mark in marks)
        or bool(redis.call("EXISTS", keys.steps(email_id)))
        or any(redis.are_members(run, [email_id]) == [True] for run in runs(redis, keys))
    )


def _note(found: dict[str, Traces], keys: Keys, stream: str, entry_id: str, fields: Fields) -> None:
    ours = split_email_id(fields.get("email_id", "")) is not None
    if stream != keys.results:
        ours = not Delivery(entry_id, 0, fields).foreign and "dead_id" not in fields
    email_id = fields["email_id"] if ours else fields.get("dead_id") or f"foreign:{entry_id}"
    mail = found.setdefault(email_id, Traces(email_id, ours))
    mail.mailbox = fields.get("mailbox", mail.mailbox)
    mail.internal_date = fields.get("internal_date", mail.internal_date)
    {keys.stream: mail.entries, keys.dlq: mail.letters, keys.results: mail.results}[stream].append(entry_id)
    mail.raw_refs |= {fields.get("raw_ref", ""), raw_ref_in(fields.get("record", ""))} - {""}


def _entries(redis: RedisClient, stream: str) -> Iterator[tuple[str, Fields]]:
    start = "-"
    while page := redis.entries(stream, start, count=PAGE):
        yield from page
        start = f"({page[-1][0]}"


def runs(redis: RedisClient, keys: Keys) -> list[str]:
    """The keys of the sets that runs of `scripts/reprocess.py` keep."""
    cursor, found = "0", set[str]()
    while True:
        cursor, page = redis.call("SCAN", cursor, "MATCH", keys.runs_pattern, "COUNT", 1000)
        found |= set(page)
        if str(cursor) == "0":
            return sorted(found)


def erase(
    redis: RedisClient, keys: Keys, group: str, mail: Traces, run_keys: list[str], *, unfinished: bool, processed_days: float
) -> tuple[str, Counter[str]]:
    """(OK | HELD: a worker has it | LIVE: it is unfinished and `unfinished` is False | DANGLING: `scripts/audit.py --repair` first;
    how many of `WENT` went). Safe to repeat.

    Only OK changes anything. The references of its raw mail, and the streams to write anew, then stand in `Keys.erasing`. Raises what
    RedisClient raises.
    """
    account, date = mail.account, mail.internal_date
    dated = mail.ours and date is not None
    opened = open_field(account, mail.mailbox, date) if dated and mail.mailbox is not None and date is not None else ""
    args: list[str | int] = [group, int(unfinished), round(processed_days * 86_400), mail.email_id]
    args += [member_of(mail.email_id) if dated else "", opened]
    for listed in (mail.entries, mail.letters, mail.results, sorted(mail.raw_refs)):
        args += [len(listed), *listed]
    own = [keys.stream, keys.index, keys.starts, keys.tries, keys.due, keys.dlq, keys.open, keys.results, keys.erasing]
    of_mail = [keys.steps(mail.email_id), keys.processed(account, date or "")]
    copies = [keys.copy(keys.dlq), keys.copy(keys.results)]
    verdict, *counts = redis.run("erase", [*own, *of_mail, *copies, *run_keys], args)
    return verdict, Counter({name: int(count) for name, count in zip(WENT, counts, strict=False) if count})


def find_raw(archive: Archive, sender: str) -> Iterator[str]:
    """References of the raw mails whose From is `sender`: also of mail that the results have forgotten. Reads the whole archive."""
    for raw_ref, raw in archive.all():
        record = parse(raw[:HEAD_BYTES], Envelope("", "", 0, 0, "", 0, "", "", "", truncated=True))
        if sent_by(str(record.from_), sender):
            yield raw_ref


def remove_raw(redis: RedisClient, keys: Keys, archive: Archive, began: datetime, found: Set[str]) -> tuple[int, int, int]:
    """Work off `Keys.erasing` and `found`, what is in the archive: (removed, kept since another mail has the same bytes, too young).

    What was kept anew since `began` stays listed. What is not listed only the archive knows: a producer may be about to publish it, unless
    it was kept YOUNG_SECONDS before. Raises ArchiveUnavailable and what RedisClient raises; then the rest stays listed.
    """
    listed = {raw_ref for raw_ref in redis.call("SMEMBERS", keys.erasing) if raw_ref.startswith("sha256:")}
    if not listed | found:
        return 0, 0, 0
    needed = references(redis, keys) | {fields.get("raw_ref", "") for _, fields in _entries(redis, keys.results)}
    removed = kept = young = 0
    for raw_ref in sorted(listed | found):
        before = began if raw_ref in listed else began - timedelta(seconds=YOUNG_SECONDS)
        if raw_ref in needed:
            kept += 1
        elif archive.remove(raw_ref, before):
            removed += 1
        else:
            young += raw_ref not in listed
            continue
        redis.call("SREM", keys.erasing, raw_ref)
    return removed, kept, young


def rewrite(redis: RedisClient, keys: Keys) -> dict[str, str]:
    """Write the streams anew that `erase` deleted from, so that the server keeps no byte of it; those it could not, stay listed: stream →
    GROUPS, AGAIN (it changes too fast) or the id of an entry of more than MOST_FIELDS fields.

    Workers and other runs may be at work: each page is one script, the last one swaps. A stream with consumer groups of somebody's own is
    left as it is. Raises what RedisClient raises (RedisFull: there is no room for two of it).
    """
    left = {}
    for stream in sorted({keys.dlq, keys.results} & set(redis.call("SMEMBERS", keys.erasing))):
        tries, verdict = TRIES, "AGAIN"
        while verdict == "NEXT" or (verdict == "AGAIN" and tries):
            begins = verdict == "AGAIN"
            tries -= begins
            verdict, *wide = redis.run("rewrite", [stream, keys.copy(stream), keys.erasing], [int(begins), PAGE, MOST_FIELDS])
        if verdict != "DONE":
            left[stream] = wide[0] if verdict == "WIDE" else verdict
    return left
