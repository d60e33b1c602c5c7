"""POSTs each mail as JSON to one address of yours: `WORKER_HANDLER=src.handlers.webhook:handle`, WEBHOOK_*.

At least once: the same mail comes with the same Idempotency-Key and the same body, whoever sends it how often. Signed as
Standard Webhooks has it (standardwebhooks.com): HMAC-SHA256 over `<webhook-id>.<webhook-timestamp>.<body>`.

2xx: done. 408, 425, 429, 5xx, no answer in time, a broken connection: again, not before Retry-After. Any other answer, also a
redirect: dead at once. The name is looked up once a mail, every address it gave is judged, and the connection goes to an
address that was judged: a name that changes its mind in between gains nothing. No proxy, no redirect, no cookie.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import quote

import h11
from pydantic import Field, HttpUrl, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from src.common.clock import SYSTEM, Clock
from src.common.exceptions import ConfigurationError, Permanent, RetryLater, Transient
from src.handlers.document import document
from src.handlers.settings import HandlerSettings, read
from src.mail.record import Email

Address = IPv4Address | IPv6Address
Lookup = Callable[[str, int], Sequence[str]]

CARRIERS = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))  # RFC 6052 (NAT64), RFC 4291 2.5.5.1: IPv4 in the last 32 bits
LONGEST_RETRY_AFTER = 86_400.0  # seconds
LEAST_SECRET = 24  # bytes, as Standard Webhooks asks
EXCERPT = 300  # bytes of a refusal's text that stand in the dead letter
AGAIN = frozenset({408, 425, 429})


class WebhookSettings(HandlerSettings):
    model_config = SettingsConfigDict(env_prefix="WEBHOOK_")

    url: HttpUrl = Field(description="the address that each mail is POSTed to")
    secret: SecretStr = Field(description=f"whsec_ and at least {LEAST_SECRET} random bytes in base64, as the receiver has it")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        description="hosts that mail may be sent to, separated by commas; that of WEBHOOK_URL is one of them"
    )
    allowed_addresses: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        (), description="Private addresses or networks that may be connected to, separated by commas; http:// goes to them alone."
    )
    connect_timeout: float = Field(5, gt=0, description="Seconds until one address is connected.")
    timeout: float = Field(
        30, gt=0, description="Seconds until the answer is there, all in all; the look-up of the name comes on top."
    )
    ca_file: Path | None = Field(None, description="Certificate authority of a receiver of your own (PEM).")

    @field_validator("allowed_hosts", "allowed_addresses", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip().lower() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("secret")
    @classmethod
    def _strong(cls, secret: SecretStr) -> SecretStr:
        if len(key_of(secret)) < LEAST_SECRET:
            raise ValueError(f"must be whsec_ and at least {LEAST_SECRET} bytes in base64 (openssl rand -base64 32)")
        return secret

    @model_validator(mode="after")
    def _listed(self) -> WebhookSettings:
        if self.url.username or self.url.password or self.url.fragment:
            raise ValueError("WEBHOOK_URL must have neither user, password nor fragment")
        if self.url.host not in self.allowed_hosts:
            raise ValueError(f"WEBHOOK_ALLOWED_HOSTS must name {self.url.host}, the host of WEBHOOK_URL")
        return self


class Context(Protocol):
    """What is used of `src.worker.context.Context`."""

    @property
    def idempotency_key(self) -> str: ...


@dataclass(frozen=True)
class Target:
    """Where mail goes. `host` as it is looked up and certified, `authority` as the Host header has it."""

    host: str
    port: int
    authority: str
    path: str
    tls: ssl.SSLContext | None


@dataclass(frozen=True)
class Answer:
    """`retry_after`: the header's text, "" without one. `excerpt`: how the text of a refusal begins."""

    status: int
    retry_after: str = ""
    excerpt: str = ""


def handle(email: Email, context: Context) -> dict[str, Any]:
    """Result: `{"status": 204}`. Raises Permanent, RetryLater, Transient."""
    return prepare().post(email, context.idempotency_key)


