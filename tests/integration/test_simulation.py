"""Deterministic simulation: two producers, three workers and an operator, every round trip a point where a seed decides.

See `tests/support/simulation.py`. A seed that fails is told alone with `SEED=n pytest tests/integration/test_simulation.py -k some -s`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from src.common.redis_client import RedisClient
from src.common.scripts import load
from src.sandbox.server import Sandbox
from tests.support.faulty import Crash, Fault, Process, Trips
from tests.support.inline import InlineProducer, World
from tests.support.mutants import Mutant
from tests.support.servers import RedisServer
from tests.support.simulation import Stage, Story

pytestmark = pytest.mark.timeout(900)  # on a busy machine it takes its time

FEW = 15  # seeds that ./scripts/test.sh tells; the others with --all
HERE = "tests/integration/test_simulation.py"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with (
        Sandbox() as sandbox,
        RedisServer("valkey", options={"hz": "500"}) as valkey,  # blocked reads end on time
        RedisClient.connect(valkey.url, max_connections=20, socket_timeout=10.0) as client,
    ):
        yield Stage(valkey, sandbox, client)


def tell(stage: Stage, seed: int) -> Story:
    """The story of a seed, played and checked. Raises AssertionError that says how to tell it alone."""
    folder = Path(tempfile.mkdtemp(prefix="simulation-"))
    story = Story(stage, seed, folder)
    try:
        story.play()
        story.check()
    except AssertionError as error:
        last = "\n".join(story.told[-25:])
        raise AssertionError(
            f"seed {seed}, {story.trips} steps, {dict(story.faults)}: {error}\nlast steps:\n{last}\n"
            f"alone: SEED={seed} .venv/bin/python -m pytest {HERE} -k some -s"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return story


def tell_all(stage: Stage, seeds: Iterable[int]) -> None:
    faults: Counter[str] = Counter()
    steps = count = 0
    for seed in seeds:
        story = tell(stage, seed)
        faults += story.faults
        steps, count = steps + story.trips, count + 1
        if "SEED" in os.environ:
            print("\n".join(story.told))
        print(f"seed {seed}: {story.trips} steps, digest {story.digest}, {dict(story.faults)}")
    print(f"{count} seeds, {steps} steps, {faults.total()} faults: {dict(faults)}")


def test_some_seeds(stage: Stage) -> None:
    """Whatever the order of steps and faults: every mail in one place, results once, intake at the end of the folder."""
    alone = os.environ.get("SEED")
    tell_all(stage, [int(alone)] if alone else range(1, FEW + 1))


@pytest.mark.full
def test_more_seeds(stage: Stage) -> None:
    """The same for those up to 300."""
    tell_all(stage, range(FEW + 1, 301))


@pytest.mark.full
def test_a_seed_tells_the_same_story_again(stage: Stage) -> None:
    """Steps, faults and events of a seed are the same each time."""
    for seed in (1, 2, 3):
        first, second = tell(stage, seed), tell(stage, seed)
        assert first.told == second.told


# The checks can fail: without any one of these lines some seed ends in a violation.
FENCE, NO_FENCE = "if owned[mail.sid] ~= mail.count then", "if false then"
MUTANTS = (
    Mutant("publish", "if uidvalidity ~= ARGV[3] or last_uid ~= ARGV[4] then", NO_FENCE),
    Mutant("publish", "mails[i].known = located[i]", "mails[i].known = false"),
    Mutant("publish", "or done[i] == 1 end", "end"),
    Mutant("begin", FENCE, NO_FENCE),
    Mutant("begin", "elseif ARGV[4] == '1' then", "elseif true then"),
    Mutant("begin", "elseif solo >= tonumber(ARGV[3]) then", "elseif false then"),
    Mutant("complete", "if owned[sid] ~= count then", NO_FENCE),
    Mutant("complete", "redis.call('XACK', KEYS[1], ARGV[1], unpack(sids))"),
    Mutant("complete", "redis.call('SADD', KEYS[6 + set], unpack(part))"),
    Mutant("promote", "'^%d+|(%d+)')) + 1", "'^%d+|(%d+)'))"),
    Mutant("recover", "'IDLE', ARGV[3],", "'IDLE', 0,"),
    Mutant("renew", "owned[ARGV[i]] == ARGV[i + 1] and mine or lost", "mine"),
)


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_guard_taken_out_is_seen(stage: Stage, monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """One of a hundred seeds at most ends in a violation."""
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError) as seen:
        tell_all(stage, range(1, 101))
    print(f"{mutant}\n{str(seen.value).partition(chr(10))[0]}")


def test_old_mail_that_arrives_late_is_covered_by_the_marker(stage: Stage, tmp_path: Path) -> None:
    """Published, then the producer dies, Redis forgets and the folder is numbered anew: mail older than all before is read again."""
    account = f"marker{len(stage.sandbox.accounts())}@gmail.example"
    world = stage.world(account, tmp_path)

    def arrives(subject: str, day: int) -> None:
        moment = datetime(2026, 1, day, 12, tzinfo=UTC)
        stage.sandbox.deliver(account, f"Subject: {subject}\r\n\r\nx".encode(), internal_date=moment)

    arrives("young", 28)
    InlineProducer(world, Process(Trips())).run()
    arrives("old", 2)
    with pytest.raises(Crash):
        InlineProducer(world, Process(DiesAfterPublish())).run()
    assert "old" in subjects(world)
    world.admin.flushall()
    stage.sandbox.change_uidvalidity(account)
    InlineProducer(world, Process(Trips())).run()
    assert "old" in subjects(world)


class DiesAfterPublish(Trips):
    def fault_of_next(self, kind: str, what: str) -> Fault | None:
        return Fault.CRASH_AFTER if load("publish").sha in what else None


def subjects(world: World) -> list[str]:
    return [fields["subject"] for _, fields in world.admin.xrange(world.keys.stream)]
