"""Every round trip fails once: whatever call breaks however, each mail ends in exactly one place.

The real code of producer and worker runs in this thread against a real Valkey, the sandbox and an archive on disk, each write to
which is a round trip too. A run is a story of a few processes and three mails: one is done, one is done at its second attempt, one
is dead. For each round trip k of the story and each kind of fault the story is told again with trip k broken; then fresh processes
come, and the books must balance.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from src.common.archive import ref_of
from src.common.exceptions import ArchiveMissing, ArchiveUnavailable
from src.common.redis_client import RedisClient
from src.imap.connection import ImapEndpoint
from src.imap.imap_client import ImapMailbox
from src.mail.record import gmail_email_id
from src.producer.plan import State
from src.producer.reader import Reader
from src.sandbox.server import Sandbox
from tests.support.account import assert_accounted, read_books
from tests.support.faulty import Crash, Fault, Process, Trips
from tests.support.inline import MAILBOX, InlineProducer, InlineWorker, World
from tests.support.mutants import MethodMutant, Mutant
from tests.support.servers import RedisServer

pytestmark = pytest.mark.timeout(900)  # hundreds of runs: on a busy machine they take their time

BREAKS = (Fault.CRASH_BEFORE, Fault.CRASH_AFTER, Fault.REQUEST_LOST, Fault.REPLY_LOST)
LARGE = 70_000  # bytes of the mail `done` of the story of stubs


@dataclass(frozen=True)
class Stage:
    """The world of every run of a story, and the sandbox behind it.

    By subject: `ids`, the email_ids; `refs`, where the raw mail is kept, "" if it is not. `stubs`: subjects of those that enter as
    stubs. `passed`: how many mails are left out by date.
    """

    world: World
    sandbox: Sandbox
    ids: Mapping[str, str]
    refs: Mapping[str, str]
    stubs: frozenset[str]
    passed: int

    def produce(self, trips: Trips) -> None:
        with suppress(Crash):
            InlineProducer(self.world, Process(trips)).run()

    def work(self, trips: Trips) -> None:
        with suppress(Crash):
            InlineWorker(self.world, Process(trips)).run(self.world.stream_is_empty)

    def renumber(self) -> None:
        self.sandbox.change_uidvalidity(self.world.account, shuffle=True)


Story = Callable[[Stage, Trips], None]
Stages = Callable[[Story], Stage]


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    """The stage of a story: a mailbox of its own, and its settings."""
    with Sandbox() as sandbox, RedisServer("valkey", options={"hz": "500"}) as valkey:  # blocked reads end on time
        real = RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10.0)
        built: dict[Story, Stage] = {}

        def stage(story: Story) -> Stage:
            if story not in built:
                built[story] = set_up(story, sandbox, valkey, real)
            return built[story]

        yield stage
        real.close()


def set_up(story: Story, sandbox: Sandbox, valkey: RedisServer, real: RedisClient) -> Stage:
    account, env = f"{story.__name__}@gmail.example", SETTINGS_OF.get(story, {})
    stubs = frozenset({"done"} if story is too_large else ())
    ids, refs = {}, {}
    for subject, day in (("retry", 10), ("dead", 10), ("done", 11)):
        body = b"x\r\n" * (LARGE // 3) if subject in stubs else b"x"
        raw = f"Subject: {subject}\r\n\r\n".encode() + body
        sandbox.deliver(account, raw, internal_date=datetime(2026, 1, day, 12, tzinfo=UTC))
        ids[subject] = gmail_email_id(account, sandbox.ledger()[-1].gm_msgid)
        refs[subject] = ref_of(raw) if "RAW_ARCHIVE" in env else ""
    token = sandbox.tokens.grant(
        {
            "grant_type": "refresh_token",
            "client_id": sandbox.client_id,
            "client_secret": sandbox.client_secret,
            "refresh_token": sandbox.tokens.refresh_token(account),
        }
    ).body["access_token"]
    endpoint = ImapEndpoint(sandbox.host, sandbox.imap_port, "none", 10.0, None)
    world = World(valkey.client(), real._transport, endpoint, account, str(token), **env)
    return Stage(world, sandbox, ids, refs, stubs, passed=2 if story is asked_for else 0)


# The stories. Each step is a process of its own; one that crashes is followed by the next. What another story breaks is left whole.


def one_life(stage: Stage, trips: Trips) -> None:
    """Read and worked off."""
    stage.produce(trips)
    stage.work(trips)


def handed_back(stage: Stage, trips: Trips) -> None:
    """A worker is told to stop with mail in its hands, the next one finishes it."""
    stage.produce(Trips())
    with suppress(Crash):
        worker = InlineWorker(stage.world, Process(trips))
        worker.join()
        worker.settle(worker.take()[:1])
        worker.stop()
    stage.work(trips)


def renumbered(stage: Stage, trips: Trips) -> None:
    """UIDVALIDITY changes behind a read, complete or cut short; the folder is walked."""
    stage.produce(trips)
    stage.renumber()
    stage.produce(trips)
    stage.work(Trips())


def too_large(stage: Stage, trips: Trips) -> None:
    """One mail is above MAX_MESSAGE_BYTES and enters as a stub."""
    stage.produce(trips)
    stage.work(Trips())


def asked_for(stage: Stage, trips: Trips) -> None:
    """Two mails that the first read left out are asked for. Who asked and did not hear that it is noted asks again."""
    stage.produce(Trips())
    producer, asked = InlineProducer(stage.world, Process(trips)), False
    with suppress(Crash):
        producer.ask_for(date(2026, 1, 10))
        asked = True
        producer.run()
    if not asked:
        InlineProducer(stage.world, Process(Trips())).ask_for(date(2026, 1, 10))
    stage.work(Trips())


def kept(stage: Stage, trips: Trips) -> None:
    """Raw mail is kept, and no mail is in the stream before its raw mail is in the archive."""
    stage.produce(trips)
    for _, fields in stage.world.admin.xrange(stage.world.keys.stream):
        assert_kept(stage, json.loads(fields["record"])["raw_ref"])
    stage.work(Trips())


STORIES: tuple[Story, ...] = (one_life, handed_back, renumbered, too_large, asked_for, kept)
SETTINGS_OF: Mapping[Story, Mapping[str, object]] = {
    too_large: {"MAX_MESSAGE_BYTES": 65_536},
    asked_for: {"INITIAL_SYNC": "since:2026-01-11"},
    kept: {"RAW_ARCHIVE": None},  # its default: a folder
}
ALL = ("redis", "imap", "archive")
KINDS_OF: Mapping[Story, Sequence[str]] = {too_large: ("imap",), kept: ("archive",)}  # the rest is as in `one_life`


# The checker


def tell(stage: Stage, story: Story, trips: Trips) -> None:
    """Tell the story in an empty world, let fresh processes finish what it left, and look. Raises AssertionError."""
    with tempfile.TemporaryDirectory() as disk:
        stage.world.renew(Path(disk))
        story(stage, trips)
        one_life(stage, Trips())
        check(stage)


def check(stage: Stage) -> None:
    world, ids = stage.world, stage.ids
    assert_accounted(read_books(world.admin), [*ids.values()], dead={ids["dead"]: "permanent"})
    added = {
        key: world.admin.xinfo_stream(key)["entries-added"] for key in (world.keys.stream, world.keys.dlq, world.keys.results)
    }
    assert added == {world.keys.stream: 3, world.keys.dlq: 1, world.keys.results: 2}, "each enters once, dies once, is done once"
    with ImapMailbox(world.endpoint, world.account, MAILBOX, world.token) as session:
        uidvalidity, last_uid = session.folder.uidvalidity, session.uids_from(1)[-1]
    own = world.keys.mailbox(world.account, MAILBOX)
    state = world.admin.mget(own.uidvalidity, own.last_uid, own.email_count)
    assert state == [str(uidvalidity), str(last_uid), "3"], f"intake ends at {state}"
    passed, resync = world.admin.hmget(own.intake, "passed", "resync")
    assert (passed, resync) == (str(stage.passed), None), f"{passed} mails count as left out; still asked for: {resync}"

    results = [(fields["email_id"], json.loads(fields["result"])) for _, fields in world.admin.xrange(world.keys.results)]
    seen = {email_id: (result["subject"], result["truncated"], result["raw"]) for email_id, result in results}
    assert seen == {ids[subject]: (subject, subject in stage.stubs, stage.refs[subject]) for subject in ("retry", "done")}
    [(_, letter)] = world.admin.xrange(world.keys.dlq)
    assert json.loads(letter["record"])["raw_ref"] == stage.refs["dead"]
    for raw_ref in filter(None, stage.refs.values()):
        assert_kept(stage, raw_ref)


def assert_kept(stage: Stage, raw_ref: str) -> None:
    """The archive has it, and its bytes have its hash."""
    archive = stage.world.archive()
    assert archive is not None
    try:
        archive.get(raw_ref)
    except (ArchiveMissing, ArchiveUnavailable) as error:
        raise AssertionError(f"published before it was kept: {error}") from error


def break_each(stage: Stage, story: Story, fault: Fault, meanwhile: Callable[[], None] = lambda: None) -> Iterator[Trips]:
    """The story with trip 1 broken, with trip 2 broken, … until one is told without the fault having fired."""
    for at in range(1, 1_000):
        trips = Trips(at, fault, meanwhile, KINDS_OF.get(story, ALL))
        try:
            tell(stage, story, trips)
        except AssertionError as error:
            said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            raise AssertionError(f"{story.__name__}, {trips.broken or 'nothing broken'}: {said}") from error
        if not trips.fired:
            return
        yield trips


def trips_of(stage: Stage, story: Story) -> Counter[str]:
    unbroken = Trips(kinds=KINDS_OF.get(story, ALL))
    tell(stage, story, unbroken)
    return unbroken.counts


LONG = (renumbered, handed_back)  # as long as all others together: with --all


@pytest.mark.parametrize(
    "story", [pytest.param(story, id=story.__name__, marks=[pytest.mark.full] if story in LONG else []) for story in STORIES]
)
def test_every_round_trip_fails_once(stages: Stages, story: Story) -> None:
    """A crash before or after any round trip, its request or its reply lost: every mail in one place, results once."""
    stage = stages(story)
    counts = trips_of(stage, story)
    points = sum(1 for fault in BREAKS for _ in break_each(stage, story, fault))
    print(f"{story.__name__}: {points} points = 4 x {dict(counts)}")
    assert points == 4 * counts.total() > 0


def takeover(stage: Stage) -> None:
    """Other processes do everything: what stood still is fenced off when it goes on."""
    one_life(stage, Trips())


def forgetting(stage: Stage) -> None:
    """Redis loses all it knew; the disk and the mailbox remain."""
    stage.world.admin.flushall()


def renumbering(stage: Stage) -> None:
    """The folder gets a new UIDVALIDITY, and open sessions end."""
    stage.renumber()


@pytest.mark.parametrize("event", [takeover, forgetting, renumbering], ids=lambda event: event.__name__)
def test_something_happens_before_every_round_trip(stages: Stages, event: Callable[[Stage], None]) -> None:
    """A process stands still before any round trip while the world changes, and goes on: every mail in one place, results once."""
    stage = stages(one_life)
    counts = trips_of(stage, one_life)
    points = sum(1 for _ in break_each(stage, one_life, Fault.MEANWHILE, lambda: event(stage)))
    print(f"{event.__name__}: {points} points")
    assert points == counts.total() > 0


def nothing(stage: Stage) -> None:
    """No event but the fault itself."""


class KeptAfterwards:
    """Raw mail goes into the archive when its mail is published already."""

    def __str__(self) -> str:
        return "kept afterwards"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        publish, waiting = Reader._publish, list[Callable[[], list[str]]]()

        def kept(reader: Reader, raws: Sequence[bytes], references: Callable[[], list[str]]) -> list[str]:
            waiting[:] = [references]
            return list(map(ref_of, raws))

        def publish_first(reader: Reader, *args: Any) -> State:
            state = publish(reader, *args)
            for references in waiting:
                references()
            return state

        monkeypatch.setattr(Reader, "_kept", kept)
        monkeypatch.setattr(Reader, "_publish", publish_first)


FOUND = "found = session.uids_since(plan.before(since))"
FENCE, NO_FENCE = "if owned[sid] ~= count then", "if false then"
COMPARE_AND_SET = "if uidvalidity ~= ARGV[3] or last_uid ~= ARGV[4] then"


@pytest.mark.parametrize(
    ("mutant", "story", "fault", "event", "violation"),
    [
        (Mutant("publish", COMPARE_AND_SET, NO_FENCE), one_life, Fault.MEANWHILE, takeover, "move last_uid back"),
        (Mutant("complete", FENCE, NO_FENCE), handed_back, Fault.REPLY_LOST, nothing, "results exactly once"),
        (Mutant("complete", FENCE, NO_FENCE), handed_back, Fault.MEANWHILE, takeover, "results exactly once"),
        (Mutant("complete", "redis.call('XDEL', KEYS[1], unpack(sids))"), handed_back, Fault.REPLY_LOST, nothing, "finds no end"),
        (
            Mutant("complete", "redis.call('XACK', KEYS[1], ARGV[1], unpack(sids))"),
            handed_back,
            Fault.REPLY_LOST,
            nothing,
            "pending entries",
        ),
        (
            Mutant("complete", "redis.call('SADD', KEYS[6 + set], unpack(part))"),
            handed_back,
            Fault.REPLY_LOST,
            nothing,
            "results exactly once",
        ),
        (Mutant("fail", "redis.call('XDEL', KEYS[1], mail.sid)"), handed_back, Fault.REPLY_LOST, nothing, "finds no end"),
        (Mutant("fail", "redis.call('HDEL', KEYS[3], mail.id)"), handed_back, Fault.REPLY_LOST, nothing, "marks of starts"),
        (Mutant("promote", "redis.call('ZREM', KEYS[3], member)"), handed_back, Fault.REPLY_LOST, nothing, "due entries"),
        (
            MethodMutant(Reader._wanted, "if judge(", "if metas[uid].size <= 65_536 and judge("),
            too_large,
            Fault.CRASH_BEFORE,
            nothing,
            "lost",
        ),
        (
            MethodMutant(Reader.look_back, FOUND, f"self.pulse.ask_redis(partial(self.states.look_done, request)); {FOUND}"),
            asked_for,
            Fault.CRASH_BEFORE,
            nothing,
            "lost",
        ),
        (KeptAfterwards(), kept, Fault.CRASH_BEFORE, nothing, "published before it was kept"),
        (
            MethodMutant(Reader._kept, "if not said:", "return [''] * len(raws)\n            if not said:"),
            kept,
            Fault.REQUEST_LOST,
            nothing,
            "published before it was kept",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_guard_taken_out_is_seen(
    stages: Stages,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Mutant | MethodMutant | KeptAfterwards,
    story: Story,
    fault: Fault,
    event: Callable[[Stage], None],
    violation: str,
) -> None:
    """The checker can fail: without any one of these lines some broken round trip ends in the violation named."""
    stage = stages(story)
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError, match=violation):
        for _ in break_each(stage, story, fault, lambda: event(stage)):
            pass
