"""Google's token endpoint in small: codes, refresh tokens, service accounts, access tokens that expire, and the verdicts on them.

Error bodies as Google sends them (RFC 6749, 5.2; https://developers.google.com/identity/protocols/oauth2/native-app).
PKCE as in RFC 7636, service accounts as in RFC 7523, the id token as in OpenID Connect Core 1.0, section 2, but unsigned.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from src.common.clock import Clock, iso
from src.sandbox import service_account

SCOPE = "https://mail.google.com/"
EMAIL_SCOPE = "https://www.googleapis.com/auth/userinfo.email"
CLIENT_ID = "sandbox.apps.googleusercontent.example"
CLIENT_SECRET = "sandbox-client-secret"  # noqa: S105 - opens nothing but the sandbox
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: status and JSON body."""

    status: int
    body: Mapping[str, object]


@dataclass(frozen=True)
class Consent:
    """What a person has allowed: `scopes` of `account`, to whoever knows the verifier behind `challenge`."""

    account: str
    scopes: tuple[str, ...]
    redirect_uri: str
    challenge: str


@dataclass(frozen=True)
class _Grant:
    account: str
    scopes: tuple[str, ...]


@dataclass(frozen=True)
class _Access:
    grant: _Grant
    until: datetime


@dataclass(frozen=True)
class Login:
    """Whose mail is open, and until when (None: for good)."""

    account: str
    until: datetime | None = None


