"""`python -m src.auth.oauth2_gmail --info`: what each account logs in with and what will end it. Asks nobody, shows no secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from config.accounts import Account
from src.auth.oauth2_gmail import SCOPE, TESTING_DAYS, TokenSource, days_since, first_existing, read_token, token_files
from src.auth.password import PasswordSource
from src.auth.service_account import ServiceAccountSource
from src.common.clock import Clock, iso
from src.common.exceptions import ConfigurationError


def write_info(accounts: Sequence[Account], clock: Clock, out: TextIO, err: TextIO) -> int:
    """A block of lines for each account. Exit code: 0, or 2 where something of an account cannot be used; the others are shown."""
    code, between = 0, ""
    for account in accounts:
        try:
            lines = _DESCRIBED[account.mail.auth_method](account, clock)
        except ConfigurationError as error:
            err.write(f"{account.username}: {error}\n" if account.username else f"{error}\n")
            code = 2
            continue
        out.write(between)
        out.writelines(f"{name + ':':16} {value}\n" for name, value in lines.items())
        between = "\n"
    return code


def _consent(account: Account, clock: Clock) -> Mapping[str, object]:
    path = first_existing(token_files(account.mail, account.username))
    info = TokenSource(path, account.username or read_token(path).account, clock=clock).info()
    left = f"good for {info.seconds_left:.0f} s, until {iso(info.expiry)}" if info.seconds_left and info.expiry else ""
    return {
        "account": info.account or "(not named in the file)",
        "logs in by": "a person's consent (AUTH_METHOD=oauth2)",
        "token file": info.path,
        "scopes": " ".join(info.scopes) or "(not named in the file)",
        "endpoint": info.token_uri,
        "consented": _age(info.obtained_at, clock.wall()),
        "access token": left or "none; the next use gets one",
        "ended by": f"{TESTING_DAYS} days after the consent if the app is in testing; 6 months without use; a new password; "
        "the account or its administrator; --revoke",
    }


def _service_account(account: Account, clock: Clock) -> Mapping[str, object]:
    path = account.mail.service_account_file
    assert path is not None, "load_accounts has seen to it"
    info = ServiceAccountSource(path, account.username, clock=clock).info()
    return {
        "account": account.username,
        "logs in by": "a service account with domain-wide delegation (AUTH_METHOD=service_account)",
        "service account": info.client_email,
        "client id": f"{info.client_id} (what the delegation in the Admin console names)",
        "project": info.project,
        "key file": f"{path}, {_written(path, clock.wall())}",
        "key id": info.key_id,
        "scopes": SCOPE,
        "endpoint": info.token_uri,
        "access token": "in the memory of each process, for an hour at most; never on disk",
        "ended by": "the delegation taken back in the Admin console; the key deleted, or expired where the organisation lets keys expire; "
        "the service account or its project disabled or deleted; the account suspended or renamed",
    }


def _password(account: Account, clock: Clock) -> Mapping[str, object]:
    mail = account.mail
    password = mail.password.get_secret_value() if mail.password else ""
    PasswordSource(account.username, mail.password_file, password, clock=clock).access_token()  # is it there, and nobody else's?
    path = mail.password_file
    return {
        "account": account.username,
        "logs in by": "a password (AUTH_METHOD=password)",
        "server": f"{mail.host}:{mail.port}",
        "password": f"in {path}, {_written(path, clock.wall())}" if path else "in IMAP_PASSWORD",
        "scopes": "none: a password opens all that the server offers",
        "ended by": "a new password, or whoever runs the server. An app password of Gmail: removed by its owner, a new password of the "
        "account, an administrator. A refused one is not tried again for an hour",
    }


_DESCRIBED = {"oauth2": _consent, "service_account": _service_account, "password": _password}


def _age(moment: str, now: datetime) -> str:
    days = days_since(moment, now)
    return "(not known)" if days is None else f"{moment}, {int(days)} days ago"


def _written(path: Path, now: datetime) -> str:
    """When the file was put there: the file's own time, since keys and passwords tell no date."""
    return f"written {_age(iso(datetime.fromtimestamp(path.stat().st_mtime, UTC)), now)}"
