"""Files that open mailboxes: read only where nobody else can read them."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from src.common.exceptions import ConfigurationError


def read_secret(path: Path, what: str, missing: str) -> bytes:
    """The content of `path`. `what` names the file in errors, `missing` is the whole text where there is none.

    Raises ConfigurationError, in one line: missing, not readable, open to other users.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigurationError(
                    f"{what} {path} is open to other users (mode {mode:04o}); run: chmod 600 {shlex.quote(str(path))}"
                )
            return file.read()
    except FileNotFoundError:
        raise ConfigurationError(missing) from None
    except OSError as error:
        raise ConfigurationError(f"{what} {path} cannot be read: {error.strerror}") from error


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever a person replaces, edits or protects the file; None where there is none that can be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_mode
