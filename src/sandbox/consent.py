"""Google's consent page in small: who asks for what, and where a decision sends the browser.

    GET  /auth?client_id=…&redirect_uri=…&scope=…&state=…&code_challenge=…      the page
    POST /consent      the same fields, and account=A, decision=allow|deny, mail=on (its box is ticked)

Parameters as of https://developers.google.com/identity/protocols/oauth2/native-app (RFC 6749, 4.1.1; RFC 7636, 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from urllib.parse import urlencode, urlsplit

from src.sandbox.tokens import CLIENT_ID, EMAIL_SCOPE, SCOPE, Consent

_REQUEST = ("client_id", "redirect_uri", "response_type", "scope", "state", "code_challenge", "code_challenge_method")
_SIGN_IN = ("openid", EMAIL_SCOPE)  # granted with the account; only the others have a box to tick

_PAGE = """\
<!doctype html><title>Sandbox: sign in</title>
<h1>Sandbox</h1><p>An app wants to read, compose, send and delete all your mail.</p>
<form method="post" action="/consent">
{hidden}
<p>{accounts}</p>
<p><label><input type="checkbox" name="mail" value="on" checked> {scope}</label></p>
<p><button name="decision" value="allow">Continue</button> <button name="decision" value="deny">Cancel</button></p>
</form>
"""


class Refused(Exception):
    """The request is shown to the person, not sent back to the app: Google's words for it."""


def page(query: Mapping[str, str], accounts: Sequence[str]) -> str:
    """The consent page's HTML. Raises Refused."""
    _check(query)
    hinted = query.get("login_hint") or next(iter(accounts), "")
    choice = (
        f'<label><input type="radio" name="account" value="{escape(account)}"{" checked" * (account == hinted)}> '
        f"{escape(account)}</label><br>"
        for account in accounts
    )
    hidden = (f'<input type="hidden" name="{name}" value="{escape(query.get(name, ""))}">' for name in _REQUEST)
    return _PAGE.format(hidden="\n".join(hidden), accounts="\n".join(choice), scope=SCOPE)


def decide(form: Mapping[str, str], accounts: Sequence[str], issue: Callable[[Consent], str]) -> str:
    """The address a decision redirects to; `issue` gives the code of a consent. Raises Refused."""
    _check(form)
    if form.get("decision") != "allow":
        return _redirect(form, {"error": "access_denied"})
    if form.get("account") not in accounts:
        raise Refused("Couldn't find your Google Account")
    scopes = tuple(scope for scope in form["scope"].split() if scope in _SIGN_IN or form.get("mail") == "on")
    code = issue(Consent(form["account"], scopes, form["redirect_uri"], form["code_challenge"]))
    return _redirect(form, {"code": code, "scope": " ".join(scopes)})


def _check(request: Mapping[str, str]) -> None:
    if request.get("client_id") != CLIENT_ID:
        raise Refused("Error 401: invalid_client: The OAuth client was not found.")
    if urlsplit(request.get("redirect_uri", "")).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise Refused("Error 400: redirect_uri_mismatch")
    if request.get("response_type") != "code" or not request.get("scope"):
        raise Refused("Error 400: invalid_request: Missing required parameter")
    if request.get("code_challenge_method") != "S256" or not request.get("code_challenge"):
        raise Refused("Error 400: invalid_request: this sandbox wants PKCE with S256")


def _redirect(request: Mapping[str, str], answer: Mapping[str, str]) -> str:
    return f"{request['redirect_uri']}?{urlencode({'state': request.get('state', ''), **answer})}"
