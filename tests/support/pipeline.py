"""One mail server, one Redis, and the daemons that stand between them, with the settings of a test: short leases and waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from src.common.clock import iso
from src.mail.record import gmail_email_id, header_email_id
from src.sandbox.server import Sandbox
from tests.support import acl
from tests.support.account import Books, assert_accounted, read_books
from tests.support.daemons import Daemon
from tests.support.handlers import Line, read_journal
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until

DEADLINE = 60.0  # seconds; the machine is shared
OBEY = "tests.support.handlers:obey"

_numbers = itertools.count()


class Pipeline:
    """`account` is read from `source` into `redis`. `env` wins over the settings of tests, and goes to every daemon.

    `users`: the daemons log in to Redis as the users of docs/security.md (`tests.support.acl`), which the server has.
    """

    users = acl.EVERYWHERE

    def __init__(self, source: Sandbox | Dovecot, redis: RedisServer, tmp: Path, **env: str) -> None:
        self.source = source
        self.redis = redis
        self.client: Any = redis.client()  # redis-py's own types allow bytes everywhere
        self.tmp = tmp
        self.account = f"user{next(_numbers)}@example.org"
        self.journal = tmp / "journal"
        self.delivered: list[str] = []
        self.write_token(self.account)
        self.env: Mapping[str, str] = {
            "REDIS_URL": redis.url,
            "GMAIL_USERNAME": self.account,
            **self._server(),
            "INITIAL_SYNC": "all",
            "POLL_INTERVAL": "1",
            "PRODUCER_LEASE": "3",
            "INCOMPLETE_WAIT": "0.2",
            "WORKER_HANDLER": OBEY,
            "JOURNAL": str(self.journal),
            "WORKER_BLOCK_MS": "200",
            "LEASE_SECONDS": "4",
            "RECOVERY_TICK": "0.1",
            "BACKOFF_BASE": "0.1",
            "BACKOFF_CAP": "0.2",
            "STATS_INTERVAL": "2",
            "HTTP_PORT": "0",
            "LOG_FORMAT": "text",
            **env,
        }

    def _server(self) -> Mapping[str, str]:
        if isinstance(self.source, Sandbox):
            return {"IMAP_HOST": "127.0.0.1", "IMAP_PORT": str(self.source.imap_port), "IMAP_SECURITY": "none"}
        return {"IMAP_HOST": "localhost", "IMAP_PORT": str(self.source.imaps_port), "IMAP_CA_FILE": str(self.source.ca_file)}

    def write_token(self, account: str) -> None:
        """A token file as after a consent of `account`."""
        tokens = self.source if isinstance(self.source, Sandbox) else self.source.tokens
        tokens.write_token_file(self.tmp / "tokens" / f"{account}.json", account)

    def producer(self, *args: str, **env: str) -> Daemon:
        return Daemon("producer.py", *args, env=self._as("producer", env), tmp=self.tmp)

    def worker(self, *args: str, **env: str) -> Daemon:
        return Daemon("worker.py", *args, env=self._as("worker", env), tmp=self.tmp)

    def _as(self, role: acl.Role, env: Mapping[str, str]) -> Mapping[str, str]:
        merged = {**self.env, **env}
        return {**merged, "REDIS_URL": acl.as_user(merged["REDIS_URL"], role)} if self.users else merged

    # mail

    def deliver(
        self, *subjects: str, body: bytes = b"hello\r\n", account: str = "", days_ago: int = 0, expected: bool = True
    ) -> list[str]:
        """One mail a subject arrives in the INBOX of `account` (the pipeline's own); their email_ids.

        `expected`: they are to be accounted for (appended to `delivered`).
        """
        moment = datetime.now(UTC).replace(microsecond=0) - timedelta(days=days_ago)
        fresh = [self._put(account or self.account, subject, body, moment) for subject in subjects]
        self.delivered += fresh if expected else []
        return fresh

    def _put(self, account: str, subject: str, body: bytes, moment: datetime) -> str:
        header = b"From: Ann <ann@example.org>\r\nSubject: %s\r\nMessage-ID: <%d@example.org>\r\n\r\n"
        header %= (subject.encode(), next(_numbers))
        self.source.deliver(account, header + body, internal_date=moment)
        if isinstance(self.source, Sandbox):
            return gmail_email_id(account, self.source.ledger()[-1].gm_msgid)
        return header_email_id(account, iso(moment), len(header + body), header)

    def change_uidvalidity(self) -> int:
        return self.source.change_uidvalidity(self.account)

    # what became of it

    def books(self) -> Books:
        return read_books(self.client)

    def lines(self, event: str = "") -> list[Line]:
        """What the handlers noted: all, or the lines of one event."""
        return [line for line in read_journal(self.journal) if event in ("", line.event)]

    def wait_for_books(self, condition: Callable[[Books], object], what: str, timeout: float = DEADLINE) -> Books:
        """Wait until the books fulfil `condition`; raises AssertionError with `what`."""
        seen: list[Books] = []

        def fulfilled() -> object:
            seen[:] = [self.books()]
            return condition(seen[0])

        until(fulfilled, timeout, what)
        return seen[0]

    def wait_until_settled(self, email_ids: Iterable[str] | None = None, timeout: float = DEADLINE) -> Books:
        """Wait until each of `email_ids` (all delivered ones) is done, discarded or dead, and nothing is left in the stream."""
        wanted = set(self.delivered if email_ids is None else email_ids)
        return self.wait_for_books(
            lambda books: wanted <= books.fates() and not books.stream, f"{len(wanted)} mails are settled", timeout
        )

    def wait_until_settled_but(self, waiting: Collection[str]) -> Books:
        """Wait until all delivered mails but `waiting` are done, discarded or dead, and only those are left in the stream."""
        wanted = set(self.delivered) - set(waiting)
        return self.wait_for_books(
            lambda books: wanted <= books.fates() and {fields["email_id"] for fields in books.stream.values()} == set(waiting),
            f"{len(wanted)} mails are settled",
        )

    def assert_accounted(self, **expected: Any) -> None:
        """See `tests.support.account.assert_accounted`, for everything delivered."""
        assert_accounted(self.books(), self.delivered, **expected)

    def last_uid(self, mailbox: str = "INBOX") -> str | None:
        value: str | None = self.client.get(f"producer_state:{self.account}:{mailbox}:last_uid")
        return value

    def wait_for_uid(self, uid: int, mailbox: str = "INBOX") -> None:
        """Wait until the producer has recorded the fate of everything up to `uid`."""
        until(lambda: int(self.last_uid(mailbox) or 0) >= uid, DEADLINE, f"last_uid {uid}")

    def wait_for_first_poll(self) -> None:
        """Wait until the producer has looked at the mailbox once: whatever comes now is new mail, no backfill."""
        until(lambda: self.last_uid() is not None, DEADLINE, "the first poll")

    def wait_for_begun(self, email_ids: Collection[str], timeout: float = DEADLINE) -> None:
        """Wait until a handler has begun with each of these mails."""
        until(
            lambda: set(email_ids) <= {line.email_id for line in self.lines("begin")},
            timeout,
            f"{len(email_ids)} mails are begun",
        )

    def open_gate(self, name: str) -> None:
        """Let the mails go on whose subject is `hold <name>`."""
        (self.tmp / name).touch()