@cache
def prepare() -> Webhook:
    """The webhook as the environment has it, once. Raises ConfigurationError."""
    settings = read(WebhookSettings)
    return Webhook(settings, target_of(settings), lookup, SYSTEM)


class Webhook:
    """One receiver. `look_up` (host, port → addresses) may raise OSError."""

    def __init__(self, settings: WebhookSettings, target: Target, look_up: Lookup, clock: Clock) -> None:
        self._settings = settings
        self._target = target
        self._key = key_of(settings.secret)
        self._look_up = look_up
        self._clock = clock

    def post(self, email: Email, idempotency_key: str) -> dict[str, Any]:
        body = document(email).encode()
        moment = self._clock.wall()
        head = request_head(self._target, self._key, idempotency_key, body, round(moment.timestamp()))
        try:
            answer = self._exchange(head, body)
        except (OSError, h11.RemoteProtocolError) as error:
            raise Transient(f"{self._target.host}: {type(error).__name__}: {error}") from error
        judge(answer, moment)
        return {"status": answer.status}

    def _exchange(self, head: h11.Request, body: bytes) -> Answer:
        """Raises OSError (TimeoutError among them), h11.RemoteProtocolError; Permanent when an address is refused."""
        addresses = self._addresses()
        end = self._clock.monotonic() + self._settings.timeout

        def left() -> float:
            seconds = end - self._clock.monotonic()
            if seconds <= 0:
                raise TimeoutError(f"no answer within {self._settings.timeout:g} s")
            return seconds

        with self._connected(addresses, left) as connection:
            return exchange(connection, head, body, left)

    def _addresses(self) -> Sequence[str]:
        target = self._target
        found = self._look_up(target.host, target.port)
        for address in found:
            reason = refusal(address, self._settings.allowed_addresses, encrypted=target.tls is not None)
            if reason:
                raise Permanent(f"{target.host} has the address {address}: {reason}")
        return found

    def _connected(self, addresses: Sequence[str], left: Callable[[], float]) -> socket.socket:
        """A connection to the first of `addresses` that takes one; the error of the last one that did not."""
        target = self._target
        for number, address in enumerate(addresses, start=1):
            try:
                plain = socket.create_connection((address, target.port), min(self._settings.connect_timeout, left()))
                break
            except OSError:
                if number == len(addresses):
                    raise
        else:
            raise OSError("the name has no address")
        if target.tls is None:
            return plain
        try:
            plain.settimeout(left())
            return target.tls.wrap_socket(plain, server_hostname=target.host)
        except OSError:
            plain.close()
            raise


# --- decisions ---------------------------------------------------------------------------------------------------------


def judge(answer: Answer, now: datetime) -> None:
    """Returns for 2xx. Raises RetryLater or Transient when the receiver may take it later, else Permanent."""
    if 200 <= answer.status < 300:
        return
    if answer.status not in AGAIN and answer.status < 500:
        redirect = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
        raise Permanent(f"the receiver answered {answer.status}{redirect} {answer.excerpt}".rstrip())
    seconds = retry_after(answer.retry_after, now)
    text = f"the receiver answered {answer.status} {answer.excerpt}".rstrip()
    raise RetryLater(seconds, text) if seconds > 0 else Transient(text)


def retry_after(text: str, now: datetime) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110 section 10.2.3: seconds or a date); 0 without a sensible one."""
    if text.isascii() and text.isdigit():
        return min(float(text), LONGEST_RETRY_AFTER)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - now).total_seconds()), LONGEST_RETRY_AFTER)


def refusal(address: str, allowed: Sequence[IPv4Network | IPv6Network], *, encrypted: bool) -> str:
    """Why nothing is sent to `address`; "" when it may be. Addresses that carry an IPv4 address are judged by that one too."""
    outer = ip_address(address)
    if any(outer in network for network in allowed):
        return ""
    inner = carried(outer)
    if inner is not None and any(inner in network for network in allowed):
        return ""
    if not all(one.is_global and not one.is_multicast for one in (outer, inner) if one is not None):
        return "it is not a public one and not in WEBHOOK_ALLOWED_ADDRESSES"
    return "" if encrypted else "http:// is for WEBHOOK_ALLOWED_ADDRESSES only; use https://"


def carried(address: Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped, compatible, 6to4, NAT64."""
    if isinstance(address, IPv4Address):
        return None
    if any(address in network for network in CARRIERS):
        return IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour


