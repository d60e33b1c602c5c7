"""The webhook against a real HTTP server on this machine that answers well, late, broken, or points elsewhere."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.common.clock import SYSTEM
from src.common.exceptions import Permanent, RetryLater, Transient
from src.handlers.webhook import Lookup, Target, Webhook, WebhookSettings, exchange, lookup, request_head, target_of
from src.mail.record import Email
from tests.support.daemons import ROOT
from tests.support.hooks import HookServer, Reply, Request, Reset, answering
from tests.support.processes import free_port

KEY = b"a key of at least 24 bytes"
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
EMAIL_ID = "gm:a@example.org:17"
HERE = ["127.0.0.1"]
MANY_ADDRESSES = pytest.mark.skipif(sys.platform != "linux", reason="needs 127.0.0.2, which only Linux has unasked")


def mail(text: str = "hello é") -> Email:
    record: dict[str, Any] = {"body_text": text, "from": {"name": "A", "address": "a@example.org"}}
    return Email(
        {
            "email_id": EMAIL_ID,
            "account": "a@example.org",
            "mailbox": "INBOX",
            "uid": "5",
            "internal_date": "2026-11-01T10:00:00Z",
            "subject": "s",
            "record": json.dumps(record),
        }
    )


def webhook(url: str, look_up: Lookup | None = None, **settings: Any) -> Webhook:
    """A webhook to `url`, where the name stands for 127.0.0.1, which is allowed."""
    given = {
        "url": url,
        "secret": SECRET,
        "allowed_hosts": url.split("/")[2].rpartition(":")[0],
        "allowed_addresses": "127.0.0.1",
        "timeout": 5,
        **settings,
    }
    built = WebhookSettings(_env_file=None, **given)
    return Webhook(built, target_of(built), look_up or (lambda host, port: HERE), SYSTEM)


@contextmanager
def hook(reply: Reply) -> Iterator[tuple[HookServer, Webhook]]:
    with HookServer(reply) as server:
        yield server, webhook(f"http://hooks.test:{server.port}/in?a=b")


def post(sender: Webhook) -> dict[str, Any]:
    return sender.post(mail(), EMAIL_ID)


def test_a_mail_arrives_signed() -> None:
    """The receiver gets the whole mail as JSON, the key, and a signature that it can verify with its own copy of the secret."""
    with hook(answering(204)) as (server, sender):
        assert post(sender) == {"status": 204}
        [request] = server.requests
    headers = request.headers
    assert (request.method, request.target, headers["host"]) == ("POST", "/in?a=b", f"hooks.test:{server.port}")
    body = json.loads(request.body)
    assert (body["email_id"], body["uid"], body["record"]["body_text"]) == (EMAIL_ID, 5, "hello é")
    assert headers["idempotency-key"] == EMAIL_ID
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + request.body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(SYSTEM.wall().timestamp() - int(headers["webhook-timestamp"])) < 60


def test_the_receiver_of_the_documents_verifies() -> None:
    """The code in docs/handlers/webhook.md accepts what arrives, and neither another body nor another secret."""
    with hook(answering(204)) as (server, sender):
        post(sender)
        [request] = server.requests
    names: dict[str, Any] = {}
    exec((ROOT / "docs/handlers/webhook.md").read_text().split("```python\n")[1].split("```")[0], names)
    verify = names["verify"]
    assert verify(SECRET, request.headers, request.body)
    assert not verify(SECRET, request.headers, request.body + b" ")
    assert not verify("whsec_" + "YWJj" * 8, request.headers, request.body)
    assert not verify(SECRET, request.headers | {"webhook-timestamp": "1000"}, request.body)


def test_an_attempt_repeats_key_id_and_body() -> None:
    """After a 503 the same mail comes byte for byte, with the same key and id."""
    with hook(answering(503)) as (server, sender):
        for _ in range(2):
            with pytest.raises(Transient):
                post(sender)
        first, second = server.requests
    assert first.body == second.body
    for name in ("idempotency-key", "webhook-id"):
        assert first.headers[name] == second.headers[name]


def test_503_with_retry_after() -> None:
    """The receiver's own delay is passed on."""
    with (
        hook(answering(503, "Retry-After: 7", body=b"busy")) as (_, sender),
        pytest.raises(RetryLater, match="503 busy") as caught,
    ):
        post(sender)
    assert caught.value.seconds == 7


