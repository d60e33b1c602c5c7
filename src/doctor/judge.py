"""What the doctor makes of what was seen: facts in, findings out. Pure.

A finding is ok, warn (mail moves, something is not as it should be) or fail (mail does not move, or can be lost), with one line of
detail and, where it is not ok, what to run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from config.settings import RedisSettings, StreamSettings, misspelt
from src.auth.oauth2_gmail import SCOPE, TESTING_DAYS, days_since, setup_command
from src.common.clock import iso
from src.common.health import Memory
from src.common.overview import Overview
from src.common.registry import Seen

Status = Literal["ok", "warn", "fail"]
PortState = Literal["free", "ours", "other"]

WARN_DAYS = 5.0  # age of a consent from which the end after seven days is near
INTSET_ENTRIES = 4096
CLOCK_WARN, CLOCK_FAIL = 2.0, 60.0  # seconds
DISK_FAIL, DISK_WARN = 100 << 20, 1 << 30  # free bytes
INODES_FAIL, INODES_WARN = 1_000, 20_000
DLQ_NEAR = 0.8  # part of DLQ_MAX
SECRET = re.compile(r"PASSWORD$|SECRET$|TOKEN$|^REDIS_URL$|^SQL_URL$|^RAW_ARCHIVE$")  # variables that are, or may hold, one
REMEDY = re.compile(r"(?:[;.:] |^)(?:run|Run): ")

Needs = Mapping[str, tuple[str, ...]]  # key pattern of the ACL ("" for none) → commands


@dataclass(frozen=True)
class Finding:
    """`remedy`: what to run or to set; "" where nothing is to be done."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    """0: nothing failed. 2: a setting or one of its files cannot be used. 1: something else failed."""
    failed = {finding.check for finding in findings if finding.status == "fail"}
    return 2 if failed & {"settings", "accounts", "handlers"} else int(bool(failed))


def failed(check: str, text: str, remedy: str) -> Finding:
    """An error's own text; where it names what to run, that is the remedy, else `remedy` is."""
    said = REMEDY.search(text)
    return Finding(check, "fail", text[: said.start()], text[said.end() :]) if said else Finding(check, "fail", text, remedy)


# this machine


def settings(names: Collection[str] | None, mode: int, known: Collection[str]) -> Finding:
    """`names`: variables set in .env, None where there is none. `mode`: of that file. `known`: all variables there are."""
    if names is None:
        return Finding("settings", "ok", "from the environment and defaults; there is no .env")
    secret = next((name for name in sorted(names) if SECRET.search(name)), "")
    if mode & 0o077 and secret:
        return Finding("settings", "warn", f".env is open to other users (mode {mode:04o}) and sets {secret}", "chmod 600 .env")
    for name, meant in misspelt(names, known).items():
        return Finding("settings", "warn", f"{name} in .env is no setting", f"did you mean {meant}? Rename it in .env")
    return Finding("settings", "ok", f"{len(names)} set in .env")


def python(version: tuple[int, int, int], wanted: Mapping[str, str], installed: Mapping[str, str]) -> list[Finding]:
    """`wanted`, `installed`: package → version; what is not installed is not in `installed`."""
    name = ".".join(map(str, version))
    found = [
        Finding("python", "ok", name)
        if version >= (3, 11, 0)
        else Finding("python", "fail", f"{name} is older than 3.11", "install Python 3.11 or later and make .venv with it")
    ]
    install = "pip install -r requirements.txt"
    missing = sorted(set(wanted) - set(installed))
    other = sorted(
        f"{name} {installed[name]} instead of {wanted[name]}"
        for name in wanted
        if installed.get(name, wanted[name]) != wanted[name]
    )
    if missing:
        return [*found, Finding("packages", "fail", f"not installed: {', '.join(missing)}", install)]
    if other:
        return [*found, Finding("packages", "warn", ", ".join(other), install)]
    return [*found, Finding("packages", "ok", f"{len(wanted)} as in requirements.txt")]


