"""The sandbox's HTTP server: the OAuth endpoints a client knows, and the switches a test or a curious person turns.

GET  /health  /ledger  /ledger?summary=1  /faults  /auth (Google's consent page)  /tokeninfo?access_token=T
POST /consent (that page's buttons)  /token  /revoke  (forms)
POST /deliver  /faults  /expire-tokens  /revoke-token  /password  /new-uidvalidity  /rename  /hide  /expunge  /cut
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from src.common.clock import iso
from src.common.digits import number_in
from src.sandbox.consent import Refused, decide, page
from src.sandbox.generator import KINDS
from src.sandbox.store import Delivered, UnknownFolder
from src.sandbox.tokens import Answer

if TYPE_CHECKING:
    from src.sandbox.server import Sandbox

_BODY_LIMIT = 100 * 1024 * 1024


class ControlServer(ThreadingHTTPServer):
    """Listens from construction, serves in `serve_forever`. OSError: the port is taken."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.stopping = threading.Event()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's reverse look-up of the host's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "sandbox", int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left before its answer is no news; anything else is a fault of ours and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # typed `object` above, as it comes

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ControlServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        sandbox = self.server.sandbox
        match url.path:
            case "/health":
                self._answer(Answer(200, {"status": "ok", "imap_port": sandbox.imap_port, "accounts": sandbox.accounts()}))
            case "/ledger":
                delivered = sandbox.ledger()
                self._answer(
                    Answer(200, _summary(delivered) if query.get("summary") else {"mails": [_line(d) for d in delivered]})
                )
            case "/faults":
                self._answer(Answer(200, sandbox.faults.state()))
            case "/tokeninfo":
                self._answer(sandbox.tokens.info(query.get("access_token", "")))
            case "/auth":
                self._consent(query)
            case _:
                self._answer(_wrong(404, f"there is no {url.path[:100]}"))

    def do_POST(self) -> None:
        size = number_in(self.headers.get("Content-Length", "0"))
        if size is None or size > _BODY_LIMIT:
            self._answer(_wrong(413, "the body is too large or its length is not given"))
            return
        body = self.rfile.read(size)
        path, sandbox = urlsplit(self.path).path, self.server.sandbox
        if path == "/token":
            self._token(_form(body))
        elif path == "/consent":
            self._decision(_form(body))
        elif path == "/revoke":
            self._answer(sandbox.tokens.revoke_token(_form(body).get("token", "")))
        elif path in _ACTIONS:
            self._act(_ACTIONS[path], body)
        else:
            self._answer(_wrong(404, f"there is no {path[:100]}"))

    def _consent(self, query: Mapping[str, str]) -> None:
        try:
            self._send(200, "text/html; charset=utf-8", page(query, self.server.sandbox.accounts()).encode())
        except Refused as error:
            self._send(400, "text/plain; charset=utf-8", f"{error}\n".encode())

    def _decision(self, form: Mapping[str, str]) -> None:
        try:
            address = decide(form, self.server.sandbox.accounts(), self.server.sandbox.tokens.code)
        except Refused as error:
            self._send(400, "text/plain; charset=utf-8", f"{error}\n".encode())
            return
        self.send_response(302)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _token(self, form: Mapping[str, str]) -> None:
        sandbox = self.server.sandbox
        if stall := sandbox.faults.take("token_stall"):
            self.server.stopping.wait(float(str(stall["seconds"])))
        if fault := sandbox.faults.take("token_answer"):
            self._send(int(str(fault["status"])), "text/html", str(fault["body"]).encode())
            return
        code = form.get("grant_type") == "authorization_code"
        offline = not code or sandbox.faults.take("no_refresh_token") is None
        self._answer(sandbox.tokens.grant(form, offline=offline))

    def _act(self, action: Callable[[Sandbox, _Request], Mapping[str, object]], body: bytes) -> None:
        try:
            self._answer(Answer(200, action(self.server.sandbox, _Request(_json_object(body)))))
        except UnknownFolder as error:
            self._answer(_wrong(400, f"there is no folder {error}"))
        except ValueError as error:
            self._answer(_wrong(400, str(error)))

    def _answer(self, answer: Answer) -> None:
        self._send(answer.status, "application/json", json.dumps(answer.body).encode() + b"\n")

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the path of /tokeninfo holds a token."""


class _Request:
    """The JSON object of a request; each key is taken by type. ValueError, one sentence: a key is missing, wrong or unknown."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = dict(values)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._values.pop(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._values.pop(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._values.pop(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a whole number, not negative")
        return value

    def flag(self, name: str) -> bool:
        value = self._values.pop(name, False)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._values.pop(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} must be a list of texts")
        return value

    def section(self, name: str) -> _Request | None:
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object")
        return _Request(value)

    def all(self) -> Mapping[str, object]:
        values, self._values = self._values, {}
        return values

    def end(self) -> None:
        """Every key has been taken."""
        if self._values:
            raise ValueError(f"unknown key {', '.join(map(repr, self._values))}")