def test_422_is_dead_with_the_receivers_words() -> None:
    """The dead letter will say what the receiver said: the beginning of it, printable."""
    with hook(answering(422, body=b"no \x1b[31mticket" + b"x" * 9000)) as (_, sender), pytest.raises(Permanent) as caught:
        post(sender)
    assert str(caught.value).startswith("the receiver answered 422 no  [31mticketxxx")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(status: int) -> None:
    """A redirect to a second server: dead at once, and that server hears nothing."""
    with (
        HookServer(answering(200)) as other,
        hook(answering(status, f"Location: http://127.0.0.1:{other.port}/")) as (_, sender),
        pytest.raises(Permanent, match=f"{status} .redirects are not followed"),
    ):
        post(sender)
    assert other.connections == 0


def silence(server: HookServer) -> Iterable[bytes]:
    server.stopped.wait(30)
    return []


@pytest.mark.parametrize(
    "reply",
    [
        silence,
        lambda server: server.drops(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10_000),
        lambda server: (b"HTTP/1.1 103 Early\r\n\r\n" for _ in iter(lambda: server.stopped.wait(0.01), True)),
    ],
    ids=["no answer", "byte by byte", "only early hints"],
)
def test_a_slow_receiver_costs_the_timeout_and_no_more(reply: Callable[[HookServer], Iterable[bytes]]) -> None:
    """Whatever trickles in, the attempt ends when WEBHOOK_TIMEOUT is over."""
    with HookServer(lambda request: reply(server)) as server:
        sender = webhook(f"http://hooks.test:{server.port}/", timeout=0.5)
        with pytest.raises(Transient, match=r"TimeoutError"):
            post(sender)
        assert len(server.requests) == 1


def test_an_answer_without_an_end_is_an_answer() -> None:
    """204 and 400 count when their head is there, though their text never ends."""

    def endless(status: int) -> Reply:
        return lambda request: server.drops(b"HTTP/1.1 %d X\r\nContent-Length: 99\r\n\r\nsorry" % status, 0.001)

    with HookServer(answering(200)) as server:
        sender = webhook(f"http://hooks.test:{server.port}/", timeout=1)
        server.reply = endless(200)
        assert post(sender) == {"status": 200}
        server.reply = endless(400)
        with pytest.raises(Permanent, match="400 sorry"):
            post(sender)


def reset(request: Request) -> Iterable[bytes]:
    raise Reset


@pytest.mark.parametrize(
    "reply",
    [reset, lambda request: [], lambda request: [b"HTTP/1.1 20"], lambda request: [b"SMTP ready\r\n\r\n"],
     lambda request: [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000]],
    ids=["reset", "closed", "torn", "no HTTP", "endless head"],
)  # fmt: skip
def test_broken_answers_are_retried(reply: Reply) -> None:
    """No verdict came: the mail comes again."""
    with hook(reply) as (_, sender), pytest.raises(Transient) as caught:
        post(sender)
    assert not isinstance(caught.value, RetryLater)


@pytest.mark.parametrize(("abrupt", "verdicts"), [(False, Permanent), (True, (Permanent, Transient))])
def test_refused_before_the_body_is_read(abrupt: bool, verdicts: type[Exception]) -> None:
    """A receiver that answers 413 before it has read the mail is heard; when it resets the connection, heard or asked again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = webhook(f"http://hooks.test:{listener.getsockname()[1]}/")

        def refuse() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            if abrupt:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65_536):
                    pass
            connection.close()

        threading.Thread(target=refuse, daemon=True).start()
        with pytest.raises(verdicts, match=r"413|Reset|BrokenPipe"):
            sender.post(mail("x" * 60_000), EMAIL_ID)


def test_an_answer_to_half_a_request_counts() -> None:
    """The connection is closed for writing while the mail is on its way; the answer that came before is read."""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        theirs.close()
        head = request_head(Target("h", 80, "h", "/", None), KEY, EMAIL_ID, b"{}", 0)
        assert exchange(ours, head, b"{}", lambda: 5.0).status == 413


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port of 127.0.0.2 where connections are neither taken nor refused: its queue is full."""
    with socket.create_server(("127.0.0.2", 0), backlog=0) as listener, ExitStack() as stack:
        port: int = listener.getsockname()[1]
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.2", port))
        yield port


@MANY_ADDRESSES
def test_an_address_that_does_not_answer_is_given_up(deaf: int) -> None:
    """WEBHOOK_CONNECT_TIMEOUT ends the first address, and the second one gets the mail."""
    with HookServer(answering(200), host="127.0.0.1", port=deaf) as server:
        sender = webhook(
            f"http://hooks.test:{deaf}/",
            lambda host, port: ["127.0.0.2", "127.0.0.1"],
            allowed_addresses="127.0.0.0/30",
            connect_timeout=0.3,
        )
        assert post(sender) == {"status": 200}
        assert len(server.requests) == 1


