"""The next group of mails is asked for before this one is published, but only where it may be taken in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from src.common.redis_client import RedisClient
from src.imap.connection import ImapEndpoint
from src.imap.imap_client import ImapMailbox
from src.producer.state_manager import StateManager
from src.sandbox.server import Sandbox
from tests.support.faulty import Process, Trips
from tests.support.inline import InlineProducer, World
from tests.support.servers import RedisServer

ACCOUNT = "ahead@gmail.example"
MAILS = 5  # PRODUCER_BATCH_SIZE is 2


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the producer does, in order: `ask` and `bodies` with their UIDs, `publish` with how many mails."""
    said: list[str] = []
    ask, bodies, publish = ImapMailbox.ask_bodies, ImapMailbox.bodies, StateManager.publish

    def asked(self: ImapMailbox, uids: Sequence[int]) -> None:
        said.append(f"ask {uids}")
        ask(self, uids)

    def fetched(self: ImapMailbox, uids: Sequence[int]) -> dict[int, bytes]:
        said.append(f"bodies {uids}")
        return bodies(self, uids)

    def published(self: StateManager, mails: Sequence[Any], **options: Any) -> Any:
        said.extend([f"publish {len(mails)}"] if mails else [])
        return publish(self, mails, **options)

    monkeypatch.setattr(ImapMailbox, "ask_bodies", asked)
    monkeypatch.setattr(ImapMailbox, "bodies", fetched)
    monkeypatch.setattr(StateManager, "publish", published)
    return said


@pytest.fixture
def producer(sandbox: Sandbox, valkey: RedisServer, tmp_path: Path) -> InlineProducer:
    """Of a mailbox of five mails."""
    for number in range(MAILS):
        sandbox.deliver(ACCOUNT, f"Subject: {number}\r\n\r\nx".encode())
    grant = {"grant_type": "refresh_token", "client_id": sandbox.client_id, "client_secret": sandbox.client_secret}
    token = sandbox.tokens.grant(grant | {"refresh_token": sandbox.tokens.refresh_token(ACCOUNT)}).body["access_token"]
    real = RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10.0)
    endpoint = ImapEndpoint(sandbox.host, sandbox.imap_port, "none", 10.0, None)
    world = World(valkey.client(), real._transport, endpoint, ACCOUNT, str(token))
    world.renew(tmp_path)
    return InlineProducer(world, Process(Trips()))


def test_the_next_group_is_asked_for_before_this_one_is_published(producer: InlineProducer, told: list[str]) -> None:
    """While the mails of one FETCH are parsed and published the server works on the next; the last one has none behind it."""
    producer.run()
    assert told[:8] == [
        "bodies [1, 2]",
        "ask [3, 4]",
        "publish 2",
        "bodies [3, 4]",
        "ask [5]",
        "publish 2",
        "bodies [5]",
        "publish 1",
    ]


def test_nothing_is_asked_for_ahead_while_intake_is_paused(producer: InlineProducer, told: list[str]) -> None:
    """Redis has no room once the first group has come: the next is not asked for before it has."""
    looks = iter(["", "full", "full", "", ""])
    producer.mailbox.reader.gate = lambda: next(looks, "")
    producer.run()
    assert told[:3] == ["bodies [1, 2]", "publish 2", "bodies [3, 4]"]


def test_nothing_is_asked_for_ahead_above_the_days_bytes(
    producer: InlineProducer, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first group spends them: the next one waits, unasked for, until the process is told to stop."""
    reader = producer.mailbox.reader
    spent = reader._spend
    monkeypatch.setattr(reader, "_spend", lambda size: spent(size) + (reader.settings.mail.daily_bytes if size else 0))
    monkeypatch.setattr(reader.pulse.shutdown, "wait", lambda seconds: reader.pulse.shutdown.request("enough") or True)
    producer.run()
    assert told == ["bodies [1, 2]", "publish 2"]
