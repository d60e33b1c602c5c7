"""What the doctor makes of what it saw: each judgement ok, warn and fail, with the very remedy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from config.settings import SECTIONS, env_names, load_settings
from src.auth.oauth2_gmail import SCOPE
from src.common.clock import iso
from src.common.health import Memory
from src.common.overview import Overview
from src.common.registry import Registration, Seen
from src.doctor import judge, probes
from src.doctor.judge import Consent, Disk, Finding, Marked, Port, Server
from tests.support import acl

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
SETTINGS = load_settings({}, env_file=None)
REDIS, STREAM = SETTINGS.redis, SETTINGS.stream
KNOWN = ("REDIS_URL", "POLL_INTERVAL")
PINS = {"redis": "8.1.0", "lxml": "6.1.3"}
AOF = {"aof_enabled": "1"}
SETUSER = "redis-cli ACL SETUSER"
ROOM = "make room: du -xh --max-depth=2 data | sort -h | tail; or lower RAW_RETENTION"
APPENDONLY = "redis-cli CONFIG SET appendonly yes, and appendonly yes in its redis.conf (CONFIG REWRITE)"
NTP = "timedatectl set-ntp true, on both machines"
SHOW = "in Gmail: Settings, Labels, Show in IMAP; then python producer.py --list-mailboxes"


def consent(days: float, *scopes: str) -> Finding:
    return judge.consent(Consent("a@x.org", scopes, iso(NOW - timedelta(days=days)), 1800.0), NOW)


def memory(part: float, policy: str = "noeviction", limit: int = 1_000_000_000, **limits: Any) -> list[Finding]:
    return judge.policy(Memory(round(part * 1e9), limit, policy), REDIS.model_copy(update=limits))


def registered(*daemons: tuple[str, str, float]) -> list[Finding]:
    """(role, version, seconds silent) each."""
    return judge.daemons(
        [Seen(Registration(role, f"{role}-1", "", version, "vm", 17, ""), silent) for role, version, silent in daemons]
    )


def holds(live: int, dead: int) -> list[Finding]:
    return judge.backlog(Overview(live, 0, 0, dead, 0, 0.0), STREAM)


def info(**fields: str) -> Finding:
    return judge.server(Server({"redis_version": "7.0.15", **fields}))


CASES: list[tuple[Callable[[], Finding | list[Finding]], str, str, str]] = [
    # what is judged, its (last) status, a part of its detail, its remedy
    (lambda: judge.settings(None, 0, KNOWN), "ok", "there is no .env", ""),
    (lambda: judge.settings(["REDIS_URL", "SQL_URL"], 0o600, KNOWN), "ok", "2 set in .env", ""),
    (lambda: judge.settings(["POLL_INTERVAL"], 0o644, KNOWN), "ok", "1 set in .env", ""),
    (lambda: judge.settings(["REDIS_URL"], 0o644, KNOWN), "warn", "(mode 0644) and sets REDIS_URL", "chmod 600 .env"),
    (
        lambda: judge.settings(["REDIS_ULR"], 0o600, KNOWN),
        "warn",
        "REDIS_ULR in .env is no setting",
        "did you mean REDIS_URL? Rename it in .env",
    ),
    (lambda: judge.python((3, 11, 7), PINS, PINS), "ok", "2 as in requirements.txt", ""),
    (lambda: judge.python((3, 10, 1), PINS, PINS)[0], "fail", "3.10.1", "install Python 3.11 or later and make .venv with it"),
    (
        lambda: judge.python((3, 12, 0), PINS, {**PINS, "redis": "7.0.0"}),
        "warn",
        "redis 7.0.0 instead of 8.1.0",
        "pip install -r requirements.txt",
    ),
    (
        lambda: judge.python((3, 11, 0), PINS, {"lxml": "6.1.3"}),
        "fail",
        "not installed: redis",
        "pip install -r requirements.txt",
    ),
    (lambda: judge.disk("disk data", Disk("data", 5 << 30, 10**6, True)), "ok", "5.4 GB free in data", ""),
    (lambda: judge.disk("disk data", Disk("data", 5 << 30, None, True)), "ok", "5.4 GB free", ""),
    (lambda: judge.disk("disk data", Disk("data", 500 << 20, 10**6, True)), "warn", "0.5 GB free", ROOM),
    (lambda: judge.disk("disk data", Disk("data", 50 << 20, 10**6, True)), "fail", "0.1 GB free", ROOM),
    (lambda: judge.disk("disk data", Disk("data", 5 << 30, 10_000, True)), "warn", "10000 inodes free in data", ROOM),
    (lambda: judge.disk("disk data", Disk("data", 5 << 30, 10, True)), "fail", "10 inodes free in data", ROOM),
    (
        lambda: judge.disk("disk data", Disk("data", 5 << 30, 10**6, False)),
        "fail",
        "data cannot be written",
        "chown -R $USER data, or mount it for writing",
    ),
    (
        lambda: judge.disk("disk archive", Disk("raw", 5 << 30, 10**6, True, "raw/tmp")),
        "fail",
        "raw/tmp lies on another file system than raw",
        "mount one file system at raw",
    ),
    (lambda: judge.port(Port(8080, "producer", "free")), "ok", "free for the producer", ""),
    (lambda: judge.port(Port(8080, "producer", "ours")), "ok", "a daemon of ours", ""),
    (
        lambda: judge.port(Port(8080, "producer", "other")),
        "warn",
        "the producer takes the next free port",
        "ss -ltnp 'sport = :8080'  shows it; HTTP_PORT names a port of your choice",
    ),
    (
        lambda: judge.port(Port(8090, "daemon", "other", "HTTP_PORT")),
        "fail",
        "HTTP_PORT=8090 asks for it",
        "ss -ltnp 'sport = :8090'  shows it; end it, or choose another HTTP_PORT",
    ),
    (lambda: consent(1, SCOPE), "ok", "consented 1.0 days ago, access token good for 30 min", ""),
    (lambda: consent(30), "ok", "consented 30.0 days ago", ""),
    (lambda: judge.consent(Consent("a@x.org", (), "", 0.0), NOW), "ok", "age not known", ""),
    (
        lambda: consent(6.5, SCOPE),
        "warn",
        "consented 6.5 days ago: if the app is in testing, Google ends that after 7 days, at 2026-03-11T00:00:00Z",
        "publish the app (https://console.cloud.google.com/auth/audience), then python producer.py --auth-setup --username a@x.org",
    ),
    (
        lambda: consent(1, "https://www.googleapis.com/auth/gmail.readonly"),
        "fail",
        f"gmail.readonly, IMAP wants {SCOPE}",
        "python producer.py --auth-setup --username a@x.org",
    ),
    (lambda: judge.folders("a", ["INBOX"], [], ["INBOX"]), "ok", "1 shown over IMAP, none hidden", ""),
    (lambda: judge.folders("a", ["INBOX"], ["\\Junk"], ["INBOX"]), "warn", "nothing in them can be read: \\Junk", SHOW),
    (lambda: judge.folders("a", ["INBOX"], ["\\All"], ["\\All"]), "fail", "and to be read: \\All", SHOW),
    (lambda: judge.marker(Marked("a/INBOX", True, True)), "ok", "as Redis has it", ""),
    (lambda: judge.marker(Marked("a/INBOX", False, False)), "ok", "never read yet", ""),
    (
        lambda: judge.marker(Marked("a/INBOX", False, True, oldest="2026-03-01")),
        "warn",
        "Redis knows nothing of it: it will be read again from a day before 2026-03-01",
        "is REDIS_URL the right server? Else restore a backup, or let it read again",
    ),
    (
        lambda: judge.marker(Marked("a/INBOX", True, False)),
        "warn",
        "no marker file",
        "run producer.py here, or set DATA_DIR to the folder it uses",
    ),
    (
        lambda: judge.marker(Marked("a/INBOX", True, False, "x.json is damaged")),
        "fail",
        "x.json is damaged",
        "python scripts/audit.py  tells whether Redis still knows the mailbox",
    ),
    (lambda: info(), "ok", "Redis 7.0.15", ""),
    (lambda: info(valkey_version="9.1.2"), "ok", "Valkey 9.1.2", ""),
    (lambda: info(valkey_version="8.0.1"), "warn", "Valkey 8.0.1 was never tried", "upgrade to Valkey 9"),
    (lambda: judge.server(Server({})), "warn", "does not tell", "redis-cli ACL SETUSER <user> +info"),
    (
        lambda: info(redis_version="6.2.14"),
        "fail",
        "Redis 6.2.14 is older than 7.0",
        "upgrade it, or leave REDIS_URL unset: a Valkey comes with us",
    ),
    (lambda: info(redis_mode="cluster"), "fail", "as a cluster", "name a single server in REDIS_URL: a cluster is not supported"),
    (lambda: info(role="slave"), "fail", "is a replica", "name its master in REDIS_URL"),
    (lambda: memory(0.5)[0], "ok", "noeviction", ""),
    (lambda: judge.policy(None, REDIS), "warn", "may not be asked", "redis-cli ACL SETUSER <user> +info"),
    (
        lambda: memory(0.5, "allkeys-lru")[0],
        "fail",
        "maxmemory-policy is allkeys-lru",
        "redis-cli CONFIG SET maxmemory-policy noeviction",
    ),
    (
        lambda: memory(0.5, "allkeys-lru", allow_eviction=True)[0],
        "warn",
        "allkeys-lru",
        "redis-cli CONFIG SET maxmemory-policy noeviction",
    ),
    (lambda: memory(0.5), "ok", "500 of 1000 MB used (50% of maxmemory)", ""),
    (lambda: memory(0.5, limit=0), "ok", "500 MB used, no maxmemory", ""),
    (
        lambda: memory(0.8),
        "warn",
        "800 of 1000 MB used",
        "redis-cli CONFIG SET maxmemory 1600000000, or make room: python scripts/dlq.py groups",
    ),
    (
        lambda: memory(0.9),
        "fail",
        "intake pauses at MEMORY_HIGH=0.85",
        "redis-cli CONFIG SET maxmemory 1800000000, or make room: python scripts/dlq.py groups",
    ),
    (lambda: judge.persistence(Server(AOF)), "ok", "append-only file", ""),
    (lambda: judge.persistence(Server({"aof_enabled": "0"}, {"save": "3600 1"})), "warn", "snapshots only (3600 1)", APPENDONLY),
    (lambda: judge.persistence(Server({"aof_enabled": "0"}, {"save": ""})), "fail", "nothing is kept on disk", APPENDONLY),
    (lambda: judge.persistence(Server({"aof_enabled": "0"})), "warn", "may not be asked (CONFIG GET)", APPENDONLY),
    (lambda: judge.persistence(Server({})), "warn", "may not be asked", "redis-cli ACL SETUSER <user> +info"),
    (
        lambda: judge.persistence(Server({**AOF, "aof_last_write_status": "err"})),
        "fail",
        "cannot be written (aof_last_write_status=err)",
        "df -h; see the server's log",
    ),
    (lambda: judge.intset(Server({}, {"set-max-intset-entries": "4096"})), "ok", "4096", ""),
    (lambda: judge.intset(Server({})), "ok", "recommended: 4096", ""),
    (
        lambda: judge.intset(Server({}, {"set-max-intset-entries": "512"})),
        "warn",
        "512: a day with more",
        "redis-cli CONFIG SET set-max-intset-entries 4096",
    ),
    (
        lambda: judge.rights("me", {"producer": {}, "worker": {"": ()}}),
        "ok",
        "me may do all that a producer and a worker needs",
        "",
    ),
    (lambda: judge.rights("me", {"producer": {"": ("get",)}, "worker": {}}), "ok", "me may do all that a worker needs", ""),
    (
        lambda: judge.rights("me", {"producer": {"": ("get", "set", "scan")}, "worker": {"s:*": ("*",), "": ("xgroup|create",)}}),
        "fail",
        "me may not do all that a worker needs",
        f"{SETUSER} me '~s:*' '+xgroup|create'",
    ),
    (lambda: judge.clock("clock redis", 0.3), "ok", "0.3 s apart", ""),
    (lambda: judge.clock("clock redis", -5.0), "warn", "5.0 s behind it", NTP),
    (lambda: judge.clock("clock redis", 3600.0), "fail", "3600.0 s ahead of it: tokens and leases", NTP),
    (lambda: registered(), "ok", "none registered", ""),
    (lambda: registered(("producer", "1", 3.0), ("worker", "1", 3.0)), "ok", "1 producer, 1 worker", ""),
    (
        lambda: registered(("producer", "1", 3.0), ("worker", "1", 300.0)),
        "warn",
        "1 producer, 0 workers; silent: worker-1 on vm (300 s)",
        "were they killed? Start them again; on their machine: ps -p 17 -o pid,lstart,args",
    ),
    (
        lambda: registered(("producer", "1", 3.0), ("worker", "2", 3.0)),
        "warn",
        "different versions run: 1, 2",
        "restart those of the older version, workers first",
    ),
    (lambda: holds(3, 10), "ok", "10 of DLQ_MAX=10000", ""),
    (lambda: holds(100_000, 0)[0], "warn", "intake waits at STREAM_MAXLEN=100000", "start more workers: python worker.py"),
    (lambda: holds(0, 8_000), "warn", "at the limit workers stop reading", "python scripts/dlq.py groups"),
    (lambda: holds(0, 10_000), "fail", "workers have stopped reading", "python scripts/dlq.py groups"),
    (lambda: judge.archive(None, "", lived=True), "ok", "off", ""),
    (lambda: judge.archive("raw", "", lived=True), "ok", "raw", ""),
    (lambda: judge.archive("raw", "raw is no archive (yet): …", lived=False), "ok", "not begun", ""),
    (
        lambda: judge.archive("raw", "raw is no archive (yet): …", lived=True),
        "fail",
        "raw is no archive (yet)",
        "mount it, or set RAW_ARCHIVE: ls -ld raw",
    ),
    (
        lambda: judge.failed("token", "there is no token file t; run: python producer.py --auth-setup", "other"),
        "fail",
        "there is no token file t",
        "python producer.py --auth-setup",
    ),
    (lambda: judge.failed("imap", "refused", "nc -zv h 1"), "fail", "refused", "nc -zv h 1"),
]


@pytest.mark.parametrize(("judged", "status", "detail", "remedy"), CASES)
def test_judgements(judged: Callable[[], Finding | list[Finding]], status: str, detail: str, remedy: str) -> None:
    """Status, detail and remedy of each thing that can be seen; the last finding, where there are several."""
    found = judged()
    finding = found[-1] if isinstance(found, list) else found
    assert (finding.status, finding.remedy) == (status, remedy), finding
    assert detail in finding.detail
    assert "\n" not in finding.detail + finding.remedy
    assert bool(finding.remedy) == (finding.status != "ok"), "whatever is not ok says what to do"


def test_exit_codes() -> None:
    """0 with warnings, 1 where a check failed, 2 where settings, accounts or handlers cannot be used."""
    warned = Finding("clock redis", "warn", "")
    assert judge.exit_code([]) == judge.exit_code([warned]) == 0
    assert judge.exit_code([warned, Finding("redis", "fail", "")]) == 1
    assert judge.exit_code([Finding("handlers", "fail", ""), Finding("redis", "fail", "")]) == 2
    assert judge.exit_code([Finding("handlers", "warn", "")]) == 0


@pytest.mark.parametrize("role", ["producer", "worker"])
def test_the_commands_asked_for_are_those_of_the_documents(role: str) -> None:
    """docs/security.md gives each role just the commands that the doctor asks for (and EVAL, by which it asks)."""
    [words] = [line for line in acl.lines() if line[2] == role]
    given = {word[1:] for word in words if word.startswith("+")}
    asked = set()
    for call in probes.CALLS[role]:
        first, second = [*call.lower().split(), ""][:2]
        asked.add(f"{first}|{second}" if first.upper() in probes.CONTAINERS else first)
    assert asked | {"eval", "evalsha"} == given


def test_every_secret_setting_is_known_as_one() -> None:
    """A variable whose value is masked in errors makes .env a file for its owner alone."""
    fields = [field for section in SECTIONS.values() for field in section.model_fields.values()]
    secret = [str(field.alias) for field in fields if "SecretStr" in str(field.annotation)]
    assert len(secret) >= 4
    assert [name for name in [*secret, "WEBHOOK_SECRET", "SQL_URL"] if not judge.SECRET.search(name)] == []


def test_pins_and_variables_are_read() -> None:
    """requirements.txt without its conditional lines, and the names that .env sets."""
    assert judge.requirements("# x\nredis==8.1.0\n\nasync-timeout==5; python_full_version < '3.11.3'\n") == {"redis": "8.1.0"}
    assert env_names("# A=1\nREDIS_URL=x\n  export B = 2\n#C=3\n") == ["REDIS_URL", "B"]


def test_a_secret_in_an_error_is_masked() -> None:
    """Whatever a library put into its text."""
    assert judge.secrets_masked("no host s3cret/x", ["s3cret", ""]) == "no host ***/x"
