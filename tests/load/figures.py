"""How fast the twins are here, printed and never judged: `python -m tests.load.figures [WHAT …]`, one or more of the names below.

drain: one worker process with every guarantee on and a no-op handler empties a stream of 5 KB records. intake: one producer
process reads a Dovecot mailbox over TLS into the stream. Beside each rate stand the process's peak memory and, as the measure of this
machine on this day, the bare XREADGROUP + XACK loop. These two are what runs when nothing is named.

first-read: the memory of a producer while it reads a sandbox mailbox of ten times as many mails for the first time. arrival: from
the moment the sandbox has a mail to the moment it stands in the stream, one mail at a time, told by IDLE. takeover: from the kill -9 of a
producer to the first mail that its standby publishes, with the default lease. handlers: of 20 ms, async and in threads, and in processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import redis

from src.sandbox.generator import generate
from src.sandbox.server import Sandbox
from tests.support.daemons import Daemon
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until

STREAM = "email_ingestion_stream"
RECORD_BYTES = 5_000
ACCOUNT = "load@example.org"
NEVER = threading.Event()  # waiting for it is how a handler takes its time


def no_op(email: object, context: object) -> None:
    """The handler of the drain."""


def fill(client: redis.Redis, count: int) -> None:
    """`count` entries as the producer writes them, of about 5 KB."""
    record = json.dumps(
        {"body_text": "x" * (RECORD_BYTES - 400), "from": {"name": "A", "address": "a@example.org"}, "subject": "s"}
    )
    pipe = client.pipeline(transaction=False)
    for number in range(count):
        entry = {
            "schema": "1",
            "email_id": f"gm:{ACCOUNT}:{1_700_000_000_000_000_000 + number}",
            "account": ACCOUNT,
            "mailbox": "INBOX",
            "uid": str(number + 1),
            "internal_date": "2026-11-01T10:00:00Z",
            "from": "a@example.org",
            "subject": "s",
            "correlation_id": f"{number:016x}",
            "record": record,
        }
        pipe.xadd(STREAM, entry)  # type: ignore[arg-type]
        if number % 1000 == 999:
            pipe.execute()
    pipe.execute()


def bare_loop(client: redis.Redis, count: int) -> float:
    """Entries a second of XREADGROUP + XACK by 100, nothing else."""
    client.xgroup_create(STREAM, "bare", "0")
    began = time.perf_counter()
    left = count
    while left > 0:
        [(_, entries)] = client.xreadgroup("bare", "c", {STREAM: ">"}, count=100)  # type: ignore[misc]
        client.xack(STREAM, "bare", *(entry_id for entry_id, _ in entries))
        left -= len(entries)
    return count / (time.perf_counter() - began)


def peak_mb(pid: int) -> float:
    """Peak resident memory of a process in MB (Linux; 0 elsewhere)."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


async def wait_20_ms(email: object, context: object) -> None:
    """The handler of the async figure."""
    await asyncio.sleep(0.02)


def wait_20_ms_in_a_thread(email: object, context: object) -> None:
    """The same for threads."""
    NEVER.wait(0.02)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def emptied(server: RedisServer, count: int, handler: str, **env: str) -> tuple[float, float, float, float]:
    """One worker empties the stream: (mails a second, CPU seconds a mail, peak MB, Redis' seconds a mail), start-up left out."""
    client = server.client()
    env |= {"REDIS_URL": server.url, "HTTP_PORT": "0", "WORKER_HANDLER": f"tests.load.figures:{handler}", "LOG_FORMAT": "text"}
    with tempfile.TemporaryDirectory() as folder, Daemon("worker.py", env=env, tmp=Path(folder)) as worker:
        until(lambda: client.xlen(STREAM) < count, 30, "the first mails are done")
        client.config_resetstat()
        began, first, cpu = time.perf_counter(), client.xlen(STREAM), cpu_seconds(worker.pid)
        until(lambda: client.xlen(STREAM) == 0, 300, "the stream is empty")
        seconds, cpu = time.perf_counter() - began, cpu_seconds(worker.pid) - cpu
        scripts = client.info("commandstats")["cmdstat_evalsha"]["usec"] / 1e6
        return first / seconds, cpu / first, peak_mb(worker.pid), scripts / first


