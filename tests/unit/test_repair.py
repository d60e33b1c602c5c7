"""Entries that no index knows: every answer of `adopt`, with all that stands in Redis before and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from src.producer.repair import Stray, adopt
from tests.support.fake import DAY, DONE, Content, Store, fields_of, present

M1 = "gm:a:1"


@dataclass(frozen=True)
class Case:
    """One call with M1 at 1-0. `changes`: the parts that are different afterwards."""

    proves: str
    answer: str
    before: Content
    changes: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(
        "what nobody knows is an unfinished mail: known and counted",
        "OK",
        {"stream": {"1-0": M1}},
        {"index": {M1: "S:1-0"}, "open": {DAY: "1"}},
    ),
    Case(
        "what is known elsewhere, where nothing is any more, was counted before",
        "OK",
        {"stream": {"1-0": M1}, "index": {M1: "S:2-0"}, "open": {DAY: "1"}},
        {"index": {M1: "S:1-0"}},
    ),
    Case("an entry that is gone is no mail", "GONE", {"index": {M1: "S:1-0"}, "open": {DAY: "1"}}),
    Case(
        "the copy of an unfinished mail stays a copy",
        "KNOWN",
        {"stream": {"1-0": M1, "2-0": M1}, "index": {M1: "S:2-0"}, "open": {DAY: "1"}},
    ),
    Case(
        "the copy of a dead one too",
        "KNOWN",
        {"stream": {"1-0": M1}, "dlq": [(M1, "why", "1")], "index": {M1: "D:1-0"}, "open": {DAY: "1"}},
    ),
    Case("the copy of a finished one stays finished", "DONE", {"stream": {"1-0": M1}, "processed": {DONE: {"1"}}}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.proves)
def test_adopt(store: Store, case: Case) -> None:
    store.put(case.before)
    fields = fields_of(M1)
    stray = Stray(M1, "1-0", fields["account"], fields["mailbox"], fields["internal_date"])
    assert adopt(store.redis, store.keys, [stray]) == [case.answer]
    assert store.content() == present(case.before | case.changes)
