"""The twins measured from outside, started as a user starts them: what they did to Redis, and what the kernel says that it cost."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from os import sysconf
from pathlib import Path
from typing import Any

import redis

from src.common.clock import iso
from src.common.keys import Keys, open_field
from src.mail.record import Address, Record, gmail_email_id, record_to_json
from src.sandbox.server import Sandbox
from tests.support.daemons import Daemon
from tests.support.processes import family
from tests.support.proxy import FaultProxy
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until

KEYS = Keys("email_ingestion_stream")
ACCOUNT = "load@example.org"
FIRST_ID = 1_700_000_000_000_000_000
SETTLED = 0.1  # of the work is done before the clock starts: connections and caches are warm then


# what the kernel says (Linux; 0 elsewhere)


def _status(pid: int, name: str) -> float:
    """A line of /proc/PID/status in MB."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def peak_mb(pid: int) -> float:
    """Peak resident memory of a process and its children in MB."""
    return sum(_status(member, "VmHWM") for member in family(pid))


def resident_mb(pid: int) -> float:
    """Resident memory of a process and its children now, in MB."""
    return sum(_status(member, "VmRSS") for member in family(pid))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children so far."""
    total = 0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / sysconf("SC_CLK_TCK")


def thread_seconds(pid: int) -> dict[str, float]:
    """CPU time of each thread of a process so far, to the nanosecond."""
    return {
        thread.name: int((thread / "schedstat").read_text().split()[0]) / 1e9 for thread in Path(f"/proc/{pid}/task").iterdir()
    }


# the stream, and workers that empty it


def fill(client: redis.Redis, count: int, size: int, *, a_day: int = 10_000) -> None:
    """`count` unfinished mails as the producer leaves them, entries of about `size` bytes, `a_day` of them on each day.

    It ends when the server has done with rewriting its file of what was written here.
    """
    sender = Address("Ada Winter", "ada@firm.example")
    bare = len(record_to_json(Record(from_=sender, subject="Invoice")))
    record = record_to_json(Record(from_=sender, subject="Invoice", body_text="x" * max(0, size - bare - 300)))
    began, per_call = datetime(2024, 1, 1, 10, tzinfo=UTC), 500
    for first in range(0, count, per_call):
        pipe: Any = client.pipeline(transaction=False)
        index: dict[str, str] = {}
        for number in range(first, min(first + per_call, count)):
            day = iso(began + timedelta(days=number // a_day))
            email_id, entry_id = gmail_email_id(ACCOUNT, str(FIRST_ID + number)), f"{1_700_000_000_000 + number}-0"
            index[email_id] = f"S:{entry_id}"
            pipe.hincrby(KEYS.open, open_field(ACCOUNT, "INBOX", day), 1)
            entry = {"schema": "1", "email_id": email_id, "account": ACCOUNT, "mailbox": "INBOX", "uid": number + 1}
            entry |= {"internal_date": day, "from": str(sender), "subject": "Invoice", "correlation_id": f"{number:016x}"}
            pipe.xadd(KEYS.stream, entry | {"record": record}, id=entry_id)
        pipe.hset(KEYS.index, mapping=index)
        pipe.execute()
    until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], 120, "the server has rewritten its file")


@dataclass(frozen=True)
class Drained:
    """`rate`: mails a second. `cpu`, `scripts`: seconds of the workers' CPU and of Redis in scripts, a mail. `memory`: MB of one worker."""

    rate: float
    cpu: float
    scripts: float
    memory: float


def drain(server: RedisServer, handler: str, *, workers: int = 1, at_most: int | None = None, **env: str) -> Drained:
    """Workers empty the stream, or take `at_most` mails out of it. Their start is left out: the clock runs when a tenth is done."""
    client = server.client()
    before = client.xlen(KEYS.stream)
    end = 0 if at_most is None else before - at_most
    env = {
        "REDIS_URL": server.tcp_url,
        "HTTP_PORT": "0",
        "WORKER_HANDLER": f"tests.load.handler:{handler}",
        "LOG_FORMAT": "text",
    } | env
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        daemons = [running.enter_context(Daemon("worker.py", env=env, tmp=Path(folder))) for _ in range(workers)]
        for daemon in daemons:
            daemon.wait_for("reads email_ingestion_stream", 60)
        until(lambda: client.xlen(KEYS.stream) <= before - (before - end) * SETTLED, 120, "a tenth is done")
        client.config_resetstat()
        first, cpu, began = client.xlen(KEYS.stream), sum(cpu_seconds(daemon.pid) for daemon in daemons), time.perf_counter()
        until(lambda: client.xlen(KEYS.stream) <= end, 1200, "the mails are done")
        seconds, done = time.perf_counter() - began, first - client.xlen(KEYS.stream)
        cpu = sum(cpu_seconds(daemon.pid) for daemon in daemons) - cpu
        scripts = client.info("commandstats")["cmdstat_evalsha"]["usec"] / 1e6
        memory = max(peak_mb(daemon.pid) for daemon in daemons)
        if end:
            for daemon in daemons:  # so that they hand back what they hold
                daemon.terminate()
        return Drained(done / seconds, cpu / done, scripts / done, memory)


# a mailbox, and a producer that reads it