def drain(count: int) -> None:
    with RedisServer("valkey", appendonly=True) as server:
        client = server.client()
        fill(client, count)
        bare = bare_loop(client, count)
        client.xgroup_destroy(STREAM, "bare")
        rate, cpu, memory, scripts = emptied(server, count, "no_op")
        results = client.xlen(f"{STREAM}:results")
    print(f"drain   {count} mails of 5 KB, append-only file on: {rate:,.0f} mails/s, {memory:.0f} MB, {results} results kept")
    print(f"        a mail costs {cpu * 1e6:.0f} µs of the worker's CPU and {scripts * 1e6:.0f} µs of Redis' in scripts")
    print(f"        bare XREADGROUP + XACK by 100: {bare:,.0f}/s, so {rate / bare:.2f} of it")


def handlers(count: int) -> None:
    with RedisServer("valkey", appendonly=True) as server:
        for handler, isolation, at_once in (
            ("wait_20_ms", "thread", 64),
            ("wait_20_ms", "thread", 1000),
            ("wait_20_ms_in_a_thread", "thread", 64),
            ("no_op", "process", 2),
        ):
            fill(server.client(), count)
            rate, cpu, memory, scripts = emptied(
                server, count, handler, WORKER_ISOLATION=isolation, WORKER_CONCURRENCY=str(at_once)
            )
            kind = "async" if handler == "wait_20_ms" else isolation
            print(
                f"handlers {handler}, {kind}, {at_once} at once: {rate:,.0f} mails/s; a mail costs {cpu * 1e6:.0f} µs of the worker's CPU "
                f"and {scripts * 1e6:.0f} µs of Redis' in scripts; {memory:.0f} MB"
            )
            server.client().flushall()


