"""The commands of docs/runbooks, run as they stand, page by page, against an installation at work.

Every block fenced ```bash is run by `bash -e` in the project's folder, in the order of its page, behind the block of README.md there,
which brings the settings from .env. It ends with exit code 0, or with the one its fence names (```bash exit=1). What needs a browser,
systemd or git is fenced ```console and not run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from src.auth.oauth2_gmail import read_token
from src.common.keys import Keys
from src.sandbox.server import Sandbox
from tests.support import acl
from tests.support.account import assert_accounted
from tests.support.daemons import ROOT
from tests.support.installed import Installed
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import adopt
from tests.support.servers import RedisServer, have_redis, need
from tests.support.wait import until

INDEX = ROOT / "docs" / "runbooks" / "README.md"
PAGES = sorted(page for page in INDEX.parent.glob("*.md") if page != INDEX)
LONG = ("backup-and-recovery", "dead-letters", "rotating-credentials", "scaling", "upgrading")  # up to half a minute each
FENCE = re.compile(r"^(?P<indent> *)```bash(?: exit=(?P<code>\d+))?\n(?P<commands>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)

# What dies of the KeyError is mended by the time somebody replays it.
HANDLER = """\
from src.common.exceptions import Permanent

PRICES = {"tea": 3}


def price(email, context):
    what = email.subject.split()[0]
    if what == "bounce":
        raise Permanent("a bounce is nobody's order")
    return {"price": 4 if context.replays and what == "coffee" else PRICES[what]}
"""


@dataclass(frozen=True)
class Block:
    """`line`: of its fence, from 1 on. `code`: the exit code that it promises."""

    line: int
    commands: str
    code: int


def blocks(page: str) -> list[Block]:
    return [
        Block(page.count("\n", 0, match.start()) + 1, textwrap.dedent(match["commands"]), int(match["code"] or 0))
        for match in FENCE.finditer(page)
    ]


@dataclass
class Site:
    """An installation at work, with mail done and dead, and the shell of its operator."""

    installed: Installed
    pipeline: Pipeline

    @property
    def settings(self) -> dict[str, str]:
        """What stands in .env."""
        return {**self.pipeline.env, "TOKEN_DIR": self.installed.env["TOKEN_DIR"]}

    def bring(self, number: int) -> None:
        """One mail is done and one dies, where the page lets them; one is on its way while the next block runs."""
        self.pipeline.deliver(f"tea {number}", f"coffee {number}")
        roles = {name.partition("-")[0] for name in self.installed.pids()}
        if roles == {"producer", "worker"} and not self.pipeline.client.exists(Keys("email_ingestion_stream").paused):
            self.pipeline.wait_until_settled()
        self.pipeline.deliver(f"tea on its way {number}")

    def run(self, page: Path, block: Block) -> None:
        """AssertionError with what it wrote, for another exit code than the one it promises."""
        code, written = self.shell(block.commands)
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if os.environ.get("SHOW"):
            print(f"--- {place}\n{block.commands}{written}")
        assert code == block.code, f"{place}: exit code {code}\n{block.commands}{written}"
        assert code or not re.search(r"^Traceback", written, re.MULTILINE), f"{place}\n{written}"

    def shell(self, commands: str) -> tuple[int, str]:
        """(exit code, what they wrote)"""
        installed = self.installed
        [preamble] = blocks(INDEX.read_text())
        env = {name: value for name, value in installed.env.items() if name not in self.settings}
        with (self.pipeline.tmp / "shell.log").open("w+") as log:  # no pipe: daemons that are started outlive the shell
            command = ["bash", "-e", "-c", preamble.commands + commands]
            try:
                done = subprocess.run(
                    command, cwd=installed.root, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=3 * DEADLINE
                )
            finally:
                for pid in set(installed.pids().values()) - installed.seen:
                    installed.seen.add(pid)
                    adopt(pid)
            log.seek(0)
            return done.returncode, log.read()


@pytest.fixture
def site(sandbox: Sandbox, tmp_path: Path) -> Iterator[Site]:
    """6 mails done, 5 dead, a producer, two workers; Redis 7.0 with the users of docs/security.md, and its administrator in REDIS_URL."""
    need(have_redis() and shutil.which("redis-cli") is not None, "redis-server")
    with RedisServer("redis", appendonly=True, options={"repl-diskless-sync-delay": "0"}) as server:
        acl.make_users(server.client())
        pipeline = Pipeline(
            sandbox,
            server,
            tmp_path,
            REDIS_URL=server.tcp_url,
            WORKER_HANDLER="my_handler.py:price",
            MAX_ATTEMPTS="2",
            LOG_FORMAT="json",
            METRICS_PORT="off",
            GMAIL_CLIENT_SECRETS_FILE=str(tmp_path / "client.json"),
        )
        installed = Installed(pipeline)
        token = read_token(tmp_path / "tokens" / f"{pipeline.account}.json")
        client = {"client_id": token.client_id, "client_secret": token.client_secret}
        (tmp_path / "client.json").write_text(json.dumps({"installed": client}))
        (installed.root / "my_handler.py").write_text(HANDLER)
        found = Site(installed, pipeline)
        (installed.root / ".env").touch(mode=0o600)
        (installed.root / ".env").write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in found.settings.items()))
        pipeline.deliver(*(f"tea {n}" for n in range(6)), *(f"coffee {n}" for n in range(3)), "bounce 1", "bounce 2")
        try:
            installed.run("start.sh", "--workers", "2")
            pipeline.wait_until_settled()
            yield found
        finally:
            installed.close()


def parameter(page: Path) -> ParameterSet:
    return pytest.param(page, id=page.stem, marks=[pytest.mark.full] if page.stem in LONG else [])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [parameter(page) for page in PAGES])
def test_the_commands_of_a_runbook_run_and_lose_no_mail(page: Path, site: Site) -> None:
    """Block by block, with a mail that comes before each; afterwards producer and workers run, nobody is paused, every mail has its end."""
    found = blocks(page.read_text())
    assert found, "a runbook without a command"
    for number, block in enumerate(found):
        site.bring(number)
        site.run(page, block)

    pipeline = site.pipeline
    books = pipeline.wait_until_settled()
    assert_accounted(books, pipeline.delivered, dead=books.reasons, discarded=list(books.discarded), repeated=True)
    again = {email_id for email_id, times in books.done.items() if times > 1}
    assert not again or "scripts/reprocess.py" in page.read_text(), "done twice, and nobody asked for it"
    until(lambda: site.shell("./scripts/health_check.sh")[0] < 2, DEADLINE, "producer and workers run")
    assert "nothing is paused" in site.installed.run("pause.sh")


def test_blocks_are_found_with_their_line_and_exit_code() -> None:
    """What is fenced otherwise is not taken for a command."""
    page = "a\n```bash\ntrue\n```\n```console\nfalse\n```\n```bash exit=1\nfalse\n```\n"
    assert blocks(page) == [Block(2, "true\n", 0), Block(8, "false\n", 1)]


def test_every_fence_is_a_kind_that_is_known() -> None:
    """A block with a typing error in its fence would never be run."""
    known = re.compile(r"bash( exit=\d+)?|console|text|")
    for page in PAGES:
        kinds = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2]
        assert all(known.fullmatch(kind) for kind in kinds), (page, kinds)
