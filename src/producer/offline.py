"""What the producer prints instead of running: the record of message files, and the preview of a dry run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from config.settings import Settings
from src.common.clock import Clock
from src.common.embedded import existing_redis
from src.common.exceptions import ConfigurationError
from src.common.keys import Keys
from src.imap.imap_client import ImapMailbox
from src.mail.parse import parse
from src.mail.record import Envelope, record_to_json
from src.producer.daemon import imap_endpoint, token_sources
from src.producer.dry_run import Preview, preview
from src.producer.state_manager import MarkerFile, StateManager


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


def print_preview(settings: Settings, clock: Clock, out: TextIO) -> int:
    """What would be published: a table on a terminal, else JSON lines. Writes nothing anywhere."""
    redis, server, keys = existing_redis(settings), imap_endpoint(settings), Keys(settings.stream.name)
    if redis is None:
        out.write("# no Redis answers: every mail counts as new\n" if out.isatty() else "")
    for account, tokens in token_sources(settings, clock, keep=False).items():
        for name in settings.mail.mailboxes:
            states = StateManager(redis, keys, account, name, "dry-run") if redis else None
            session = ImapMailbox(server, account, name, tokens.access_token())
            marker_file = MarkerFile(settings.run.data_dir, account, name)
            seen = preview(settings, account, name, states, marker_file, session, clock)
            _write(out, f"{account}/{name}", seen)
    return 0


def _write(out: TextIO, title: str, seen: Preview) -> None:
    if not out.isatty():
        out.write(json.dumps({"mailbox": title, **asdict(seen)}, ensure_ascii=False) + "\n")
        return
    out.write(f"{title}: {seen.mails} mails ({seen.size / 1e6:.1f} MB) would be published, {seen.known} are known. {seen.why}\n")
    for line in seen.lines:
        out.write(f"  {line.uid:>8}  {line.internal_date}  {line.size:>9}  {line.sender[:32]:<32}  {line.subject[:60]}\n")
    if seen.mails > len(seen.lines):
        out.write(f"  … and {seen.mails - len(seen.lines)} more\n")