@dataclass(frozen=True)
class Disk:
    """A file system that we write to. `free` in bytes for us, `inodes` free ones (None: it does not count them).

    `writable`: we may write to the folder, or make it. `split`: a folder in it that lies on another file system, "" for none.
    """

    place: str
    free: int
    inodes: int | None
    writable: bool
    split: str = ""


def disk(check: str, seen: Disk) -> Finding:
    place = shlex.quote(seen.place)
    if not seen.writable:
        return Finding(check, "fail", f"{seen.place} cannot be written", f"chown -R $USER {place}, or mount it for writing")
    if seen.split:
        return Finding(
            check,
            "fail",
            f"{seen.split} lies on another file system than {seen.place}: files cannot be renamed into it",
            f"mount one file system at {place}",
        )
    room = f"{seen.free / 1e9:.1f} GB free in {seen.place}"
    remedy = f"make room: du -xh --max-depth=2 {place} | sort -h | tail; or lower RAW_RETENTION"
    for status, most_free, most_inodes in (("fail", DISK_FAIL, INODES_FAIL), ("warn", DISK_WARN, INODES_WARN)):
        if seen.free < most_free:
            return Finding(check, status, room, remedy)  # type: ignore[arg-type]  # the two literals above
        if seen.inodes is not None and seen.inodes < most_inodes:
            return Finding(check, status, f"{seen.inodes} inodes free in {seen.place}", remedy)  # type: ignore[arg-type]  # as above
    return Finding(check, "ok", room)


@dataclass(frozen=True)
class Port:
    """`role`: who listens there. `demanded`: the setting that names it, "" for a default. `state`: free, ours, or other."""

    number: int
    role: str
    state: PortState
    demanded: str = ""


def port(seen: Port) -> Finding:
    check = f"port {seen.number}"
    if seen.state == "free":
        return Finding(check, "ok", f"free for the {seen.role}")
    if seen.state == "ours":
        return Finding(check, "ok", "a daemon of ours listens there")
    who = f"ss -ltnp 'sport = :{seen.number}'"
    if seen.demanded:
        detail = f"another program listens there, and {seen.demanded}={seen.number} asks for it: the {seen.role} will not start"
        return Finding(check, "fail", detail, f"{who}  shows it; end it, or choose another {seen.demanded}")
    detail = f"another program listens there: the {seen.role} takes the next free port"
    return Finding(check, "warn", detail, f"{who}  shows it; HTTP_PORT names a port of your choice")


def metrics_port(number: int, state: PortState) -> Finding:
    """The second port of /metrics: one that is taken stops nobody."""
    if state != "other":
        return port(Port(number, "metrics of the producer", state))
    detail = "another program listens there: /metrics is answered on the daemon's own port alone"
    remedy = f"ss -ltnp 'sport = :{number}'  shows it; METRICS_PORT names another port, or off"
    return Finding(f"port {number}", "warn", detail, remedy)


# accounts


@dataclass(frozen=True)
class Consent:
    """What a token file tells. `scopes`: () where it names none. `obtained_at`: "" where it is not known."""

    account: str
    scopes: tuple[str, ...]
    obtained_at: str
    seconds_left: float


def consent(seen: Consent, now: datetime) -> Finding:
    check = f"token {seen.account}"
    if seen.scopes and SCOPE not in seen.scopes:
        return Finding(
            check, "fail", f"the consent is for {' '.join(seen.scopes)}, IMAP wants {SCOPE}", setup_command(seen.account)
        )
    age = days_since(seen.obtained_at, now)
    if age is not None and WARN_DAYS <= age <= TESTING_DAYS:
        end = iso(datetime.fromisoformat(seen.obtained_at) + timedelta(days=TESTING_DAYS))
        return Finding(
            check,
            "warn",
            f"consented {age:.1f} days ago: if the app is in testing, Google ends that after {TESTING_DAYS} days, at {end}",
            f"publish the app (https://console.cloud.google.com/auth/audience), then {setup_command(seen.account)}",
        )
    told = "age not known" if age is None else f"consented {age:.1f} days ago"
    return Finding(check, "ok", f"{told}, access token good for {seen.seconds_left / 60:.0f} min")


