"""Workspace service accounts with domain-wide delegation: one key opens many mailboxes, nobody consents.

The key signs a JWT in the name of an account, the endpoint answers with an access token of that account (RFC 7523;
https://developers.google.com/identity/protocols/oauth2/service-account). Tokens live in memory only.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from google.auth.exceptions import GoogleAuthError
from google.oauth2.service_account import Credentials

from src.auth.endpoint import Refused, renew
from src.auth.oauth2_gmail import SCOPE, expiry_facts
from src.auth.secret_file import read_secret, stamp_of
from src.common.circuit_breaker import Breakers
from src.common.clock import Clock
from src.common.exceptions import ConfigurationError, ReauthRequired, TokenEndpointUnavailable

GUIDE = "docs/OAUTH2_SETUP.md, section 10"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyInfo:
    """What may be shown of a key; "(not in the key file)" where it does not say."""

    client_email: str
    client_id: str
    project: str
    key_id: str
    token_uri: str


class ServiceAccountSource:
    """Access tokens of one account by the key in `path`, for any number of threads.

    `timeout`: seconds a connect to or a read from the endpoint may take. `refresh_ahead`: seconds before its end at which a
    token is replaced. `breakers`: see `renew`. A new key file is noticed at the next token.
    """

    def __init__(
        self,
        path: Path,
        account: str,
        *,
        clock: Clock,
        timeout: float = 20.0,
        refresh_ahead: float = 300.0,
        breakers: Breakers | None = None,
    ) -> None:
        self._path = path
        self._account = account
        self._clock = clock
        self._timeout = timeout
        self._refresh_ahead = timedelta(seconds=refresh_ahead)
        self._breakers = breakers
        self._lock = threading.Lock()
        self._token = ""
        self._until = datetime.min.replace(tzinfo=UTC)

    def access_token(self, *, refuse: str | None = None) -> str:
        """A token that is good for at least `refresh_ahead`, or as good as can be had; never `refuse`, which a server refused.

        Raises ReauthRequired (cause and cure), TokenEndpointUnavailable, ConfigurationError (the key file).
        """
        with self._lock:
            if self._usable(refuse, self._refresh_ahead):
                return self._token
            try:
                self._token, self._until = self._ask()
            except TokenEndpointUnavailable as error:
                if not self._usable(refuse, timedelta(0)):
                    raise
                _log.warning("%s: the token is not refreshed yet: %s", self._account, error)
            return self._token

    def stamp(self) -> object:
        """Changes when a person has put another key into the file's place."""
        return stamp_of(self._path)

    def info(self) -> KeyInfo:
        """What may be shown of the key, without asking anybody. Raises ConfigurationError where it cannot be used."""
        key, _ = self._signer()
        fields = ("client_email", "client_id", "project_id", "private_key_id", "token_uri")
        return KeyInfo(*(str(key.get(name) or "(not in the key file)") for name in fields))

    def facts(self) -> dict[str, object]:
        """What /status shows of the token: when it ends, if there is one."""
        token, until = self._token, self._until
        return {"method": "service_account", **(expiry_facts(until, self._clock.wall()) if token else {})}

    def _usable(self, refuse: str | None, ahead: timedelta) -> bool:
        return self._token not in ("", refuse) and self._clock.wall() + ahead < self._until

    def _ask(self) -> tuple[str, datetime]:
        key, credentials = self._signer()
        try:
            return renew(credentials, str(key["token_uri"]), self._timeout, self._breakers)
        except Refused as error:
            who = key.get("client_email", "the service account")
            raise ReauthRequired(
                f"Google does not let {who} read {self._account} ({error}); likely: {_likely(error, key)}; see {GUIDE}"
            ) from error

    def _signer(self) -> tuple[dict[str, Any], Any]:
        key = self._key()
        try:
            credentials = Credentials.from_service_account_info(  # type: ignore[no-untyped-call]  # google-auth has no types there
                key, scopes=[SCOPE], subject=self._account
            )
        except (GoogleAuthError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"the key file {self._path} is of no use ({type(error).__name__}); see {GUIDE}") from None
        return key, credentials

    def _key(self) -> dict[str, Any]:
        content = read_secret(self._path, "the key file", f"there is no key file {self._path} of a service account; see {GUIDE}")
        try:
            key = json.loads(content)
        except ValueError:
            key = None
        if not isinstance(key, dict) or key.get("type") != "service_account":
            raise ConfigurationError(f"the key file {self._path} is not the JSON key of a service account; see {GUIDE}")
        return key


def _likely(error: Refused, key: dict[str, Any]) -> str:
    """What to mend, by the endpoint's words (https://developers.google.com/identity/protocols/oauth2/service-account#error-codes)."""
    if error.error == "unauthorized_client":
        return (
            f"the administrator has not allowed client id {key.get('client_id', '(see the key file)')} the scope {SCOPE} "
            "(Admin console: Security, API controls, Domain-wide delegation)"
        )
    text = str(error).lower()
    if "email or user" in text:
        return "there is no such account in the Workspace, or it is an alias"
    if "signature" in text or "key" in text:
        return "the key was deleted in Google Cloud: make a new one"
    if "iat" in text or "timeframe" in text:
        return "the clock of this machine is wrong"
    return "the service account or its key was disabled or deleted"
