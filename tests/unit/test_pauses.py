"""What is paused by hand: who it holds up, how a person names it. Pure."""

from __future__ import annotations

import pytest

from src.common.keys import Keys
from src.common.pauses import WORKERS, field_of, fields_of, meant_by_none, named, parsed, why

ANN = "ann@example.org"
SINCE = "2026-01-31T08:00:00Z"


@pytest.mark.parametrize(
    ("target", "field"),
    [
        (ANN, "ann@example.org|"),
        ("ann@example.org/INBOX", "ann@example.org|INBOX"),
        ("ann@example.org/[Gmail]/All Mail", "ann@example.org|[Gmail]/All Mail"),
        ("joe", "joe|"),
        ("joe/INBOX", "joe|INBOX"),
        ("INBOX", "|INBOX"),
        ("[Gmail]/All Mail", "|[Gmail]/All Mail"),
        ("\\All", "|\\All"),
        ("jane/INBOX", "|jane/INBOX"),  # nobody's account here: a folder in a folder
        ("workers", "|workers"),
    ],
)
def test_a_target_names_an_account_a_mailbox_or_a_folder(target: str, field: str) -> None:
    """And what is shown of it is what names it again. `joe` is a known account."""
    assert parsed(target, ["joe"]) == field
    assert named(field) == target


@pytest.mark.parametrize(
    ("field", "held"),
    [
        (field_of(ANN, "INBOX"), {(ANN, "INBOX")}),
        (field_of(ANN, ""), {(ANN, "INBOX"), (ANN, "Sent")}),
        (field_of("", "INBOX"), {(ANN, "INBOX"), ("bob@example.org", "INBOX")}),
        (WORKERS, set()),
        (field_of("ann@example.or", ""), set()),
    ],
)
def test_a_pause_holds_up_what_it_names_and_no_other(field: str, held: set[tuple[str, str]]) -> None:
    """Of three mailboxes."""
    mailboxes = [(ANN, "INBOX"), (ANN, "Sent"), ("bob@example.org", "INBOX")]
    assert {box for box in mailboxes if why({field: f"{SINCE}|"}, fields_of(*box))} == held


def test_a_pause_tells_since_when_why_and_what_ends_it() -> None:
    """The command can be pasted into a shell; a reason may hold a |."""
    paused = {WORKERS: f"{SINCE}|", "|My Mail": f"{SINCE}|a|b"}
    assert why(paused, [WORKERS]) == f"paused by hand since {SINCE}; go on: ./scripts/resume.sh --workers"
    held = why(paused, fields_of(ANN, "My Mail"))
    assert held == f"paused by hand since {SINCE} (a|b); go on: ./scripts/resume.sh 'My Mail'"
    assert why({}, [WORKERS]) == ""


def test_the_key_follows_from_the_stream() -> None:
    assert Keys("s").paused == "s:paused"


def test_a_pause_of_what_nobody_reads_is_noticed() -> None:
    """A misspelt account or folder; all workers are always somebody."""
    read = {(ANN, "INBOX"), ("joe", "Archive")}
    meant = [field_of(ANN, "INBOX"), field_of(ANN, ""), field_of("", "Archive"), WORKERS]
    strangers = [field_of("nobody@x", "INBOX"), field_of(ANN, "Archive"), field_of("", "inbox")]
    assert meant_by_none([*meant, *strangers], read) == strangers


def test_the_mailboxes_that_were_read_are_told_by_their_keys() -> None:
    """Also folders with colons and slashes."""
    keys = Keys("s")
    key = keys.mailbox(ANN, "a:b/c").last_uid
    assert keys.is_last_uid(key) and keys.mailbox_of_last_uid(key) == (ANN, "a:b/c")
