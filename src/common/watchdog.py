"""Ends a process one of whose loops stands still for good. /health has said 503 since the loop's limit; this is for where nobody asked.

Only our own loops count (`src.common.health.Beats`): they turn while Redis or a mail server is away, and a handler is none of them.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading

from src.common.clock import Clock
from src.common.health import Beats
from src.common.shutdown import Shutdown

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class Watchdog:
    """`patience`: seconds that a loop may stand still beyond its limit. `end_within`: seconds that the steps of the shutdown may take
    then; what stands still may hold them too."""

    def __init__(self, beats: Beats, patience: float, end_within: float, shutdown: Shutdown, clock: Clock) -> None:
        self._beats = beats
        self._patience = patience
        self._end_within = end_within
        self._shutdown = shutdown
        self._clock = clock
        self._late: dict[tuple[str, float], float] = {}  # (loop, its last turn) → when it was first seen to be late

    def run(self) -> None:
        """The body of a thread; returns at the shutdown, also at the one that it asks for."""
        while not self._shutdown.wait(LOOK_SECONDS):
            hung = self.look()
            if hung:
                self._end(hung)

    def look(self) -> list[str]:
        """The loops whose time is over. It counts from when this thread first saw them late: a process that was stopped as a whole, or
        a machine that slept, has loops that look late and turn again at once."""
        now = self._clock.monotonic()
        late = {(name, loop.turned) for name, loop in self._beats.seen().items() if now - loop.turned > loop.limit}
        self._late = {key: self._late.get(key, now) for key in late}
        return sorted(name for (name, _), since in self._late.items() if now - since > self._patience)

    def _end(self, hung: list[str]) -> None:
        last_resort = threading.Timer(self._end_within, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()  # before anything else: the log may be what stands still
        faulthandler.dump_traceback(all_threads=True)
        why = f"no turn of {', '.join(hung)} within its limit and HANG_TIMEOUT ({self._patience:g} s)"
        self._shutdown.request(why, exit_code=1)
        log.critical("%s: the process ends. Where its threads stand is shown above", why)
