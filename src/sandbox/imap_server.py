"""The sandbox's IMAP server: a thread a connection, Gmail's words, the mail of the `Store`, the accidents of `Faults`.

Speaks what a reader of mail needs (CAPABILITY, ID, AUTHENTICATE, LOGIN, LIST, EXAMINE, STATUS, SEARCH, FETCH, IDLE) and APPEND,
CREATE. Passwords open only what was given one, as app passwords do. A session ends with its token. XOAUTH2: https://developers.google.com/workspace/gmail/imap/xoauth2-protocol.
"""

from __future__ import annotations

import base64
import binascii
import re
import select
import socket
import socketserver
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from src.sandbox import protocol
from src.sandbox.faults import Faults
from src.sandbox.protocol import Malformed, Value, text
from src.sandbox.store import Entry, Rebuilt, Store, UnknownFolder, View, canonical
from src.sandbox.tokens import SCOPE, Login, Tokens

_CAPABILITIES = "IMAP4rev1 UNSELECT IDLE NAMESPACE ID XLIST CHILDREN{gmail} UIDPLUS ENABLE MOVE SPECIAL-USE SASL-IR"
_CHALLENGE = base64.b64encode(b'{"status":"400","schemes":"Bearer","scope":"%b"}' % SCOPE.encode())
_LINE_LIMIT = 1024 * 1024  # a UID set of a whole mailbox is long
_LITERAL_LIMIT = 64 * 1024 * 1024
_FLUSH_AT = 64 * 1024
_FETCH_STEP = 100
_TOKEN_LOOK = 0.25  # seconds between two looks whether the token of a session that idles is over
_TOO_MANY = "[ALERT] Too many simultaneous connections. (Failure)"
_WRONG = "[AUTHENTICATIONFAILED] Invalid credentials (Failure)"
_BEARER = re.compile(rb"user=([^\x01]*)\x01auth=Bearer ([^\x01]*)\x01\x01\Z")


Command = Callable[[list[Value]], str]  # arguments → the text after OK; raises Malformed (BAD), Refused or UnknownFolder (NO)


class Refused(Exception):
    """Answer NO with this text."""


class Hangup(Exception):
    """The connection is at its end."""


class ImapServer(socketserver.ThreadingTCPServer):
    """Listens from construction, serves in `serve_forever`. `port` 0: any free one. OSError: the port is taken."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, store: Store, tokens: Tokens, faults: Faults, *, connection_limit: int = 15) -> None:
        super().__init__((host, port), _Handler)
        self.store = store
        self.tokens = tokens
        self.faults = faults
        self.connection_limit = connection_limit
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._open: Counter[str] = Counter()
        self._attempts: Counter[str] = Counter()

    def enter(self, connection: socket.socket) -> None:
        with self._lock:
            self._live.add(connection)

    def leave(self, connection: socket.socket) -> None:
        with self._lock:
            self._live.discard(connection)

    def admit(self, account: str) -> bool:
        """One session more of the account, if it may have one; `dismiss` takes it back."""
        with self._lock:
            if self._open[account] >= self.connection_limit:
                return False
            self._open[account] += 1
            return True

    def dismiss(self, account: str) -> None:
        with self._lock:
            self._open[account] -= 1

    def note_attempt(self, account: str) -> None:
        with self._lock:
            self._attempts[account] += 1

    def attempts(self, account: str) -> int:
        """How often somebody tried to log in as the account."""
        with self._lock:
            return self._attempts[account]

    def cut(self) -> int:
        """End every connection without a word; how many there were."""
        with self._lock:
            for connection in self._live:
                _shut(connection)
            return len(self._live)

    def stop(self) -> None:
        """Listen no more, end every connection."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        self.cut()


class _Handler(socketserver.BaseRequestHandler):
    server: ImapServer

    def handle(self) -> None:
        if self.server.faults.take("refuse") is not None:
            return
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.enter(self.request)
        if self.server.stopping.is_set():
            return
        session = Session(_Wire(self.request, self.server.faults), self.server)
        try:
            session.run()
        except (Hangup, OSError):
            return
        finally:
            session.end()
            self.server.leave(self.request)


