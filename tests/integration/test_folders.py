"""Folders by name and by special use, in any language and under several labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.common.exceptions import ConfigurationError
from src.sandbox.server import Sandbox
from tests.integration.test_commands import files_of, finished, keys_of
from tests.support.once import read_once
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until


def gmail_id(pipeline: Pipeline, sandbox: Sandbox) -> str:
    """The id of the mail delivered last."""
    return f"gm:{pipeline.account}:{sandbox.ledger()[-1].gm_msgid}"


def test_special_uses_are_found_under_any_name(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """\\All and \\Sent of a German account, renamed while they are read: keys and records hold what the user wrote."""
    sandbox.rename(pipeline.account, "[Gmail]/All Mail", "[Gmail]/Alle Nachrichten")
    sandbox.rename(pipeline.account, "[Gmail]/Sent Mail", "[Gmail]/Gesendet")
    pipeline.deliver("received")
    sandbox.deliver(pipeline.account, b"Subject: sent\r\n\r\n", mailbox="[Gmail]/Gesendet")
    pipeline.delivered.append(gmail_id(pipeline, sandbox))
    with pipeline.producer("--mailbox", "\\All", "--mailbox", "\\Sent") as producer:
        until(lambda: pipeline.last_uid("\\All") == "2" and pipeline.last_uid("\\Sent") == "1", DEADLINE, "both are read")
        sandbox.rename(pipeline.account, "[Gmail]/Alle Nachrichten", "[Gmail]/Tous les messages")
        pipeline.deliver("after the change of language")
        pipeline.wait_for_uid(3, "\\All")
        assert "MISCONFIGURED" not in producer.output()
    books = pipeline.books()
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert {fields["mailbox"] for fields in books.stream.values()} <= {"\\All", "\\Sent"}
    assert {fields["subject"] for fields in books.stream.values()} == {"received", "sent", "after the change of language"}


def test_special_use_and_localised_names_of_a_real_server(dovecot: Dovecot, valkey: RedisServer, tmp_path: Path) -> None:
    """Dovecot's \\All, and a folder whose name needs modified UTF-7, an ampersand and a blank."""
    pipeline = Pipeline(dovecot, valkey, tmp_path)
    name = "Entwürfe & Küsse"
    dovecot.deliver(pipeline.account, b"Subject: one\r\n\r\n", mailbox="[Gmail]/All Mail")
    dovecot.deliver(pipeline.account, b"Subject: two\r\n\r\n", mailbox=name)
    assert read_once(pipeline, mailboxes=("\\All", name)) == 0
    read = {(fields["mailbox"], fields["subject"]): fields["email_id"] for fields in pipeline.books().stream.values()}
    assert set(read) == {("\\All", "one"), (name, "two")}
    pipeline.delivered += read.values()
    pipeline.assert_accounted(waiting=pipeline.delivered)
    assert pipeline.last_uid(name) == "1"


def test_a_label_in_modified_utf7(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """A Gmail label in another alphabet: read by its name, and named so in the record's labels."""
    sandbox.deliver(pipeline.account, b"Subject: one\r\n\r\n", mailbox="Счета/2026 & mehr")
    pipeline.delivered.append(gmail_id(pipeline, sandbox))
    assert read_once(pipeline, mailboxes=("Счета/2026 & mehr",)) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)
    [fields] = pipeline.books().stream.values()
    assert fields["mailbox"] == "Счета/2026 & mehr"
    assert json.loads(fields["record"])["gm_labels"] == ["Счета/2026 & mehr"]


@pytest.mark.parametrize(("scope", "entries"), [("account", 1), ("mailbox", 3)])
def test_the_same_mail_under_two_labels(pipeline: Pipeline, sandbox: Sandbox, scope: str, entries: int) -> None:
    """DEDUP_SCOPE=account: it enters once, with all its labels; DEDUP_SCOPE=mailbox: once a folder, under an id of each."""
    [email_id] = pipeline.deliver("in three places", expected=False)
    sandbox.copy(pipeline.account, 1, "Work")
    for _ in range(2):
        assert read_once(pipeline, mailboxes=("INBOX", "Work", "\\All"), DEDUP_SCOPE=scope) == 0
    entered = list(pipeline.books().stream.values())
    assert len({fields["email_id"] for fields in entered}) == len(entered) == entries
    assert [json.loads(fields["record"])["gm_labels"] for fields in entered] == [["\\Inbox", "Work"]] * entries
    if scope == "account":
        assert entered[0]["email_id"] == email_id
    pipeline.delivered = [fields["email_id"] for fields in entered]
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_list_mailboxes(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """Names, special uses, counts, and what is hidden from IMAP; nothing is written anywhere."""
    pipeline.deliver("one", "two", expected=False)
    sandbox.copy(pipeline.account, 1, "Büro")
    sandbox.hide(pipeline.account, "[Gmail]/Spam")
    keys, files = keys_of(pipeline), files_of(pipeline.tmp)
    output = finished(pipeline.producer("--list-mailboxes"))
    assert (keys_of(pipeline), files_of(pipeline.tmp)) == (keys, files)
    lines = [json.loads(line) for line in output.splitlines()]
    assert {line.pop("account") for line in lines} == {pipeline.account}
    shown = {line["name"]: (line["special_use"], line["messages"]) for line in lines if not line["hidden"]}
    assert shown == {
        "INBOX": ("", 2),
        "Büro": ("", 1),
        "[Gmail]/All Mail": ("\\All", 2),
        "[Gmail]/Drafts": ("\\Drafts", 0),
        "[Gmail]/Important": ("\\Important", 0),
        "[Gmail]/Sent Mail": ("\\Sent", 0),
        "[Gmail]/Starred": ("\\Flagged", 0),
        "[Gmail]/Trash": ("\\Trash", 0),
    }
    assert [line for line in lines if line["hidden"]] == [{"name": "", "special_use": "\\Junk", "messages": None, "hidden": True}]
    pipeline.assert_accounted()


def test_a_folder_that_is_not_there_holds_up_no_other(pipeline: Pipeline, sandbox: Sandbox) -> None:
    """MISCONFIGURED names the way to see the folders there are; --once reads the others too, and says what is wrong at its end."""
    sandbox.hide(pipeline.account, "[Gmail]/All Mail")
    flags = ("--mailbox", "\\All", "--mailbox", "Nowhere", "--mailbox", "INBOX")
    pipeline.deliver("one")
    with pipeline.producer(*flags) as producer:
        producer.wait_for(r"\\All: MISCONFIGURED: .*special use \\All; is it hidden from IMAP\?.*--list-mailboxes", DEADLINE)
        producer.wait_for("Nowhere: MISCONFIGURED: no mailbox 'Nowhere'", DEADLINE)
        pipeline.wait_for_uid(1)
        assert producer.terminate() == 0
    pipeline.deliver("two")
    with pytest.raises(ConfigurationError, match=r"special use \\All; .*; no mailbox 'Nowhere'"):
        read_once(pipeline, mailboxes=("\\All", "Nowhere", "INBOX"))
    pipeline.assert_accounted(waiting=pipeline.delivered)