# --- the request -------------------------------------------------------------------------------------------------------


def target_of(settings: WebhookSettings) -> Target:
    """Raises ConfigurationError when the certificate authority cannot be read."""
    url = settings.url
    host, port = str(url.host), url.port or 0
    usual = port == (443 if url.scheme == "https" else 80)
    try:
        tls = ssl.create_default_context(cafile=settings.ca_file) if url.scheme == "https" else None
    except OSError as error:
        raise ConfigurationError(f"WEBHOOK_CA_FILE={settings.ca_file}: {error}") from None
    path = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
    return Target(host.strip("[]"), port, host if usual else f"{host}:{port}", path, tls)


def request_head(target: Target, key: bytes, idempotency_key: str, body: bytes, timestamp: int) -> h11.Request:
    """`timestamp`: seconds since 1970. A key with other than visible ASCII characters is sent percent-encoded."""
    message_id = f"msg_{hashlib.sha256(idempotency_key.encode()).hexdigest()}"
    headers = {
        "Host": target.authority,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "User-Agent": "email-ingestion-twins",
        "Idempotency-Key": quote(idempotency_key, safe="!#$&'()*+,/:;=?@[]^_`{|}~"),
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(key, message_id, timestamp, body),
        "Connection": "close",
    }
    return h11.Request(method="POST", target=target.path, headers=list(headers.items()))


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Standard Webhooks: `v1,` and the base64 of HMAC-SHA256 over id, time stamp and body, joined by full stops."""
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


def key_of(secret: SecretStr) -> bytes:
    """The bytes of `whsec_<base64>`; b"" when it is something else."""
    text = secret.get_secret_value()
    if not text.startswith("whsec_"):
        return b""
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        return b""


# --- the network -------------------------------------------------------------------------------------------------------


def lookup(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, in the system's order. Raises OSError."""
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def exchange(sock: socket.socket, head: h11.Request, body: bytes, left: Callable[[], float]) -> Answer:
    """One request, one answer. `left`: seconds that remain, raises TimeoutError when none do: also a trickling answer ends in time."""
    http = h11.Connection(our_role=h11.CLIENT)
    parts = [http.send(head), http.send(h11.Data(data=body)), http.send(h11.EndOfMessage())]
    with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it had read everything: 413
        sock.settimeout(left())
        sock.sendall(b"".join(part for part in parts if part))
    event = next_event(http, sock, left)
    while not isinstance(event, h11.Response):
        event = next_event(http, sock, left)
    asked = b" ".join(value for name, value in event.headers if name == b"retry-after")
    refused = event.status_code >= 300
    return Answer(event.status_code, asked.decode("latin-1"), excerpt(http, sock, left) if refused else "")


def excerpt(http: h11.Connection, sock: socket.socket, left: Callable[[], float]) -> str:
    """How the answer's text begins, printable; the answer stands, however its text ends."""
    text = b""
    with suppress(OSError, h11.RemoteProtocolError):
        event = next_event(http, sock, left)
        while isinstance(event, h11.Data) and len(text) < EXCERPT:
            text += event.data
            event = next_event(http, sock, left)
    return "".join(char if char.isprintable() else " " for char in text[:EXCERPT].decode("utf-8", "replace")).strip()


def next_event(http: h11.Connection, sock: socket.socket, left: Callable[[], float]) -> object:
    """What comes next from the receiver. Raises OSError, h11.RemoteProtocolError."""
    event = http.next_event()
    while event is h11.NEED_DATA:
        sock.settimeout(left())
        http.receive_data(sock.recv(65_536))
        event = http.next_event()
    return event
