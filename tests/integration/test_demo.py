"""The demo as a user runs it: every process real, judged by its exit code and its last line."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemons import ROOT
from tests.support.processes import ChildProcess
from tests.support.wait import until

SECONDS = 120.0


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty HOME and TMPDIR; its path is short, as that of a unix socket must be."""
    folder = Path(tempfile.mkdtemp(prefix="demo-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(home: Path) -> ChildProcess:
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "REDIS_URL": "redis://127.0.0.1:1/0"}
    return ChildProcess([sys.executable, "-m", "src.sandbox.demo", "--emails", "60"], log=home / "out", env=env, cwd=ROOT)


def sandbox_of(home: Path, demo: ChildProcess) -> str:
    def state() -> Path | None:
        assert demo.running(), demo.tail()
        return next(home.glob("email-twins-demo-*/sandbox/sandbox.json"), None)

    found = until(state, SECONDS, "the demo's sandbox runs")
    assert found is not None
    return f"http://127.0.0.1:{json.loads(found.read_text())['http_port']}"


def last_line(demo: ChildProcess) -> str:
    return demo.output().rstrip().splitlines()[-1]


def test_the_demo_accounts_for_every_mail(home: Path) -> None:
    """60 mails, a killed worker and a restarted producer: exit code 0, the promised last line, and nothing is left on disk."""
    demo = start(home)
    try:
        assert demo.wait(SECONDS) == 0, demo.tail()
        assert last_line(demo) == "60 received = 57 done + 3 dead · 0 lost · 0 twice"
        assert "worker-1 was killed (SIGKILL)" in demo.output()
        assert not list(home.glob("email-twins-demo-*"))
    finally:
        demo.kill()


def test_the_demo_fails_when_the_ledger_knows_a_mail_that_never_came_through(home: Path) -> None:
    """A mail in a folder that nobody reads stands in the ledger: it is named as lost, the exit code is 1, the logs are kept."""
    demo = start(home)
    try:
        raw = base64.b64encode(b"Subject: nobody reads me\r\n\r\n").decode()
        body = json.dumps({"account": "sandbox@gmail.example", "mailbox": "[Gmail]/Spam", "raw": raw}).encode()
        with urllib.request.urlopen(f"{sandbox_of(home, demo)}/deliver", data=body, timeout=30) as answer:
            assert json.load(answer)["uids"] == [1]
        assert demo.wait(SECONDS) == 1, demo.tail()
        assert last_line(demo).startswith("The logs are in ")
        assert "61 received != " in demo.output()
        assert "lost: gm:sandbox@gmail.example:" in demo.output()
        assert list(home.glob("email-twins-demo-*/worker-2.log"))
    finally:
        demo.kill()
