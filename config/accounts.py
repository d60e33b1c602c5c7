"""Whose mail is read, and how: from GMAIL_USERNAME, or from the TOML file ACCOUNTS_FILE with one table for each account.

    [[account]]
    username = "ann@example.com"
    mailboxes = ["INBOX", '\\Sent']
    initial_sync = "since:30d"

    [[account]]
    username = "post@example.org"
    host = "imap.example.org"
    auth_method = "password"
    password_file = "secrets/post"

The keys are the fields of MailSettings. Strongest first: a command-line flag, the account's table, the environment, `.env`.
Paths are relative to the working directory, as everywhere.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.settings import MailSettings, SettingsError, first_fault

OF_ALL_ACCOUNTS = ("usernames", "accounts_file", "password")  # `password`: secrets stay out of a file that people show around
KEYS = {name: str(field.alias) for name, field in MailSettings.model_fields.items() if name not in OF_ALL_ACCOUNTS}
NAMES = {variable: name for name, variable in KEYS.items()}


@dataclass(frozen=True)
class Account:
    """`username`: "" is the account of the token file, whoever that is. `mail`: the settings that hold for it."""

    username: str
    mail: MailSettings


def load_accounts(mail: MailSettings, flags: Mapping[str, Any] | None = None) -> tuple[Account, ...]:
    """The accounts to read. `flags`: variable → value given on the command line; None means not given.

    Raises SettingsError: one line that names file, account and key, or the variable.
    """
    if mail.accounts_file is None:
        accounts = tuple(Account(username, mail) for username in _once(mail.usernames) or ("",))
    else:
        given = {name for name, value in (flags or {}).items() if value is not None}
        accounts = _chosen(_read(mail.accounts_file, mail, given), mail)
    for account in accounts:
        _check(account, accounts)
    return accounts


def _read(path: Path, mail: MailSettings, given: set[str]) -> tuple[Account, ...]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"ACCOUNTS_FILE={path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"ACCOUNTS_FILE={path}: not TOML: {error}") from None
    tables = content.pop("account", None)
    if content:
        raise SettingsError(f"{path}: {next(iter(content))}: no such table; each account is an [[account]]")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{path}: there is no [[account]] in it")
    accounts: list[Account] = []
    for number, table in enumerate(tables, 1):
        account = _account(path, number, table, mail, given)
        if account.username.casefold() in (other.username.casefold() for other in accounts):
            raise SettingsError(f"{path}: account {account.username}: username: stands there twice")
        accounts.append(account)
    return tuple(accounts)


def _account(path: Path, number: int, table: Mapping[str, Any], mail: MailSettings, given: set[str]) -> Account:
    username = table.get("username")
    if not isinstance(username, str) or not username.strip():
        raise SettingsError(f"{path}: account {number}: username: is missing or not a text")
    title = f"{path}: account {username}"
    own = {key: value for key, value in table.items() if key != "username"}
    for key in own:
        if key == "password":
            raise SettingsError(f"{title}: password: secrets have no place here; put it into a file and name that: password_file")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise SettingsError(f"{title}: {key}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
    values = {str(field.alias): getattr(mail, name) for name, field in MailSettings.model_fields.items()}
    values |= {KEYS[key]: value for key, value in own.items() if KEYS[key] not in given}
    try:
        return Account(username, MailSettings(**{**values, "GMAIL_USERNAME": (username,)}))
    except ValidationError as error:
        variable, *told = first_fault(MailSettings, error)
        raise SettingsError(f"{title}: " + "=".join([NAMES.get(variable, variable), *told])) from None


def _chosen(accounts: tuple[Account, ...], mail: MailSettings) -> tuple[Account, ...]:
    known = {account.username.casefold(): account for account in accounts}
    for username in mail.usernames:
        if username.casefold() not in known:
            raise SettingsError(f"GMAIL_USERNAME={username}: there is no such account in {mail.accounts_file}")
    return tuple(known[username.casefold()] for username in _once(mail.usernames)) or accounts


def _once(usernames: Sequence[str]) -> tuple[str, ...]:
    return tuple({username.casefold(): username for username in usernames}.values())


def _check(account: Account, accounts: Sequence[Account]) -> None:
    """What is needed to log in is there, and belongs to this account."""
    mail = account.mail
    method = mail.auth_method
    if method != "oauth2" and not account.username:
        raise SettingsError(f"AUTH_METHOD={method}: GMAIL_USERNAME is not set")
    if method == "service_account" and mail.service_account_file is None:
        raise SettingsError(f"{_named(account, 'auth_method')}={method}: {_named(account, 'service_account_file')} is not set")
    if method == "password" and mail.password_file is None and mail.password is None:
        raise SettingsError(f"{_named(account, 'auth_method')}={method}: {_named(account, 'password_file')} is not set")
    secret = {"oauth2": "token_file", "password": "password_file"}.get(method)
    if secret:
        alike = [other for other in accounts if other.mail.auth_method == method and _secret(other) == _secret(account)]
        if _secret(account) and len(alike) > 1:  # another account's password, tried again and again, locks an account
            names = ", ".join(other.username for other in alike)
            raise SettingsError(f"{_named(account, secret)}: is of one account, not of {names}; give each its own")


def _named(account: Account, name: str) -> str:
    path = account.mail.accounts_file
    return f"{path}: account {account.username}: {name}" if path else KEYS[name]


def _secret(account: Account) -> object:
    mail = account.mail
    return mail.token_file if mail.auth_method == "oauth2" else mail.password_file or mail.password
