"""`producer.py --sandbox`: find the sandbox that runs, or start one for as long as we live."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Event
from typing import Any

from src.common.exceptions import ConfigurationError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
FIRST_MAILS = 25
COMMAND = (sys.executable, "-m", "src.sandbox", "--until-eof")


@contextmanager
def attached(data_dir: Path, *, hints: bool) -> Iterator[dict[str, Any]]:
    """The settings (variable → value) that point a producer at the sandbox of `data_dir`. `hints`: say what else it is good for.

    Raises ConfigurationError.
    """
    folder = (data_dir / "sandbox").resolve()
    state_file = folder / "sandbox.json"
    state = running(state_file)
    if state:
        log.info("sandbox: using the one that runs (pid %d)", state["pid"])
        yield _pointed_at(state, hints=hints)
        return
    stderr = folder / "sandbox.log"  # not ours: whoever reads ours to its end must not wait for the sandbox
    try:
        folder.mkdir(parents=True, exist_ok=True)
        errors = stderr.open("wb")
    except OSError as error:
        raise ConfigurationError(f"DATA_DIR={data_dir}: cannot be written ({error.strerror}); choose another folder") from None
    with errors:
        process = subprocess.Popen(
            [*COMMAND, "--state-file", str(state_file), "--token-dir", str(folder / "tokens"), "--emails", str(FIRST_MAILS)],
            stdin=subprocess.PIPE,  # the kernel closes our end however we end, and with it the sandbox ends
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            cwd=ROOT,
        )
    with process:  # closes that pipe and waits
        yield _pointed_at(_awaited(state_file, process, stderr), hints=hints)


def running(state_file: Path) -> dict[str, Any] | None:
    """What stands in `state_file`, if the sandbox that wrote it answers."""
    try:
        state: dict[str, Any] = json.loads(state_file.read_text())
        with urllib.request.urlopen(f"http://127.0.0.1:{state['http_port']}/health", timeout=2) as answer:  # our own address
            return state if json.load(answer)["imap_port"] == state["imap_port"] else None  # or its port is another's by now
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None


def new_mail(account: str, http_port: int) -> str:
    """The line for a shell that delivers ten mails."""
    order = json.dumps({"account": account, "generate": {"count": 10, "seed": 7}})
    return f"curl -d {shlex.quote(order)} http://127.0.0.1:{http_port}/deliver"


def _awaited(state_file: Path, process: subprocess.Popen[bytes], stderr: Path) -> dict[str, Any]:
    pause = Event()
    for _ in range(int(START_SECONDS / 0.05)):
        state = running(state_file)
        if state:
            log.info("sandbox: started (pid %d) with %d mails; it ends with this producer", state["pid"], FIRST_MAILS)
            return state
        if process.poll() is not None:
            break
        pause.wait(0.05)
    why = stderr.read_text(errors="replace").strip().rpartition("\n")[2]
    raise ConfigurationError(why or f"the sandbox does not answer within {START_SECONDS:.0f} s")


def _pointed_at(state: dict[str, Any], *, hints: bool) -> dict[str, Any]:
    overrides = _overrides(state)
    if hints:
        exports = (
            f"{name}={shlex.quote(','.join(value) if isinstance(value, tuple) else str(value))}"
            for name, value in overrides.items()
            if value
        )
        log.info("sandbox: new mail: %s", new_mail(state["account"], state["http_port"]))
        log.info("sandbox: for scripts/audit.py, doctor.py, reprocess.py: export %s", " ".join(exports))
    return overrides


def _overrides(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "GMAIL_USERNAME": (state["account"],),
        "ACCOUNTS_FILE": "",
        "AUTH_METHOD": "oauth2",
        "TOKEN_FILE": Path(state["token_file"]),
        "GMAIL_CLIENT_SECRETS_FILE": Path(state["client_secrets"]),
        "IMAP_HOST": "127.0.0.1",
        "IMAP_PORT": state["imap_port"],
        "IMAP_SECURITY": "none",
        "INITIAL_SYNC": "all",
    }
