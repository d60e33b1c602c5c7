"""Transitions and methods with one of their guards taken out, to show that a check can fail."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class MethodMutant:
    """A method with `guard`, which stands in it once, replaced by `instead`."""

    method: Callable[..., object]
    guard: str
    instead: str

    def __str__(self) -> str:
        return f"{self.method.__qualname__}: {self.guard}"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every object of the class has it from now on."""
        method: Any = self.method
        source = textwrap.dedent(inspect.getsource(method))
        assert source.count(self.guard) == 1, f"{self.guard!r} does not stand once in {method.__qualname__}"
        source = f"from __future__ import annotations\n{source.replace(self.guard, self.instead)}"
        names: dict[str, Any] = {}
        exec(source, method.__globals__, names)
        owner, _, name = method.__qualname__.partition(".")
        monkeypatch.setattr(method.__globals__[owner], name, names[name])
