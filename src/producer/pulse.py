"""Signs of life of one mailbox's thread, and waiting that ends with the process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from src.common.health import Beats
from src.common.retry import retry_on_redis_error
from src.common.shutdown import Shutdown

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pulse:
    """`title`: account/mailbox. `step`: seconds that any one step may take before the thread counts as stuck."""

    title: str
    beats: Beats
    shutdown: Shutdown
    step: float

    def turn(self, seconds: float = 0.0) -> None:
        """The thread is alive, and will be heard of again within the time a step may take after `seconds`."""
        self.beats.turn(self.title, limit=seconds + self.step)

    def pause(self, seconds: float) -> bool:
        """Wait; True if the process is to stop."""
        self.turn(seconds)
        return self.shutdown.wait(seconds)

    def ask_redis(self, call: Callable[[], Result]) -> Result:
        """`call`, repeated while Redis is away or full."""

        @retry_on_redis_error(self.shutdown)
        def ask() -> Result:
            self.turn()
            return call()

        return ask()
