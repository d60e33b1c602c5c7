"""Google's consent: a person allows us to read a mailbox, and takes that back.

    python producer.py --auth-setup [--username U] [--no-browser]
    python -m src.auth.oauth2_gmail --setup | --revoke

The flow for installed apps (https://developers.google.com/identity/protocols/oauth2/native-app, RFC 8252 with PKCE): the
person consents in a browser, which Google sends back to a port of 127.0.0.1 where we listen meanwhile. What has come back
may as well be pasted. Whose account it was is in the id token, which is why `openid` and `email` are asked for beside the
scope that IMAP wants; it came over TLS from Google itself, so its signature needs no look (OpenID Connect Core, 3.1.3.7).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urljoin, urlsplit

import requests
from google.auth import jwt
from google_auth_oauthlib.flow import InstalledAppFlow  # type: ignore[import-untyped]
from oauthlib.oauth2 import OAuth2Error  # type: ignore[import-untyped]

from config.accounts import Account
from config.settings import AuthSettings
from src.auth.loopback import LOOPBACK, WayBack
from src.auth.oauth2_gmail import SCOPE, SINGLE_TOKEN, TOKEN_URI, StoredToken, locked, read_token, write_token
from src.common.clock import SYSTEM, Clock, iso
from src.common.exceptions import ConfigurationError, Permanent, TokenEndpointUnavailable

SCOPES = (SCOPE, "openid", "https://www.googleapis.com/auth/userinfo.email")
AUTH_URI = "https://accounts.google.com/o/oauth2/auth"
REVOKE_URI = "https://oauth2.googleapis.com/revoke"
GUIDE = "docs/OAUTH2_SETUP.md"
CONSENT_SECONDS = 600.0
ENDPOINT_SECONDS = 20.0


class ConsentFailed(Permanent):
    """There is no token; the text says in words what went wrong and what to do."""


@dataclass(frozen=True)
class Client:
    """Our app as Google knows it: a client of type Desktop app."""

    client_id: str
    client_secret: str = field(repr=False)
    auth_uri: str = AUTH_URI
    token_uri: str = TOKEN_URI


def set_up(settings: AuthSettings, accounts: Sequence[Account], *, with_browser: bool) -> int:
    """`--auth-setup`: a consent for each account that logs in by one ("": for whichever account the person takes).

    Talks on stdout and stderr, reads pasted addresses from stdin. Exit code: 0, or 1 when a consent came to nothing.
    Raises ConfigurationError: a setting or a place is wrong (seen before anybody is asked), or Google does not know our client.
    """
    consenting = [account for account in accounts if account.mail.auth_method == "oauth2"]
    if not consenting:
        raise ConfigurationError(f"AUTH_METHOD={accounts[0].mail.auth_method}: needs no consent")
    client = client_of(settings)
    alone = len(consenting) == 1 and not consenting[0].mail.accounts_file
    try:
        for username, mail in ((account.username, account.mail) for account in consenting):
            path = mail.token_file or file_for(mail.token_dir, username, alone=alone)
            make_place(path)
            browse = webbrowser.open if with_browser else None
            token = ask(client, username or account_in(path), settings.port, sys.stdout, browse=browse, typed=_stdin())
            keep(path, token)
            sys.stdout.write(f"{token.account}: allowed; the token is in {path}\n")
    except (ConsentFailed, TokenEndpointUnavailable) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing more was written\n")
        return 1
    return 0


# What to ask with, and where to keep what comes


def client_of(settings: AuthSettings) -> Client:
    """Raises ConfigurationError, one line: what is missing, and where the guide is."""
    if settings.client_secrets_file:
        client = _client_in(settings.client_secrets_file)
    elif settings.client_id and settings.client_secret:
        client = Client(settings.client_id, settings.client_secret.get_secret_value())
    else:
        missing = "GMAIL_CLIENT_SECRET" if settings.client_id else "GMAIL_CLIENT_ID"
        raise ConfigurationError(
            f"{missing} is not set: set GMAIL_CLIENT_ID and GMAIL_CLIENT_SECRET, or GMAIL_CLIENT_SECRETS_FILE; how to get them: {GUIDE}"
        )
    for address in (client.auth_uri, client.token_uri):
        if urlsplit(address).scheme != "https" and urlsplit(address).hostname != LOOPBACK:
            raise ConfigurationError(f"{address} would be used in clear text; it must begin with https://")
    return client


def _client_in(path: Path) -> Client:
    try:
        content = json.loads(path.read_bytes())
        client = Client(
            **{name: content["installed"][name] for name in Client.__dataclass_fields__ if name in content["installed"]}
        )
        if not all(isinstance(value, str) and value for value in asdict(client).values()):
            raise TypeError
    except OSError as error:
        raise ConfigurationError(f"GMAIL_CLIENT_SECRETS_FILE={path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigurationError(
            f"GMAIL_CLIENT_SECRETS_FILE={path}: not the JSON of a client of type Desktop app; how to get it: {GUIDE}"
        ) from None
    return client


def file_for(folder: Path, account: str, *, alone: bool) -> Path:
    """The token file of an account ("": not known yet): its own where there is one, or where gmail_token.json is another's.

    `alone`: it is the only account there is. The producer looks in the same order. Raises ConfigurationError.
    """
    if account and Path(account).name != account:
        raise ConfigurationError(f"GMAIL_USERNAME={account}: must be an e-mail address")
    own, single = folder / f"{account}.json", folder / SINGLE_TOKEN
    if account and (own.exists() or not alone or account_in(single).casefold() not in ("", account.casefold())):
        return own
    return single


def account_in(path: Path) -> str:
    """Whose token stands in the file; "" where nothing says so."""
    try:
        account = json.loads(path.read_bytes())["account"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return account if isinstance(account, str) else ""


def keep(path: Path, token: StoredToken) -> None:
    """Put the token in its place. Raises ConfigurationError."""
    try:
        with locked(path):
            write_token(path, token)
    except OSError as error:
        raise ConfigurationError(f"the token file {path} cannot be written: {error.strerror}") from error


def make_place(path: Path) -> None:
    """See before anybody is asked that a token could be written there. Raises ConfigurationError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the folder {path.parent} for tokens cannot be made: {error.strerror}") from error
    with locked(path):
        pass


