"""Passwords: app passwords of Gmail, and other IMAP servers. Never tried twice after a refusal: servers lock accounts for that."""

from __future__ import annotations

import threading
from pathlib import Path

from src.auth.secret_file import read_secret, stamp_of
from src.common.clock import Clock
from src.common.exceptions import ConfigurationError, ReauthRequired

RETRY_SECONDS = 3600.0


class PasswordSource:
    """The password of one account, shared by its mailboxes: `path` holds it (read anew each time), else it is `password`."""

    def __init__(self, account: str, path: Path | None, password: str, *, clock: Clock) -> None:
        self._account = account
        self._path = path
        self._password = password
        self._clock = clock
        self._lock = threading.Lock()
        self._refused = ""
        self._refused_at = 0.0

    def access_token(self, *, refuse: str | None = None) -> str:
        """The password. `refuse`: one that the server just refused; it is not handed out again for an hour.

        Raises ReauthRequired (the password was refused) and ConfigurationError (no such file, or others can read it).
        """
        password = self._read()
        with self._lock:
            if refuse:
                self._refused, self._refused_at = refuse, self._clock.monotonic()
            if password == self._refused and self._clock.monotonic() < self._refused_at + RETRY_SECONDS:
                raise ReauthRequired(f"the server refuses the password of {self._account}; set a new one: {self._place}")
        return password

    def stamp(self) -> object:
        """Changes when a person has put another password into its place."""
        return stamp_of(self._path) if self._path else None

    def facts(self) -> dict[str, object]:
        return {"method": "password"}

    @property
    def _place(self) -> str:
        return f"in {self._path}" if self._path else "IMAP_PASSWORD, then start the producer again"

    def _read(self) -> str:
        if self._path is None:
            return self._password
        content = read_secret(self._path, "the password file", f"there is no password file {self._path}")
        try:
            password = content.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            password = ""
        if not password.isprintable() or not password:
            raise ConfigurationError(f"the password file {self._path} does not hold one line of text")
        return password
