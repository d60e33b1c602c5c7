"""What somebody paused by hand: mailboxes, accounts, all workers. It stands in Redis, for every daemon everywhere, until resumed. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence

BY_HAND = "paused by hand"
WORKERS = "workers"  # no mailbox's field: those hold a |


def field_of(account: str, mailbox: str) -> str:
    """Of `Keys.paused`. "" for `mailbox`: all of the account; for `account`: the folder of that name in all accounts."""
    return f"{account}|{mailbox}"


def fields_of(account: str, mailbox: str) -> list[str]:
    """Those that hold this mailbox up."""
    return [field_of(account, mailbox), field_of(account, ""), field_of("", mailbox)]


def parsed(target: str, accounts: Collection[str]) -> str:
    """The field of what a person names: `account`, `account/mailbox` (as in logs and /status), or a folder's name.

    `accounts`: known ones. Of others, what has an @ before the first slash is an account: folders may have slashes too.
    """
    account, _, mailbox = target.partition("/")
    known = account in accounts or "@" in account
    return field_of(account, mailbox) if known else field_of("", target)


def meant_by_none(targets: Sequence[str], mailboxes: Collection[tuple[str, str]]) -> list[str]:
    """Those of the fields `targets` that hold none of `mailboxes` (account, mailbox) up."""
    held = {field for account, mailbox in mailboxes for field in fields_of(account, mailbox)} | {WORKERS}
    return [field for field in targets if field not in held]


def named(field: str) -> str:
    """`field` as `parsed` reads it; `--workers` for the workers."""
    account, bar, mailbox = field.partition("|")
    if not bar:
        return "--workers"
    return f"{account}/{mailbox}" if account and mailbox else account or mailbox


def why(paused: Mapping[str, str], fields: Sequence[str]) -> str:
    """Why what `fields` name is held up, and what ends it; "" if it is not. `paused`: the hash of `Keys.paused`."""
    field = next((field for field in fields if field in paused), None)
    return "" if field is None else f"{told(paused[field])}; go on: ./scripts/resume.sh {shlex.quote(named(field))}"


def told(value: str) -> str:
    """`<since>|<reason>` for a person."""
    since, _, reason = value.partition("|")
    return f"{BY_HAND} since {since}" + (f" ({reason})" if reason else "")
