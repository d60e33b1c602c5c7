"""One question to Google's token endpoint, and what its answer means: a token, a verdict, or nothing that counts.

(RFC 6749 section 5; https://developers.google.com/identity/protocols/oauth2)
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError
from google.auth.transport.requests import Request

from src.common.circuit_breaker import Breakers
from src.common.exceptions import BreakerOpen, Permanent, TokenEndpointUnavailable

# The verdicts of RFC 6749 section 5.2 that no repetition changes. Everything else may pass.
PERMANENT = ("invalid_grant", "invalid_client", "unauthorized_client")


class Refused(Permanent):
    """The endpoint's verdict on a grant or a client. `error`: its code, one of PERMANENT. The text has its description too."""

    def __init__(self, error: str, text: str) -> None:
        super().__init__(text)
        self.error = error


def renew(credentials: Any, token_uri: str, timeout: float, breakers: Breakers | None = None) -> tuple[str, datetime]:
    """(access token, its end, aware) for google-auth `credentials`, which hold the token afterwards too.

    `timeout`: seconds a connect or a read may take. `breakers`: of a daemon, whose accounts share the endpoint's; a verdict on one
    of them is no failure of the endpoint. Raises Refused and TokenEndpointUnavailable.
    """
    if breakers is None:
        return _renewed(credentials, token_uri, timeout)
    breaker = breakers.get(f"token endpoint {urlsplit(token_uri).netloc}")
    try:
        return breaker.call(lambda: _renewed(credentials, token_uri, timeout))
    except BreakerOpen as error:
        raise TokenEndpointUnavailable(str(error)) from error


def _renewed(credentials: Any, token_uri: str, timeout: float) -> tuple[str, datetime]:
    try:
        with requests.Session() as session:
            credentials.refresh(_one_try(session, timeout))
    except RefreshError as error:
        verdict = _verdict(error)
        if verdict is None:
            raise TokenEndpointUnavailable(f"{token_uri}: {_describe(error)}") from error
        raise verdict from error
    except (GoogleAuthError, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # Beside its own errors google-auth lets TypeError and others out when a 200 is not what it expects.
        raise TokenEndpointUnavailable(f"{token_uri}: {_describe(error)}") from error
    if not isinstance(credentials.token, str) or not credentials.token or credentials.expiry is None:
        raise TokenEndpointUnavailable(f"{token_uri}: the answer holds no token with an end")
    return credentials.token, credentials.expiry.replace(tzinfo=UTC)


def _one_try(session: requests.Session, timeout: float) -> Any:
    """google-auth's transport with our time out. A 5xx, 408 or 429 ends the call, where google-auth would sleep and repeat."""
    transport: Any = Request(session)

    def ask(**arguments: Any) -> Any:
        response = transport(**{**arguments, "timeout": timeout})
        if response.status in (408, 429) or response.status >= 500:
            raise TransportError(f"HTTP {response.status}")  # type: ignore[no-untyped-call]  # google-auth has no types there
        return response

    return ask


def _verdict(error: RefreshError) -> Refused | None:
    """The cause, when the endpoint itself said that this grant or client is no good; None for anything that may pass.

    `error.retryable` says False of a 503 too. Of a Workspace that asks for a new log in (invalid_rapt) google-auth drops
    the body and leaves a sentence.
    """
    body = error.args[-1] if error.args else None
    if isinstance(body, dict) and body.get("error") in PERMANENT:
        return Refused(str(body["error"]), _describe(error))
    if isinstance(body, str) and body.startswith("Reauthentication is needed"):
        return Refused("invalid_grant", "invalid_grant: the Workspace asks for a new log in")
    return None


def _describe(error: Exception) -> str:
    text = str(error.args[0]) if error.args else type(error).__name__
    return "".join(character if character.isprintable() else " " for character in text)[:300]
