"""What can be made to go wrong: one method a fault, each with the number of times it still strikes; then it clears itself.

The same names are the keys of POST /faults: `{"stall": 2}` calls `stall(2)`, `{"ok_without_data": {"uids": [3], "times": 2}}`
calls `ok_without_data(uids=[3], times=2)`. `times=0` takes a fault back.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Armed:
    """A fault that waits for its occasion: how often it still strikes, and with what."""

    left: int
    details: Mapping[str, object]


class Faults:
    """Arming a fault replaces what was armed under its name. Any thread may call. ValueError: an argument of a wrong type."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: dict[str, Armed] = {}
        self._bytes_left = 0
        self._by_name: dict[str, Callable[..., None]] = {
            "refuse": self.refuse,
            "login_no": self.login_no,
            "drop_after_bytes": self.drop_after_bytes,
            "stall": self.stall,
            "bye": self.bye,
            "garbage": self.garbage,
            "answer_no": self.answer_no,
            "half_open": self.half_open,
            "ok_without_data": self.ok_without_data,
            "hide_uids": self.hide_uids,
            "mute_idle": self.mute_idle,
            "token_answer": self.token_answer,
            "token_stall": self.token_stall,
            "no_refresh_token": self.no_refresh_token,
        }

    def refuse(self, times: int = 1) -> None:
        """The next IMAP connections are closed before the greeting."""
        self._arm("refuse", times)

    def login_no(self, text: str = "[ALERT] Too many simultaneous connections. (Failure)", times: int = 1) -> None:
        """The next AUTHENTICATE commands are answered NO with this text, whatever the token."""
        self._arm("login_no", times, text=_of(str, "text", text))

    def drop_after_bytes(self, count: int, times: int = 1) -> None:
        """After `count` more bytes to IMAP clients (all connections together) the connection that crosses the line is cut."""
        with self._lock:
            self._bytes_left = _of(int, "count", count)
        self._arm("drop_after_bytes", times, count=count)

    def stall(self, seconds: float, times: int = 1) -> None:
        """The next IMAP commands are answered this much later."""
        self._arm("stall", times, seconds=_of((int, float), "seconds", seconds))

    def bye(self, text: str = "Session expired, please login again.", times: int = 1) -> None:
        """The next IMAP commands of logged-in sessions are answered with BYE and the end of the connection."""
        self._arm("bye", times, text=_of(str, "text", text))

    def garbage(self, times: int = 1) -> None:
        """The next FETCH answers begin with a line that is not IMAP."""
        self._arm("garbage", times)

    def answer_no(
        self,
        text: str = "[OVERQUOTA] Account exceeded command or bandwidth limits. (Failure)",
        times: int = 1,
        command: str = "FETCH",
    ) -> None:
        """The next commands of this name (UID or not) are answered NO with this text."""
        self._arm("answer_no", times, text=_of(str, "text", text), command=_of(str, "command", command).upper())

    def half_open(self, times: int = 1) -> None:
        """The next session that hears a command, or that idles when there are news, says nothing any more and stays open."""
        self._arm("half_open", times)

    def ok_without_data(
        self, uids: Sequence[int], times: int = 1, mailbox: str = "INBOX", bodies_only: bool = False, no: str = ""
    ) -> None:
        """The next FETCH commands (`bodies_only`: of BODY) that ask for one of these answer OK, or NO with the text `no`, without their
        data and with that of the others."""
        mailbox = _of(str, "mailbox", mailbox)
        details = {"uids": _uids(uids), "mailbox": mailbox, "bodies_only": bool(bodies_only), "no": _of(str, "no", no)}
        self._arm("ok_without_data", times, **details)

    def hide_uids(self, uids: Sequence[int], times: int = 1, mailbox: str = "INBOX") -> None:
        """UIDs that become visible late: SEARCH and FETCH know nothing of them until this many SEARCHes would have shown one."""
        self._arm("hide_uids", times, uids=_uids(uids), mailbox=_of(str, "mailbox", mailbox))

    def mute_idle(self, times: int = 1) -> None:
        """The next news are not pushed to an IDLE; the poll finds them."""
        self._arm("mute_idle", times)

    def token_answer(self, status: int = 503, body: str = "<html>Service Unavailable</html>", times: int = 1) -> None:
        """The next POST /token are answered with this status and this text as text/html."""
        self._arm("token_answer", times, status=_of(int, "status", status), body=_of(str, "body", body))

    def token_stall(self, seconds: float, times: int = 1) -> None:
        """The next POST /token are answered this much later."""
        self._arm("token_stall", times, seconds=_of((int, float), "seconds", seconds))

    def no_refresh_token(self, times: int = 1) -> None:
        """The next codes are exchanged for an access token only."""
        self._arm("no_refresh_token", times)

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._armed.clear()

    def arm(self, wanted: Mapping[str, object]) -> None:
        """The HTTP form of the methods above. ValueError, one sentence: unknown fault, argument or type."""
        calls: list[inspect.BoundArguments] = []
        names = list(wanted)
        for name in names:
            if name not in self._by_name:
                raise ValueError(f"no fault is called {name!r}; there are {', '.join(self._by_name)}")
            value = wanted[name]
            signature = inspect.signature(self._by_name[name])
            try:
                calls.append(signature.bind(**value) if isinstance(value, dict) else signature.bind(value))
            except TypeError as error:
                raise ValueError(f"{name} takes {', '.join(signature.parameters)}: {error}") from None
        for name, call in zip(names, calls, strict=True):
            self._by_name[name](*call.args, **call.kwargs)

    def state(self) -> dict[str, dict[str, object]]:
        """Each fault still armed: its arguments and `left`."""
        with self._lock:
            return {name: {**armed.details, "left": armed.left} for name, armed in self._armed.items()}

    def take(self, name: str) -> Mapping[str, object] | None:
        """What a server asks at the occasion: the arguments, one strike used up; None: all is well."""
        with self._lock:
            return self._take(name)

    def refusal(self, command: str) -> str | None:
        """The text with which `command` is to be answered NO."""
        with self._lock:
            armed = self._armed.get("answer_no")
            if armed is None or armed.details["command"] != command:
                return None
            self._take("answer_no")
            return str(armed.details["text"])

    def allowance(self, size: int) -> int:
        """How many of `size` bytes may be sent; fewer than `size`: cut the connection after them."""
        with self._lock:
            if "drop_after_bytes" not in self._armed:
                return size
            if size <= self._bytes_left:
                self._bytes_left -= size
                return size
            allowed = self._bytes_left
            details = self._take("drop_after_bytes")
            self._bytes_left = int(str(details["count"])) if details else 0
            return allowed

    def hidden(self, mailbox: str, uids: Sequence[int], *, strike: bool) -> frozenset[int]:
        """Those of `uids` that `hide_uids` conceals; with `strike` one of its times is used up by it."""
        return self._concealed("hide_uids", mailbox, uids, strike=strike)[0]

    def withheld(self, mailbox: str, uids: Sequence[int], *, bodies: bool) -> tuple[frozenset[int], str]:
        """Those of `uids` that `ok_without_data` withholds from a FETCH, one of its times, and the text of its NO, "" for OK."""
        return self._concealed("ok_without_data", mailbox, uids, strike=True, bodies=bodies)

    def _concealed(
        self, name: str, mailbox: str, uids: Sequence[int], *, strike: bool, bodies: bool = True
    ) -> tuple[frozenset[int], str]:
        with self._lock:
            armed = self._armed.get(name)
            if armed is None or armed.details["mailbox"] != mailbox or (armed.details.get("bodies_only") and not bodies):
                return frozenset(), ""
            concealed = frozenset(uids) & frozenset(_uids(armed.details["uids"]))
            if concealed and strike:
                self._take(name)
            return concealed, str(armed.details.get("no", "")) if concealed else ""

    def _take(self, name: str) -> Mapping[str, object] | None:
        armed = self._armed.get(name)
        if armed is None:
            return None
        if armed.left == 1:
            del self._armed[name]
        else:
            self._armed[name] = replace(armed, left=armed.left - 1)
        return armed.details

    def _arm(self, name: str, times: int, **details: object) -> None:
        left = _of(int, "times", times)
        with self._lock:
            if left > 0:
                self._armed[name] = Armed(left, details)
            else:
                self._armed.pop(name, None)


def _of(kind: type | tuple[type, ...], name: str, value: T) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, which has the wrong type")
    return value


def _uids(value: object) -> list[int]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(uid, int) for uid in value):
        raise ValueError(f"uids is {value!r}, not a list of numbers")
    return list(value)