@MANY_ADDRESSES
def test_connecting_counts_for_the_whole_time(deaf: int) -> None:
    """WEBHOOK_TIMEOUT ends an attempt that never connects, though WEBHOOK_CONNECT_TIMEOUT is longer than this test may run."""
    sender = webhook(
        f"http://hooks.test:{deaf}/",
        lambda host, port: ["127.0.0.2"],
        allowed_addresses="127.0.0.0/30",
        timeout=0.3,
        connect_timeout=1000,
    )
    with pytest.raises(Transient, match="TimeoutError"):
        post(sender)


def test_nobody_listens() -> None:
    """A refused connection, a name that does not exist: transient."""
    with pytest.raises(Transient, match="ConnectionRefusedError"):
        post(webhook(f"http://hooks.test:{free_port()}/"))
    with pytest.raises(Transient, match="gaierror"):
        post(webhook("http://does-not-exist.invalid:80/", lookup))


@MANY_ADDRESSES
def test_the_next_address_is_tried() -> None:
    """Two addresses, nobody at the first one: the second gets the mail."""
    with HookServer(answering(200), host="127.0.0.1") as server:
        sender = webhook(
            f"http://hooks.test:{server.port}/", lambda host, port: ["127.0.0.2", "127.0.0.1"], allowed_addresses="127.0.0.0/30"
        )
        assert post(sender) == {"status": 200}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1"])
def test_a_private_address_is_refused_unless_listed(host: str) -> None:
    """This machine, under any name of it, hears nothing while it is not listed, though the host is allowed."""
    with HookServer(answering(200)) as server:
        url = f"http://{host}:{server.port}/"
        sender = webhook(url, lookup, allowed_hosts="127.0.0.1,localhost", allowed_addresses="")
        with pytest.raises(Permanent, match="not a public one and not in WEBHOOK_ALLOWED_ADDRESSES"):
            post(sender)
        assert server.connections == 0
        assert post(webhook(url, lookup, allowed_hosts="127.0.0.1,localhost", allowed_addresses="127.0.0.1,::1")) == {
            "status": 200
        }


def test_one_bad_address_spoils_a_name() -> None:
    """A name with a good and a private address gets nothing at all."""
    with HookServer(answering(200)) as server:
        sender = webhook(f"http://hooks.test:{server.port}/", lambda host, port: ["127.0.0.1", "10.0.0.1"])
        with pytest.raises(Permanent, match=r"10\.0\.0\.1"):
            post(sender)
        assert server.connections == 0


@MANY_ADDRESSES
def test_a_name_that_changes_its_mind() -> None:
    """DNS rebinding: the name gives the good address once and the trap ever after. The mail goes to the address that was judged,
    by one look-up; the next mail is refused; the trap hears nothing."""
    with (
        HookServer(answering(200), host="127.0.0.2") as good,
        HookServer(answering(200), host="127.0.0.3", port=good.port) as trap,
    ):
        answers = iter([["127.0.0.2"]])
        asked: list[str] = []

        def rebinding(host: str, port: int) -> list[str]:
            asked.append(host)
            return next(answers, ["127.0.0.3"])

        sender = webhook(f"http://hooks.test:{good.port}/", rebinding, allowed_addresses="127.0.0.2")
        assert post(sender) == {"status": 200}
        assert (len(good.requests), asked) == (1, ["hooks.test"])
        with pytest.raises(Permanent, match=r"127\.0\.0\.3"):
            post(sender)
        assert trap.connections == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of hooks.test in one file."""
    path = tmp_path_factory.mktemp("tls") / "cert.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hooks.test"]
    argv += ["-addext", "subjectAltName=DNS:hooks.test", "-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subprocess.run(argv, check=True, capture_output=True)
    return path


def test_tls_names_are_checked(certificate: Path) -> None:
    """https to the checked address under the certified name works; another name, or no trust, sends nothing."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with HookServer(answering(200), tls=context) as server:
        assert post(webhook(f"https://hooks.test:{server.port}/", ca_file=certificate)) == {"status": 200}
        for sender in (
            webhook(f"https://other.test:{server.port}/", ca_file=certificate),
            webhook(f"https://hooks.test:{server.port}/"),
        ):
            with pytest.raises(Transient, match="CERTIFICATE_VERIFY_FAILED"):
                post(sender)
        assert len(server.requests) == 1


def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY of the environment does not see the mail."""
    with HookServer(answering(200)) as proxy, hook(answering(200)) as (server, sender):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        post(sender)
        assert (len(server.requests), proxy.connections) == (1, 0)
