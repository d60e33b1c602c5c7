"""The demo with real processes, judged by its exit code and its last line."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from src.sandbox.demo import Interrupted, run
from tests.support.daemons import ROOT
from tests.support.processes import ChildProcess
from tests.support.wait import until

SECONDS = 120.0


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty folder; its path is short, as that of a unix socket must be."""
    folder = Path(tempfile.mkdtemp(prefix="demo-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[str]:
    """The command lines that name `folder`."""
    listed = subprocess.run(["ps", "-axo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line]


def test_the_demo_accounts_for_every_mail(home: Path) -> None:
    """As a user starts it, with an empty HOME: exit code 0, the promised last line, and neither a file nor a process is left."""
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "REDIS_URL": "redis://127.0.0.1:1/0"}
    demo = ChildProcess([sys.executable, "-m", "src.sandbox.demo", "--emails", "60"], log=home / "out", env=env, cwd=ROOT)
    try:
        assert demo.wait(SECONDS) == 0, demo.tail()
        assert demo.output().splitlines()[-1] == "60 received = 57 done + 3 dead · 0 lost · 0 twice"
        assert "worker-1 was killed (SIGKILL)" in demo.output()
        assert not list(home.glob("email-twins-demo-*"))
        assert processes_of(home) == []
    finally:
        demo.kill()


@pytest.mark.full
def test_the_demo_fails_when_the_ledger_knows_a_mail_that_never_came_through(home: Path) -> None:
    """A mail in a folder that nobody reads stands in the ledger: it is named as lost, exit code 1; --keep says what to look at."""
    output, stop, codes = io.StringIO(), threading.Event(), list[int]()
    console = Console(file=output, soft_wrap=True, markup=False, highlight=False, emoji=False)
    demo = threading.Thread(target=lambda: codes.append(run(30, home, console, stop, keep=True)), daemon=True)
    demo.start()
    try:
        state = home / "sandbox" / "sandbox.json"
        until(state.exists, SECONDS, "the demo's sandbox runs")
        address = f"http://127.0.0.1:{json.loads(state.read_text())['http_port']}"
        raw = base64.b64encode(b"Subject: nobody reads me\r\n\r\n").decode()
        body = json.dumps({"account": "sandbox@gmail.example", "mailbox": "[Gmail]/Spam", "raw": raw}).encode()
        with urllib.request.urlopen(f"{address}/deliver", data=body, timeout=30) as answer:
            assert json.load(answer)["uids"] == [1]
        until(lambda: "To stop it" in output.getvalue(), SECONDS, "the demo is kept")
        with urllib.request.urlopen(f"{address}/ledger?summary=1", timeout=30) as answer:
            assert json.load(answer)["mails"] == 31
        assert f"{address.removeprefix('http://')}/deliver" in output.getvalue()
    finally:
        stop.set()
        demo.join(SECONDS)
    assert codes == [1]
    assert re.search(r"31 received != \d+ done \+ \d dead · 1 lost · 0 twice", output.getvalue())
    assert "lost: gm:sandbox@gmail.example:" in output.getvalue()
    assert processes_of(home) == []


def test_an_interrupted_demo_leaves_no_process(home: Path) -> None:
    """Ctrl-C while it starts: everything that was started is ended."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        run(30, home, Console(file=io.StringIO()), stop, keep=False)
    assert processes_of(home) == []