def _stdin() -> int | None:
    return None if sys.stdin is None or sys.stdin.closed else sys.stdin.fileno()


# Asking


def ask(
    client: Client,
    account: str,
    port: int,
    out: TextIO,
    *,
    browse: Callable[[str], object] | None,
    typed: int | None,
    patience: float = CONSENT_SECONDS,
    clock: Clock = SYSTEM,
) -> StoredToken:
    """One consent, from the address shown to the token checked. `account`: whose it must be; "": anybody's.

    `port`: of 127.0.0.1, 0 for any free one. `browse` opens an address and says whether it could. `typed`: a file
    descriptor from which pasted addresses are read. `patience`: seconds. Raises ConsentFailed, TokenEndpointUnavailable,
    ConfigurationError.
    """
    state = secrets.token_urlsafe(32)
    with _way_back(port, state) as way_back:
        flow = _flow(client, way_back.redirect_uri)
        hint = {"login_hint": account} if account else {}
        address, _ = flow.authorization_url(state=state, access_type="offline", prompt="consent", **hint)
        out.write(_invitation(address, way_back.port, account, minutes=patience / 60))
        out.flush()
        if browse and browse(address):  # a text browser returns only when it is left
            out.write("A browser was opened with it.\n")
            out.flush()
        answer = way_back.wait(typed, out, patience, clock)
    if answer is None:
        raise ConsentFailed(
            f"time out: no answer within {patience:.0f} s; where the browser showed an error of Google's, {GUIDE} has its cure"
        )
    if answer.error:
        raise ConsentFailed(_refusal(answer.error))
    return granted(_exchange(flow, answer.code), client, account, clock.wall())


def granted(answer: Mapping[str, Any], client: Client, account: str, now: datetime) -> StoredToken:
    """The token in the endpoint's answer, if it is for what was asked. Raises ConsentFailed."""
    scopes = answer.get("scope", SCOPES)
    scopes = tuple(scopes.split() if isinstance(scopes, str) else scopes)
    if SCOPE not in scopes:
        raise ConsentFailed(
            f"the access to Gmail ({SCOPE}) was not granted: its box was left unticked; run it again and tick every box"
        )
    try:
        claims = jwt.decode(answer["id_token"], verify=False)  # type: ignore[no-untyped-call]  # google-auth has no types there
        owner, audience = str(claims["email"]), claims["aud"]
    except (LookupError, ValueError, TypeError, AttributeError):
        raise ConsentFailed("Google did not say whose account it is; run it again") from None
    if audience != client.client_id:
        raise ConsentFailed("the answer is for another app than ours; run it again")
    if account and owner.casefold() != account.casefold():
        raise ConsentFailed(
            f"the wrong account: {owner} was chosen, {account} was asked for; nothing was written. Run it again and choose {account}, "
            f"or give --username {owner}"
        )
    if not answer.get("refresh_token"):
        raise ConsentFailed(
            "Google gave no refresh token, without which the access ends within the hour: remove the app at "
            "https://myaccount.google.com/connections and run it again"
        )
    seconds = answer.get("expires_in")
    return StoredToken(
        account=owner,
        client_id=client.client_id,
        client_secret=client.client_secret,
        refresh_token=str(answer["refresh_token"]),
        access_token=str(answer["access_token"]),
        expiry=now + timedelta(seconds=seconds) if isinstance(seconds, int) else None,
        scopes=scopes,
        token_uri=client.token_uri,
        obtained_at=iso(now),
    )


