"""`producer.py --sandbox`: find the sandbox that runs, or start one for as long as we live."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from src.common.exceptions import ConfigurationError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
FIRST_MAILS = 25


@contextmanager
def attached(data_dir: Path) -> Iterator[dict[str, Any]]:
    """The settings (variable → value) that point a producer at the sandbox of `data_dir`. Raises ConfigurationError."""
    folder = (data_dir / "sandbox").resolve()
    state_file = folder / "sandbox.json"
    running = _running(state_file)
    if running:
        log.info("sandbox: using the one that runs (pid %d)", running["pid"])
        yield _overrides(running)
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "src.sandbox",
        "--state-file",
        str(state_file),
        "--token-dir",
        str(folder / "tokens"),
    ]
    process = subprocess.Popen(
        [*command, "--emails", str(FIRST_MAILS)], stdout=subprocess.DEVNULL, start_new_session=True, cwd=ROOT
    )
    try:
        yield _overrides(_awaited(state_file, process))
    finally:
        process.terminate()
        process.wait()


def _awaited(state_file: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    pause = Event()
    for _ in range(int(START_SECONDS / 0.05)):
        running = _running(state_file)
        if running:
            log.info("sandbox: started (pid %d) with %d mails; it ends with this producer", running["pid"], FIRST_MAILS)
            return running
        if process.poll() is not None:
            break
        pause.wait(0.05)
    raise ConfigurationError("the sandbox does not start: run python -m src.sandbox to see why")


def _running(state_file: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(state_file.read_text())
        with urllib.request.urlopen(f"http://127.0.0.1:{state['http_port']}/health", timeout=2):  # our own address
            return state
    except (OSError, ValueError, KeyError):
        return None


def _overrides(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "GMAIL_USERNAME": (state["account"],),
        "ACCOUNTS_FILE": "",
        "AUTH_METHOD": "oauth2",
        "TOKEN_FILE": "",
        "TOKEN_DIR": Path(state["token_file"]).parent,
        "GMAIL_CLIENT_SECRETS_FILE": Path(state["client_secrets"]),
        "IMAP_HOST": "127.0.0.1",
        "IMAP_PORT": state["imap_port"],
        "IMAP_SECURITY": "none",
        "INITIAL_SYNC": "all",
    }
