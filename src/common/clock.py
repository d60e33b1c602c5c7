"""Time as a value that is handed in.

The daemons get `SYSTEM`; a test hands in a `Clock` of two functions of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Clock:
    """`wall`: the time of day, an aware datetime in UTC. `monotonic`: seconds from any start, never going back."""

    wall: Callable[[], datetime]
    monotonic: Callable[[], float]


SYSTEM = Clock(wall=lambda: datetime.now(UTC), monotonic=time.monotonic)


def iso(moment: datetime) -> str:
    """ISO 8601 in UTC with a `Z`, to the second: the form every stored date has."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