def folders(account: str, shown: Collection[str], hidden: Sequence[str], wanted: Collection[str]) -> Finding:
    """`hidden`: special uses that this account hides from IMAP. `wanted`: the folders that are read."""
    check = f"folders {account}"
    lacking = [use for use in hidden if use in wanted]
    remedy = "in Gmail: Settings, Labels, Show in IMAP; then python producer.py --list-mailboxes"
    if lacking:
        return Finding(check, "fail", f"hidden from IMAP, and to be read: {', '.join(lacking)}", remedy)
    if hidden:
        return Finding(check, "warn", f"hidden from IMAP, so nothing in them can be read: {', '.join(hidden)}", remedy)
    return Finding(check, "ok", f"{len(shown)} shown over IMAP, none hidden")


@dataclass(frozen=True)
class Marked:
    """One mailbox: what Redis and the marker file know of it. `error`: why the file cannot be read, "" if it can."""

    title: str
    state: bool
    marker: bool
    error: str = ""
    oldest: str = ""


def marker(seen: Marked) -> Finding:
    check = f"marker {seen.title}"
    if seen.error:
        return Finding(check, "fail", seen.error, "python scripts/audit.py  tells whether Redis still knows the mailbox")
    if seen.marker and not seen.state:
        since = f"a day before {seen.oldest}" if seen.oldest else "the beginning"
        return Finding(
            check,
            "warn",
            f"this machine read the mailbox before, Redis knows nothing of it: it will be read again from {since}",
            "is REDIS_URL the right server? Else restore a backup, or let it read again",
        )
    if seen.state and not seen.marker:
        return Finding(
            check,
            "warn",
            "Redis knows the mailbox, this machine has no marker file: were Redis lost, it would start anew",
            "run producer.py here, or set DATA_DIR to the folder it uses",
        )
    return Finding(check, "ok", "as Redis has it" if seen.state else "never read yet")


# Redis


@dataclass(frozen=True)
class Server:
    """INFO, as far as it may be asked: {} where not. `config`: what CONFIG GET answered, {} where it is refused."""

    info: Mapping[str, str]
    config: Mapping[str, str] = field(default_factory=dict)


def server(seen: Server) -> Finding:
    check, info = "redis version", seen.info
    if "redis_version" not in info:
        return Finding(check, "warn", "the server does not tell (INFO is refused)", "redis-cli ACL SETUSER <user> +info")
    valkey = "valkey_version" in info
    name = "Valkey" if valkey else "Redis"
    version = info["valkey_version"] if valkey else info["redis_version"]
    if info.get("redis_mode", "standalone") == "cluster":
        return Finding(
            check, "fail", f"{name} {version} as a cluster", "name a single server in REDIS_URL: a cluster is not supported"
        )
    if info.get("role", "master") != "master":
        return Finding(check, "fail", f"{name} {version} is a replica, which takes no writes", "name its master in REDIS_URL")
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not valkey and number < (7, 0):
        return Finding(
            check, "fail", f"Redis {version} is older than 7.0", "upgrade it, or leave REDIS_URL unset: a Valkey comes with us"
        )
    if valkey and number < (9, 0):
        return Finding(check, "warn", f"Valkey {version} was never tried; Valkey 9 and Redis 7.0 were", "upgrade to Valkey 9")
    return Finding(check, "ok", f"{name} {version}")


