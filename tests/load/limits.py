"""What this machine gives today without any guarantee: the bare limits that the twins are measured against."""

from __future__ import annotations

import email
import email.policy
import hashlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from email.header import decode_header, make_header
from email.utils import getaddresses, parsedate_to_datetime
from pathlib import Path

import redis

from src.mail.text import html_to_text

FETCH = 100  # mails in one command of the thin reader
_LITERAL = re.compile(rb"\{(\d+)\}\r\n$")


def read_and_acknowledge(client: redis.Redis, stream: str, count: int) -> float:
    """Entries a second of XREADGROUP + XACK by 100, nothing else; the group is taken away again."""
    client.xgroup_create(stream, "bare", "0")
    began, left = time.perf_counter(), count
    while left > 0:
        [(_, entries)] = client.xreadgroup("bare", "c", {stream: ">"}, count=100)  # type: ignore[misc]
        client.xack(stream, "bare", *(entry_id for entry_id, _ in entries))
        left -= len(entries)
    rate = count / (time.perf_counter() - began)
    client.xgroup_destroy(stream, "bare")
    return rate


def drain_imap(port: int, account: str, password: str, count: int, ca_file: Path | None = None) -> float:
    """Mails a second of a reader that only takes them off the wire: FETCH of 100 bodies, the next one in flight. TLS with `ca_file`."""
    raw = socket.create_connection(("127.0.0.1", port), 60)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    context = ssl.create_default_context(cafile=str(ca_file)) if ca_file else None
    with (
        context.wrap_socket(raw, server_hostname="localhost") if context else raw as wire,
        wire.makefile("rb", 1 << 16) as stream,
    ):
        stream.readline()
        for tag, command in ((b"a", f'LOGIN "{account}" "{password}"'), (b"b", "EXAMINE INBOX")):
            wire.sendall(tag + b" " + command.encode() + b"\r\n")
            while not stream.readline().startswith(tag + b" OK"):
                pass
        tags = [b"f%d" % first for first in range(1, count + 1, FETCH)]
        commands = [
            b"%s UID FETCH %d:%d (BODY.PEEK[])\r\n" % (tag, first, min(first + FETCH - 1, count))
            for tag, first in zip(tags, range(1, count + 1, FETCH), strict=True)
        ]
        room, mails = memoryview(bytearray(64 << 20)), 0
        began = time.perf_counter()
        wire.sendall(commands[0])
        for number, tag in enumerate(tags):
            if number + 1 < len(commands):
                wire.sendall(commands[number + 1])
            while not (line := stream.readline()).startswith(tag):
                if literal := _LITERAL.search(line):
                    left = room[: int(literal[1])]
                    while left:
                        left = left[stream.readinto(left) :]  # type: ignore[attr-defined]
                    mails += 1
        seconds = time.perf_counter() - began
    assert mails == count, f"the thin reader had {mails} of {count} mails"
    return count / seconds


def compat32(raw: bytes) -> str:
    """The record of a mail in the plainest way on the standard library's parser, as JSON; HTML becomes text as with us."""
    mail = email.message_from_bytes(raw, policy=email.policy.compat32)
    texts: dict[str, list[str]] = {"plain": [], "html": []}
    files = []
    for part in mail.walk():
        if part.is_multipart():
            continue
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        if part.get_content_maintype() != "text" or part.get_content_disposition() == "attachment":
            digest = hashlib.sha256(content).hexdigest()
            files.append({"name": part.get_filename(""), "type": part.get_content_type(), "size": len(content), "sha256": digest})
        else:
            text = content.decode(part.get_content_charset("ascii"), "replace").replace("\r\n", "\n")
            texts["html" if part.get_content_subtype() == "html" else "plain"].append(text)
    text = "\n\n".join(texts["plain"] or [html_to_text(markup)[0] for markup in texts["html"]])[:65_536]
    people = {name: getaddresses([str(value) for value in mail.get_all(name, [])]) for name in ("from", "to", "cc", "reply-to")}
    people = {name: [(_words(who), address) for who, address in found] for name, found in people.items()}
    record = {name: str(mail.get(name, "")) for name in ("message-id", "in-reply-to", "references")}
    record |= {
        "subject": _words(str(mail.get("subject", ""))),
        "date": str(parsedate_to_datetime(mail["date"]) if mail["date"] else ""),
    }
    record["preview"] = " ".join(text[:4_000].split())[:200]
    return json.dumps({**record, **people, "text": text, "files": files}, ensure_ascii=False)


def _words(value: str) -> str:
    return str(make_header(decode_header(value)))


def pool_of_threads(threads: int, count: int, seconds: float) -> float:
    """Calls a second of a bare pool whose calls wait for `seconds` each."""
    never = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(never.wait, [0.0] * threads))
        began = time.perf_counter()
        list(pool.map(never.wait, [seconds] * count))
        return count / (time.perf_counter() - began)


def cpu_rate(call: object, mails: Iterable[bytes]) -> float:
    """Mails a second of this thread's CPU that `call` takes."""
    count, began = 0, time.thread_time()
    for raw in mails:
        call(raw)  # type: ignore[operator]
        count += 1
    return count / (time.thread_time() - began)
