"""Google's token endpoint in small: refresh tokens, access tokens that expire, and the verdicts on both.

Error bodies as Google sends them (RFC 6749, 5.2; https://developers.google.com/identity/protocols/oauth2/native-app).
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from src.common.clock import Clock, iso

SCOPE = "https://mail.google.com/"
CLIENT_ID = "sandbox.apps.googleusercontent.example"
CLIENT_SECRET = "sandbox-client-secret"  # noqa: S105 - opens nothing but the sandbox


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: status and JSON body."""

    status: int
    body: Mapping[str, object]


@dataclass(frozen=True)
class _Access:
    account: str
    until: datetime


class Tokens:
    """Issues and judges tokens. `lifetime`: seconds an access token lives by the clock's wall time."""

    def __init__(self, lifetime: float, clock: Clock) -> None:
        self._lifetime = lifetime
        self._clock = clock
        self._lock = threading.Lock()
        self._refresh: dict[str, str] = {}  # account -> its refresh token
        self._access: dict[str, _Access] = {}

    def refresh_token(self, account: str) -> str:
        """The account's refresh token; a new one after `revoke`, as if its owner had consented again."""
        with self._lock:
            return self._refresh.setdefault(account, f"1//{secrets.token_urlsafe(32)}")

    def grant(self, form: Mapping[str, str]) -> Answer:
        """POST /token with the fields of a refresh request."""
        if form.get("grant_type") != "refresh_token":
            return _error(400, "unsupported_grant_type", f"Invalid grant_type: {form.get('grant_type', '')}")
        if (form.get("client_id"), form.get("client_secret")) != (CLIENT_ID, CLIENT_SECRET):
            return _error(401, "invalid_client", "The OAuth client was not found.")
        with self._lock:
            accounts = [account for account, token in self._refresh.items() if token == form.get("refresh_token")]
            if not accounts:
                return _error(400, "invalid_grant", "Token has been expired or revoked.")
            now = self._clock.wall()
            self._access = {token: access for token, access in self._access.items() if access.until > now}
            token = f"ya29.{secrets.token_urlsafe(32)}"
            self._access[token] = _Access(accounts[0], now + timedelta(seconds=self._lifetime))
        return Answer(200, {"access_token": token, "expires_in": int(self._lifetime), "scope": SCOPE, "token_type": "Bearer"})

    def account_of(self, access_token: str) -> str | None:
        """The account that a living access token speaks for."""
        access = self._living(access_token)
        return access.account if access else None

    def info(self, access_token: str) -> Answer:
        """GET /tokeninfo, also what Dovecot's oauth2 passdb asks."""
        access = self._living(access_token)
        if access is None:
            return Answer(400, {"error": "invalid_token", "error_description": "Invalid Value"})
        seconds = int((access.until - self._clock.wall()).total_seconds())
        body = {"email": access.account, "email_verified": "true", "scope": SCOPE, "aud": CLIENT_ID, "expires_in": seconds}
        return Answer(200, body)

    def expire_all(self) -> None:
        """Every access token is refused from now on; refresh tokens go on working."""
        with self._lock:
            self._access.clear()

    def revoke(self, account: str) -> None:
        """The owner took the consent back: refresh and access tokens of the account are dead."""
        with self._lock:
            self._refresh.pop(account, None)
            self._access = {token: access for token, access in self._access.items() if access.account != account}

    def _living(self, access_token: str) -> _Access | None:
        with self._lock:
            access = self._access.get(access_token)
        return access if access and self._clock.wall() < access.until else None


def write_token_file(path: Path, account: str, refresh_token: str, token_uri: str, now: datetime) -> None:
    """Google's authorized-user form with ours beside it, mode 0600, put in place by rename."""
    text = json.dumps(
        {
            "type": "authorized_user",
            "account": account,
            "client_id": CLIENT_ID,
            "client_secret": CLIENT_SECRET,
            "refresh_token": refresh_token,
            "token": "",
            "expiry": "",
            "scopes": [SCOPE],
            "token_uri": token_uri,
            "obtained_at": iso(now),
        },
        indent=2,
    )
    write_private(path, text)


def write_private(path: Path, text: str) -> None:
    """Replace `path` by a file that only its owner can read; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def _error(status: int, code: str, description: str) -> Answer:
    return Answer(status, {"error": code, "error_description": description})
