"""The Redis users of docs/security.md: the very lines, and addresses that log in as them.

With TEST_ACL=1 every server of the tests has these users, and the daemons of every `Pipeline` log in as them.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest

Role = Literal["producer", "worker", "operator"]

EVERYWHERE = os.environ.get("TEST_ACL") == "1"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "security.md"


def not_under_acl(why: str) -> pytest.MarkDecorator:
    """For a test that cannot pass where every server has the users."""
    return pytest.mark.skipif(EVERYWHERE, reason=f"TEST_ACL=1: {why}")


def lines() -> list[list[str]]:
    """`ACL SETUSER …`, a list of words each, as the document has them."""
    block = re.search(r"```redis-acl\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert block, "docs/security.md has a block of ACL lines"
    return [shlex.split(line) for line in block[1].splitlines()]


def password(role: Role) -> str:
    return f"{role.upper()}-PASSWORD"


def make_users(client: Any) -> None:
    for line in lines():
        client.execute_command(*line)


def write_users(path: Path) -> Path:
    """The same as a server's aclfile."""
    path.write_text("".join(f"user {' '.join(words[2:])}\n" for words in lines()))
    return path


def as_user(url: str, role: Role) -> str:
    """`url` for `role`, whoever it was for before."""
    scheme, _, rest = url.partition("://")
    rest = rest.rpartition("@")[2]
    if scheme == "unix":
        path = rest.partition("&password=")[0]
        return f"unix://{role}@{path}{'' if '?' in path else '?db=0'}&password={password(role)}"
    return f"{scheme}://{role}:{password(role)}@{rest}"