def _way_back(port: int, state: str) -> WayBack:
    try:
        return WayBack(port, state)
    except OSError as error:
        raise ConsentFailed(
            f"port {port} of {LOOPBACK} is taken ({error.strerror}); set GMAIL_AUTH_PORT to a free one, or to 0 for any"
        ) from None


def _invitation(address: str, port: int, account: str, *, minutes: float) -> str:
    who = f" as {account}" if account else ""
    return f"""\
Open in a browser, sign in{who}, allow every access:

{address}

The browser is then sent to http://{LOOPBACK}:{port}/ on its own machine. If that is another one than this, either
  - run there first:  ssh -N -L {port}:{LOOPBACK}:{port} {socket.gethostname()}
  - or let it fail to load, copy the whole address it was sent to, and paste it here.
Waiting for {minutes:.0f} minutes; Ctrl-C ends it.
"""


def _refusal(error: str) -> str:
    shown = "".join(character if character.isprintable() else " " for character in error)[:100]
    match error:
        case "access_denied":
            why = "access denied: Cancel was pressed, or the account is no test user of an app in testing"
        case "admin_policy_enforced":
            why = "the Workspace's administrator does not allow this app"
        case "org_internal":
            why = "the app is internal to another organisation than the account's"
        case _:
            why = "Google refused"
    return f"{why} ({shown}); nothing was written; what to do: {GUIDE}"


# Google's endpoints


def _flow(client: Client, redirect_uri: str) -> Any:
    if urlsplit(client.token_uri).hostname == LOOPBACK:
        os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"  # oauthlib knows no other way to allow http on this machine
    for telltale in ("requests_oauthlib", "oauthlib"):  # at DEBUG they write secrets and tokens
        logging.getLogger(telltale).setLevel(logging.INFO)
    return InstalledAppFlow.from_client_config({"installed": asdict(client)}, list(SCOPES), redirect_uri=redirect_uri)


def _exchange(flow: Any, code: str) -> Mapping[str, Any]:
    """The endpoint's answer to the code and the PKCE verifier."""
    flow.oauth2session.register_compliance_hook("access_token_response", _no_outage)
    try:
        answer: Mapping[str, Any] = flow.fetch_token(code=code, include_client_id=True, timeout=ENDPOINT_SECONDS)
    except Warning as changed:  # how oauthlib says that the scopes are not those asked for
        answer = changed.token  # type: ignore[attr-defined]  # oauthlib sets it on its Warning
    except OAuth2Error as error:
        if error.error in ("invalid_client", "unauthorized_client"):
            raise ConfigurationError(
                f"Google does not know this client ({error.error}): GMAIL_CLIENT_ID or GMAIL_CLIENT_SECRET is wrong; see {GUIDE}"
            ) from None
        raise ConsentFailed(
            f"Google does not take the code ({error.error}): it is good for one use and a few minutes; run it again"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TokenEndpointUnavailable(
            f"the token endpoint cannot be reached or gave no sense ({type(error).__name__}); run it again"
        ) from error
    return answer


def _no_outage(response: requests.Response) -> requests.Response:
    if response.status_code >= 500 or response.status_code in (408, 429):
        raise TokenEndpointUnavailable(f"the token endpoint is away (HTTP {response.status_code}); run it again in a while")
    return response


def revoke(path: Path) -> str:
    """Take the consent back at Google and remove the token file; returns the account.

    Every token of the account and our app ends with it. A token that was dead before is removed too. Raises
    ConfigurationError (no usable file) and TokenEndpointUnavailable (nothing is removed).
    """
    with locked(path):
        token = read_token(path)
        try:
            response = requests.post(revoke_uri(token.token_uri), data={"token": token.refresh_token}, timeout=ENDPOINT_SECONDS)
            dead = response.status_code == 400 and response.json().get("error") == "invalid_token"
        except (OSError, ValueError, AttributeError) as error:
            raise TokenEndpointUnavailable(f"the revocation endpoint cannot be reached ({type(error).__name__})") from error
        if response.status_code != 200 and not dead:
            raise TokenEndpointUnavailable(f"the revocation endpoint answered HTTP {response.status_code}; the token stands")
        path.unlink()
    return token.account


def revoke_uri(token_uri: str) -> str:
    """Google's, or beside a token endpoint that is not Google's."""
    host = urlsplit(token_uri).hostname or ""
    return REVOKE_URI if host.endswith((".googleapis.com", ".google.com")) else urljoin(token_uri, "revoke")
