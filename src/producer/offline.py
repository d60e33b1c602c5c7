"""What the producer prints instead of running: the record of message files, the preview of a dry run, the mailboxes there are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from config.settings import MailSettings, Settings
from src.common.clock import Clock
from src.common.embedded import existing_redis
from src.common.exceptions import ConfigurationError, LoginRefused, MailboxMissing, ReauthRequired
from src.common.keys import Keys
from src.imap.imap_client import ImapMailbox, Listed, list_mailboxes
from src.mail.parse import parse
from src.mail.record import Envelope, record_to_json
from src.producer.daemon import Access, NoUsableToken, imap_endpoint
from src.producer.dry_run import Preview, preview
from src.producer.state_manager import MarkerFile, StateManager

log = logging.getLogger(__name__)


def print_records(files: Sequence[Path], out: TextIO) -> int:
    """One JSON object a line, by the code path of intake. Raises ConfigurationError for a file that cannot be read."""
    for path in files:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"--parse {path}: {error.strerror}") from None
        record = parse(raw, Envelope("", "", 0, 0, "", len(raw), "", "", ""))
        out.write(record_to_json(record) + "\n")
    return 0


def print_preview(settings: Settings, accesses: Sequence[Access], clock: Clock, out: TextIO) -> int:
    """What would be published: a table on a terminal, else JSON lines. Writes nothing anywhere. Raises NoUsableToken."""
    redis, keys = existing_redis(settings), Keys(settings.stream.name)

    def show(account: str, mail: MailSettings, secret: str) -> None:
        for name in mail.mailboxes:
            states = StateManager(redis, keys, account, name, "dry-run") if redis else None
            session = ImapMailbox(imap_endpoint(mail), account, name, secret)
            marker_file = MarkerFile(settings.run.data_dir, account, name)
            seen = preview(replace(settings, mail=mail), account, name, states, marker_file, session, clock)
            _write(out, f"{account}/{name}", seen)

    return _for_each(accesses, show)


def print_mailboxes(accesses: Sequence[Access], out: TextIO) -> int:
    """What each account shows over IMAP, and what it hides: a table on a terminal, else JSON lines. Raises NoUsableToken."""

    def show(account: str, mail: MailSettings, secret: str) -> None:
        listed, hidden = list_mailboxes(imap_endpoint(mail), account, secret)
        if out.isatty():
            _write_table(out, account, listed, hidden)
            return
        for mailbox in listed:
            out.write(json.dumps({"account": account, **asdict(mailbox), "hidden": False}, ensure_ascii=False) + "\n")
        for use in hidden:
            unseen = Listed("", use, None)
            out.write(json.dumps({"account": account, **asdict(unseen), "hidden": True}, ensure_ascii=False) + "\n")

    return _for_each(accesses, show)


def _for_each(accesses: Sequence[Access], show: Callable[[str, MailSettings, str], None]) -> int:
    """`show(account, its settings, what it logs in with)`. Exit code 1 where one could not be shown; the others were."""
    refused, failed = [], False
    for access in accesses:
        account = access.account
        try:
            show(account.username, account.mail, access.credentials.access_token())
        except (ReauthRequired, LoginRefused, MailboxMissing, ConfigurationError) as error:
            log.error("%s: %s", account.username, error)
            failed = True
            refused += [str(error)] if isinstance(error, (ReauthRequired, LoginRefused)) else []
    if len(refused) == len(accesses):
        raise NoUsableToken("; ".join(refused))
    return int(failed)


def _write_table(out: TextIO, account: str, listed: Sequence[Listed], hidden: Sequence[str]) -> None:
    out.write(f"{account}\n  {'messages':>8}  {'special use':<11}  name\n")
    for mailbox in listed:
        out.write(f"  {'-' if mailbox.messages is None else mailbox.messages:>8}  {mailbox.special_use:<11}  {mailbox.name}\n")
    if hidden:
        out.write(f"  hidden from IMAP: {', '.join(hidden)}. Switched on in Gmail: Settings, Labels, Show in IMAP\n")


def _write(out: TextIO, title: str, seen: Preview) -> None:
    if not out.isatty():
        out.write(json.dumps({"mailbox": title, **asdict(seen)}, ensure_ascii=False) + "\n")
        return
    out.write(f"{title}: {seen.mails} mails ({seen.size / 1e6:.1f} MB) would be published, {seen.known} are known. {seen.why}\n")
    for line in seen.lines:
        out.write(f"  {line.uid:>8}  {line.internal_date}  {line.size:>9}  {line.sender[:32]:<32}  {line.subject[:60]}\n")
    if seen.mails > len(seen.lines):
        out.write(f"  … and {seen.mails - len(seen.lines)} more\n")
