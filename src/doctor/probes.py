"""What the doctor looks at. Every wait has a deadline, no trouble hides another check, nothing is written.

Each group of checks runs in a thread of its own: one that hangs is left behind with a finding.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from config.accounts import Account, load_accounts
from config.routes import load_routes
from config.settings import MailSettings, Settings, SettingsError, env_names, known_names
from src.auth.credentials import Credentials, credentials_of
from src.auth.oauth2_gmail import TokenSource, first_existing, read_token, setup_command, token_files
from src.auth.service_account import ServiceAccountSource
from src.common import overview, registry
from src.common.archive import Folder, open_archive
from src.common.clock import Clock
from src.common.embedded import chosen_server, existing_redis
from src.common.exceptions import (
    ArchiveUnavailable,
    ConfigurationError,
    DiskUnavailable,
    ImapUnavailable,
    IngestionError,
    LoginRefused,
    MailboxMissing,
    ReauthRequired,
    ScriptRefused,
    TokenEndpointUnavailable,
)
from src.common.keys import Keys
from src.common.redis_client import RedisClient, pairs
from src.doctor import judge
from src.doctor.judge import Finding
from src.imap.imap_client import ImapMailbox, list_mailboxes
from src.producer.daemon import imap_endpoint
from src.producer.state_manager import MarkerFile, StateManager
from src.worker.processor import load_handlers

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0  # seconds that one group of checks may take
REDIS_SECONDS, IMAP_SECONDS, HTTP_SECONDS = 5.0, 10.0, 2.0  # one answer
PRODUCER_PORT, WORKER_PORT, METRICS_PORT = 8080, 8081, 9090
NOT_SEEN = "not visible to the Redis user of this process"

# What each daemon runs (docs/security.md), as a call that is harmless where it is allowed: on a key that nothing stands under.
SHARED = (
    "PING",
    "INFO memory",
    "TIME",
    "SELECT 0",
    "EXISTS {}",
    "TYPE {}",
    "EXPIRE {} 1",
    "HGET {} a",
    "HSET {} a b",
    "HSETNX {} a b",
    "HDEL {} a",
    "HMGET {} a",
    "HGETALL {}",
    "HINCRBY {} a 1",
    "HEXISTS {} a",
    "HLEN {}",
    "SISMEMBER {} 1",
    "SMISMEMBER {} 1",
    "ZCARD {}",
    "ZRANGEBYSCORE {} 0 0",
    "ZREM {} a",
    "XADD {} * a b",
    "XLEN {}",
    "XRANGE {} - + COUNT 1",
    "XREVRANGE {} + - COUNT 1",
    "XPENDING {} g",
    "XCLAIM {} g c 0 0-1",
    "XINFO GROUPS {}",
    "XINFO STREAM {}",
)
CALLS = {
    "producer": (
        *SHARED,
        *(
            "SCAN 0 COUNT 1",
            "GET {}",
            "MGET {}",
            "SET {} 1",
            "INCRBY {} 1",
            "HSCAN {} 0",
            "HVALS {}",
            "ZSCAN {} 0",
            "ZSCORE {} a",
        ),
    ),
    "worker": (
        *SHARED,
        *("DEL {}", "SADD {} 1", "ZADD {} 1 a"),
        *("XREADGROUP GROUP g c STREAMS {} >", "XACK {} g 0-1", "XDEL {} 0-1", "XTRIM {} MAXLEN 0", "XGROUP CREATE {} g 0"),
        *("XGROUP CREATECONSUMER {} g c", "XGROUP DELCONSUMER {} g c", "XINFO CONSUMERS {}"),
    ),
}
CONTAINERS = ("XGROUP", "XINFO")  # commands whose first word is a command of its own in an ACL


def examine(settings: Settings, clock: Clock, *, offline: bool) -> list[Finding]:
    """All checks. `offline`: without the token endpoint and the mail servers."""
    quick = replace(settings, redis=settings.redis.model_copy(update={"socket_timeout": _at_most(settings, REDIS_SECONDS)}))
    accounts, account_findings = _accounts(settings.mail)
    first = [
        _Group("settings", lambda: [_env_file(), *_python()]),
        _Group("handlers", partial(_handlers, settings)),
        *(_Group(f"account {account.username}", partial(_account, account, clock, offline)) for account in accounts),
    ]
    redis, redis_findings = _redis(quick)
    second = [
        _Group("redis", partial(_server, redis, quick, clock)),
        _Group("markers", partial(_markers, redis, settings, accounts)),
        _Group("ports", partial(_ports, redis, settings)),
        _Group("disk", partial(_disks, redis, settings)),
    ]
    findings = first[0].findings() + account_findings
    for group in first[1:]:
        findings += group.findings()
    findings += redis_findings
    for group in second:
        findings += group.findings()
    if redis is not None:
        redis.close()
    return findings


def _at_most(settings: Settings, seconds: float) -> float:
    return min(settings.redis.socket_timeout, seconds)


class _Group:
    """Checks that run in a thread of their own from now on, for `DEADLINE` at most."""

    def __init__(self, name: str, checks: Callable[[], Iterable[Finding]]) -> None:
        self._name, self._checks = name, checks
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def findings(self) -> list[Finding]:
        self._thread.join(DEADLINE)
        if self._thread.is_alive():
            return [
                *self._found,
                Finding(self._name, "fail", f"no end within {DEADLINE:g} s", "run it again; then see what hangs"),
            ]
        return self._found

    def _run(self) -> None:
        try:
            self._found.extend(self._checks())
        except IngestionError as error:
            self._found.append(judge.failed(self._name, str(error), "see docs/security.md"))
        except Exception as error:  # noqa: BLE001  # a thread's edge: no trouble may hide the other checks
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._found.append(Finding(self._name, "fail", f"the check itself failed: {text}", "please report this"))


# this machine


def _env_file() -> Finding:
    path = Path(".env")
    known = known_names()
    try:
        return judge.settings(env_names(path.read_text()), path.stat().st_mode & 0o777, known)
    except FileNotFoundError:
        return judge.settings(None, 0, known)


def _python() -> list[Finding]:
    wanted = judge.requirements((ROOT / "requirements.txt").read_text())
    installed = {}
    for name in wanted:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return judge.python(sys.version_info[:3], wanted, installed)


def _handlers(settings: Settings) -> list[Finding]:
    source = f"HANDLERS_FILE={settings.work.handlers_file}" if settings.work.handlers_file else "WORKER_HANDLER"
    try:
        handlers = load_handlers(settings.work, load_routes(settings.work.handlers_file))
    except (SettingsError, ConfigurationError) as error:
        return [judge.failed("handlers", str(error), f"mend it, then python worker.py --dry-run ({source})")]
    return [Finding("handlers", "ok", ", ".join(dict.fromkeys(f"{handler.spec} ({handler.kind})" for handler in handlers.all)))]


def _disks(redis: RedisClient | None, settings: Settings) -> Iterator[Finding]:
    data = settings.run.data_dir
    yield judge.disk("disk data", _disk(data))
    place = settings.run.raw_archive
    archive = open_archive(place.get_secret_value() if place else None, data)
    if archive and isinstance(archive.store, Folder):
        yield judge.disk("disk archive", _disk(archive.store.root))
    error = ""
    try:
        if archive:
            archive.check()
    except ArchiveUnavailable as away:
        error = str(away)
    yield judge.archive(archive.store.place if archive else None, error, lived=_lived(redis, Keys(settings.stream.name)))


def _disk(place: Path) -> judge.Disk:
    there = next(folder for folder in (place, *place.resolve().parents) if folder.exists())
    status = os.statvfs(there)
    writable = os.access(there, os.W_OK | os.X_OK) and not status.f_flag & os.ST_RDONLY
    device = there.stat().st_dev
    split = [str(path) for path in there.iterdir() if path.is_dir() and path.stat().st_dev != device] if there == place else []
    inodes = status.f_favail if status.f_files else None
    return judge.Disk(str(place), status.f_bavail * status.f_frsize, inodes, writable, split[0] if split else "")


def _ports(redis: RedisClient | None, settings: Settings) -> Iterator[Finding]:
    run, known = settings.run, set[int]()
    if redis is not None:
        with suppress(ConfigurationError):  # not for this user to see: then /health tells
            seen = registry.registered(redis, Keys(settings.stream.name))
            here = [one.daemon for one in seen if one.alive and one.daemon.host == socket.gethostname()]
            known = {urlsplit(daemon.address).port or 0 for daemon in here}
    wanted = [(PRODUCER_PORT, "producer", ""), (WORKER_PORT, "worker", "")]
    if run.http_port is not None:
        wanted = [(run.http_port, "daemon", "HTTP_PORT")] if run.http_port else []
    for number, role, demanded in wanted:
        yield judge.port(judge.Port(number, role, _port_state(run.http_host, number, known), demanded))
    second = METRICS_PORT if run.metrics_port is None else run.metrics_port
    if second not in ("off", 0):
        yield judge.metrics_port(int(second), _port_state(run.http_host, int(second), set()))


def _port_state(host: str, number: int, known: set[int]) -> judge.PortState:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError:
            return "ours" if number in known or _is_ours(host, number) else "other"
    return "free"


def _is_ours(host: str, number: int) -> bool:
    """Whether /metrics there answers as one of our daemons does, on either of its ports."""
    name = f"[{host}]" if ":" in host else host
    try:
        with urllib.request.urlopen(f"http://{name}:{number}/metrics", timeout=HTTP_SECONDS) as answer:
            return b"email_build_info" in answer.read(1_000_000)
    except (OSError, ValueError, HTTPException):
        return False


# accounts


def _accounts(mail: MailSettings) -> tuple[tuple[Account, ...], list[Finding]]:
    """Those that are read, by name, and what is wrong with their list."""
    try:
        accounts = load_accounts(mail)
    except SettingsError as error:
        place = f"edit {mail.accounts_file}" if mail.accounts_file else "see docs/OAUTH2_SETUP.md"
        return (), [judge.failed("accounts", str(error), place)]
    try:
        named = tuple(
            account if account.username else replace(account, username=read_token(first_existing(token_files(mail, ""))).account)
            for account in accounts
        )
    except ConfigurationError as error:
        return (), [judge.failed("token", str(error), setup_command())]
    names = ", ".join(f"{account.username} ({account.mail.auth_method})" for account in named)
    return named, [Finding("accounts", "ok", names)]


def _account(account: Account, clock: Clock, offline: bool) -> Iterator[Finding]:
    """How it logs in, whether the server takes that, and which of its folders are there."""
    name = account.username
    mail = account.mail.model_copy(update={"timeout": min(account.mail.timeout, IMAP_SECONDS)})
    credentials = credentials_of(Account(name, mail), clock, keep=False)
    remedy = f"python -m src.auth.oauth2_gmail --info --username {name}"
    try:
        secret = "" if offline and mail.auth_method != "password" else credentials.access_token()
        yield _credential(name, mail, credentials, clock)
    except (ConfigurationError, ReauthRequired) as error:
        yield judge.failed(f"token {name}", str(error), remedy)
        return
    except TokenEndpointUnavailable as error:
        yield judge.failed(
            f"token {name}", str(error), "curl -sSI https://oauth2.googleapis.com/token  should answer; a proxy? DNS?"
        )
        return
    if offline:
        return
    try:
        yield from _imap(name, mail, credentials, secret)
    except (LoginRefused, ReauthRequired) as error:
        yield judge.failed(f"imap {name}", str(error), remedy)
    except ConfigurationError as error:
        yield judge.failed(f"imap {name}", str(error), f"openssl s_client -connect {mail.host}:{mail.port}")
    except ImapUnavailable as error:
        reach = (
            f"openssl s_client -connect {mail.host}:{mail.port}" if mail.security == "tls" else f"nc -zv {mail.host} {mail.port}"
        )
        yield judge.failed(f"imap {name}", str(error), f"{reach}; see IMAP_HOST, IMAP_PORT, and the firewall")


def _credential(name: str, mail: MailSettings, credentials: Credentials, clock: Clock) -> Finding:
    if isinstance(credentials, TokenSource):
        info = credentials.info()
        return judge.consent(judge.Consent(name, info.scopes, info.obtained_at, info.seconds_left), clock.wall())
    if isinstance(credentials, ServiceAccountSource):
        return Finding(f"token {name}", "ok", f"service account {credentials.info().client_email}")
    return Finding(
        f"token {name}", "ok", f"a password {f'in {mail.password_file}' if mail.password_file else 'in IMAP_PASSWORD'}"
    )


def _imap(name: str, mail: MailSettings, credentials: Credentials, secret: str) -> Iterator[Finding]:
    server = imap_endpoint(mail)
    try:
        listed, hidden = list_mailboxes(server, name, secret)
    except LoginRefused:
        if mail.auth_method == "password":  # never tried twice: servers lock accounts for that
            raise
        secret = credentials.access_token(refuse=secret)  # as the producer does
        listed, hidden = list_mailboxes(server, name, secret)
    security = "TLS, " if mail.security == "tls" else ""
    yield Finding(f"imap {name}", "ok", f"{mail.host}:{mail.port}: {security}logged in")
    for mailbox in mail.mailboxes:
        try:
            with ImapMailbox(server, name, mailbox, secret) as session:
                folder = session.folder
            yield Finding(f"mailbox {name}/{mailbox}", "ok", f"{folder.exists} messages, UIDVALIDITY {folder.uidvalidity}")
        except MailboxMissing as error:
            yield judge.failed(
                f"mailbox {name}/{mailbox}", str(error), "python producer.py --list-mailboxes  shows those there are"
            )
    yield judge.folders(name, [mailbox.name for mailbox in listed], hidden, mail.mailboxes)


def _markers(redis: RedisClient | None, settings: Settings, accounts: Sequence[Account]) -> Iterator[Finding]:
    for account in accounts:
        for mailbox in account.mail.mailboxes:
            title = f"{account.username}/{mailbox}"
            try:
                marker, error = MarkerFile(settings.run.data_dir, account.username, mailbox).read(), ""
            except (ConfigurationError, DiskUnavailable) as damaged:
                marker, error = None, str(damaged)
            state = None
            if redis is not None:
                try:
                    state = StateManager(redis, Keys(settings.stream.name), account.username, mailbox, "doctor").look()
                except ConfigurationError:
                    yield Finding(f"marker {title}", "ok", NOT_SEEN)
                    continue
            if redis is not None or error:
                oldest = marker.oldest if marker else ""
                yield judge.marker(judge.Marked(title, state is not None, marker is not None, error, oldest))


# Redis


def _redis(settings: Settings) -> tuple[RedisClient | None, list[Finding]]:
    """The server that is there, and whether one is."""
    url = settings.redis.url
    data = settings.run.data_dir
    try:
        embedded = not url and (data / "redis.json").exists() and chosen_server(data) == "embedded"
        place = _place(url.get_secret_value()) if url else "the embedded Valkey" if embedded else "the server on 127.0.0.1:6379"
        client = existing_redis(settings)
    except IngestionError as error:
        return None, [judge.failed("redis", str(error), "set REDIS_URL=redis://user:password@host:port/0")]
    if client is not None:
        return client, [Finding("redis", "ok", f"{place} answers")]
    if url:
        return None, [
            Finding("redis", "fail", f"{place} does not answer", "start it (systemctl start redis-server), or mend REDIS_URL")
        ]
    if embedded or not (data / "redis.json").exists():
        return None, [Finding("redis", "ok", "none runs now: the first daemon starts the embedded Valkey")]
    remedy = f"start it (systemctl start redis-server), or remove {data / 'redis.json'} to choose anew"
    return None, [Finding("redis", "fail", f"{place}, which the first run chose, does not answer", remedy)]


def _place(url: str) -> str:
    """Without user, password and options."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"


