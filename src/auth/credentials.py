"""How an account logs in: by a consent's token, a service account's key or a password, each as one thing that gives a secret."""

from __future__ import annotations

from typing import Protocol

from config.accounts import Account
from src.auth.oauth2_gmail import TokenSource, token_files
from src.auth.password import PasswordSource
from src.auth.service_account import ServiceAccountSource
from src.common.circuit_breaker import Breakers
from src.common.clock import Clock


class Credentials(Protocol):
    """`access_token`: what AUTHENTICATE wants now, an access token or a password; `refuse` is one that a server just refused.
    `stamp`: changes when a person has renewed what it is made from. `facts`: what /status shows of it, nothing secret; asks nobody."""

    def access_token(self, *, refuse: str | None = None) -> str: ...

    def stamp(self) -> object: ...

    def facts(self) -> dict[str, object]: ...


def credentials_of(account: Account, clock: Clock, *, breakers: Breakers | None = None, keep: bool = True) -> Credentials:
    """`breakers`: of a daemon. `keep`: refreshed tokens are written back (a dry run writes nothing)."""
    mail = account.mail
    if mail.auth_method == "service_account":
        assert mail.service_account_file is not None, "load_accounts has seen to it"
        return ServiceAccountSource(mail.service_account_file, account.username, clock=clock, breakers=breakers)
    if mail.auth_method == "password":
        password = mail.password.get_secret_value() if mail.password else ""
        return PasswordSource(account.username, mail.password_file, password, clock=clock)
    path, *instead = token_files(mail, account.username)
    return TokenSource(path, account.username, instead=instead[0] if instead else None, clock=clock, breakers=breakers, keep=keep)