class _Wire:
    """Lines and literals in, buffered octets out."""

    def __init__(self, connection: socket.socket, faults: Faults) -> None:
        self._socket = connection
        self._faults = faults
        self._in = bytearray()
        self._out = bytearray()

    def line(self) -> bytes:
        """The next line without its CRLF; flushes what is to be said first. `Hangup`: the client is gone or talks too long."""
        self.flush()
        searched = 0
        while (end := self._in.find(b"\n", searched)) < 0:
            searched = len(self._in)
            if searched > _LINE_LIMIT:
                raise Hangup
            self._receive()
        line = bytes(self._in[:end]).removesuffix(b"\r")
        del self._in[: end + 1]
        return line

    def octets(self, count: int) -> bytes:
        """Exactly `count` octets of a literal."""
        self.flush()
        while len(self._in) < count:
            self._receive()
        octets = bytes(self._in[:count])
        del self._in[:count]
        return octets

    def line_waits(self, wake: socket.socket, seconds: float) -> bool:
        """Block until the client said something (True), `wake` has an octet (which is taken) or the time is over (False)."""
        self.flush()
        if self._in:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(wake, select.POLLIN)
        ready = {number for number, _ in poll.poll(seconds * 1000)}
        if wake.fileno() in ready:
            wake.recv(4096)
        return self._socket.fileno() in ready

    def hear_nothing(self) -> NoReturn:
        """Say nothing any more; what the client says is lost, until it hangs up."""
        while True:
            self._receive()
            self._in.clear()

    def say(self, line: str) -> None:
        self.write(line.encode("utf-8", "surrogateescape") + b"\r\n")

    def write(self, octets: bytes) -> None:
        self._out += octets
        if len(self._out) >= _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        out, self._out = self._out, bytearray()
        allowed = self._faults.allowance(len(out))
        self._socket.sendall(memoryview(out)[:allowed])
        if allowed < len(out):
            raise Hangup

    def _receive(self) -> None:
        received = self._socket.recv(64 * 1024)
        if not received:
            raise Hangup
        self._in += received


@dataclass(frozen=True)
class _Selected:
    view: View
    read_only: bool