def source(dovecot: Dovecot, account: str, *, port: int | None = None, tls: bool = False) -> dict[str, str]:
    """The settings of a producer that reads a Dovecot account with its password; `port`: of a proxy before it."""
    where = {"IMAP_HOST": "localhost", "IMAP_CA_FILE": str(dovecot.ca_file)} if tls else {"IMAP_HOST": "127.0.0.1"}
    return where | {
        "GMAIL_USERNAME": account,
        "AUTH_METHOD": "password",
        "IMAP_PASSWORD": dovecot.PASSWORD,
        "IMAP_SECURITY": "tls" if tls else "none",
        "IMAP_PORT": str(port or (dovecot.imaps_port if tls else dovecot.imap_port)),
        "INITIAL_SYNC": "all",
        "HTTP_PORT": "0",
        "LOG_FORMAT": "text",
    }


@dataclass(frozen=True)
class Intake:
    """`rate`: mails a second. `cpu`: seconds of CPU a mail. `peak`: MB. `growth`: MB of the last third above the middle third."""

    rate: float
    cpu: float
    peak: float
    growth: float


def intake(settings: Mapping[str, str], account: str, count: int, folder: Path) -> Intake:
    """One producer reads `count` mails into an empty Valkey with an append-only file; its start is left out.

    `folder`: new, for the raw mail; the caller removes it when nothing is measured (ext4 makes new files slowly for a minute after
    thousands were removed).
    """
    with RedisServer("valkey", appendonly=True) as server:
        client = server.client()
        last_uid = KEYS.mailbox(account, "INBOX").last_uid
        seen: list[tuple[int, float]] = []  # (mails, MB)
        with Daemon("producer.py", env={"REDIS_URL": server.tcp_url, **settings}, tmp=folder) as producer:
            until(lambda: client.xlen(KEYS.stream) > 0, 120, "the first mails are in the stream")
            first, cpu, began = client.xlen(KEYS.stream), cpu_seconds(producer.pid), time.perf_counter()

            def read() -> bool:
                seen.append((client.xlen(KEYS.stream), resident_mb(producer.pid)))
                return str(client.get(last_uid)) == str(count)

            until(read, 1200, "the mailbox is read")
            seconds, cpu, peak = time.perf_counter() - began, cpu_seconds(producer.pid) - cpu, peak_mb(producer.pid)
        assert client.xlen(KEYS.stream) == count, f"{client.xlen(KEYS.stream)} of {count} mails are in the stream"
    thirds = [[mb for mails, mb in seen if part <= 3 * mails / count < part + 1] or [seen[-1][1]] for part in (1, 2)]
    middle, last = map(statistics.median, thirds)
    return Intake((count - first) / seconds, cpu / (count - first), peak, last - middle)


@dataclass(frozen=True)
class Polls:
    """What one poll of an unchanged folder costs: seconds of CPU of the thread that reads the mailbox (the work of others goes by time,
    and a server takes longer over a large folder), bytes from the server."""

    cpu: float
    received: float


def polls(dovecot: Dovecot, account: str, seconds: float) -> Polls:
    """A producer that knows the folder polls it ten times a second, through a proxy that counts what passes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer("valkey", appendonly=True) as server,
        FaultProxy(dovecot.imap_port, keep=True) as proxy,
    ):
        client = server.client()
        settings = source(dovecot, account, port=proxy.port) | {"INITIAL_SYNC": "new", "POLL_INTERVAL": "0.1"}
        with Daemon("producer.py", env={"REDIS_URL": server.tcp_url, **settings}, tmp=Path(folder)) as producer:

            def asked() -> int:
                return proxy.passed("to_server").count(b" UID SEARCH ")

            until(lambda: client.get(KEYS.mailbox(account, "INBOX").last_poll) is not None, 300, "the first poll")
            settled = asked() + 10
            until(lambda: asked() >= settled, 120, "it polls")
            before, cpu, received = asked(), thread_seconds(producer.pid), len(proxy.passed("to_client"))
            began = time.perf_counter()
            until(lambda: time.perf_counter() - began > seconds, seconds + 5, "some time has gone by")
            done = asked() - before
            reader = max(seconds - cpu.get(thread, 0.0) for thread, seconds in thread_seconds(producer.pid).items())
            return Polls(reader / done, (len(proxy.passed("to_client")) - received) / done)


def takeover() -> float:
    """Seconds from the kill -9 of a producer to the first mail that its standby publishes, with the default lease of 30 s."""
    with tempfile.TemporaryDirectory() as name, RedisServer("valkey", appendonly=True) as server, Sandbox() as sandbox:
        folder = Path(name)
        sandbox.add_account(ACCOUNT)
        sandbox.write_token_file(folder / "tokens" / "gmail_token.json", ACCOUNT)
        env = {"REDIS_URL": server.tcp_url, "HTTP_PORT": "0", "IMAP_HOST": "127.0.0.1", "IMAP_PORT": str(sandbox.imap_port)}
        env |= {"IMAP_SECURITY": "none", "INITIAL_SYNC": "all", "LOG_FORMAT": "text"}
        client = server.client()
        with Daemon("producer.py", env=env, tmp=folder) as owner:
            until(lambda: client.get(KEYS.mailbox(ACCOUNT, "INBOX").last_uid) is not None, 60, "the first poll")
            with Daemon("producer.py", env=env, tmp=folder) as standby:
                standby.wait_for("standing by", 60)
                owner.kill9()
                began = time.perf_counter()
                sandbox.deliver(ACCOUNT, b"Subject: for the standby\r\n\r\nx")
                until(lambda: client.xlen(KEYS.stream) == 1, 120, "the standby has published")
                return time.perf_counter() - began