def _server(redis: RedisClient | None, settings: Settings, clock: Clock) -> Iterator[Finding]:
    if redis is None:
        return
    seen = judge.Server(_info(redis), _config(redis))
    yield judge.server(seen)
    yield from judge.policy(redis.memory(), settings.redis)
    yield judge.persistence(seen)
    yield judge.intset(seen)
    yield _rights(redis, settings)
    yield judge.clock("clock redis", _seconds_ahead(redis, clock))
    keys = Keys(settings.stream.name)
    try:
        yield from judge.daemons(registry.registered(redis, keys))
    except ConfigurationError:
        yield Finding("daemons", "ok", NOT_SEEN)
    try:
        yield from judge.backlog(overview.look(redis, keys, settings.stream.group), settings.stream)
    except ConfigurationError:
        yield Finding("stream", "ok", NOT_SEEN)
    except ScriptRefused as error:
        yield judge.failed("stream", f"STREAM_NAME={keys.stream}: {error}", "choose another STREAM_NAME")


def _info(redis: RedisClient) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in ("server", "replication", "persistence"):
        try:
            found |= redis.info(section)
        except ConfigurationError:
            continue
    return found


def _config(redis: RedisClient) -> dict[str, str]:
    """CONFIG GET, which the users of docs/security.md may not."""
    try:
        return pairs(redis.call("CONFIG", "GET", "save")) | pairs(redis.call("CONFIG", "GET", "set-max-intset-entries"))
    except (ConfigurationError, ScriptRefused):
        return {}