def intake(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, RedisServer("valkey", appendonly=True) as server, Dovecot() as dovecot:
        total = 0
        for sample in generate(1, count):
            dovecot.deliver(ACCOUNT, sample.raw)
            total += len(sample.raw)
        dovecot.login(ACCOUNT).select("INBOX", readonly=True)  # so that Dovecot's own indexing is not measured
        tokens = Path(folder) / "tokens"
        tokens.mkdir()
        dovecot.tokens.write_token_file(tokens / "gmail_token.json", ACCOUNT)
        env = {
            "REDIS_URL": server.url,
            "HTTP_PORT": "0",
            "IMAP_HOST": "localhost",
            "IMAP_PORT": str(dovecot.imaps_port),
            "IMAP_CA_FILE": str(dovecot.ca_file),
            "INITIAL_SYNC": "all",
            "LOG_FORMAT": "text",
        }
        client = server.client()
        with Daemon("producer.py", env=env, tmp=Path(folder)) as producer:
            until(lambda: client.xlen(STREAM) > 0, 60, "the first mails are in the stream")
            began, first = time.perf_counter(), client.xlen(STREAM)
            until(lambda: client.get(f"producer_state:{ACCOUNT}:INBOX:last_uid") == str(count), 300, "the mailbox is read")
            rate = (count - first) / (time.perf_counter() - began)
            published = client.xlen(STREAM)
            memory = peak_mb(producer.pid)
    print(
        f"intake  {count} mails ({total / 1e6:.0f} MB), Dovecot over TLS: {rate:,.0f} mails/s, {memory:.0f} MB, {published} in the stream"
    )


def resident_mb(pid: int) -> float:
    """Resident memory of a process now, in MB (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def of_the_sandbox(sandbox: Sandbox, server: RedisServer, folder: Path) -> dict[str, str]:
    """The settings of a producer that reads the sandbox's account; its token is in `folder`."""
    (folder / "tokens").mkdir()
    sandbox.write_token_file(folder / "tokens" / "gmail_token.json", ACCOUNT)
    return {
        "REDIS_URL": server.url,
        "HTTP_PORT": "0",
        "IMAP_HOST": "127.0.0.1",
        "IMAP_PORT": str(sandbox.imap_port),
        "IMAP_SECURITY": "none",
        "INITIAL_SYNC": "all",
        "LOG_FORMAT": "text",
    }


def first_read(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, RedisServer("valkey", appendonly=True) as server, Sandbox() as sandbox:
        for number in range(count):
            header = f"From: Ann <ann@example.org>\r\nSubject: mail {number}\r\nMessage-ID: <{number}@example.org>\r\n\r\n"
            sandbox.deliver(ACCOUNT, header.encode() + b"hello\r\n" * 20)
        env = of_the_sandbox(sandbox, server, Path(folder)) | {"STREAM_MAXLEN": str(11 * count)}  # the read may use a tenth
        client = server.client()
        last_uid = f"producer_state:{ACCOUNT}:INBOX:last_uid"
        seen: list[tuple[int, float]] = []  # (mails read, MB)
        with Daemon("producer.py", env=env, tmp=Path(folder)) as producer:
            until(lambda: client.get(last_uid) is not None, 60, "the read has begun")
            began = time.perf_counter()

            def ended() -> bool:
                seen.append((int(client.get(last_uid) or 0), resident_mb(producer.pid)))
                return seen[-1][0] == count

            until(ended, 3600, "the mailbox is read")
            seconds = time.perf_counter() - began
            published, peak = client.xlen(STREAM), peak_mb(producer.pid)
    thirds = [[mb for done, mb in seen if part <= 3 * done / count < part + 1] or [0.0] for part in range(3)]
    whole = " ".join(f"{statistics.median(part):.1f}" for part in thirds)
    late = [(done, mb) for done, mb in seen if done > count / 10]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope * 100_000 if len(late) > 2 else 0.0
    print(f"first read  {count} mails, sandbox: {count / seconds:,.0f} mails/s, {published} in the stream, peak {peak:.0f} MB")
    print(
        f"            memory by thirds of the read: {whole} MB; grows by {slope:.1f} MB per 100,000 mails behind the first tenth"
    )


def arrival(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, RedisServer("valkey", appendonly=True) as server, Sandbox() as sandbox:
        sandbox.add_account(ACCOUNT)
        client = server.client()
        env = of_the_sandbox(sandbox, server, Path(folder)) | {"POLL_INTERVAL": "600"}
        with Daemon("producer.py", env=env, tmp=Path(folder)):
            until(lambda: client.get(f"producer_state:{ACCOUNT}:INBOX:last_uid") is not None, 60, "the first poll")
            took: list[float] = []
            last = "0"
            for sample in generate(1, count):
                client.xread({STREAM: last}, block=random.randint(50, 150))  # all is at rest meanwhile
                began = time.perf_counter()
                sandbox.deliver(ACCOUNT, sample.raw)
                [(_, entries)] = client.xread({STREAM: last}, block=30_000)  # type: ignore[misc]
                took.append((time.perf_counter() - began) * 1000)
                last = entries[-1][0]
    p50, p99 = (statistics.quantiles(took, n=100)[at - 1] for at in (50, 99))
    print(f"arrival     {count} mails one at a time, IDLE: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {max(took):.1f} ms")


def takeover() -> None:
    with tempfile.TemporaryDirectory() as folder, RedisServer("valkey", appendonly=True) as server, Sandbox() as sandbox:
        sandbox.add_account(ACCOUNT)
        client = server.client()
        env = of_the_sandbox(sandbox, server, Path(folder))
        with Daemon("producer.py", env=env, tmp=Path(folder)) as owner:
            until(lambda: client.get(f"producer_state:{ACCOUNT}:INBOX:last_uid") is not None, 60, "the first poll")
            with Daemon("producer.py", env=env, tmp=Path(folder)) as standby:
                standby.wait_for("standing by", 60)
                owner.kill9()
                began = time.perf_counter()
                sandbox.deliver(ACCOUNT, b"Subject: for the standby\r\n\r\nx")
                until(lambda: client.xlen(STREAM) == 1, 120, "the standby has published")
                print(f"takeover    {time.perf_counter() - began:.1f} s after the kill -9 of the owner, whose lease is 30 s")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "what", nargs="*", choices=[[], "drain", "intake", "first-read", "arrival", "takeover", "handlers"], metavar="WHAT"
    )
    parser.add_argument("--emails", type=int, default=10_000, metavar="N")
    given = parser.parse_args()
    what, count = given.what or ["drain", "intake"], given.emails
    if "drain" in what:
        drain(3 * count)
    if "intake" in what:
        intake(count)
    if "first-read" in what:
        first_read(10 * count)
    if "arrival" in what:
        arrival(min(count, 300))
    if "takeover" in what:
        takeover()
    if "handlers" in what:
        handlers(count)
    print("load        " + " ".join(f"{load:.1f}" for load in os.getloadavg()) + f" on {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