class Session:
    """One connection: greeting, commands, goodbye."""

    def __init__(self, wire: _Wire, server: ImapServer) -> None:
        self._wire = wire
        self._server = server
        self._store = server.store
        self._faults = server.faults
        self._account = ""
        self._login: Login | None = None
        self._selected: _Selected | None = None
        self._capabilities = _CAPABILITIES.format(gmail=" X-GM-EXT-1" if server.store.gmail else "")
        self._any: dict[str, Command] = {
            "CAPABILITY": self._capability,
            "NOOP": lambda values: "NOOP completed (Success)",
            "ID": self._id,
            "LOGOUT": self._logout,
        }
        self._before_login: dict[str, Command] = {
            "AUTHENTICATE": self._authenticate,
            "LOGIN": self._by_login,
        }
        self._after_login: dict[str, Command] = {
            "NAMESPACE": self._namespace,
            "ENABLE": self._enable,
            "LIST": lambda values: self._list(values, "LIST"),
            "XLIST": lambda values: self._list(values, "XLIST"),
            "LSUB": lambda values: self._list(values, "LSUB"),
            "CREATE": self._create,
            "STATUS": self._status,
            "SELECT": lambda values: self._select(values, read_only=False),
            "EXAMINE": lambda values: self._select(values, read_only=True),
            "APPEND": self._append,
            "IDLE": self._idle,
        }
        self._when_selected: dict[str, Command] = {
            "CHECK": lambda values: "CHECK completed (Success)",
            "CLOSE": self._unselect,
            "UNSELECT": self._unselect,
            "SEARCH": lambda values: self._search(values, by_uid=False),
            "FETCH": lambda values: self._fetch(values, by_uid=False),
            "UID": self._uid,
        }

    def run(self) -> None:
        """Until the client leaves. `Hangup`, OSError: the connection is over."""
        self._wire.say("* OK Gimap (sandbox) ready for requests")
        try:
            while True:
                self._command()
        except Rebuilt:
            self._wire.say("* BYE The folder was rebuilt, please reconnect.")
            self._wire.flush()

    def end(self) -> None:
        """The connection is over."""
        if self._account:
            self._server.dismiss(self._account)

    def _command(self) -> None:
        parts = self._read_command()
        self._accidents()
        tag, name = _tag(parts[0]), ""
        try:
            tag, name, values = protocol.parse_command(parts)
            word = text(values[0]).upper() if name == "UID" and values else name
            if refusal := self._faults.refusal(word):
                raise Refused(refusal)
            done = self._handler(name)(values)
            if name not in ("FETCH", "SEARCH"):
                self._tell_news()
            answer = f"{tag} OK {done}"
        except Malformed as error:
            answer = f"{tag} BAD {error}"
        except Refused as error:
            answer = f"{tag} NO {error}"
        except UnknownFolder as error:
            answer = f"{tag} NO [NONEXISTENT] Unknown Mailbox: {protocol.encode_name(str(error))} (Failure)"
        self._wire.say(answer)
        if name == "LOGOUT":
            self._hang_up()

    def _read_command(self) -> list[bytes]:
        parts = [self._wire.line()]
        while literal := protocol.literal_at_end(parts[-1]):
            size, waits = literal
            if size > _LITERAL_LIMIT:
                self._wire.say("* BYE Literal too large")
                self._hang_up()
            if waits:
                self._wire.say("+ go ahead")
            parts.append(self._wire.octets(size))
            parts.append(self._wire.line())
        return parts

    def _accidents(self) -> None:
        if stall := self._faults.take("stall"):
            self._server.stopping.wait(float(str(stall["seconds"])))
        self._fall_silent()
        self._end_with_token()
        if self._account and (bye := self._faults.take("bye")):
            self._wire.say(f"* BYE {bye['text']}")
            self._hang_up()

    def _fall_silent(self) -> None:
        if self._account and self._faults.take("half_open") is not None:
            self._wire.hear_nothing()

    def _end_with_token(self) -> None:
        if self._login and self._server.tokens.over(self._login):
            self._wire.say("* BYE Session expired, please login again.")
            self._hang_up()

    def _hang_up(self) -> None:
        self._wire.flush()
        raise Hangup

    def _handler(self, name: str) -> Command:
        if name in self._any:
            return self._any[name]
        if name in self._before_login:
            if self._account:
                raise Malformed(f"{name} not allowed now.")
            return self._before_login[name]
        if name in self._after_login or name in self._when_selected:
            if not self._account:
                raise Malformed(f"{name} not allowed before login.")
            if name in self._when_selected and not self._selected:
                raise Malformed(f"{name} not allowed: no folder is selected.")
            return self._after_login.get(name) or self._when_selected[name]
        raise Malformed(f"Unknown command {name[:40]}")

    # Any time

    def _capability(self, values: list[Value]) -> str:
        plain = " AUTH=PLAIN" if self._server.tokens.has_passwords else ""
        self._wire.say(f"* CAPABILITY {self._capabilities}" + ("" if self._account else f" AUTH=XOAUTH2{plain}"))
        return "Thats all she wrote! (Success)"

    def _id(self, values: list[Value]) -> str:
        self._wire.say('* ID ("name" "GImap" "vendor" "sandbox" "support-url" NIL)')
        return "Success"

    def _logout(self, values: list[Value]) -> str:
        self._wire.say("* BYE LOGOUT Requested")
        return "73 good day (Success)"

    # Before the login

    def _by_login(self, values: list[Value]) -> str:
        user, password = (text(value) for value in _exactly(2, values))
        return self._enter_by_password(user, password)

    def _authenticate(self, values: list[Value]) -> str:
        mechanism = text(values[0]).upper() if values else ""
        if mechanism not in (("XOAUTH2", "PLAIN") if self._server.tokens.has_passwords else ("XOAUTH2",)):
            raise Malformed("Unknown SASL mechanism")
        response = self._sasl_response(values[1:])
        if mechanism == "PLAIN":
            _, user, password = _exactly(3, [*response.decode("utf-8", "replace").split("\0")])
            return self._enter_by_password(text(user), text(password))
        match = _BEARER.match(response)
        if not match:
            raise Malformed("Invalid SASL argument.")
        user, token = (field.decode("utf-8", "replace") for field in match.groups())
        self._attempt(user)
        login = self._server.tokens.login(token)
        if login is None or login.account.lower() != user.lower():
            self._wire.say(f"+ {_CHALLENGE.decode()}")
            self._wire.line()
            raise Refused(_WRONG)
        return self._enter(login)

    def _sasl_response(self, initial: list[Value]) -> bytes:
        if initial:
            response = text(initial[0]).encode("utf-8", "surrogateescape")
        else:
            self._wire.say("+ ")
            response = self._wire.line()
        try:
            return base64.b64decode(response, validate=True)
        except binascii.Error:
            raise Malformed("Invalid SASL argument.") from None

    def _enter_by_password(self, user: str, password: str) -> str:
        self._attempt(user)
        right = self._server.tokens.password_of(user)
        if not right:
            raise Refused("[ALERT] Application-specific password required: the sandbox gave this account none (Failure)")
        if password != right:
            raise Refused(_WRONG)
        return self._enter(Login(user))

    def _attempt(self, user: str) -> None:
        self._server.note_attempt(user)
        if refusal := self._faults.take("login_no"):
            raise Refused(str(refusal["text"]))

    def _enter(self, login: Login) -> str:
        if not self._server.admit(login.account):
            raise Refused(_TOO_MANY)
        self._login, self._account = login, login.account
        self._wire.say(f"* CAPABILITY {self._capabilities}")
        return f"{login.account} authenticated (Success)"

    # After the login

    def _namespace(self, values: list[Value]) -> str:
        self._wire.say('* NAMESPACE (("" "/")) NIL NIL')
        return "Success"

    def _enable(self, values: list[Value]) -> str:
        self._wire.say("* ENABLED")
        return "Success"

    def _list(self, values: list[Value], word: str) -> str:
        reference, pattern = (protocol.decode_name(text(value)) for value in _exactly(2, values))
        if not pattern:
            self._wire.say(f'* {word} (\\Noselect) "/" "/"')
            return "Success"
        folders = self._store.folders(self._account)
        wanted = _pattern(reference + pattern)
        for name, special_use in folders:
            if wanted.match(name):
                children = any(other.startswith(f"{name}/") for other, _ in folders)
                attributes = ("\\HasChildren" if children else "\\HasNoChildren") + (f" {special_use}" if special_use else "")
                self._wire.write(f'* {word} ({attributes}) "/" '.encode() + protocol.quoted(protocol.encode_name(name)) + b"\r\n")
        return "Success"

    def _create(self, values: list[Value]) -> str:
        (name,) = _exactly(1, values)
        self._store.create(self._account, protocol.decode_name(text(name)))
        return "Success"

    def _status(self, values: list[Value]) -> str:
        mailbox, asked = _exactly(2, values)
        name = protocol.decode_name(text(mailbox))
        status = self._store.status(self._account, name)
        numbers = {
            "MESSAGES": status.exists,
            "RECENT": 0,
            "UIDNEXT": status.uidnext,
            "UIDVALIDITY": status.uidvalidity,
            "UNSEEN": status.unseen,
        }
        wanted = [text(value).upper() for value in asked] if isinstance(asked, list) else []
        if not wanted or not all(item in numbers for item in wanted):
            raise Malformed("Unknown STATUS item")
        shown = " ".join(f"{item} {numbers[item]}" for item in wanted)
        self._wire.write(b"* STATUS %b (%b)\r\n" % (protocol.quoted(protocol.encode_name(name)), shown.encode()))
        return "Success"

    def _select(self, values: list[Value], *, read_only: bool) -> str:
        (mailbox,) = _exactly(1, values)
        self._selected = None
        name = canonical(protocol.decode_name(text(mailbox)))
        view = self._store.view(self._account, name)
        status = self._store.status(self._account, name)
        self._wire.say("* FLAGS (\\Answered \\Flagged \\Draft \\Deleted \\Seen $NotPhishing $Phishing)")
        self._wire.say("* OK [PERMANENTFLAGS ()] Flags permitted.")
        self._wire.say(f"* OK [UIDVALIDITY {view.uidvalidity}] UIDs valid.")
        self._wire.say(f"* {len(view.uids)} EXISTS")
        self._wire.say("* 0 RECENT")
        self._wire.say(f"* OK [UIDNEXT {status.uidnext}] Predicted next UID.")
        self._selected = _Selected(view, read_only)
        access = "READ-ONLY" if read_only else "READ-WRITE"
        return f"[{access}] {protocol.encode_name(name)} selected. (Success)"

    def _append(self, values: list[Value]) -> str:
        raw = values[-1] if len(values) > 1 else ""
        if not isinstance(raw, bytes):
            raise Malformed("APPEND mailbox [(flags)] [date-time] literal")
        name = protocol.decode_name(text(values[0]))
        options = values[1:-1]
        flags: list[str] = []
        if options and isinstance(options[0], list):
            flags = [text(flag) for flag in options[0]]
            options = options[1:]
        moment = protocol.read_date_time(text(options.pop(0))) if options else None
        if options:
            raise Malformed("APPEND mailbox [(flags)] [date-time] literal")
        uidvalidity = self._store.status(self._account, name).uidvalidity
        uid = self._store.deliver(self._account, name, raw, internal_date=moment, kind="append", flags=flags)
        return f"[APPENDUID {uidvalidity} {uid}] (Success)"

    def _idle(self, values: list[Value]) -> str:
        self._wire.say("+ idling")
        hears, speaks = socket.socketpair()
        with hears, speaks:
            speaks.setblocking(False)

            def wake() -> None:
                try:
                    speaks.send(b"!")
                except BlockingIOError:
                    return  # it has been woken often enough

            self._store.watch(wake)
            try:
                self._tell_news()
                while not self._wire.line_waits(hears, _TOKEN_LOOK):
                    self._end_with_token()
                    if self._has_news():
                        self._fall_silent()
                        if self._faults.take("mute_idle") is None:
                            self._tell_news()
                self._fall_silent()
            finally:
                self._store.unwatch(wake)
        if self._wire.line().upper() != b"DONE":
            raise Malformed("Expected DONE")
        return "IDLE terminated (Success)"

    # With a folder selected

    def _unselect(self, values: list[Value]) -> str:
        self._selected = None
        return "Returned to authenticated state. (Success)"

    def _uid(self, values: list[Value]) -> str:
        name = text(values[0]).upper() if values else ""
        if name == "SEARCH":
            return self._search(values[1:], by_uid=True)
        if name == "FETCH":
            return self._fetch(values[1:], by_uid=True)
        raise Malformed(f"Unknown command UID {name[:40]}")

    def _search(self, values: list[Value], *, by_uid: bool) -> str:
        view = self._open().view
        if len(values) > 2 and isinstance(values[0], str) and values[0].upper() == "CHARSET":
            values = values[2:]
        found = protocol.search(values, view.uids, self._load)
        hidden = self._faults.hidden(view.name, found, strike=True)
        found = [uid for uid in found if uid not in hidden]
        if not by_uid:
            found = [bisect_left(view.uids, uid) + 1 for uid in found]
        self._wire.say(" ".join(("* SEARCH", *map(str, found))))
        return "SEARCH completed (Success)"

    def _fetch(self, values: list[Value], *, by_uid: bool) -> str:
        selected = self._open()
        view = selected.view
        sequence_set, asked = _exactly(2, values)
        items = protocol.fetch_items(asked, by_uid=by_uid, gmail=self._store.gmail)
        chosen = (protocol.uids_in if by_uid else protocol.positions_in)(text(sequence_set), view.uids)
        hidden = self._faults.hidden(view.name, chosen, strike=False)
        bodies = any(item.name == "BODY" for item in items)
        withheld, refusal = self._faults.withheld(view.name, chosen, bodies=bodies)
        chosen = [uid for uid in chosen if uid not in hidden | withheld]
        if self._faults.take("garbage") is not None:
            self._wire.say("\x00\x7f}{ this is not IMAP (((")
        if not selected.read_only and not all(item.peek for item in items):
            self._store.mark_seen(self._account, view, chosen)
        with_labels = any(item.name == "X-GM-LABELS" for item in items)
        for start in range(0, len(chosen), _FETCH_STEP):
            for uid, entry in self._load(chosen[start : start + _FETCH_STEP]):
                labels = self._store.labels(entry.message) if with_labels else ()
                position = bisect_left(view.uids, uid) + 1
                self._wire.write(protocol.fetch_line(position, uid, entry, labels, items))
        if refusal:
            raise Refused(refusal)
        return "Success"

    def _load(self, uids: Sequence[int]) -> list[tuple[int, Entry]]:
        return self._store.entries(self._account, self._open().view, uids)

    def _open(self) -> _Selected:
        if self._selected is None:
            raise Malformed("No folder is selected")
        return self._selected

    def _has_news(self) -> bool:
        return self._selected is not None and self._store.changed(self._account, self._selected.view)

    def _tell_news(self) -> None:
        if self._selected is None:
            return
        view = self._selected.view
        removed, grew = self._store.catch_up(self._account, view)
        for position in removed:
            self._wire.say(f"* {position} EXPUNGE")
        if grew:
            self._wire.say(f"* {len(view.uids)} EXISTS")


def _exactly(count: int, values: list[Value]) -> list[Value]:
    if len(values) != count:
        raise Malformed(f"Expected {count} argument{'s' if count > 1 else ''}, got {len(values)}")
    return values


def _pattern(pattern: str) -> re.Pattern[str]:
    """LIST: `*` stands for anything, `%` for anything within one level (RFC 3501, 6.3.8)."""
    escaped = re.escape(pattern).replace(r"\*", ".*").replace("%", "[^/]*")
    return re.compile(f"{escaped}\\Z", re.IGNORECASE if pattern.upper() == "INBOX" else 0)


def _tag(line: bytes) -> str:
    tag = line.partition(b" ")[0].decode("ascii", "replace")
    return tag if re.fullmatch(r"[A-Za-z0-9.]{1,40}", tag) else "*"


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already
