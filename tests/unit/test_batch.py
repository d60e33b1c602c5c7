"""Grouping mails into calls: each gets its own answer, none is lost, none is doubled."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.batch import Batcher, each_answered, split
from src.common.exceptions import RedisUnavailable, ScriptRefused

# each_answered


@given(st.lists(st.integers(0, 20), unique=True), st.sets(st.integers(0, 20)))
def test_one_refused_mail_does_not_hold_the_others(items: list[int], bad: set[int]) -> None:
    """A batch with a bad mail is repeated mail by mail; every item gets its own answer, in order."""
    calls: list[list[int]] = []

    def call(batch: Sequence[int]) -> list[int]:
        calls.append(list(batch))
        if bad & set(batch):
            raise ScriptRefused("bad")
        return [10 * item for item in batch]

    answers = each_answered(call, items)
    assert [answer if isinstance(answer, int) else "refused" for answer in answers] == [
        "refused" if item in bad else 10 * item for item in items
    ]
    assert len(calls) <= 1 + len(items) * bool(bad & set(items))


def test_a_server_that_is_away_is_no_answer() -> None:
    """The whole call is to be repeated: nothing is asked mail by mail."""
    calls = []

    def call(batch: Sequence[int]) -> list[int]:
        calls.append(batch)
        raise RedisUnavailable("away")

    with pytest.raises(RedisUnavailable):
        each_answered(call, [1, 2, 3])
    assert len(calls) == 1


# split


@given(
    st.lists(st.integers(0, 100)),
    st.integers(1, 10),
    st.integers(0, 200),
)
def test_groups_are_consecutive_within_both_bounds_and_as_large_as_they_may_be(
    sizes: list[int], most: int, most_bytes: int
) -> None:
    """Only an item that is too large by itself breaks the byte bound, and then it stands alone."""
    groups = split(range(len(sizes)), sizes.__getitem__, most=most, most_bytes=most_bytes)
    assert [item for group in groups for item in group] == list(range(len(sizes)))
    for group in groups:
        assert 0 < len(group) <= most
        assert len(group) == 1 or sum(sizes[item] for item in group) <= most_bytes
    for first, second in pairwise(groups):
        assert len(first) == most or sum(sizes[item] for item in first) + sizes[second[0]] > most_bytes


# Batcher


def run(batcher: Batcher[int]) -> threading.Thread:
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    return thread


def test_items_are_handed_on_in_order_and_full_groups_at_once() -> None:
    """The time bound does not matter where there is enough; what was put before close is still handed on."""
    groups: list[list[int]] = []
    batcher: Batcher[int] = Batcher(groups.append, most=3, seconds=3600)
    for item in range(8):
        batcher.put(item)
    batcher.close()
    batcher.run()
    assert groups == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_single_item_does_not_wait_for_company() -> None:
    """At most `seconds` after the first."""
    handed = threading.Event()
    groups: list[list[int]] = []

    def flush(group: list[int]) -> None:
        groups.append(group)
        handed.set()

    batcher: Batcher[int] = Batcher(flush, most=100, seconds=0.001)
    thread = run(batcher)
    batcher.put(1)
    assert handed.wait(20)
    batcher.close()
    thread.join(20)
    assert groups == [[1]]
    assert not thread.is_alive()


def test_items_of_many_threads_all_arrive_once() -> None:
    """Nothing is lost between the threads that put and the one that flushes."""
    groups: list[list[int]] = []
    batcher: Batcher[int] = Batcher(groups.append, most=7, seconds=0.001)
    flusher = run(batcher)

    def put(start: int) -> None:
        for item in range(start, start + 100):
            batcher.put(item)

    putters = [threading.Thread(target=put, args=(100 * number,)) for number in range(4)]
    for thread in putters:
        thread.start()
    for thread in putters:
        thread.join(20)
    batcher.close()
    flusher.join(20)
    assert sorted(item for group in groups for item in group) == list(range(400))
    assert max(map(len, groups)) <= 7


def test_closing_an_empty_batcher_ends_it() -> None:
    groups: list[list[int]] = []
    batcher: Batcher[int] = Batcher(groups.append, most=1, seconds=1)
    batcher.close()
    batcher.run()
    assert groups == []
