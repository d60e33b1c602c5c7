"""Every error this project raises on purpose, by what the caller can do about it.

Transient: the same call may succeed later; wait and repeat. Permanent: repeating it as it stands cannot help, a person or
a new input must; the rest goes on. Fatal: this process cannot go on. Foreign errors (redis, imapclient, google-auth) are
translated into these once, in the module that owns the connection.
"""

from __future__ import annotations

from typing import Literal


class IngestionError(Exception):
    """The root of the hierarchy; never raised itself."""


class Transient(IngestionError):
    """The same call may succeed later."""


class Permanent(IngestionError):
    """Repeating the call cannot help. A handler raises it to bury a mail at once."""


class RetryLater(Transient):
    """A handler raises it to set the delay before its next attempt itself. `seconds`: that delay, at most a year, or what a
    Retry-After header says; the attempt counts."""

    def __init__(self, seconds: float | str, reason: str = "") -> None:
        super().__init__(reason or f"again in {seconds} s")
        self.seconds = seconds


class LeaseLost(Transient):
    """Another worker has this mail by now: its handler is to stop, what it did may be repeated."""


class BreakerOpen(Transient):
    """`name` failed again and again and is not asked for now. `seconds`: until it is asked again. `cause`: how it failed last."""

    def __init__(self, name: str, seconds: float, cause: str = "") -> None:
        how = f" ({cause})" if cause else ""
        super().__init__(f"{name} failed again and again{how}: it is asked again in {seconds:.0f} s")
        self.name = name
        self.seconds = seconds

    def __reduce__(self) -> tuple[type[BreakerOpen], tuple[str, float]]:
        """It crosses the pipe between a worker and the process of a handler."""
        return BreakerOpen, (self.name, self.seconds)


class SkipEmail(IngestionError):
    """A handler raises it with the reason: there is nothing to do for this mail, it is done."""


class Fatal(IngestionError):
    """This process cannot go on (exit code 1)."""


class ConfigurationError(Fatal):
    """A setting, a flag or a file of the user's is wrong (exit code 2). The text is one line that says what to change."""


class RedisUnavailable(Transient):
    """No answer from Redis, or one that says 'not now' (LOADING, READONLY, CLUSTERDOWN)."""


class RedisFull(Transient):
    """Redis refuses writes until someone makes room: OOM (maxmemory) or MISCONF (its disk)."""


class DiskUnavailable(Transient):
    """A file of ours cannot be written: disk full, or not ours to write. What it should have covered waits."""


class ArchiveUnavailable(Transient):
    """The archive of raw mail is full or cannot be reached. The text says where it is and what to do."""


class ArchiveMissing(Permanent):
    """This raw mail is not in the archive, or not as it was stored; the archive itself can be had."""


class GroupMissing(Transient):
    """NOGROUP: the stream or its consumer group is gone (FLUSHALL, DEL); join again."""


class BackupError(Permanent):
    """A backup cannot be taken or restored as things are. The text says what stands and what to do."""


class ScriptRefused(Permanent):
    """A transition was refused for the data it was given: a key of another type, a malformed batch."""


class ImapUnavailable(Transient):
    """The IMAP server cannot be reached, ended the session, or answered out of protocol."""


class ImapThrottled(Transient):
    """The server asks for a long pause. `kind`: OVERQUOTA (the day's bytes), THROTTLED (too busy), CONNECTIONS (too many at once)."""

    def __init__(self, kind: Literal["OVERQUOTA", "THROTTLED", "CONNECTIONS"], text: str) -> None:
        super().__init__(text)
        self.kind = kind


class ImapIncomplete(Transient):
    """FETCH answered OK without the data of some messages. `uids` are those that are missing."""

    def __init__(self, uids: list[int]) -> None:
        super().__init__(f"the server answered OK without the data of UID {', '.join(map(str, uids[:10]))}")
        self.uids = uids


class LoginRefused(Transient):
    """AUTHENTICATE answered NO. With XOAUTH2 a forced token refresh is tried once before this becomes ReauthRequired."""


class MailboxMissing(Permanent):
    """EXAMINE answered NO: there is no such folder, or IMAP does not show it."""


class TokenEndpointUnavailable(Transient):
    """The token endpoint cannot be reached or answered something that is not a verdict (503, HTML, time out)."""


class ReauthRequired(Permanent):
    """No token of this account will work until a person consents again. The text names the cause and the command."""
