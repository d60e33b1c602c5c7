"""The mailboxes of the sandbox and the ledger of everything ever delivered to them: state under one lock, no I/O.

A mail is one immutable `Message`; a folder shows it under a UID of its own. In a Gmail every mail outside Spam and Trash
stands in All Mail too, with the same X-GM-MSGID (https://developers.google.com/workspace/gmail/imap/imap-extensions).
"""

from __future__ import annotations

import hashlib
import random
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from src.common.clock import Clock

_FIRST_MSGID = 1_850_000_000_000_000_000  # as long as Gmail's: beyond what a JSON or Lua number holds exactly
_FIRST_UIDVALIDITY = 600_000_000

# RFC 6154 attributes, and the X-GM-LABELS name Gmail shows for a mail that stands there.
_GMAIL_FOLDERS = {
    "INBOX": ("", "\\Inbox"),
    "[Gmail]/All Mail": ("\\All", ""),
    "[Gmail]/Drafts": ("\\Drafts", "\\Draft"),
    "[Gmail]/Important": ("\\Important", "\\Important"),
    "[Gmail]/Sent Mail": ("\\Sent", "\\Sent"),
    "[Gmail]/Spam": ("\\Junk", "\\Spam"),
    "[Gmail]/Starred": ("\\Flagged", "\\Starred"),
    "[Gmail]/Trash": ("\\Trash", "\\Trash"),
}
_PLAIN_FOLDERS = {
    "INBOX": ("", ""),
    "Drafts": ("\\Drafts", ""),
    "Sent": ("\\Sent", ""),
    "Junk": ("\\Junk", ""),
    "Trash": ("\\Trash", ""),
}
_OUTSIDE_ALL_MAIL = frozenset({"\\All", "\\Junk", "\\Trash"})


@dataclass(frozen=True, slots=True)
class Message:
    """One mail. `internal_date`: aware, UTC, whole seconds. `header_end`: bytes up to and with the empty line."""

    raw: bytes
    internal_date: datetime
    gm_msgid: int
    header_end: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """A line of the ledger: one mail, as it stood when it was delivered (later UID changes do not rewrite it)."""

    account: str
    mailbox: str
    uid: int
    uidvalidity: int
    gm_msgid: str
    internal_date: datetime
    size: int
    sha256: str
    kind: str
    subject: str


@dataclass(slots=True)
class Entry:
    """A mail in a folder."""

    message: Message
    flags: frozenset[str]


