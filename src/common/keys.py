"""Every key in Redis is built here and nowhere else. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

ALL_DAEMONS = "*:daemons"  # for SCAN: `Keys.daemons` of every stream in the database


@dataclass(frozen=True)
class MailboxKeys:
    """State of one (account, mailbox). The first four are plain strings that people read; `last_uid` is written last."""

    account: str
    mailbox: str

    def _key(self, suffix: str) -> str:
        return f"producer_state:{self.account}:{self.mailbox}:{suffix}"

    @cached_property
    def last_uid(self) -> str:
        return self._key("last_uid")

    @cached_property
    def uidvalidity(self) -> str:
        return self._key("uidvalidity")

    @cached_property
    def last_poll(self) -> str:
        return self._key("last_poll")

    @cached_property
    def email_count(self) -> str:
        return self._key("email_count")

    @cached_property
    def intake(self) -> str:
        """Hash: owner, until, epoch, batch (the fence) and boundary, horizon, first_complete, passed, floor (the read by date), resync."""
        return self._key("intake")


@dataclass(frozen=True)
class Keys:
    """The stream and what stands beside it. One server: `<stream>:<suffix>`. One stream a database: `producer_state:*` names none."""

    stream: str

    @cached_property
    def index(self) -> str:
        """Hash email_id → `S:<stream id>` (unfinished) or `D:<dead-letter id>`."""
        return f"{self.stream}:index"

    @cached_property
    def starts(self) -> str:
        """Hash email_id → `<solo starts>|<stream id>:<delivery count>` of a start that has not finished."""
        return f"{self.stream}:starts"

    @cached_property
    def tries(self) -> str:
        """Hash email_id → `<failed attempts>|<last delivery count>|<first failure in ms, or nothing before one>`."""
        return f"{self.stream}:tries"

    @cached_property
    def due(self) -> str:
        """Sorted set `<stream id>|<email_id>` by due time in ms: mail that waits for its next attempt."""
        return f"{self.stream}:due"

    @cached_property
    def dlq(self) -> str:
        """Stream of dead letters."""
        return f"{self.stream}:dlq"

    @cached_property
    def results(self) -> str:
        """Stream of {email_id, outcome, result, …}: a bounded log."""
        return f"{self.stream}:results"

    def steps(self, email_id: str) -> str:
        """Hash step → JSON: what the steps of this mail returned (`context.once`)."""
        return f"{self.stream}:steps:{email_id}"

    @cached_property
    def open(self) -> str:
        """Hash `<account>|<mailbox>|<YYYYMMDD>` → how many unfinished or dead mails have that INTERNALDATE day."""
        return f"{self.stream}:open"

    @cached_property
    def daemons(self) -> str:
        """Hash name → `<ms of the last heartbeat>|<JSON>`: the daemons at work (`src.common.registry`)."""
        return f"{self.stream}:daemons"

    @classmethod
    def of_daemons(cls, key: str) -> Keys:
        """The keys of the stream whose `daemons` is `key`, one that `ALL_DAEMONS` finds."""
        return cls(key.removesuffix(":daemons"))

    @cached_property
    def paused(self) -> str:
        """Hash `workers`, `<account>|`, `<account>|<mailbox>` or `|<mailbox>` → `<since>|<reason>` (`src.common.pauses`)."""
        return f"{self.stream}:paused"

    def run(self, name: str) -> str:
        """Set of the email_ids that a run of `scripts/reprocess.py` brought back."""
        return f"{self.stream}:run:{name}"

    @cached_property
    def runs_pattern(self) -> str:
        """For SCAN: the sets of all runs."""
        return f"{escaped(self.stream)}:run:*"

    @cached_property
    def erasing(self) -> str:
        """Set of what `scripts/erase.py` has still to do: references of raw mail to remove, keys of streams to write anew."""
        return f"{self.stream}:erasing"

    def copy(self, stream: str) -> str:
        """What `scripts/erase.py` writes anew of `stream`, dead letters or results, until it takes its place."""
        return f"{self.erasing}:copy:{stream.removeprefix(f'{self.stream}:')}"

    def processed(self, account: str, internal_date: str) -> str:
        """Set of the members (see `src.mail.record.member_of`) of finished mail: one per account and INTERNALDATE day.

        `internal_date`: ISO 8601 in UTC, or "" where the server gave none.
        """
        return self.processed_day(account, day_of(internal_date))

    def processed_day(self, account: str, day: str) -> str:
        """The same of a day as it stands in the key: YYYYMMDD, or `undated`."""
        return f"{self.stream}:processed:{account}:{day}"

    def processed_pattern(self, account: str | None = None) -> str:
        """For SCAN: the sets of `account`, or of all. Those of an account whose name goes on with a colon match too."""
        return f"{escaped(self.stream)}:processed:{'*' if account is None else escaped(account)}:*"

    def patterns(self) -> tuple[str, str, str]:
        """For SCAN: every key that `is_data` may be true of, once each."""
        return "producer_state:*", escaped(self.stream), f"{escaped(self.stream)}:*"

    def is_data(self, key: str) -> bool:
        """Whether `key` belongs into a backup: all of ours but the daemons that are at work now and what a restore has laid aside."""
        ours = self.is_of_stream(key) or key.startswith("producer_state:")
        return ours and key != self.daemons and not key.startswith(f"{self.stream}:restoring:")

    def is_of_stream(self, key: str) -> bool:
        return key == self.stream or key.startswith(f"{self.stream}:")

    def is_processed(self, key: str) -> bool:
        return key.startswith(f"{self.stream}:processed:")

    def is_last_uid(self, key: str) -> bool:
        return key.startswith("producer_state:") and key.endswith(":last_uid")

    def mailbox_of_last_uid(self, key: str) -> tuple[str, str]:
        """(account, mailbox) of such a key."""
        account, _, mailbox = key.removeprefix("producer_state:").removesuffix(":last_uid").partition(":")
        return account, mailbox

    def restoring(self, nonce: str, number: int) -> str:
        """Where a restore keeps its key `number` (from 0) until all are there and take their places in one step."""
        return f"{self.stream}:restoring:{nonce}:{number}"

    def restoring_pattern(self) -> str:
        """For SCAN: what restores have laid aside."""
        return f"{escaped(self.stream)}:restoring:*"

    def bytes_read(self, account: str, moment: str) -> str:
        """Counter of the bytes read from `account` on the day of `moment` (ISO 8601, UTC)."""
        return f"producer_state:{account}:bytes:{day_of(moment)}"

    def mailbox(self, account: str, mailbox: str) -> MailboxKeys:
        return MailboxKeys(account, mailbox)


def day_of(internal_date: str) -> str:
    """`2026-01-31T…` → `20260131`; "" → `undated`."""
    return internal_date[:10].replace("-", "") or "undated"


def open_field(account: str, mailbox: str, internal_date: str) -> str:
    return f"{account}|{mailbox}|{day_of(internal_date)}"


def escaped(text: str) -> str:
    """`text` as it stands in a glob pattern of SCAN."""
    return "".join(f"\\{char}" if char in "*?[]\\^" else char for char in text)