def policy(seen: Memory | None, limits: RedisSettings) -> list[Finding]:
    if seen is None:
        return [Finding("redis policy", "warn", "may not be asked (INFO memory)", "redis-cli ACL SETUSER <user> +info")]
    found = []
    if seen.policy in ("noeviction", ""):
        found.append(Finding("redis policy", "ok", seen.policy or "not told"))
    else:
        status: Status = "warn" if limits.allow_eviction else "fail"
        detail = f"maxmemory-policy is {seen.policy}: unfinished mail is thrown away when memory is full"
        found.append(Finding("redis policy", status, detail, "redis-cli CONFIG SET maxmemory-policy noeviction"))
    if not seen.limit:
        return [*found, Finding("redis memory", "ok", f"{seen.used / 1e6:.0f} MB used, no maxmemory")]
    used = f"{seen.used / 1e6:.0f} of {seen.limit / 1e6:.0f} MB used ({seen.level:.0%} of maxmemory)"
    remedy = (
        f"redis-cli CONFIG SET maxmemory {round(seen.used / limits.memory_low * 1.5)}, or make room: python scripts/dlq.py groups"
    )
    if seen.level >= limits.memory_high:
        return [*found, Finding("redis memory", "fail", f"{used}: intake pauses at MEMORY_HIGH={limits.memory_high:g}", remedy)]
    if seen.level >= limits.memory_low:
        return [*found, Finding("redis memory", "warn", used, remedy)]
    return [*found, Finding("redis memory", "ok", used)]


def persistence(seen: Server) -> Finding:
    check, info = "redis persistence", seen.info
    remedy = "redis-cli CONFIG SET appendonly yes, and appendonly yes in its redis.conf (CONFIG REWRITE)"
    if "aof_enabled" not in info:
        return Finding(check, "warn", "may not be asked (INFO persistence)", "redis-cli ACL SETUSER <user> +info")
    if info["aof_enabled"] == "1":
        errors = [name for name in ("aof_last_write_status", "aof_last_bgrewrite_status") if info.get(name, "ok") != "ok"]
        if errors:
            return Finding(
                check,
                "fail",
                f"the append-only file cannot be written ({errors[0]}={info[errors[0]]})",
                "df -h; see the server's log",
            )
        return Finding(check, "ok", "append-only file")
    if "save" not in seen.config:
        return Finding(check, "warn", "no append-only file; whether it takes snapshots may not be asked (CONFIG GET)", remedy)
    if seen.config["save"]:
        return Finding(
            check, "warn", f"snapshots only ({seen.config['save']}): a crash loses what came after the last one", remedy
        )
    return Finding(check, "fail", "nothing is kept on disk: a restart of the server loses all unfinished mail", remedy)


def intset(seen: Server) -> Finding:
    check, value = "redis set-max-intset-entries", seen.config.get("set-max-intset-entries", "")
    if not value.isdigit():
        return Finding(check, "ok", f"may not be asked by this user; recommended: {INTSET_ENTRIES}")
    if int(value) < INTSET_ENTRIES:
        detail = f"{value}: a day with more finished mails takes about five times the memory"
        return Finding(check, "warn", detail, f"redis-cli CONFIG SET set-max-intset-entries {INTSET_ENTRIES}")
    return Finding(check, "ok", value)


def rights(user: str, denied: Mapping[str, Needs]) -> Finding:
    """`denied`: role → key pattern → the commands of that role that the server refuses there. `*` among them: the keys themselves.

    A user that may do all of one role is fine. Else it is taken for the role that it comes nearest to.
    """
    check = "redis acl"
    able = [role for role, lacking in denied.items() if not any(lacking.values())]
    if able:
        return Finding(check, "ok", f"{user} may do all that a {' and a '.join(able)} needs")
    role, lacking = min(denied.items(), key=lambda item: sum(map(len, item[1].values())))
    grants = [f"~{pattern}" for pattern, commands in lacking.items() if "*" in commands]
    grants += sorted({f"+{command}" for commands in lacking.values() for command in commands if command != "*"})
    line = shlex.join(["redis-cli", "ACL", "SETUSER", user, *grants])
    return Finding(check, "fail", f"{user} may not do all that a {role} needs (docs/security.md)", line)


