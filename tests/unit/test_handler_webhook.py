"""What the webhook decides: whom it may talk to, what an answer means, what is signed. No network."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

import pytest
from pydantic import SecretStr

from src.common.exceptions import ConfigurationError, Permanent, RetryLater, Transient
from src.handlers import webhook
from src.handlers.settings import read
from src.handlers.webhook import Answer, Target, WebhookSettings, judge, key_of, refusal, request_head, retry_after, signature

NOW = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
GOOD = {"WEBHOOK_URL": "https://hooks.example.org/in", "WEBHOOK_SECRET": SECRET, "WEBHOOK_ALLOWED_HOSTS": "hooks.example.org"}


def test_signature_is_that_of_standard_webhooks() -> None:
    """The example of the Standard Webhooks libraries: same secret, id, time and body, same signature."""
    key = key_of(SecretStr("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"))
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_2xx_is_done(status: int) -> None:
    """Returns; nothing is raised."""
    judge(Answer(status, "120"), NOW)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_retried(status: int) -> None:
    """These come again: after the usual backoff, or when the receiver says."""
    with pytest.raises(Transient) as plain:
        judge(Answer(status), NOW)
    assert not isinstance(plain.value, RetryLater)
    with pytest.raises(RetryLater, match=str(status)) as later:
        judge(Answer(status, "120"), NOW)
    assert later.value.seconds == 120


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308, 400, 401, 403, 404, 409, 410, 413, 422, 451])
def test_dead(status: int) -> None:
    """These are buried at once, with the answer's words; Retry-After changes nothing."""
    with pytest.raises(Permanent, match=f"{status}.* no such ticket$"):
        judge(Answer(status, "120", "no such ticket"), NOW)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        ("Sun, 01 Nov 2026 12:02:00 GMT", 120),
        ("Sunday, 01-Nov-26 12:02:00 GMT", 120),
        ("Sun Nov  1 12:02:00 2026", 120),
        ("Sun, 01 Nov 2026 11:00:00 GMT", 0),
        ("Sun, 01 Nov 2099 12:00:00 GMT", 86_400),
        ("9" * 400, 86_400),
        ("", 0),
        ("-5", 0),
        ("1.5", 0),
        ("²", 0),
        ("soon", 0),
        ("Sun, 99 Nov 2026 12:02:00 GMT", 0),
        ("1 2", 0),
    ],
)
def test_retry_after(text: str, seconds: float) -> None:
    """Seconds or one of the three forms of a date, a day at most; anything else counts as absent."""
    assert retry_after(text, NOW) == seconds


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "255.255.255.255",
        "224.0.0.1", "198.18.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fd00::1", "ff02::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::",
    ],
)  # fmt: skip
def test_addresses_that_are_no_receivers(address: str) -> None:
    """Nothing private, local, shared, reserved or multicast, in whatever clothes; also not because other networks are listed."""
    assert refusal(address, (), encrypted=True)
    assert refusal(address, networks("203.0.113.0/24", "2001:db8:1::/48"), encrypted=True)


