"""The producer: carries every mail of some mailboxes into the stream. `python producer.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from config.accounts import Account, load_accounts
from config.settings import Settings, SettingsError, load_settings, misspelt_in
from src.common import logging_config
from src.common.circuit_breaker import Breakers, rules_of
from src.common.clock import SYSTEM
from src.common.exceptions import ConfigurationError, Transient
from src.common.shutdown import Shutdown, leave

log = logging.getLogger("producer")

FLAGS = {
    "username": "GMAIL_USERNAME",
    "mailbox": "MAILBOXES",
    "batch_size": "PRODUCER_BATCH_SIZE",
    "poll_interval": "POLL_INTERVAL",
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Carries every mail of some mailboxes into the stream, until it is stopped.")
    parser.add_argument(
        "--username", metavar="U", action="append", help="account to read; may be repeated (default: the token file's)"
    )
    parser.add_argument(
        "--mailbox", metavar="M", action="append", help="folder or special use (\\All) to read; may be repeated (default: INBOX)"
    )
    parser.add_argument("--batch-size", metavar="N", help="most mails in one publish (default: 100)")
    parser.add_argument("--poll-interval", metavar="S", help="seconds between two polls (default: 60)")
    parser.add_argument("--once", action="store_true", help="read what is there now, then end")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be published; nothing is written, no server started"
    )
    parser.add_argument(
        "--resync-from",
        metavar="DATE",
        type=day,
        help="look again at all mail since DATE (2026-01-31), then go on",
    )
    parser.add_argument("--list-mailboxes", action="store_true", help="show the folders there are and those hidden, then end")
    parser.add_argument("--auth-setup", action="store_true", help="ask for Google's consent, store the token, then end")
    parser.add_argument("--no-browser", action="store_true", help="with --auth-setup: show the address, open no browser")
    parser.add_argument("--sandbox", action="store_true", help="read the sandbox's mailbox, starting the sandbox if none runs")
    parser.add_argument(
        "--parse", metavar="FILE", nargs="+", type=Path, help="print the record of message files as JSON lines, then end"
    )
    return parser


def day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no date like 2026-01-31") from None


def main() -> int:
    parser = arguments()
    given = parser.parse_args()
    if given.resync_from and (given.dry_run or given.list_mailboxes or given.auth_setup):
        parser.error("--resync-from goes with a read, or with --once")
    os.umask(0o077)  # whatever is written here is about somebody's mail
    shutdown = Shutdown()
    flags = {
        FLAGS[name]: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items() if name in FLAGS
    }
    try:
        if given.parse:
            from src.producer.offline import print_records

            return print_records(given.parse, sys.stdout)
        settings = load_settings(flags)
        logging_config.configure(settings.run.log_format, settings.run.log_level)
        for name, meant in misspelt_in(Path(".env")).items():
            log.warning("%s in .env is no setting and does nothing: did you mean %s?", name, meant)
        if not given.auth_setup:  # a consent is ended by Ctrl-C at once
            shutdown.on_signals()
        if given.sandbox:
            from src.sandbox.attach import attached

            stays = not (given.once or given.dry_run or given.list_mailboxes or given.auth_setup)
            with attached(settings.run.data_dir, hints=stays) as overrides:
                flags |= overrides
                return act(load_settings(flags), flags, shutdown, given)
        return act(settings, flags, shutdown, given)
    except (SettingsError, ConfigurationError) as error:
        print(f"producer.py: {error}", file=sys.stderr)  # noqa: T201  # the one line a wrong setting gets
        return 2
    except Transient as error:
        print(f"producer.py: {error}", file=sys.stderr)  # noqa: T201  # the same
        return shutdown.exit_code if shutdown.requested else 1


def act(settings: Settings, flags: dict[str, Any], shutdown: Shutdown, given: argparse.Namespace) -> int:
    accounts = load_accounts(settings.mail, flags)
    if given.auth_setup:
        from src.auth.consent import set_up

        return set_up(settings.auth, accounts, with_browser=not given.no_browser)
    return run(settings, accounts, shutdown, given)


def run(settings: Settings, accounts: Sequence[Account], shutdown: Shutdown, given: argparse.Namespace) -> int:
    from src.common.embedded import open_redis  # after the settings: --help and a wrong setting answer at once
    from src.producer.daemon import NoUsableToken, Producer, accesses
    from src.producer.offline import print_mailboxes, print_preview

    try:
        if given.dry_run or given.list_mailboxes:
            found = accesses(accounts, SYSTEM, keep=False)
            return (
                print_mailboxes(found, sys.stdout) if given.list_mailboxes else print_preview(settings, found, SYSTEM, sys.stdout)
            )
        breakers = Breakers(rules_of(settings.breakers), SYSTEM.monotonic, random.random)
        found = accesses(accounts, SYSTEM, breakers=breakers)
        with open_redis(settings, shutdown) as redis:
            producer = Producer(settings, found, redis, shutdown, SYSTEM, breakers)
            if given.resync_from:
                producer.ask_for(given.resync_from)
            producer.run_once() if given.once else producer.run()
    except NoUsableToken as error:
        print(f"producer.py: {error}", file=sys.stderr)  # noqa: T201  # the same
        return 3
    return shutdown.exit_code


if __name__ == "__main__":
    code = main()
    with suppress(OSError):  # whoever reads what it prints may take longer than leaving may
        sys.stdout.flush()
    leave(code)
