"""Deterministic simulation: two producers, three workers and an operator, every round trip a point where a seed decides.

See `tests/support/simulation.py`. A seed that fails is told alone with `SEED=n pytest tests/integration/test_simulation.py -k alone -s`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from src.common.redis_client import RedisClient
from src.sandbox.server import Sandbox
from tests.support.mutants import Mutant
from tests.support.servers import RedisServer
from tests.support.simulation import Stage, Story

pytestmark = pytest.mark.timeout(900)  # on a busy machine it takes its time

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
            f"alone: SEED={seed} .venv/bin/python -m pytest {HERE} -k alone -s"
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
        print(f"seed {seed}: {story.trips} steps, digest {story.digest}, {dict(story.faults)}")
    print(f"{count} seeds, {steps} steps, {faults.total()} faults: {dict(faults)}")


def test_sixty_seeds(stage: Stage) -> None:
    """Whatever the order of steps and faults: every mail in one place, results once, intake at the end of the folder."""
    tell_all(stage, range(1, 61))


@pytest.mark.full
def test_three_hundred_seeds(stage: Stage) -> None:
    """The same for 300 seeds."""
    tell_all(stage, range(1, 301))


def test_a_seed_tells_the_same_story_again(stage: Stage) -> None:
    """Steps, faults and events of a seed are the same each time."""
    for seed in (1, 2, 3):
        first, second = tell(stage, seed), tell(stage, seed)
        assert first.told == second.told


@pytest.mark.skipif("SEED" not in os.environ, reason="SEED=n says which")
def test_one_seed_alone(stage: Stage) -> None:
    """The story that SEED names, step by step."""
    story = tell(stage, int(os.environ["SEED"]))
    print("\n".join(story.told))
