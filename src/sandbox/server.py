"""The sandbox: an in-memory Gmail on 127.0.0.1 to try things on, and for users' own tests.

    with Sandbox() as sandbox:
        sandbox.deliver("me@gmail.example", b"Subject: hello\\r\\n\\r\\nhi")
        sandbox.write_token_file(Path("gmail_token.json"), "me@gmail.example")
        ...  # point a producer at 127.0.0.1:sandbox.imap_port, without TLS

It keeps a ledger of every mail delivered, so that a test can ask whether each of them arrived, and it can go wrong on
demand (`faults`). Nothing is kept on disk but the token files asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType

from src.common.clock import SYSTEM, Clock
from src.sandbox import service_account
from src.sandbox.control import ControlServer
from src.sandbox.faults import Faults
from src.sandbox.generator import Sample, generate
from src.sandbox.imap_server import ImapServer
from src.sandbox.store import Delivered, Store
from src.sandbox.tokens import CLIENT_ID, CLIENT_SECRET, Tokens, write_client_secrets, write_private, write_token_file

_STOP_POLL = 0.05  # seconds; how soon a listening thread sees that it is over


class Sandbox:
    """A context manager: serves while entered; its threads are daemons. May be entered again: same ports, same mail.

    `imap_port`, `http_port`: 0 takes any free port; while serving they are the real ones. `gmail=False`: a plain IMAP
    server without X-GM-EXT-1 and All Mail. `token_lifetime`: seconds, of sessions too. `connection_limit`: most sessions of one
    account at once. `numbered_from`: a moment (aware) at which UIDVALIDITY and message ids begin, so that a sandbox started later
    shows nothing that a reader knows already; None: the same numbers each time. OSError on enter: a port is taken.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        imap_port: int = 0,
        http_port: int = 0,
        gmail: bool = True,
        token_lifetime: float = 3600.0,
        connection_limit: int = 15,
        clock: Clock = SYSTEM,
        numbered_from: datetime | None = None,
    ) -> None:
        self.host = host
        self.imap_port = imap_port
        self.http_port = http_port
        self.client_id = CLIENT_ID
        self.client_secret = CLIENT_SECRET
        self.faults = Faults()
        self.tokens = Tokens(token_lifetime, clock)
        self._connection_limit = connection_limit
        self._clock = clock
        self._store = Store(gmail=gmail, clock=clock, numbered_from=numbered_from)
        self._servers: tuple[ImapServer, ControlServer] | None = None

    @property
    def token_uri(self) -> str:
        return f"http://{self.host}:{self.http_port}/token"

    @property
    def auth_uri(self) -> str:
        return f"http://{self.host}:{self.http_port}/auth"

    def start(self) -> None:
        limit = self._connection_limit
        imap = ImapServer(self.host, self.imap_port, self._store, self.tokens, self.faults, connection_limit=limit)
        try:
            control = ControlServer(self.host, self.http_port, self)
        except OSError:
            imap.server_close()
            raise
        self.imap_port, self.http_port = int(imap.server_address[1]), int(control.server_address[1])
        self._servers = (imap, control)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(_STOP_POLL,), name="sandbox", daemon=True).start()

    def stop(self) -> None:
        """Close every connection and both ports; again: nothing."""
        servers, self._servers = self._servers, None
        for server in servers or ():
            server.stop()

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def add_account(self, account: str) -> None:
        """Make an account with the standard folders; again: nothing."""
        self._store.add_account(account)

    def accounts(self) -> list[str]:
        return self._store.accounts()

    def deliver(
        self, account: str, raw: bytes, *, mailbox: str = "INBOX", internal_date: datetime | None = None, kind: str = ""
    ) -> int:
        """A new mail arrives (account and folder are made if need be); its UID. `internal_date`: aware; None: now."""
        return self._store.deliver(account, mailbox, raw, internal_date=internal_date, kind=kind)

    def deliver_generated(
        self,
        account: str,
        *,
        count: int,
        seed: int = 1,
        kinds: Sequence[str] = (),
        rate: float = 0.0,
        mailbox: str = "INBOX",
        internal_date: datetime | None = None,
    ) -> Mapping[str, object]:
        """`count` mails of the generator: at once ({"uids": [...]}), or `rate` a second from a thread ({"delivering": count})."""

        def put(sample: Sample) -> int:
            return self.deliver(account, sample.raw, mailbox=mailbox, internal_date=internal_date, kind=sample.kind)

        samples = generate(seed, count, kinds)
        if rate <= 0:
            return {"uids": [put(sample) for sample in samples]}
        self.add_account(account)
        servers = self._servers
        stopping = servers[1].stopping if servers else threading.Event()

        def trickle() -> None:
            for sample in samples:
                put(sample)
                if stopping.wait(1 / rate):
                    return

        threading.Thread(target=trickle, name="sandbox-deliver", daemon=True).start()
        return {"delivering": count}

    def copy(self, account: str, uid: int, to: str, mailbox: str = "INBOX") -> int:
        """The same mail in a further folder (in Gmail: under a further label); its UID there. KeyError: no such UID."""
        return self._store.copy(account, uid, mailbox, to)

    def rename(self, account: str, mailbox: str, name: str) -> None:
        """Call a folder otherwise, as a Gmail in another language does. UnknownFolder."""
        self._store.rename(account, mailbox, name)

    def hide(self, account: str, mailbox: str, *, hidden: bool = True) -> None:
        """Gmail's "Show in IMAP" of a label, off or on again. UnknownFolder."""
        self._store.hide(account, mailbox, hidden=hidden)

    def ledger(self) -> list[Delivered]:
        """Every mail ever delivered, once, in order."""
        return self._store.ledger()

    def write_token_file(self, path: Path, account: str) -> None:
        """A token file as after a consent: a living refresh token, no access token yet. Mode 0600."""
        self.add_account(account)
        write_token_file(path, account, self.tokens.refresh_token(account), self.token_uri, self._clock.wall())

    def write_service_account_key(self, path: Path, *accounts: str) -> None:
        """The key of a service account that may read `accounts` (until `revoke`). Mode 0600."""
        for account in accounts:
            self.add_account(account)
        self.tokens.delegate(accounts)
        write_private(path, service_account.key_file(self.token_uri))

    def set_password(self, account: str, password: str) -> None:
        """An app password: LOGIN and AUTHENTICATE PLAIN open the account with it from now on."""
        self.add_account(account)
        self.tokens.set_password(account, password)

    def attempts(self, account: str) -> int:
        """How often somebody tried to log in as the account, since the last start."""
        return self._servers[0].attempts(account) if self._servers else 0

    def write_client_secrets(self, path: Path) -> None:
        """What GMAIL_CLIENT_SECRETS_FILE wants, for a consent of this sandbox's. Mode 0600."""
        write_client_secrets(path, self.auth_uri, self.token_uri)

    def change_uidvalidity(self, account: str, mailbox: str = "INBOX", *, shuffle: bool = False) -> int:
        """Number the folder anew from 1; the new UIDVALIDITY. Sessions that have it open are ended. UnknownFolder."""
        return self._store.change_uidvalidity(account, mailbox, shuffle_seed=1 if shuffle else None)

    def expunge(self, account: str, uid: int, mailbox: str = "INBOX") -> None:
        """The mail is deleted from the folder; the ledger keeps it. KeyError: no such UID. UnknownFolder."""
        self._store.expunge(account, mailbox, uid)

    def expire_tokens(self) -> None:
        """Every access token is refused from now on; sessions that are logged in go on to their end."""
        self.tokens.expire_all()

    def revoke(self, account: str) -> None:
        """The refresh token is refused too (invalid_grant), until `write_token_file` stands for a new consent."""
        self.tokens.revoke(account)

    def cut(self) -> int:
        """End every IMAP connection without a word; how many there were."""
        return self._servers[0].cut() if self._servers else 0
