"""Transitions with one of their guards taken out, to show that a check can fail."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest

from src.common import redis_client
from src.common.scripts import Script, load


@dataclass(frozen=True)
class Mutant:
    """`lua/<script>.lua` with `guard`, which stands in it once, replaced by `instead`."""

    script: str
    guard: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.script}: {self.guard}"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every RedisClient runs it from now on."""
        original = load(self.script)
        assert original.source.count(self.guard) == 1, f"{self.guard!r} does not stand once in {self.script}.lua"
        source = original.source.replace(self.guard, self.instead)
        broken = Script(self.script, source, hashlib.sha1(source.encode()).hexdigest())
        monkeypatch.setattr(redis_client, "load", lambda name: broken if name == self.script else load(name))
