"""`python -m src.sandbox`: a Gmail on this machine, with mail in it, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from src.common.clock import SYSTEM
from src.sandbox.attach import new_mail, running
from src.sandbox.server import Sandbox
from src.sandbox.tokens import write_private

_DEFAULT_ACCOUNT = "sandbox@gmail.example"
_DEFAULT_DIR = Path("data/sandbox")  # never tokens/, where the user's own token stands

_READY = """\
A Gmail to try things on, until Ctrl-C. Nothing leaves this machine.
  account     {accounts}
  IMAP        127.0.0.1:{imap_port}, without TLS, XOAUTH2 only
  tokens      {token_uri}
  token file  {token_files}
  mail        {emails}

Read it:      python producer.py --sandbox{elsewhere}
Consent:      python producer.py --sandbox --auth-setup
New mail:     {new_mail}
What came:    curl {base}/ledger?summary=1
Go wrong:     curl -d '{{"stall": 5}}' {base}/faults      (all of them: src/sandbox/faults.py)
By hand:      IMAP_HOST=127.0.0.1 IMAP_PORT={imap_port} IMAP_SECURITY=none TOKEN_DIR={token_dir} \
GMAIL_USERNAME={joined} python producer.py
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 after a signal, 1 where a port or a file cannot be had or a sandbox runs already, 2 (argparse) for a wrong argument."""
    options = _options(arguments)
    accounts: list[str] = options.account or [_DEFAULT_ACCOUNT]
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.until_eof:
        threading.Thread(target=_end_with_stdin, args=(stop,), daemon=True).start()
    other = running(options.state_file)
    if other:
        print(
            f"The sandbox cannot start: one runs already (pid {other['pid']}, {options.state_file}); end that one, or give this one "
            "a --state-file and a --token-dir of its own",
            file=sys.stderr,
        )
        return 1
    try:
        with Sandbox(imap_port=options.imap_port, http_port=options.http_port, numbered_from=SYSTEM.wall()) as sandbox:
            token_files = [_token_file(options.token_dir, account, accounts) for account in accounts]
            for account, path in zip(accounts, token_files, strict=True):
                sandbox.write_token_file(path, account)
                sandbox.deliver_generated(account, count=options.emails, seed=options.seed, rate=options.rate)
            client_secrets = options.token_dir / "client_secrets.json"
            sandbox.write_client_secrets(client_secrets)
            state = _state(sandbox, accounts[0], token_files[0], client_secrets)
            write_private(options.state_file, state)
            print(_ready(sandbox, options, accounts, token_files), flush=True)
            stop.wait()
            if options.state_file.exists() and options.state_file.read_text() == state:  # not a later sandbox's
                options.state_file.unlink()
    except OSError as error:
        print(f"The sandbox cannot start: {error}", file=sys.stderr)
        return 1
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m src.sandbox", description=__doc__)
    parser.add_argument("--imap-port", type=_port, default=0, metavar="N", help="default: any free one")
    parser.add_argument("--http-port", type=_port, default=0, metavar="N", help="default: any free one")
    parser.add_argument("--account", action="append", metavar="A", help=f"may be repeated; default: {_DEFAULT_ACCOUNT}")
    parser.add_argument("--token-dir", type=Path, default=_DEFAULT_DIR, metavar="DIR", help=f"default: {_DEFAULT_DIR}")
    parser.add_argument("--emails", type=_count, default=50, metavar="N", help="mails for each account; default: 50")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="the same seed writes the same mail; default: 1")
    parser.add_argument("--rate", type=_rate, default=0.0, metavar="PER_SECOND", help="mails a second; default: all at once")
    parser.add_argument(
        "--state-file",
        type=Path,
        default=_DEFAULT_DIR / "sandbox.json",
        metavar="FILE",
        help=f"where producer.py --sandbox finds this sandbox; default: {_DEFAULT_DIR}/sandbox.json",
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="end as well when standard input ends: with whoever holds its other end"
    )
    return parser.parse_args(arguments)


def _end_with_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()


def _port(value: str) -> int:
    return _within(int(value), 0, 65535)


def _count(value: str) -> int:
    return _within(int(value), 0, 10_000_000)


def _rate(value: str) -> float:
    rate = float(value)
    if not 0 <= rate <= 10_000:
        raise argparse.ArgumentTypeError(f"{value} is not a number of mails a second between 0 and 10000")
    return rate


def _within(value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
    return value


def _token_file(folder: Path, account: str, accounts: Sequence[str]) -> Path:
    """The names that TOKEN_DIR knows: gmail_token.json for a single account, else one file each."""
    return folder / ("gmail_token.json" if len(accounts) == 1 else f"{account}.json")


def _state(sandbox: Sandbox, account: str, token_file: Path, client_secrets: Path) -> str:
    return json.dumps(
        {
            "imap_port": sandbox.imap_port,
            "http_port": sandbox.http_port,
            "token_uri": sandbox.token_uri,
            "account": account,
            "token_file": str(token_file.resolve()),
            "client_secrets": str(client_secrets.resolve()),
            "pid": os.getpid(),
        }
    )


def _ready(sandbox: Sandbox, options: argparse.Namespace, accounts: Sequence[str], token_files: Sequence[Path]) -> str:
    usual = options.state_file == _DEFAULT_DIR / "sandbox.json"
    return _READY.format(
        accounts=", ".join(accounts),
        new_mail=new_mail(accounts[0], sandbox.http_port),
        joined=",".join(accounts),
        imap_port=sandbox.imap_port,
        token_uri=sandbox.token_uri,
        base=sandbox.token_uri.removesuffix("/token"),
        token_files=", ".join(map(str, token_files)),
        token_dir=options.token_dir,
        emails=f"{options.emails} each" + (f", {options.rate:g} a second" if options.rate else ""),
        elsewhere="" if usual else f"   (it looks for {_DEFAULT_DIR}/sandbox.json, yours is {options.state_file})",
    )


if __name__ == "__main__":
    sys.exit(main())
