"""Many mails in one script call, each with its own answer."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from src.common.exceptions import ScriptRefused

Item = TypeVar("Item")
Answer = TypeVar("Answer")

CLOSED = object()


def each_answered(call: Callable[[Sequence[Item]], Sequence[Answer]], items: Sequence[Item]) -> list[Answer | ScriptRefused]:
    """`call(items)`; if the script refuses the batch, mail by mail, so that one mail cannot hold the others.

    Returns one answer an item, ScriptRefused for those that are refused alone too.
    """
    try:
        return list(call(items)) if items else []
    except ScriptRefused as error:
        if len(items) == 1:
            return [error]
    return [answer for item in items for answer in each_answered(call, [item])]


def split(items: Sequence[Item], size: Callable[[Item], int], *, most: int, most_bytes: int) -> list[list[Item]]:
    """Consecutive groups of at most `most` items and `most_bytes` in all; one that is larger alone stands alone. Pure."""
    groups: list[list[Item]] = []
    room = 0
    for item in items:
        weight = size(item)
        if not groups or len(groups[-1]) >= most or weight > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(item)
        room -= weight
    return groups


class Batcher(Generic[Item]):
    """Collects items from any thread and hands them on in groups: at `most` items or `seconds` after the first."""

    def __init__(self, flush: Callable[[list[Item]], None], *, most: int, seconds: float) -> None:
        self._flush = flush
        self._most = most
        self._seconds = seconds
        self._queue: queue.SimpleQueue[Item | object] = queue.SimpleQueue()

    def put(self, item: Item) -> None:
        self._queue.put(item)

    def close(self) -> None:
        """What was put before is still handed on; then `run` returns."""
        self._queue.put(CLOSED)

    def _next(self, ends: float | None) -> Item | object:
        """What comes next, until then. Raises queue.Empty."""
        if ends is None:
            return self._queue.get()
        try:
            return self._queue.get_nowait()  # no look at the clock where items come fast
        except queue.Empty:
            return self._queue.get(timeout=max(0.0, ends - time.monotonic()))

    def run(self) -> None:
        """The body of the one thread that flushes."""
        closed = False
        while not closed:
            group: list[Item] = []
            ends = None
            while len(group) < self._most:
                try:
                    item = self._next(ends)
                except queue.Empty:
                    break
                if item is CLOSED:
                    closed = True
                    break
                group.append(item)  # type: ignore[arg-type]  # CLOSED is the only other object in the queue
                ends = ends or time.monotonic() + self._seconds
            if group:
                self._flush(group)