def _deliver(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    account, mailbox = request.text("account"), request.text("mailbox", "INBOX")
    raw, moment, generate = request.text("raw", ""), request.text("internal_date", ""), request.section("generate")
    request.end()
    internal_date = _moment(moment) if moment else None
    if bool(raw) == (generate is not None):
        raise ValueError("give either raw (base64) or generate {count, seed, kinds, rate}")
    if generate is None:
        uid = sandbox.deliver(account, _base64(raw), mailbox=mailbox, internal_date=internal_date, kind="raw")
        return {"uids": [uid]}
    count, seed = generate.integer("count"), generate.integer("seed", 1)
    kinds, rate = generate.texts("kinds"), generate.number("rate", 0)
    generate.end()
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"no kind is called {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return sandbox.deliver_generated(
        account, count=count, seed=seed, kinds=kinds, rate=rate, mailbox=mailbox, internal_date=internal_date
    )


def _faults(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    sandbox.faults.arm(request.all())
    return sandbox.faults.state()


def _expire_tokens(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    request.end()
    sandbox.expire_tokens()
    return {"expired": True}


def _revoke_token(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    account = request.text("account")
    request.end()
    sandbox.revoke(account)
    return {"revoked": account}


def _new_uidvalidity(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    account, mailbox, shuffle = request.text("account"), request.text("mailbox", "INBOX"), request.flag("shuffle")
    request.end()
    return {"uidvalidity": sandbox.change_uidvalidity(account, mailbox, shuffle=shuffle)}


def _password(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    account, password = request.text("account"), request.text("password")
    request.end()
    sandbox.set_password(account, password)
    return {"password": bool(password)}


def _rename(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    account, mailbox, name = request.text("account"), request.text("mailbox"), request.text("name")
    request.end()
    sandbox.rename(account, mailbox, name)
    return {"renamed": name}


def _hide(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    account, mailbox, shown = request.text("account"), request.text("mailbox"), request.flag("shown")
    request.end()
    sandbox.hide(account, mailbox, hidden=not shown)
    return {"hidden": not shown}


def _expunge(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    account, mailbox, uid = request.text("account"), request.text("mailbox", "INBOX"), request.integer("uid")
    request.end()
    try:
        sandbox.expunge(account, uid, mailbox)
    except KeyError:
        raise ValueError(f"there is no UID {uid} in {mailbox}") from None
    return {"expunged": uid}


def _cut(sandbox: Sandbox, request: _Request) -> Mapping[str, object]:
    request.end()
    return {"cut": sandbox.cut()}


_ACTIONS: dict[str, Callable[[Sandbox, _Request], Mapping[str, object]]] = {
    "/deliver": _deliver,
    "/faults": _faults,
    "/expire-tokens": _expire_tokens,
    "/revoke-token": _revoke_token,
    "/password": _password,
    "/new-uidvalidity": _new_uidvalidity,
    "/rename": _rename,
    "/hide": _hide,
    "/expunge": _expunge,
    "/cut": _cut,
}


def _line(delivered: Delivered) -> dict[str, object]:
    return {**asdict(delivered), "internal_date": iso(delivered.internal_date)}


def _summary(delivered: list[Delivered]) -> dict[str, object]:
    return {
        "mails": len(delivered),
        "bytes": sum(d.size for d in delivered),
        "by_account": Counter(d.account for d in delivered),
        "by_mailbox": Counter(d.mailbox for d in delivered),
        "by_kind": Counter(d.kind for d in delivered),
    }


def _wrong(status: int, sentence: str) -> Answer:
    return Answer(status, {"error": sentence})


def _form(body: bytes) -> dict[str, str]:
    return dict(parse_qsl(body.decode("utf-8", "replace")))


def _json_object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body or b"{}")
    except ValueError:
        raise ValueError("the body is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("the body is not a JSON object")
    return value


def _base64(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("raw is not base64") from None


def _moment(value: str) -> datetime:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("internal_date is not an ISO 8601 date") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
