"""A minute of random faults on real processes, with a new seed each time; `python -m tests.load.soak` runs it for longer."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.load import soak


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_minute_of_everything(tmp_path: Path) -> None:
    """Kills, stops, cuts, outages, renumbering, dead tokens, handlers that kill: every mail done once or dead, none lost."""
    seed = secrets.randbelow(1_000_000)
    print(f"again: python -m tests.load.soak --seconds 60 --seed {seed}")
    print(soak.run(60, seed, tmp_path / "soak", print))