class Tokens:
    """Issues and judges tokens, and knows the passwords. `lifetime`: seconds an access token lives by the clock's wall time."""

    def __init__(self, lifetime: float, clock: Clock) -> None:
        self._lifetime = lifetime
        self._clock = clock
        self._lock = threading.Lock()
        self._codes: dict[str, Consent] = {}
        self._refresh: dict[str, _Grant] = {}
        self._access: dict[str, _Access] = {}
        self._passwords: dict[str, str] = {}
        self._delegated: set[str] = set()

    def refresh_token(self, account: str) -> str:
        """The account's refresh token; a new one after `revoke`, as if its owner had consented again."""
        with self._lock:
            return self._refresh_token(_Grant(account, (SCOPE, "openid", EMAIL_SCOPE)))

    def code(self, consent: Consent) -> str:
        """An authorization code, good for one use."""
        code = f"4/{secrets.token_urlsafe(32)}"
        with self._lock:
            self._codes[code] = consent
        return code

    def grant(self, form: Mapping[str, str], *, offline: bool = True) -> Answer:
        """POST /token with the fields of a refresh request or of a code's exchange; the latter not `offline`: without a
        refresh token, as Google answers whom it has given one already.
        """
        if form.get("grant_type") == JWT_BEARER:
            return self._assert(form.get("assertion", ""))
        if form.get("grant_type") not in ("refresh_token", "authorization_code"):
            return _error(400, "unsupported_grant_type", f"Invalid grant_type: {form.get('grant_type', '')}")
        if (form.get("client_id"), form.get("client_secret")) != (CLIENT_ID, CLIENT_SECRET):
            return _error(401, "invalid_client", "The OAuth client was not found.")
        with self._lock:
            return self._exchange(form, offline) if form["grant_type"] == "authorization_code" else self._renew(form)

    def login(self, access_token: str) -> Login | None:
        """What a living access token opens."""
        access = self._living(access_token)
        return Login(access.grant.account, access.until) if access and SCOPE in access.grant.scopes else None

    def over(self, login: Login) -> bool:
        """Whether its token has expired: Gmail ends the session then."""
        return login.until is not None and login.until <= self._clock.wall()

    def set_password(self, account: str, password: str) -> None:
        """From now on the account is opened by this password too ("": no more)."""
        with self._lock:
            self._passwords[account.lower()] = password

    @property
    def has_passwords(self) -> bool:
        return any(self._passwords.values())

    def password_of(self, account: str) -> str:
        """ "" where it has none."""
        return self._passwords.get(account.lower(), "")

    def delegate(self, accounts: Iterable[str]) -> None:
        """The service account may read these."""
        with self._lock:
            self._delegated |= set(accounts)

    def info(self, access_token: str) -> Answer:
        """GET /tokeninfo, also what Dovecot's oauth2 passdb asks."""
        access = self._living(access_token)
        if access is None:
            return Answer(400, {"error": "invalid_token", "error_description": "Invalid Value"})
        seconds = int((access.until - self._clock.wall()).total_seconds())
        body = {"scope": " ".join(access.grant.scopes), "aud": CLIENT_ID, "expires_in": seconds}
        email = {"email": access.grant.account, "email_verified": "true"} if EMAIL_SCOPE in access.grant.scopes else {}
        return Answer(200, body | email)

    def revoke_token(self, token: str) -> Answer:
        """POST /revoke (RFC 7009) with a refresh or an access token: the whole consent of its account ends."""
        with self._lock:
            access = self._access.get(token)
            grant = access.grant if access else self._refresh.get(token)
        if grant is None:
            return _error(400, "invalid_token", "Token expired or revoked")
        self.revoke(grant.account)
        return Answer(200, {})

    def expire_all(self) -> None:
        """Every access token is refused from now on; refresh tokens go on working."""
        with self._lock:
            self._access.clear()

    def revoke(self, account: str) -> None:
        """The owner took the consent back: refresh and access tokens of the account are dead."""
        with self._lock:
            self._refresh = {token: grant for token, grant in self._refresh.items() if grant.account != account}
            self._access = {token: access for token, access in self._access.items() if access.grant.account != account}
            self._delegated.discard(account)

    def _assert(self, assertion: str) -> Answer:
        """https://developers.google.com/identity/protocols/oauth2/service-account#authorizingrequests"""
        claims = service_account.claims(assertion)
        if claims is None:
            return _error(400, "invalid_grant", "Invalid JWT Signature.")
        account, scope = str(claims.get("sub", "")), str(claims.get("scope", ""))
        with self._lock:
            if account not in self._delegated or scope != SCOPE:
                return _error(
                    401,
                    "unauthorized_client",
                    "Client is unauthorized to retrieve access tokens using this method, or client not authorized for any of "
                    "the scopes requested.",
                )
            return Answer(200, self._access_answer(_Grant(account, (SCOPE,))))

    def _exchange(self, form: Mapping[str, str], offline: bool) -> Answer:
        consent = self._codes.pop(form.get("code", ""), None)
        if consent is None:
            return _error(400, "invalid_grant", "Malformed auth code.")
        if form.get("redirect_uri") != consent.redirect_uri:
            return _error(400, "redirect_uri_mismatch", "Bad Request")
        if challenge_of(form.get("code_verifier", "")) != consent.challenge:
            return _error(400, "invalid_grant", "Invalid code verifier.")
        grant = _Grant(consent.account, consent.scopes)
        answer = self._access_answer(grant)
        if "openid" in grant.scopes:
            answer["id_token"] = _id_token(grant)
        if offline:
            answer["refresh_token"] = self._refresh_token(grant)
        return Answer(200, answer)

    def _renew(self, form: Mapping[str, str]) -> Answer:
        grant = self._refresh.get(form.get("refresh_token", ""))
        if grant is None:
            return _error(400, "invalid_grant", "Token has been expired or revoked.")
        return Answer(200, self._access_answer(grant))

    def _refresh_token(self, grant: _Grant) -> str:
        for token, held in self._refresh.items():
            if held == grant:
                return token
        token = f"1//{secrets.token_urlsafe(32)}"
        self._refresh[token] = grant
        return token

    def _access_answer(self, grant: _Grant) -> dict[str, object]:
        now = self._clock.wall()
        self._access = {token: access for token, access in self._access.items() if access.until > now}
        token = f"ya29.{secrets.token_urlsafe(32)}"
        self._access[token] = _Access(grant, now + timedelta(seconds=self._lifetime))
        scope = " ".join(grant.scopes)
        return {"access_token": token, "expires_in": int(self._lifetime), "scope": scope, "token_type": "Bearer"}

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


def write_client_secrets(path: Path, auth_uri: str, token_uri: str) -> None:
    """The JSON that Google's console lets one download for a client of type Desktop app."""
    client = {"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET, "auth_uri": auth_uri, "token_uri": token_uri}
    write_private(path, json.dumps({"installed": {**client, "redirect_uris": ["http://localhost"]}}, indent=2))


def write_private(path: Path, text: str) -> None:
    """Replace `path` by a file that only its owner can read; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def challenge_of(verifier: str) -> str:
    """RFC 7636, 4.2, method S256."""
    return _base64url(hashlib.sha256(verifier.encode()).digest())


def _id_token(grant: _Grant) -> str:
    claims = {"iss": "https://accounts.google.com", "aud": CLIENT_ID, "email": grant.account, "email_verified": True}
    parts = ({"alg": "RS256", "typ": "JWT"}, claims, "not signed")
    return ".".join(_base64url(json.dumps(part).encode()) for part in parts)


def _base64url(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def _error(status: int, code: str, description: str) -> Answer:
    return Answer(status, {"error": code, "error_description": description})
