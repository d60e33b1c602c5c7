"""Every round trip fails once: whatever call breaks however, each mail ends in exactly one place.

The real code of producer and worker runs in this thread against a real Valkey and the sandbox. A run is a story of a few
processes and three mails: one is done, one is done at its second attempt, one is dead. For each round trip k of the story and
each kind of fault the story is told again with trip k broken; then fresh processes come, and the books must balance.
"""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from src.common.redis_client import RedisClient
from src.imap.imap_client import ImapEndpoint, ImapMailbox
from src.mail.record import gmail_email_id
from src.sandbox.server import Sandbox
from tests.support.account import assert_accounted, read_books
from tests.support.faulty import Crash, Fault, Process, Trips
from tests.support.inline import MAILBOX, InlineProducer, InlineWorker, World
from tests.support.mutants import Mutant
from tests.support.servers import RedisServer

pytestmark = pytest.mark.timeout(900)  # hundreds of runs: on a busy machine they take their time

ACCOUNT = "crash@gmail.example"
BREAKS = (Fault.CRASH_BEFORE, Fault.CRASH_AFTER, Fault.REQUEST_LOST, Fault.REPLY_LOST)


@dataclass(frozen=True)
class Stage:
    """The world of every run, and the sandbox behind it. `ids`: subject → email_id."""

    world: World
    sandbox: Sandbox
    ids: dict[str, str]

    def produce(self, trips: Trips) -> None:
        with suppress(Crash):
            InlineProducer(self.world, Process(trips)).run()

    def work(self, trips: Trips) -> None:
        with suppress(Crash):
            InlineWorker(self.world, Process(trips)).run(self.world.stream_is_empty)

    def renumber(self) -> None:
        self.sandbox.change_uidvalidity(ACCOUNT, shuffle=True)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Sandbox() as sandbox, RedisServer("valkey", options={"hz": "500"}) as valkey:  # blocked reads end on time
        for subject, day in (("retry", 10), ("dead", 10), ("done", 11)):
            sandbox.deliver(
                ACCOUNT, f"Subject: {subject}\r\n\r\nx".encode(), internal_date=datetime(2026, 1, day, 12, tzinfo=UTC)
            )
        token = sandbox.tokens.grant(
            {
                "grant_type": "refresh_token",
                "client_id": sandbox.client_id,
                "client_secret": sandbox.client_secret,
                "refresh_token": sandbox.tokens.refresh_token(ACCOUNT),
            }
        ).body["access_token"]
        real = RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10.0)
        world = World(
            valkey.client(),
            real._transport,
            ImapEndpoint(sandbox.host, sandbox.imap_port, "none", 10.0, None),
            ACCOUNT,
            str(token),
        )
        ids = {mail.subject: gmail_email_id(ACCOUNT, mail.gm_msgid) for mail in sandbox.ledger()}
        yield Stage(world, sandbox, ids)
        real.close()


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


Story = Callable[[Stage, Trips], None]
STORIES: tuple[Story, ...] = (one_life, handed_back, renumbered)


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
    with ImapMailbox(world.endpoint, ACCOUNT, MAILBOX, world.token) as session:
        uidvalidity, last_uid = session.folder.uidvalidity, session.uids_from(1)[-1]
    own = world.keys.mailbox(ACCOUNT, MAILBOX)
    state = world.admin.mget(own.uidvalidity, own.last_uid, own.email_count)
    assert state == [str(uidvalidity), str(last_uid), "3"], f"intake ends at {state}"


def break_each(stage: Stage, story: Story, fault: Fault, meanwhile: Callable[[], None] = lambda: None) -> Iterator[Trips]:
    """The story with trip 1 broken, with trip 2 broken, … until one is told without the fault having fired."""
    for at in range(1, 1_000):
        trips = Trips(at, fault, meanwhile)
        try:
            tell(stage, story, trips)
        except AssertionError as error:
            said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            raise AssertionError(f"{story.__name__}, {trips.broken or 'nothing broken'}: {said}") from error
        if not trips.fired:
            return
        yield trips


def trips_of(stage: Stage, story: Story) -> Counter[str]:
    unbroken = Trips()
    tell(stage, story, unbroken)
    return unbroken.counts


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_every_round_trip_fails_once(stage: Stage, story: Story) -> None:
    """A crash before or after any round trip, its request or its reply lost: every mail in one place, results once."""
    counts = trips_of(stage, story)
    points = sum(1 for fault in BREAKS for _ in break_each(stage, story, fault))
    print(f"{story.__name__}: {points} points = 4 x ({counts['redis']} Redis + {counts['imap']} IMAP round trips)")
    assert points == 4 * (counts["redis"] + counts["imap"]) > 0


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
def test_something_happens_before_every_round_trip(stage: Stage, event: Callable[[Stage], None]) -> None:
    """A process stands still before any round trip while the world changes, and goes on: every mail in one place, results once."""
    counts = trips_of(stage, one_life)
    points = sum(1 for _ in break_each(stage, one_life, Fault.MEANWHILE, lambda: event(stage)))
    print(f"{event.__name__}: {points} points")
    assert points == counts.total() > 0


def nothing(stage: Stage) -> None:
    """No event but the fault itself."""


FENCE, NO_FENCE = "if owned[mail.sid] ~= mail.count then", "if false then"
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
        (Mutant("promote", "redis.call('ZREM', KEYS[4], member)"), handed_back, Fault.REPLY_LOST, nothing, "due entries"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_guard_taken_out_is_seen(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Mutant,
    story: Story,
    fault: Fault,
    event: Callable[[Stage], None],
    violation: str,
) -> None:
    """The checker can fail: without any one of these lines some broken round trip ends in the violation named."""
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError, match=violation):
        for _ in break_each(stage, story, fault, lambda: event(stage)):
            pass
