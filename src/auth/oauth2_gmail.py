"""Google's OAuth 2.0 for IMAP: the token file, and access tokens that are always fresh.

One token file per account, shared by every process that uses it. The file is the truth: a token is read from it each time,
and refreshed by whoever holds the lock beside it, so that threads and processes together ask the endpoint once
(RFC 6749 section 6, https://developers.google.com/identity/protocols/oauth2).

    python -m src.auth.oauth2_gmail --setup | --info | --refresh | --revoke [--username U] [--token-file F]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from google.oauth2.credentials import Credentials

from config.accounts import Account, load_accounts
from config.settings import MailSettings, SettingsError, load_settings
from src.auth.endpoint import Refused, renew
from src.auth.secret_file import read_secret
from src.common.circuit_breaker import Breakers
from src.common.clock import SYSTEM, Clock, iso
from src.common.exceptions import ConfigurationError, IngestionError, ReauthRequired, TokenEndpointUnavailable

SCOPE = "https://mail.google.com/"
TOKEN_URI = "https://oauth2.googleapis.com/token"  # noqa: S105 - an address
SINGLE_TOKEN = "gmail_token.json"  # noqa: S105 - a file name, in TOKEN_DIR
TESTING_DAYS = 7
IDLE_DAYS = 180

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredToken:
    """A token file's content. `access_token` may be "" and `expiry` None (not known): then it is refreshed before use.

    `expiry` is an aware UTC time; `obtained_at` says when a person consented, ISO 8601 in UTC, "" if not known.
    """

    account: str
    client_id: str
    client_secret: str = field(repr=False)
    refresh_token: str = field(repr=False)
    access_token: str = field(repr=False)
    expiry: datetime | None
    scopes: tuple[str, ...]
    token_uri: str
    obtained_at: str


@dataclass(frozen=True)
class TokenInfo:
    """What may be shown of a token. `seconds_left`: of the access token, 0.0 when it has none or it ran out."""

    path: Path
    account: str
    scopes: tuple[str, ...]
    token_uri: str
    obtained_at: str
    expiry: datetime | None
    seconds_left: float


def token_files(mail: MailSettings, account: str) -> tuple[Path, ...]:
    """Where the token of `account` may stand, the first that exists counts: its own file, then that of a single account."""
    if mail.token_file:
        return (mail.token_file,)
    single = mail.token_dir / SINGLE_TOKEN
    return (mail.token_dir / f"{account}.json", single) if account else (single,)


def first_existing(paths: Sequence[Path]) -> Path:
    """The last one where none exists."""
    return next((path for path in paths if path.exists()), paths[-1])


def setup_command(account: str = "") -> str:
    """The command that makes a person consent again."""
    return "python producer.py --auth-setup" + (f" --username {shlex.quote(account)}" if account else "")


def read_token(path: Path, account: str = "") -> StoredToken:
    """The token file at `path`; `account` only completes the command an error names.

    Raises ConfigurationError, in one line, when the file is missing, open to other users, or not a token file.
    """
    content = read_secret(path, "the token file", f"there is no token file {path}; run: {setup_command(account)}")
    try:
        return _decode(json.loads(content))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else "it is not an authorized_user JSON"
        raise ConfigurationError(f"the token file {path} is of no use: {what}; run: {setup_command(account)}") from None


def write_token(path: Path, token: StoredToken) -> None:
    """Replace the file at once and durably, mode 0600: after a crash there is the old one or the new one. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp creates with mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(_encode(token), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:  # a stop too: the half-written file goes, the error goes on
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with the token file: flock on `<path>.lock` excludes threads and processes alike, for each opens it anew.

    Raises ConfigurationError when the lock file cannot be made.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{lock} cannot be opened, and tokens are refreshed under it: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class TokenSource:
    """Access tokens of one account out of one token file; for any number of threads and processes.

    `instead`: the file that counts while there is no `path`. `timeout`: seconds a connect to or a read from the endpoint may
    take. `refresh_ahead`: seconds before its end at which a token is replaced. `breakers`: see `renew`. `keep`: refreshed tokens are
    written back (a dry run writes nothing, not even a lock file). Raises ConfigurationError from any method but `stamp` and `facts`
    when the file is missing, unusable or another account's.
    """

    def __init__(
        self,
        path: Path,
        account: str,
        *,
        instead: Path | None = None,
        clock: Clock = SYSTEM,
        timeout: float = 20.0,
        refresh_ahead: float = 300.0,
        breakers: Breakers | None = None,
        keep: bool = True,
    ) -> None:
        self._paths = (path, instead) if instead else (path,)
        self._account = account
        self._clock = clock
        self._timeout = timeout
        self._refresh_ahead = timedelta(seconds=refresh_ahead)
        self._breakers = breakers
        self._keep = keep
        self._unsaved: StoredToken | None = None

    def access_token(self, *, refuse: str | None = None) -> str:
        """A token that is good for at least `refresh_ahead`, or as good as can be had.

        `refuse`: a token some server just refused; it is not handed out again. Raises ReauthRequired (the text holds the
        cause and the command) and TokenEndpointUnavailable; the latter only once the stored token is over or refused.
        """
        path = self._path
        token = self._read(path)
        if self._fresh(token, refuse):
            return token.access_token
        with locked(path) if self._keep else nullcontext():
            token = self._read(path)
            if self._fresh(token, refuse):
                return token.access_token
            try:
                refreshed = _refresh(token, self._timeout, self._account, self._clock.wall(), self._breakers)
            except TokenEndpointUnavailable as error:
                if not self._valid(token, refuse, timedelta(0)):
                    raise
                _log.warning("%s: the token is not refreshed yet: %s", self._account, error)
                return token.access_token
            if self._path == path and self._read(path).refresh_token == token.refresh_token:
                self._save(path, refreshed)
                return refreshed.access_token
        return self.access_token(refuse=refuse)  # a person consented meanwhile: that counts, and is not written over

    def stamp(self) -> object:
        """Changes when a person has consented anew or mended the file; not when a token is refreshed, which others do too."""
        try:
            token = self._read(self._path)
        except ConfigurationError as error:
            return str(error)
        return token.client_id, token.client_secret, token.refresh_token, token.obtained_at

    def facts(self) -> dict[str, object]:
        """What /status shows of the token: how old the consent is, when the access token ends."""
        try:
            token = self._read(self._path)
        except ConfigurationError as error:
            return {"method": "oauth2", "error": str(error)}
        now = self._clock.wall()
        age = days_since(token.obtained_at, now)
        return {
            "method": "oauth2",
            "consented": token.obtained_at,
            "consented_days_ago": None if age is None else round(age, 2),
            **(expiry_facts(token.expiry, now) if token.expiry and token.access_token else {}),
        }

    @property
    def _path(self) -> Path:
        return first_existing(self._paths)

    def info(self) -> TokenInfo:
        """What may be shown of the token, without asking anybody."""
        path = self._path
        token = self._read(path)
        left = (token.expiry - self._clock.wall()).total_seconds() if token.expiry and token.access_token else 0.0
        return TokenInfo(path, token.account, token.scopes, token.token_uri, token.obtained_at, token.expiry, max(0.0, left))

    def _fresh(self, token: StoredToken, refuse: str | None) -> bool:
        return self._valid(token, refuse, self._refresh_ahead)

    def _valid(self, token: StoredToken, refuse: str | None, ahead: timedelta) -> bool:
        usable = token.access_token not in ("", refuse)
        return usable and token.expiry is not None and self._clock.wall() + ahead < token.expiry

    def _read(self, path: Path) -> StoredToken:
        stored = read_token(path, self._account)
        if stored.account and self._account and stored.account.casefold() != self._account.casefold():
            raise ConfigurationError(f"the token file {path} belongs to {stored.account}, not to {self._account}")
        unsaved = self._unsaved
        if unsaved is not None and unsaved.obtained_at == stored.obtained_at and _expiry(unsaved) > _expiry(stored):
            return unsaved
        return stored

    def _save(self, path: Path, token: StoredToken) -> None:
        """Store it for everybody; where the disk refuses, this process goes on with it alone."""
        if not self._keep:
            self._unsaved = token
            return
        try:
            write_token(path, token)
        except OSError as error:
            _log.warning("the token file %s cannot be written: %s", path, error.strerror)
            self._unsaved = token
        else:
            self._unsaved = None


def _refresh(token: StoredToken, timeout: float, account: str, now: datetime, breakers: Breakers | None) -> StoredToken:
    """Ask the endpoint once. A 200 may carry a new refresh token, which then replaces the old one."""
    credentials: Any = Credentials(  # type: ignore[no-untyped-call]  # google-auth has no types there
        token=None,
        refresh_token=token.refresh_token,
        token_uri=token.token_uri,
        client_id=token.client_id,
        client_secret=token.client_secret,
    )
    try:
        access_token, expiry = renew(credentials, token.token_uri, timeout, breakers)
    except Refused as error:
        account = account or token.account
        raise ReauthRequired(
            f"Google refuses the token of {account} ({error}); likely: {likely_cause(token, error.error, now)}; "
            f"run: {setup_command(account)}"
        ) from error
    return replace(token, access_token=access_token, expiry=expiry, refresh_token=credentials.refresh_token)


def likely_cause(token: StoredToken, error: str, now: datetime) -> str:
    """Why the endpoint gave the verdict `error` (RFC 6749 section 5.2), as far as the token's dates tell.

    (https://developers.google.com/identity/protocols/oauth2#expiration)
    """
    if error != "invalid_grant":
        return "the client was deleted in Google Cloud, or its secret is a new one"
    if token.expiry and (now - token.expiry).days >= IDLE_DAYS:
        return f"it was not used for {(now - token.expiry).days} days; after six months a consent ends"
    age = days_since(token.obtained_at, now)
    if age is not None and TESTING_DAYS <= round(age, 1) <= TESTING_DAYS + 1:
        return f"the app is in testing, where a consent ends after {TESTING_DAYS} days: publish it, then consent once more"
    return "the account has a new password, or its owner or an administrator took the access back"


def expiry_facts(until: datetime, now: datetime) -> dict[str, object]:
    """When an access token ends, for /status."""
    return {"expires": iso(until), "expires_in_seconds": round((until - now).total_seconds())}


def _expiry(token: StoredToken) -> datetime:
    return token.expiry or datetime.min.replace(tzinfo=UTC)


def _decode(content: dict[str, Any]) -> StoredToken:
    required = {name: content[name] for name in ("client_id", "client_secret", "refresh_token")}
    optional = {name: content.get(name, "") for name in ("account", "token", "expiry", "obtained_at")}
    token_uri = content.get("token_uri", TOKEN_URI)
    if not all(isinstance(value, str) for value in (*required.values(), *optional.values(), token_uri)):
        raise TypeError("a field is not a text")
    expiry = datetime.fromisoformat(optional["expiry"]) if optional["expiry"] else None
    return StoredToken(
        account=optional["account"],
        access_token=optional["token"],
        expiry=expiry.replace(tzinfo=UTC) if expiry and expiry.tzinfo is None else expiry,
        scopes=tuple(map(str, content.get("scopes", []))),
        token_uri=token_uri,
        obtained_at=optional["obtained_at"],
        **required,
    )


def _encode(token: StoredToken) -> dict[str, object]:
    return {
        "type": "authorized_user",
        "account": token.account,
        "client_id": token.client_id,
        "client_secret": token.client_secret,
        "refresh_token": token.refresh_token,
        "token": token.access_token,
        "expiry": iso(token.expiry) if token.expiry else "",
        "scopes": list(token.scopes),
        "token_uri": token.token_uri,
        "obtained_at": token.obtained_at,
    }


def main(arguments: Sequence[str]) -> int:
    """Get, show, refresh or give back a token.

    Exit codes: 0, 1 consent denied or endpoint not to be had, 2 no usable setting or file, 3 a person must consent.
    """
    parser = argparse.ArgumentParser(prog="python -m src.auth.oauth2_gmail", description="What accounts log in with.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--setup", action="store_true", help="ask for Google's consent, as producer.py --auth-setup does")
    action.add_argument(
        "--info", action="store_true", help="show account, scopes, age, expiry and what ends it, of every account; no secret"
    )
    action.add_argument("--refresh", action="store_true", help="get a new access token now and store it")
    action.add_argument("--revoke", action="store_true", help="take the consent back at Google and remove the token file")
    parser.add_argument("--username", metavar="U", help="the account (default: the one of gmail_token.json; --info: all)")
    parser.add_argument("--no-browser", action="store_true", help="with --setup: show the address, open no browser")
    parser.add_argument("--token-file", type=Path, metavar="F", help="default: the account's in TOKEN_DIR")
    flags = parser.parse_args(arguments)
    try:
        given = {"GMAIL_USERNAME": flags.username, "TOKEN_FILE": flags.token_file}
        if flags.token_file and not flags.setup:  # a file that is named outright is a consent's, whatever else is set
            given |= {"AUTH_METHOD": "oauth2", "ACCOUNTS_FILE": ""}
        settings = load_settings(given)
        accounts = load_accounts(settings.mail, given)
        if flags.setup:
            from src.auth.consent import set_up  # which stands on this module

            return set_up(settings.auth, accounts, with_browser=not flags.no_browser)
        if flags.revoke:
            from src.auth.consent import revoke

            path = _file_of(accounts, "--revoke")
            sys.stdout.write(f"{revoke(path)}: the consent is taken back; {path} is removed\n")
            return 0
        if flags.refresh:
            path = _file_of(accounts, "--refresh")
            stored = read_token(path, flags.username or "")
            TokenSource(path, flags.username or stored.account).access_token(refuse=stored.access_token)
        from src.auth.info import write_info

        return write_info(accounts, SYSTEM, sys.stdout, sys.stderr)
    except (SettingsError, IngestionError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, (SettingsError, ConfigurationError)) else 3 if isinstance(error, ReauthRequired) else 1


def _file_of(accounts: Sequence[Account], action: str) -> Path:
    """The token file of the one account that is meant."""
    if len(accounts) > 1:
        names = ", ".join(account.username for account in accounts)
        raise ConfigurationError(f"{action} is for one account, of {names}: --username says which")
    [account] = accounts
    if account.mail.auth_method != "oauth2":
        raise ConfigurationError(
            f"{account.username}: AUTH_METHOD={account.mail.auth_method} has no token file; {action} is for consents (see --info)"
        )
    return first_existing(token_files(account.mail, account.username))


def days_since(moment: str, now: datetime) -> float | None:
    try:
        return (now - datetime.fromisoformat(moment)) / timedelta(days=1)
    except (ValueError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
