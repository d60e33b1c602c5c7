"""Others' software beside the twins, as its users start it: mailboxes read by mbsync and getmail6, queues emptied by task queues.

Python peers are installed into .venv-bench (requirements-bench.txt), mbsync comes from Debian. Nothing of theirs is imported here;
`with_NAME.py` is run by the Python of .venv-bench with this folder as its working directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis

from tests.support.daemons import ROOT
from tests.support.processes import ChildProcess
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until

VENV = ROOT / ".venv-bench"
REQUIREMENTS = ROOT / "requirements-bench.txt"
HERE = Path(__file__).parent


def _left_in_group(client: redis.Redis) -> int:
    [group] = client.xinfo_groups("bench")  # type: ignore[misc]
    return int(group["pending"]) + int(group["lag"] or 0)


QUEUES: dict[str, tuple[list[str], Callable[[redis.Redis], int]]] = {
    "faststream": (["faststream", "run", "with_faststream:app"], _left_in_group),
    "celery": (
        ["celery", "-A", "with_celery", "worker", "--loglevel", "WARNING"],
        lambda client: client.llen("celery") + client.hlen("unacked"),  # type: ignore[operator,return-value]
    ),
    "huey": (["huey_consumer", "with_huey.huey", "-w", "4", "-q"], lambda client: client.llen("huey.redis.bench")),  # type: ignore[return-value]
    "taskiq": (["taskiq", "worker", "with_taskiq:broker", "--workers", "1", "--log-level", "ERROR"], _left_in_group),
    "dramatiq": (["dramatiq", "with_dramatiq", "-p", "1"], lambda client: client.hlen("dramatiq:bench.msgs")),  # type: ignore[return-value]
    "rq": (
        ["rq", "worker", "bench", "-q", "--url", "{url}"],
        lambda client: client.llen("rq:queue:bench") + client.zcard("rq:wip:bench"),  # type: ignore[operator,return-value]
    ),
}
"""name → (how its worker is started, how many messages are not done)."""


def install() -> str:
    """Install what is missing; "" or what could not be had."""
    if not (VENV / ".installed").exists() or (VENV / ".installed").read_text() != REQUIREMENTS.read_text():
        print(f"installing {REQUIREMENTS.name} into {VENV.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        pip = [
            VENV / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "-q",
            "--no-deps",
            "-r",
            REQUIREMENTS,
        ]
        subprocess.run(pip, check=True)
        (VENV / ".installed").write_text(REQUIREMENTS.read_text())
    if shutil.which("mbsync") is None:
        subprocess.run(["bash", "-c", "source scripts/lib.sh && install_debian isync"], check=False, cwd=ROOT)
    return "" if shutil.which("mbsync") else "mbsync (Debian: isync) is not installed"


def versions() -> dict[str, str]:
    """Of all of them, as pinned or as they say."""
    pinned = re.findall(r"^(getmail6|faststream|celery|huey|dramatiq|taskiq|rq)==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE)
    said = (
        subprocess.run(["mbsync", "--version"], capture_output=True, text=True).stdout.split() if shutil.which("mbsync") else []
    )
    return dict(pinned) | ({"mbsync": said[-1]} if said else {})


def queue(name: str, count: int, size: int) -> float:
    """Messages a second with which one worker of `name` empties a queue of `count` messages of `size` bytes, start-up left out."""
    argv, left = QUEUES[name]
    with RedisServer("valkey", appendonly=True) as server, tempfile.TemporaryDirectory() as home:
        client = server.client()
        env = {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8", "BENCH_REDIS": server.tcp_url}
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        fill = f"from with_{name} import fill; fill({count}, {size})"
        subprocess.run([VENV / "bin" / "python", "-c", fill], check=True, cwd=HERE, env=env)
        command = [str(VENV / "bin" / argv[0]), *(word.format(url=server.tcp_url) for word in argv[1:])]
        worker = ChildProcess(command, log=Path(home) / "log", env=env, cwd=HERE)
        try:
            until(lambda: left(client) < count, 60, f"{name} has begun")
            began, first = time.perf_counter(), left(client)
            until(lambda: left(client) == 0, 600, f"{name} is done")
            return first / max(time.perf_counter() - began, 0.001)
        finally:
            worker.kill()


def mbsync(dovecot: Dovecot, account: str, count: int, folder: Path) -> float:
    """Mails a second of a pull into a Maildir on disk, with its fsyncs."""
    config = folder / "mbsyncrc"
    config.write_text(
        f"IMAPAccount a\nHost 127.0.0.1\nPort {dovecot.imap_port}\nUser {account}\nPass {dovecot.PASSWORD}\nSSLType None\n\n"
        f"IMAPStore far\nAccount a\n\nMaildirStore near\nPath {folder}/\nInbox {folder}/INBOX\n\n"
        "Channel c\nFar :far:INBOX\nNear :near:INBOX\nCreate Near\nSync Pull\nSyncState *\n"
    )
    began = time.perf_counter()
    subprocess.run(["mbsync", "-q", "-c", config, "c"], check=True, env={"PATH": os.environ["PATH"], "HOME": str(folder)})
    seconds = time.perf_counter() - began
    had = sum(1 for part in ("cur", "new") for _ in (folder / "INBOX" / part).iterdir())
    assert had == count, f"mbsync had {had} of {count} mails"
    return count / seconds


def getmail(dovecot: Dovecot, account: str, count: int, folder: Path) -> float:
    """Mails a second of a pull into a Maildir."""
    for part in ("cur", "new", "tmp"):
        (folder / "box" / part).mkdir(parents=True)
    as_user = ""
    if os.geteuid() == 0:  # getmail delivers as root to nobody
        as_user = "user = mail\n"
        folder.parent.chmod(0o755)
        folder.chmod(0o755)
        for place in (folder / "box", *(folder / "box").iterdir()):
            shutil.chown(place, "mail", "mail")
    (folder / "rc").write_text(
        f"[retriever]\ntype = SimpleIMAPRetriever\nserver = 127.0.0.1\nport = {dovecot.imap_port}\nusername = {account}\n"
        f"password = {dovecot.PASSWORD}\nmailboxes = ('INBOX',)\n\n[destination]\ntype = Maildir\npath = {folder}/box/\n{as_user}\n"
        "[options]\nread_all = true\ndelete = false\nverbose = 0\n"
    )
    began = time.perf_counter()
    argv = [VENV / "bin" / "getmail", "--getmaildir", folder, "--rcfile", folder / "rc", "--quiet"]
    subprocess.run(argv, check=True, env={"PATH": f"{VENV / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)})
    seconds = time.perf_counter() - began
    had = sum(1 for _ in (folder / "box" / "new").iterdir())
    assert had == count, f"getmail had {had} of {count} mails"
    return count / seconds
