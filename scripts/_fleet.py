"""All daemons as they look from this machine, and what is wrong with them: for start.sh, stop.sh, status.sh and health_check.sh."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.client import HTTPException
from typing import Any, Literal

import _path  # noqa: F401  # before the project's own modules
from _processes import Folder, Process, life_of
from config.settings import Settings
from src.common.clock import Clock
from src.common.embedded import existing_redis
from src.common.exceptions import Transient
from src.common.keys import Keys
from src.common.overview import Overview, look
from src.common.pauses import BY_HAND
from src.common.redis_client import Fields, RedisClient
from src.common.registry import Registration, Seen, registered

ANSWER_SECONDS = 5.0
TOLD_SECONDS = 900.0  # so long a killed daemon that nobody replaced is told, while others of its role are at work

State = Literal["ok", "degraded", "not ready", "stuck", "elsewhere", "starting", "silent", "ended"]
LIVE: tuple[State, ...] = ("ok", "degraded", "not ready", "stuck", "elsewhere", "starting")


@dataclass(frozen=True)
class Daemon:
    """`name`: that of its pid file, else its registered one. `why`: what is wrong, one sentence each. `page`: its /status, {} if not had.

    `state`: elsewhere (on another machine, its heartbeat is seen), starting (not registered), silent (killed or cut off),
    ended (it has a pid file and no process). `last_sign`: of a silent one, seconds since 1970. `ours`: it has a pid file.
    """

    name: str
    role: str
    state: State
    host: str
    pid: int
    address: str = ""
    why: tuple[str, ...] = ()
    started: float = 0.0
    last_sign: float = 0.0
    ours: bool = False
    page: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fleet:
    """`redis`: what Redis says of itself, "" if it does not answer. `paused`: the hash of `Keys.paused`. `now`: seconds since 1970.

    `last_words`: role → why the last one that was started here could not run.
    """

    daemons: Sequence[Daemon]
    redis: str = ""
    overview: Overview | None = None
    paused: Fields = field(default_factory=dict)
    now: float = 0.0
    last_words: Mapping[str, str] = field(default_factory=dict)

    @property
    def present(self) -> list[Daemon]:
        """Without those that were killed and replaced, or long ago while others went on."""
        return [daemon for daemon in self.daemons if daemon.state != "silent" or not self._is_replaced(daemon)]

    def _is_replaced(self, daemon: Daemon) -> bool:
        others = self.live(daemon.role)
        return any(other.started > daemon.last_sign for other in others) or (
            bool(others) and self.now - daemon.last_sign > TOLD_SECONDS
        )

    def live(self, role: str) -> list[Daemon]:
        return [daemon for daemon in self.daemons if daemon.role == role and daemon.state in LIVE]

    @property
    def wanted_workers(self) -> int:
        """As many as scale.sh is to start here, that those that ended are replaced."""
        return sum(daemon.role == "worker" and daemon.ours for daemon in self.daemons)


@dataclass(frozen=True)
class Trouble:
    """`level`: 1 something is wrong, 2 mail does not flow or a daemon stands still. `remedy`: what to run, "" where `text` says it."""

    level: int
    text: str
    remedy: str = ""


def survey(settings: Settings, folder: Folder, clock: Clock) -> Fleet:
    """Ask Redis and every daemon of this machine; those of others are judged by their heartbeat. Raises ConfigurationError."""
    processes = folder.processes()
    last_words = {role: folder.last_words(role) for role in ("producer", "worker")}
    try:
        redis = existing_redis(settings)
        if redis is None:
            return Fleet([_of_process(process, "Redis does not answer") for process in processes], last_words=last_words)
        with redis:
            keys = Keys(settings.stream.name)
            seen = registered(redis, keys)
            overview, paused = look(redis, keys, settings.stream.group), redis.hash(keys.paused)
            title = _title(redis)
    except Transient as error:
        return Fleet([_of_process(process, str(error)) for process in processes], last_words=last_words)
    here = socket.gethostname()
    mine = {process.pid: process for process in processes}
    daemons = [
        _asked(entry, here, mine.pop(entry.daemon.pid, None) if entry.daemon.host == here else None, clock) for entry in seen
    ]
    daemons += [_of_process(process, "not registered in Redis yet") for process in mine.values()]
    daemons.sort(key=lambda daemon: (daemon.role, len(daemon.name), daemon.name))
    return Fleet(daemons, title, overview, paused, clock.wall().timestamp(), last_words)


def addresses(redis: RedisClient, keys: Keys) -> dict[int, Registration]:
    """The daemons of this machine that are registered, by process id."""
    here = socket.gethostname()
    return {entry.daemon.pid: entry.daemon for entry in registered(redis, keys) if entry.alive and entry.daemon.host == here}


def page(address: str, path: str) -> tuple[int, dict[str, Any]]:
    """(status, body) of a page of a daemon here; (0, {}) without an answer."""
    local = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    try:
        with urllib.request.urlopen(local + path, timeout=ANSWER_SECONDS) as answer:  # noqa: S310  # an address of our own daemons
            return answer.status, _body(answer.read())
    except urllib.error.HTTPError as error:
        with error, suppress(OSError, HTTPException):
            return error.code, _body(error.read())
    except (OSError, HTTPException):  # another program's port by now, or a daemon that ended as it spoke
        pass
    return 0, {}


def _body(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _title(redis: RedisClient) -> str:
    memory = redis.memory()
    used = f", {memory.used / 1e6:.1f} MB" + (f" of {memory.limit / 1e6:.1f}" if memory.limit else "") if memory else ""
    return f"{redis.version() or 'answers'}{used}"


def _of_process(process: Process, why: str) -> Daemon:
    """A daemon of which nothing is known but its pid file."""
    state: State = "starting" if process.alive else "ended"
    reasons = (why,) if state == "starting" else ()
    return Daemon(process.name, process.role, state, socket.gethostname(), process.pid, why=reasons, ours=True)


def _asked(entry: Seen, here: str, process: Process | None, clock: Clock) -> Daemon:
    daemon, now = entry.daemon, clock.wall().timestamp()
    name = process.name if process else daemon.name
    began = datetime.fromisoformat(daemon.started).timestamp()

    def found(state: State, *why: str, status: Mapping[str, Any] | None = None) -> Daemon:
        last_sign, ours = now - entry.silent, process is not None
        return Daemon(
            name, daemon.role, state, daemon.host, daemon.pid, daemon.address, why, began, last_sign, ours, status or {}
        )

    if process and not process.alive:
        return found("ended")
    if daemon.host != here:
        return found("elsewhere") if entry.alive else found("silent")
    if not life_of(daemon.pid)[0]:
        return found("silent")
    code, status = page(daemon.address, "/status")
    if code != 200 or status.get("name") != daemon.name:
        return found("stuck", f"{daemon.address} does not answer") if process or entry.alive else found("silent")
    reasons = [*status["why"], *(reason for reason in page(daemon.address, "/ready")[1].get("why", []))]
    why = tuple(reason for i, reason in enumerate(reasons) if not any(reason in other for other in reasons[:i]))
    if status["health"] == "stuck":
        return found("stuck", page(daemon.address, "/health")[1].get("why", "a loop stands still"), *why, status=status)
    state: State = "not ready" if not status["ready"] else "degraded" if why else "ok"
    return found(state, *why, status=status)


# what is wrong: pure


START_PRODUCER = "./scripts/start.sh --workers 0"


def troubles(fleet: Fleet) -> list[Trouble]:
    """What is wrong, the worst first; [] if all is well. Dead letters are no fault of a daemon."""
    found = []
    if not fleet.redis:
        found.append(Trouble(2, "Redis does not answer", "is it running, and is REDIS_URL right? The daemons wait for it"))
    remedies = {"producer": START_PRODUCER, "worker": f"./scripts/scale.sh {fleet.wanted_workers or 2}"}
    for role, remedy in remedies.items():
        if not fleet.live(role):
            why = fleet.last_words.get(role, "")
            found.append(Trouble(2, f"no {role} runs" + (f" ({why})" if why else ""), remedy))
    told: dict[tuple[int, str, str], list[str]] = {}
    for daemon in fleet.present:
        for level, text, remedy in _faults(daemon, fleet):
            told.setdefault((level, text, remedy), []).append(daemon.name)
    found += [Trouble(level, f"{', '.join(names)}: {text}", remedy) for (level, text, remedy), names in told.items()]
    return sorted(found, key=lambda trouble: -trouble.level)


def _faults(daemon: Daemon, fleet: Fleet) -> list[tuple[int, str, str]]:
    """(level, text, remedy)"""
    if daemon.state == "stuck":
        return [
            (2, why, "restart it: ./scripts/stop.sh --kill, then ./scripts/start.sh; or systemctl restart") for why in daemon.why
        ]
    if daemon.state == "ended":
        again = START_PRODUCER if daemon.role == "producer" else f"./scripts/scale.sh {fleet.wanted_workers}"
        return [(1, "ended without stop.sh", f"{again}  replaces it; ./scripts/logs.sh {daemon.name}  may tell why")]
    if daemon.state == "silent":
        remedy = (
            f"start it on {daemon.host} as it was started before (by hand, or systemctl); told until another {daemon.role} starts, or "
            f"{TOLD_SECONDS / 60:g} min after its last sign if others run"
        )
        return [(1, f"no sign of life from {daemon.host}, pid {daemon.pid}: killed, or cut off", remedy)]
    if daemon.state == "starting" and not fleet.redis:
        return []  # that Redis is away is said already
    flows = any(other.state != "not ready" for other in fleet.live(daemon.role))
    level = 2 if daemon.state == "not ready" and not flows else 1
    return [(1 if BY_HAND in why else level, why, "") for why in daemon.why]