@dataclass
class Folder:
    """`uids` ascends and holds the keys of `entries`; `removals` counts expunges, so that a session knows when to compare.
    `hidden`: it is not shown over IMAP."""

    name: str
    special_use: str
    label: str
    uidvalidity: int
    uidnext: int = 1
    removals: int = 0
    hidden: bool = False
    uids: list[int] = field(default_factory=list)
    entries: dict[int, Entry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """What SELECT and STATUS answer."""

    exists: int
    unseen: int
    uidnext: int
    uidvalidity: int


class UnknownFolder(Exception):
    """There is no such folder in the account."""


class Rebuilt(Exception):
    """The folder's UIDVALIDITY is no longer that of the view: its UIDs mean nothing any more."""


class Store:
    """Accounts, folders, mails. Any thread may call. `UnknownFolder` where a folder must exist, `Rebuilt` for a stale view.

    `numbered_from`: UIDVALIDITY and X-GM-MSGID begin at this moment (aware); None: at the same numbers each time.
    """

    def __init__(self, *, gmail: bool, clock: Clock, numbered_from: datetime | None = None) -> None:
        self.gmail = gmail
        self._clock = clock
        self._lock = threading.RLock()
        self._accounts: dict[str, dict[str, Folder]] = {}
        self._labels: dict[int, list[str]] = {}
        self._ledger: list[Delivered] = []
        began = numbered_from.timestamp() if numbered_from else None
        self._next_msgid = int(began * 1000) * 10**6 if began else _FIRST_MSGID  # the last digits count the mails: demo_handler
        self._next_uidvalidity = int(began) if began else _FIRST_UIDVALIDITY
        self._watchers: set[Callable[[], None]] = set()

    def add_account(self, account: str) -> None:
        """Make the account with its standard folders; again: nothing."""
        with self._lock:
            if account in self._accounts:
                return
            folders = self._accounts[account] = {}
            for name, (special_use, label) in (_GMAIL_FOLDERS if self.gmail else _PLAIN_FOLDERS).items():
                folders[name] = Folder(name, special_use, label, self._new_uidvalidity())

    def accounts(self) -> list[str]:
        with self._lock:
            return list(self._accounts)

    def create(self, account: str, mailbox: str) -> None:
        """Make a user folder (in Gmail: a label); again: nothing."""
        with self._lock:
            folders = self._accounts[account]
            if canonical(mailbox) not in folders:
                folders[mailbox] = Folder(mailbox, "", mailbox if self.gmail else "", self._new_uidvalidity())

    def rename(self, account: str, mailbox: str, name: str) -> None:
        """Call a folder otherwise, as an account in another language does; sessions that have it open are ended."""
        with self._lock:
            folder = self._folder(account, mailbox)
            self._accounts[account] = {name if held is folder else key: held for key, held in self._accounts[account].items()}
            folder.name = name
            self._tell_watchers()

    def hide(self, account: str, mailbox: str, *, hidden: bool) -> None:
        """Gmail's "Show in IMAP" of a label: what is hidden is neither listed nor opened."""
        with self._lock:
            self._folder(account, mailbox).hidden = hidden
            self._tell_watchers()

    def folders(self, account: str) -> list[tuple[str, str]]:
        """(name, special-use attribute or "") of each folder that IMAP shows."""
        with self._lock:
            return [(folder.name, folder.special_use) for folder in self._accounts[account].values() if not folder.hidden]

    def deliver(
        self, account: str, mailbox: str, raw: bytes, *, internal_date: datetime | None, kind: str, flags: Iterable[str] = ()
    ) -> int:
        """Put a new mail into `mailbox` (made if need be) and into All Mail; its UID in `mailbox`. Line ends as given."""
        moment = (internal_date or self._clock.wall()).astimezone(UTC).replace(microsecond=0)
        header_end = _header_end(raw)
        digest = hashlib.sha256(raw).hexdigest()
        with self._lock:
            self.add_account(account)
            self.create(account, mailbox)
            message = Message(raw, moment, self._next_msgid, header_end)
            self._next_msgid += 1
            folder = self._folder(account, mailbox)
            uid = self._show(folder, message, flags)
            if self.gmail and folder.special_use not in _OUTSIDE_ALL_MAIL:
                self._show(self._all_mail(account), message, flags)
            self._ledger.append(
                Delivered(
                    account=account,
                    mailbox=folder.name,
                    uid=uid,
                    uidvalidity=folder.uidvalidity,
                    gm_msgid=str(message.gm_msgid),
                    internal_date=moment,
                    size=len(raw),
                    sha256=digest,
                    kind=kind,
                    subject=_subject(raw[:header_end]),
                )
            )
            self._tell_watchers()
            return uid

    def copy(self, account: str, uid: int, source: str, target: str) -> int:
        """Show a mail in a further folder (in Gmail: give it a label); its UID there. KeyError: no such UID in `source`."""
        with self._lock:
            entry = self._folder(account, source).entries[uid]
            self.create(account, target)
            new_uid = self._show(self._folder(account, target), entry.message, entry.flags)
            self._tell_watchers()
            return new_uid

    def expunge(self, account: str, mailbox: str, uid: int) -> None:
        """Take a mail out of one folder; the ledger keeps it. KeyError: no such UID."""
        with self._lock:
            folder = self._folder(account, mailbox)
            entry = folder.entries.pop(uid)
            del folder.uids[bisect_left(folder.uids, uid)]
            folder.removals += 1
            if folder.label:
                self._labels[entry.message.gm_msgid].remove(folder.label)
            self._tell_watchers()

    def change_uidvalidity(self, account: str, mailbox: str, *, shuffle_seed: int | None = None) -> int:
        """Number the folder anew from 1 under a higher UIDVALIDITY (returned); with a seed, in a shuffled order."""
        with self._lock:
            folder = self._folder(account, mailbox)
            entries = [folder.entries[uid] for uid in folder.uids]
            if shuffle_seed is not None:
                random.Random(shuffle_seed).shuffle(entries)
            folder.uids = list(range(1, len(entries) + 1))
            folder.entries = dict(zip(folder.uids, entries, strict=True))
            folder.uidnext = len(entries) + 1
            folder.uidvalidity = self._new_uidvalidity()
            self._tell_watchers()
            return folder.uidvalidity

    def status(self, account: str, mailbox: str) -> Status:
        with self._lock:
            folder = self._shown_folder(account, mailbox)
            unseen = sum("\\Seen" not in entry.flags for entry in folder.entries.values())
            return Status(len(folder.uids), unseen, folder.uidnext, folder.uidvalidity)

    def view(self, account: str, mailbox: str) -> View:
        """A session's own picture of a folder."""
        with self._lock:
            folder = self._shown_folder(account, mailbox)
            return View(folder.name, folder.uidvalidity, folder.removals, list(folder.uids))

    def entries(self, account: str, view: View, uids: Sequence[int]) -> list[tuple[int, Entry]]:
        """Those of `uids` that are still there, as copies of their entries."""
        with self._lock:
            held = self._seen_by(account, view).entries
            return [(uid, Entry(held[uid].message, held[uid].flags)) for uid in uids if uid in held]

    def labels(self, message: Message) -> tuple[str, ...]:
        """X-GM-LABELS of a mail."""
        with self._lock:
            return tuple(self._labels.get(message.gm_msgid, ()))

    def mark_seen(self, account: str, view: View, uids: Iterable[int]) -> None:
        with self._lock:
            held = self._seen_by(account, view).entries
            for uid in uids:
                if uid in held:
                    held[uid].flags |= {"\\Seen"}

    def changed(self, account: str, view: View) -> bool:
        """Would `catch_up` find anything?"""
        with self._lock:
            folder = self._seen_by(account, view)
            return folder.removals != view.removals or folder.uids[-1:] != view.uids[-1:]

    def catch_up(self, account: str, view: View) -> tuple[list[int], bool]:
        """Bring `view` up to date: (positions removed, counted as EXPUNGE counts them; did it grow)."""
        with self._lock:
            folder = self._seen_by(account, view)
            removed: list[int] = []
            if folder.removals != view.removals:
                gone = [position for position, uid in enumerate(view.uids, 1) if uid not in folder.entries]
                removed = [position - before for before, position in enumerate(gone)]
                view.uids = [uid for uid in view.uids if uid in folder.entries]
                view.removals = folder.removals
            fresh = folder.uids[bisect_right(folder.uids, view.uids[-1]) if view.uids else 0 :]
            view.uids.extend(fresh)
            return removed, bool(fresh)

    def ledger(self) -> list[Delivered]:
        with self._lock:
            return list(self._ledger)

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` (it must not block) after each change, from the thread that made it, until `unwatch`."""
        with self._lock:
            self._watchers.add(wake)

    def unwatch(self, wake: Callable[[], None]) -> None:
        with self._lock:
            self._watchers.discard(wake)

    def _tell_watchers(self) -> None:
        for wake in self._watchers:
            wake()

    def _folder(self, account: str, mailbox: str) -> Folder:
        try:
            return self._accounts[account][canonical(mailbox)]
        except KeyError:
            raise UnknownFolder(mailbox) from None

    def _all_mail(self, account: str) -> Folder:
        return next(folder for folder in self._accounts[account].values() if folder.special_use == "\\All")

    def _shown_folder(self, account: str, mailbox: str) -> Folder:
        folder = self._folder(account, mailbox)
        if folder.hidden:
            raise UnknownFolder(mailbox)
        return folder

    def _seen_by(self, account: str, view: View) -> Folder:
        folder = self._accounts[account].get(view.name)
        if folder is None or folder.hidden or folder.uidvalidity != view.uidvalidity:
            raise Rebuilt
        return folder

    def _show(self, folder: Folder, message: Message, flags: Iterable[str]) -> int:
        uid = folder.uidnext
        folder.uidnext += 1
        folder.uids.append(uid)
        folder.entries[uid] = Entry(message, frozenset(flags))
        if folder.label:
            self._labels.setdefault(message.gm_msgid, []).append(folder.label)
        return uid

    def _new_uidvalidity(self) -> int:
        self._next_uidvalidity += 1
        return self._next_uidvalidity


@dataclass
class View:
    """What one session knows of its folder: the UIDs in the order of their sequence numbers."""

    name: str
    uidvalidity: int
    removals: int
    uids: list[int]


def canonical(mailbox: str) -> str:
    """INBOX is the one name without regard to case (RFC 3501, 5.1)."""
    return "INBOX" if mailbox.upper() == "INBOX" else mailbox


def _header_end(raw: bytes) -> int:
    ends = [at + len(gap) for gap in (b"\r\n\r\n", b"\n\n") if (at := raw.find(gap)) >= 0]
    return min(ends, default=len(raw))


def _subject(header: bytes) -> str:
    """The subject as it stands in the header, unfolded and undecoded: enough for people to find a mail."""
    for line in header.replace(b"\r\n ", b" ").replace(b"\n ", b" ").splitlines():
        if line[:8].lower() == b"subject:":
            return line[8:].strip().decode("ascii", "backslashreplace")
    return ""
