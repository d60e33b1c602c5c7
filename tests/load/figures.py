"""How fast the twins are here, printed and never judged: `python -m tests.load.figures [--emails N]`.

Drain: one worker process with every guarantee on and a no-op handler empties a stream of 5 KB records. Intake: one producer
process reads a Dovecot mailbox over TLS into the stream. Beside each rate stand the process's peak memory and, as the measure of this
machine on this day, the bare XREADGROUP + XACK loop.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import redis

from src.sandbox.generator import generate
from tests.support.daemons import Daemon
from tests.support.servers import Dovecot, RedisServer
from tests.support.wait import until

STREAM = "email_ingestion_stream"
RECORD_BYTES = 5_000
ACCOUNT = "load@example.org"


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


def drain(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, RedisServer("valkey", appendonly=True) as server:
        client = server.client()
        fill(client, count)
        bare = bare_loop(client, count)
        client.xgroup_destroy(STREAM, "bare")
        env = {"REDIS_URL": server.url, "HTTP_PORT": "0", "WORKER_HANDLER": "tests.load.figures:no_op", "LOG_FORMAT": "text"}
        with Daemon("worker.py", env=env, tmp=Path(folder)) as worker:
            until(lambda: client.xlen(STREAM) < count, 30, "the first mails are done")
            began, first = time.perf_counter(), client.xlen(STREAM)
            until(lambda: client.xlen(STREAM) == 0, 300, "the stream is empty")
            rate = first / (time.perf_counter() - began)
            memory = peak_mb(worker.pid)
        results = client.xlen(f"{STREAM}:results")
    print(f"drain   {count} mails of 5 KB, append-only file on: {rate:,.0f} mails/s, {memory:.0f} MB, {results} results kept")
    print(f"        bare XREADGROUP + XACK by 100: {bare:,.0f}/s, so {rate / bare:.2f} of it")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--emails", type=int, default=10_000, metavar="N")
    count = parser.parse_args().emails
    drain(3 * count)
    intake(count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
