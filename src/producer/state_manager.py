"""How far each mailbox was read: in Redis, changed by one script a batch, and in a small marker file for the day Redis forgets."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from src.common import pauses
from src.common.clock import iso
from src.common.digits import number_in
from src.common.exceptions import ConfigurationError, DiskUnavailable
from src.common.keys import Keys, MailboxKeys, escaped, open_field
from src.common.redis_client import RedisClient
from src.mail.record import member_of
from src.producer.plan import Marker, State, oldest_open

LONGEST_NAME = 200  # characters of a file's name, so that endings and what is written aside have room within 255

Fields = dict[str, str]
Place = Literal["done", "unread", "flight", "waiting", "lost", "dead", "dangling", "unknown"]  # as lua/audit.lua has them


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail on its way into the stream: the entry's fields (`src.mail.record.to_fields`). `traceparent`: as in its record."""

    uid: int
    fields: Fields
    traceparent: str = ""

    @property
    def size(self) -> int:
        return sum(map(len, self.fields.values()))


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells whether a mail is known: its id and the INTERNALDATE that names its processed set."""

    email_id: str
    internal_date: str


@dataclass(frozen=True, slots=True)
class Lease:
    """`state` is None where Redis knows nothing of the mailbox. `epoch` grows with every change of owner.

    `resync`: what someone asked for, see `StateManager.request_look`; "" if nobody did.
    """

    epoch: int
    state: State | None
    resync: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """Another producer reads this mailbox; its lease ends in `seconds` unless renewed. `until`: that moment on the server's clock,
    another one after each renewal."""

    seconds: float
    until: str
    state: State | None


@dataclass(frozen=True, slots=True)
class Published:
    """`verdict`: OK; ALREADY (this very call repeated); FENCED (another owner); STALE (the state is not the one expected); FULL.

    `added`: one flag a mail, False for known ones (OK only). `live`: entries in the stream (OK and FULL).
    """

    verdict: Literal["OK", "ALREADY", "FENCED", "STALE", "FULL"]
    added: tuple[bool, ...] = ()
    live: int = 0


class StateManager:
    """State of one (account, mailbox), owned by `nonce` while its lease is renewed. Raises what RedisClient raises."""

    def __init__(self, redis: RedisClient, keys: Keys, account: str, mailbox: str, nonce: str) -> None:
        self._redis = redis
        self._keys = keys
        self._own: MailboxKeys = keys.mailbox(account, mailbox)
        self._nonce = nonce

    def acquire(self, lease: float) -> Lease | Held:
        """Take or renew the lease for `lease` seconds; one round trip."""
        verdict, number, until, resync, *known = self._redis.run(
            "acquire", self._lease_keys(), [self._nonce, max(1, round(lease * 1_000_000))]
        )
        if verdict == "HELD":
            return Held(int(number) / 1_000_000, until, _state(known))
        return Lease(int(number), _state(known), resync)

    def look(self) -> State | None:
        """The state without a lease; writes nothing."""
        own = self._own
        uidvalidity, last_uid = self._redis.call("MGET", own.uidvalidity, own.last_uid)
        rest = self._redis.call("HMGET", own.intake, "boundary", "horizon", "first_complete", "passed", "floor")
        return _state([part or "" for part in (uidvalidity, last_uid, *rest)])

    def request_look(self, request: str) -> str:
        """Ask whoever owns the mailbox to look again at all mail since an ISO date; with `late:` before it only to publish what was taken
        in once, or should have been. All requests that stand then, the first to come first, separated by commas."""
        return str(self._redis.run("look", [self._own.intake], ["ask", request]))

    def requested(self) -> str:
        """What is asked for and not done yet, "" for nothing."""
        return str(self._redis.call("HGET", self._own.intake, "resync") or "")

    def look_done(self, request: str) -> str:
        """The first request was this one, and is done; those that stand then."""
        return str(self._redis.run("look", [self._own.intake], ["done", request]))

    def spend(self, size: int, now: datetime) -> int:
        """Count `size` bytes read from the account today (UTC); how many that makes."""
        key = self._keys.bytes_read(self._own.account, iso(now))
        total = int(self._redis.call("INCRBY", key, size))
        if total == size:
            self._redis.call("EXPIRE", key, 2 * 86_400)
        return total

    def paused(self) -> str:
        """Why somebody holds this mailbox up by hand, "" if nobody does."""
        fields = pauses.fields_of(self._own.account, self._own.mailbox)
        return pauses.why(self._redis.hash(self._keys.paused), fields)

    def let_go(self) -> None:
        """Give the lease up, so that a standby need not wait for its end."""
        self._redis.run("acquire", self._lease_keys(), [self._nonce, 0])

    def publish(
        self, mails: Sequence[Mail], *, batch: str, expected: State | None, state: State, now: datetime, most_live: int
    ) -> Published:
        """Put `mails` into the stream and move the state from `expected` to `state` in one step. Safe to repeat with the same `batch`.

        Raises ConfigurationError where the stream's key holds something else.
        """
        sets: dict[str, int] = {}
        args: list[str | int] = [self._nonce, batch]
        args += [expected.uidvalidity, expected.last_uid] if expected else ["", ""]
        args += [state.uidvalidity, state.last_uid]
        args += [state.boundary, state.horizon, int(state.first_complete), state.passed, state.floor]
        args += [iso(now), most_live, len(mails)]
        for mail in mails:
            fields = mail.fields
            processed = self._keys.processed(fields["account"], fields["internal_date"])
            number = sets.setdefault(processed, len(sets) + 1)
            opened = open_field(fields["account"], fields["mailbox"], fields["internal_date"])
            args += [fields["email_id"], member_of(fields["email_id"]), number, opened, 2 * len(fields)]
            for name, value in fields.items():
                args += [name, value]
        own, keys = self._own, self._keys
        script_keys = [
            own.intake,
            own.uidvalidity,
            own.last_uid,
            own.last_poll,
            own.email_count,
            keys.stream,
            keys.index,
            keys.open,
            keys.dlq,
            *sets,
        ]
        reply = self._redis.run("publish", script_keys, args)
        verdict = reply[0]
        if verdict == "OK":
            return Published("OK", tuple(flag == "1" for flag in reply[2:]), int(reply[1]))
        if verdict == "FULL":
            return Published("FULL", live=int(reply[1]))
        if verdict == "BADKEY":
            raise ConfigurationError(f"STREAM_NAME={keys.stream}: that key is a {reply[1]}, not a stream; choose another name")
        if verdict == "BACKWARD":
            raise AssertionError(f"a batch would move last_uid back to {state.last_uid}")
        return Published(verdict)

    def missing(self, mails: Sequence[Identity], account: str) -> list[int]:
        """Positions (from 0) of those known nowhere: neither unfinished nor dead nor done. One round trip."""
        if not mails:
            return []
        sets, args = self._identified(mails, account)
        return [position - 1 for position in self._redis.run("missing", [self._keys.index, *sets], args)]

    def places(self, mails: Sequence[Identity], account: str, group: str) -> list[Place]:
        """Where each of them stands, at one moment; changes nothing. One round trip."""
        if not mails:
            return []
        keys = self._keys
        sets, args = self._identified(mails, account)
        return list(self._redis.run("audit", [keys.stream, keys.index, keys.due, keys.dlq, *sets], [group, *args]))

    def remember(self, mails: Sequence[Identity], account: str, processed_days: float) -> int:
        """Put the processed ids of finished mail back; how many were not unfinished again by then."""
        if not mails:
            return 0
        sets, args = self._identified(mails, account)
        answers = self._redis.run("remember", [self._keys.index, *sets], [round(processed_days * 86_400), *args])
        return int(answers.count("OK"))

    def _identified(self, mails: Sequence[Identity], account: str) -> tuple[list[str], list[str | int]]:
        """The processed sets of `mails` as script keys, and n x {email_id, member, number of its set}."""
        sets: dict[str, int] = {}
        args: list[str | int] = []
        for mail in mails:
            number = sets.setdefault(self._keys.processed(account, mail.internal_date), len(sets) + 1)
            args += [mail.email_id, member_of(mail.email_id), number]
        return list(sets), args

    def open_days(self) -> list[str]:
        """The fields of `Keys.open`: which days have unfinished mail, of all mailboxes."""
        return list(self._redis.hash(self._keys.open))

    def traces(self) -> str | None:
        """Where the state is gone: the oldest day (ISO date, "" for any) from which to read again, by what other keys tell.

        None where nothing tells of an earlier life of this mailbox. Several round trips: asked at most once a start.
        """
        account, mailbox = self._own.account, self._own.mailbox
        unfinished = oldest_open(self.open_days(), account, mailbox)
        if unfinished:
            return unfinished
        lived = int(self._redis.call("EXISTS", self._own.email_count, self._own.last_poll)) > 0
        if not lived and self._keys_like(f"producer_state:{escaped(account)}:*:last_uid"):
            return None  # the account's other mailboxes are known: this one is new
        processed = self._keys_like(f"{escaped(self._keys.processed(account, ''))[: -len('undated')]}*")
        days = sorted(key[-8:] for key in processed if key[-8:].isdigit())
        if days:
            return f"{days[-1][:4]}-{days[-1][4:6]}-{days[-1][6:]}"
        return "" if lived else None

    def _keys_like(self, pattern: str) -> list[str]:
        cursor, found = "0", []
        while True:
            cursor, page = self._redis.call("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            found += page
            if str(cursor) == "0":
                return found

    def _lease_keys(self) -> list[str]:
        return [self._own.intake, self._own.uidvalidity, self._own.last_uid]


class MarkerFile:
    """The marker of one mailbox on disk: written aside, fsynced, renamed."""

    def __init__(self, data_dir: Path, account: str, mailbox: str) -> None:
        self._path = data_dir / "markers" / _file_name(account, safe="@.") / f"{_file_name(mailbox)}.json"

    def read(self) -> Marker | None:
        """None where there is none. Raises ConfigurationError for a damaged one: guessing could lose mail; DiskUnavailable."""
        try:
            content = json.loads(self._path.read_text())
            return Marker(State(**content["state"]), content["oldest"], content["epoch"])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DiskUnavailable(f"{self._path} cannot be read ({error.strerror}): mend DATA_DIR, or whose it is") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{self._path} is damaged ({error}): delete it only if Redis still knows the mailbox (GET producer_state:…:last_uid)"
            ) from None

    def write(self, marker: Marker) -> None:
        """Raises DiskUnavailable (full, not writable): then nothing may be published that it should have covered."""
        try:
            self._write(marker)
        except OSError as error:
            raise DiskUnavailable(
                f"{self._path} cannot be written ({error.strerror}): make room, mend DATA_DIR, or whose it is"
            ) from error

    def _write(self, marker: Marker) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(f".{secrets.token_hex(4)}.tmp")  # a standby on the same disk writes, too
        try:
            with aside.open("x") as file:
                json.dump(asdict(marker), file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _file_name(text: str, safe: str = "") -> str:
    """One that any disk takes, another one for each text: a label of 30 Japanese letters is 270 characters when quoted."""
    name = quote(text, safe=safe)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 33]}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _state(known: Sequence[str]) -> State | None:
    uidvalidity, last_uid, boundary, horizon, complete, passed, floor = known
    epoch, uid = number_in(uidvalidity), number_in(last_uid)
    if epoch is None or uid is None:
        return None
    return State(epoch, uid, boundary, int(horizon or 0), complete == "1", int(passed or 0), int(floor or 0))