def clock(check: str, seconds_ahead: float) -> Finding:
    """`seconds_ahead`: of this machine's clock, before the other's."""
    apart = f"{abs(seconds_ahead):.1f} s {'ahead of' if seconds_ahead > 0 else 'behind'} it"
    remedy = "timedatectl set-ntp true, on both machines"
    if abs(seconds_ahead) >= CLOCK_FAIL:
        return Finding(check, "fail", f"this machine's clock is {apart}: tokens and leases are judged wrongly", remedy)
    if abs(seconds_ahead) >= CLOCK_WARN:
        return Finding(check, "warn", f"this machine's clock is {apart}", remedy)
    return Finding(check, "ok", f"{abs(seconds_ahead):.1f} s apart")


# the pipeline


def daemons(seen: Sequence[Seen]) -> list[Finding]:
    if not seen:
        return [Finding("daemons", "ok", "none registered")]
    silent = [one for one in seen if not one.alive]
    alive = [one.daemon for one in seen if one.alive]
    numbers = {role: sum(daemon.role == role for daemon in alive) for role in ("producer", "worker")}
    counts = ", ".join(f"{number} {role}{'' if number == 1 else 's'}" for role, number in numbers.items())
    found = [Finding("daemons", "ok", counts)]
    if silent:
        names = ", ".join(f"{one.daemon.name} on {one.daemon.host} ({one.silent:.0f} s)" for one in silent[:5])
        found = [
            Finding(
                "daemons",
                "warn",
                f"{counts}; silent: {names}",
                f"were they killed? Start them again; on their machine: ps -p {silent[0].daemon.pid} -o pid,lstart,args",
            )
        ]
    versions = sorted({daemon.version for daemon in alive})
    if len(versions) > 1:
        detail = f"daemons of different versions run: {', '.join(versions)}"
        found.append(Finding("versions", "warn", detail, "restart those of the older version, workers first"))
    return found


def backlog(seen: Overview, limits: StreamSettings) -> list[Finding]:
    found = [Finding("stream", "ok", f"{seen.live} unfinished")]
    if seen.live >= limits.maxlen:
        detail = f"{seen.live} unfinished mails, intake waits at STREAM_MAXLEN={limits.maxlen}"
        found = [Finding("stream", "warn", detail, "start more workers: python worker.py")]
    letters = f"{seen.dead} of DLQ_MAX={limits.dlq_max}"
    remedy = "python scripts/dlq.py groups"
    if seen.dead >= limits.dlq_max:
        return [*found, Finding("dead letters", "fail", f"{letters}: workers have stopped reading", remedy)]
    if seen.dead >= DLQ_NEAR * limits.dlq_max:
        return [*found, Finding("dead letters", "warn", f"{letters}: at the limit workers stop reading", remedy)]
    return [*found, Finding("dead letters", "ok", letters)]


def archive(place: str | None, error: str, *, lived: bool) -> Finding:
    """`place`: None where RAW_ARCHIVE=off. `error`: why it cannot be used, "" if it can. `lived`: mail was published before."""
    if place is None:
        return Finding("archive", "ok", "off: handlers get no raw mail")
    if not error:
        return Finding("archive", "ok", place)
    if not lived and "is no archive (yet)" in error:
        return Finding("archive", "ok", f"{place}, not begun: the first mail makes it")
    return Finding("archive", "fail", error, f"mount it, or set RAW_ARCHIVE: ls -ld {shlex.quote(place)}")


def requirements(text: str) -> dict[str, str]:
    """Package → version of the pins; those that hold for some Pythons only are left out."""
    lines = (line.strip() for line in text.splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if "==" in line and ";" not in line)}


def secrets_masked(text: str, secrets: Collection[str]) -> str:
    """`text` without any of `secrets`, should a library have put one into an error."""
    for secret in secrets:
        text = text.replace(secret, "***") if len(secret) >= 4 else text
    return text
