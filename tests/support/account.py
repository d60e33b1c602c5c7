"""Accounting for mail: what Redis holds, read in one step, and the sentence each integration test ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import redis

from src.common.keys import Keys, open_field
from src.mail.record import member_of

GROUP = "email_workers"


@dataclass(frozen=True)
class Books:
    """`done`, `discarded`: how often each email_id stands in the results. `stream`, `dead`: entry id → fields.

    `pending`, `due`: stream ids. `processed`: the members of all processed sets.
    """

    done: Counter[str]
    discarded: Counter[str]
    stream: dict[str, dict[str, str]]
    dead: dict[str, dict[str, str]]
    pending: set[str]
    due: set[str]
    index: dict[str, str]
    starts: dict[str, str]
    tries: dict[str, str]
    open: dict[str, int]
    processed: Counter[str]

    @property
    def reasons(self) -> dict[str, str]:
        """Dead mail: email_id → reason. A foreign entry stands under `foreign:<stream id>`."""
        return {
            fields.get("dead_id") or fields.get("email_id", ""): fields.get("dead_reason", "") for fields in self.dead.values()
        }

    def fates(self) -> set[str]:
        """Every email_id that needs no more work."""
        return {*self.done, *self.discarded, *self.reasons}


def read_books(client: redis.Redis, stream: str = "email_ingestion_stream") -> Books:
    """What stands in Redis now. One transaction: no script can come in between."""
    keys = Keys(stream)
    processed = sorted(client.scan_iter(f"{keys.processed('', '').removesuffix(':undated')}*", count=1000))
    grouped = any(group["name"] == GROUP for group in client.xinfo_groups(stream)) if client.exists(stream) else False
    with client.pipeline(transaction=True) as pipe:
        pipe.xrange(keys.results)
        pipe.xrange(stream)
        pipe.xrange(keys.dlq)
        pipe.zrange(keys.due, 0, -1)
        for key in (keys.index, keys.starts, keys.tries, keys.open):
            pipe.hgetall(key)
        for key in processed:
            pipe.smembers(key)
        if grouped:
            pipe.xpending_range(stream, GROUP, "-", "+", 1_000_000)
        results, entries, dead, due, index, starts, tries, opened, *rest = pipe.execute()
    outcomes = Counter((fields["email_id"], fields["outcome"]) for _, fields in results)
    return Books(
        done=Counter({email_id: n for (email_id, outcome), n in outcomes.items() if outcome == "done"}),
        discarded=Counter({email_id: n for (email_id, outcome), n in outcomes.items() if outcome == "discarded"}),
        stream=dict(entries),
        dead=dict(dead),
        pending={str(row["message_id"]) for row in rest[-1]} if grouped else set(),
        due={str(member).split("|", 1)[0] for member in due},
        index=index,
        starts=starts,
        tries=tries,
        open={field: int(count) for field, count in opened.items()},
        processed=Counter(member for members in rest[: len(processed)] for member in members),
    )


def assert_accounted(
    books: Books,
    delivered: Collection[str],
    *,
    dead: Mapping[str, str] | None = None,
    waiting: Collection[str] = (),
    discarded: Collection[str] = (),
    repeated: bool = False,
) -> None:
    """Each of `delivered` (email_ids) is in exactly one place, and nothing dangles.

    `dead`: email_id → reason, `waiting`: still in the stream, `discarded`: given up; all others are done, once
    (`repeated`: at least once, after Redis forgot).
    """
    dead = dead or {}
    done = set(delivered) - set(dead) - set(waiting) - set(discarded)
    live = {fields["email_id"]: entry_id for entry_id, fields in books.stream.items()}
    graves = {fields["email_id"]: entry_id for entry_id, fields in books.dead.items() if "dead_id" not in fields}

    assert len(set(delivered)) == len(delivered), "the test counts a mail twice"
    assert set(books.done) == done, f"lost {done - set(books.done)}, unexpected {set(books.done) - done}"
    assert repeated or not [email_id for email_id, times in books.done.items() if times != 1], "results exactly once"
    assert books.discarded == Counter(set(discarded))
    assert books.reasons == dict(dead)
    assert len(books.dead) == len(dead), "a mail has two dead letters"
    assert set(live) == set(waiting)
    assert len(books.stream) == len(live), "a mail has two stream entries"

    assert books.index == {email_id: f"S:{entry_id}" for email_id, entry_id in live.items()} | {
        email_id: f"D:{entry_id}" for email_id, entry_id in graves.items()
    }
    assert books.open == Counter(
        open_field(fields["account"], fields["mailbox"], fields["internal_date"])
        for fields in [*books.stream.values(), *(fields for fields in books.dead.values() if "dead_id" not in fields)]
    )
    assert books.pending <= set(live.values()), "pending entries that do not stand in the stream"
    assert books.due <= set(live.values()), "due entries that do not stand in the stream"
    assert set(books.starts) <= set(waiting), "marks of starts that belong to nothing"
    assert set(books.tries) <= set(waiting), "counts of attempts that belong to nothing"
    assert books.processed == Counter({member_of(email_id) for email_id in {*done, *discarded}})
