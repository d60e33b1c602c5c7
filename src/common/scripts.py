"""Lua transitions: loaded once from `lua/`, addressed by their SHA-1.

A line `--#include NAME` is replaced by the text of `lua/NAME.lua`: functions that several transitions share.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LUA = Path(__file__).parent / "lua"


@dataclass(frozen=True)
class Script:
    name: str
    source: str
    sha: str


@cache
def load(name: str) -> Script:
    """The transition `lua/<name>.lua`, includes expanded."""
    source = re.sub(r"^--#include (\w+)$", lambda match: _text(match[1]).rstrip(), _text(name), flags=re.MULTILINE)
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _text(name: str) -> str:
    return (LUA / f"{name}.lua").read_text(encoding="utf-8")