def _seconds_ahead(redis: RedisClient, clock: Clock) -> float:
    before = clock.wall().timestamp()
    seconds, micros = redis.call("TIME")
    return (before + clock.wall().timestamp()) / 2 - (int(seconds) + int(micros) / 1e6)


def _rights(redis: RedisClient, settings: Settings) -> Finding:
    """What is refused to our user. The server's ACL LOG holds those refusals."""
    url = settings.redis.url
    user = (urlsplit(url.get_secret_value()).username if url else "") or "default"
    stream = settings.stream.name
    own = {stream: stream, f"{stream}:*": f"{stream}:doctor"}
    keys = {"producer": {**own, "producer_state:*": "producer_state:doctor"}, "worker": own}
    try:
        denied = {role: _denied(redis, CALLS[role], keys[role]) for role in CALLS}
    except ConfigurationError as error:
        return judge.failed("redis acl", str(error), f"redis-cli ACL SETUSER {user} +eval +evalsha")
    return judge.rights(user, denied)


def _denied(redis: RedisClient, calls: Sequence[str], keys: dict[str, str]) -> judge.Needs:
    words = [call.split() for call in calls]
    answers = iter(redis.run("rights", [], [json.dumps(words), *keys.values()]))
    lacking: dict[str, tuple[str, ...]] = {}
    commands: set[str] = set()
    for pattern in keys:
        for command in words:
            answer = next(answers)
            if answer == 1:
                commands.add("|".join(command[:2] if command[0] in CONTAINERS else command[:1]).lower())
            elif answer == 2:
                lacking[pattern] = ("*",)
    return {**lacking, "": tuple(sorted(commands))}


def _lived(redis: RedisClient | None, keys: Keys) -> bool:
    """Whether mail was published before, as far as our user may see."""
    if redis is None:
        return False
    try:
        return int(redis.call("EXISTS", keys.stream, keys.dlq, keys.results)) > 0
    except ConfigurationError:
        return False