@pytest.mark.parametrize("address", ["93.184.215.14", "1.1.1.1", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::101:101"])
def test_public_addresses_over_tls_only(address: str) -> None:
    """A public address is good with https, and refused with http."""
    assert refusal(address, (), encrypted=True) == ""
    assert "https" in refusal(address, (), encrypted=False)


@pytest.mark.parametrize("address", ["10.1.2.3", "::ffff:10.1.2.3", "fd00::7"])
def test_listed_addresses(address: str) -> None:
    """A listed network is good, with http too; its neighbour is not."""
    assert refusal(address, networks("10.1.2.0/24", "fd00::/64"), encrypted=False) == ""
    assert refusal("10.1.3.3", networks("10.1.2.0/24"), encrypted=True)


def networks(*texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(ip_network(text) for text in texts)


def test_head_is_the_same_for_the_same_mail() -> None:
    """Idempotency-Key and webhook-id depend on the mail alone, time stamp and signature on the attempt."""
    target = Target("h", 443, "h", "/", None)
    first = dict(request_head(target, b"k", "gm:a@example.org:1", b"{}", 1000).headers)
    second = dict(request_head(target, b"k", "gm:a@example.org:1", b"{}", 2000).headers)
    other = dict(request_head(target, b"k", "gm:a@example.org:2", b"{}", 1000).headers)
    assert first[b"idempotency-key"] == second[b"idempotency-key"] == b"gm:a@example.org:1"
    assert first[b"webhook-id"] == second[b"webhook-id"] != other[b"webhook-id"]
    assert b"." not in first[b"webhook-id"], "a full stop separates the signed parts"
    assert first[b"webhook-signature"] != second[b"webhook-signature"]


def test_account_of_any_letters_makes_a_header() -> None:
    """A key with letters outside ASCII, or a line break, is percent-encoded: no second header can be smuggled in."""
    head = request_head(Target("h", 443, "h", "/", None), b"k", "gm:jürgen@x\r\nA: b:1", b"{}", 1000)
    assert dict(head.headers)[b"idempotency-key"] == b"gm:j%C3%BCrgen@x%0D%0AA:%20b:1"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"WEBHOOK_URL": ""}, "WEBHOOK_URL is not set: the address that each mail is POSTed to"),
        (
            {"WEBHOOK_URL": "ftp://hooks.example.org/"},
            "WEBHOOK_URL=ftp://hooks.example.org/: uRL scheme should be 'http' or 'https'",
        ),
        ({"WEBHOOK_URL": "https://u:p@hooks.example.org/"}, "WEBHOOK_URL must have neither user, password nor fragment"),
        (
            {"WEBHOOK_ALLOWED_HOSTS": "a.example,b.example"},
            "WEBHOOK_ALLOWED_HOSTS must name hooks.example.org, the host of WEBHOOK_URL",
        ),
        (
            {"WEBHOOK_SECRET": "hunter2"},
            "WEBHOOK_SECRET=***: must be whsec_ and at least 24 bytes in base64 (openssl rand -base64 32)",
        ),
        ({"WEBHOOK_SECRET": "whsec_c2hvcnQ="}, "WEBHOOK_SECRET=***: must be whsec_ and at least 24 bytes"),
        ({"WEBHOOK_ALLOWED_ADDRESSES": "10.0.0.1/8"}, "WEBHOOK_ALLOWED_ADDRESSES=10.0.0.1/8: "),
        ({"WEBHOOK_TIMEOUT": "0"}, "WEBHOOK_TIMEOUT=0: input should be greater than 0"),
        ({"WEBHOOK_CA_FILE": "/none.pem"}, "WEBHOOK_CA_FILE=/none.pem: [Errno 2] No such file or directory"),
    ],
)
def test_settings_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], line: str) -> None:
    """What is wrong is told at the start, secrets masked."""
    monkeypatch.chdir(tmp_path)
    for name, value in (GOOD | changes).items():
        monkeypatch.setenv(name, value)
    webhook.prepare.cache_clear()
    with pytest.raises(ConfigurationError) as caught:
        webhook.prepare()
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_settings_from_dot_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.env` holds a handler's settings beside those of the worker, the environment wins, hosts are compared in lower case."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{name}={value}" for name, value in GOOD.items()] + ["REDIS_URL=redis://x", "WEBHOOK_TIMEOUT=7"]
    Path(".env").write_text("\n".join(lines))
    monkeypatch.setenv("WEBHOOK_URL", "https://HOOKS.example.org:8443/in?token=1")
    settings = read(WebhookSettings)
    assert settings.timeout == 7
    target = webhook.target_of(settings)
    assert (target.host, target.port, target.authority, target.path) == (
        "hooks.example.org",
        8443,
        "hooks.example.org:8443",
        "/in?token=1",
    )
