"""Service accounts against the sandbox's endpoint, which checks the signature of the JWT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from src.auth.service_account import ServiceAccountSource
from src.common.clock import SYSTEM, Clock
from src.common.exceptions import ConfigurationError, ReauthRequired, TokenEndpointUnavailable
from src.imap.connection import ImapEndpoint
from src.imap.imap_client import ImapMailbox
from src.sandbox import service_account
from src.sandbox.server import Sandbox

ANN, BOB = "ann@example.com", "bob@example.com"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def key(sandbox: Sandbox, tmp_path: Path) -> Path:
    sandbox.faults.clear()
    sandbox.write_service_account_key(tmp_path / "key.json", ANN, BOB)
    return tmp_path / "key.json"


def source(key: Path, account: str = ANN, clock: Clock = SYSTEM) -> ServiceAccountSource:
    return ServiceAccountSource(key, account, clock=clock, timeout=5)


def test_one_key_opens_the_mail_of_many_accounts(sandbox: Sandbox, key: Path) -> None:
    """Each account's token opens its own mailbox over XOAUTH2 and not the other's; nothing is written beside the key."""
    tokens = {account: source(key, account).access_token() for account in (ANN, BOB)}
    endpoint = ImapEndpoint("127.0.0.1", sandbox.imap_port, "none", 10, None)
    for account, token in tokens.items():
        with ImapMailbox(endpoint, account, "INBOX", token) as box:
            assert box.folder.name == "INBOX"
    assert tokens[ANN] != tokens[BOB]
    assert [path.name for path in key.parent.iterdir()] == ["key.json"]


def test_a_token_is_kept_until_five_minutes_before_its_end_or_its_refusal(key: Path) -> None:
    """The same token while it is good; another one when the server refused it; another one when it is nearly over."""
    now = [0.0]
    held = source(key, clock=Clock(wall=lambda: SYSTEM.wall() + timedelta(seconds=now[0]), monotonic=SYSTEM.monotonic))
    first = held.access_token()
    assert held.access_token() == first
    second = held.access_token(refuse=first)
    assert second != first
    now[0] = 3200
    assert held.access_token() == second
    now[0] = 3400
    assert held.access_token() not in (first, second)


def test_an_outage_of_the_endpoint_leaves_the_old_token_to_its_end(sandbox: Sandbox, key: Path) -> None:
    """503 with four minutes left: the old token; refused or over: TokenEndpointUnavailable."""
    now = [0.0]
    held = source(key, clock=Clock(wall=lambda: SYSTEM.wall() + timedelta(seconds=now[0]), monotonic=SYSTEM.monotonic))
    token = held.access_token()
    sandbox.faults.token_answer(503, times=100)
    now[0] = 3360
    assert held.access_token() == token
    with pytest.raises(TokenEndpointUnavailable, match="HTTP 503"):
        held.access_token(refuse=token)
    now[0] = 3700
    with pytest.raises(TokenEndpointUnavailable):
        held.access_token()
    sandbox.faults.clear()
    assert held.access_token() != token


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "<html>captive portal</html>"),
        (429, "slow down"),
        (500, "{}"),
        (403, '{"error": "access_denied"}'),
        (200, "{}"),
    ],
)
def test_what_is_no_verdict_may_pass(sandbox: Sandbox, key: Path, status: int, body: str) -> None:
    sandbox.faults.token_answer(status, body)
    with pytest.raises(TokenEndpointUnavailable):
        source(key).access_token()
    assert source(key).access_token()


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ({"error": "invalid_grant", "error_description": "Invalid email or User ID"}, "there is no such account"),
        ({"error": "invalid_grant", "error_description": "Invalid JWT Signature."}, "the key was deleted"),
        (
            {
                "error": "invalid_grant",
                "error_description": "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. "
                "Check your iat and exp values in the JWT claim.",
            },
            "the clock of this machine is wrong",
        ),
        ({"error": "invalid_client", "error_description": "The OAuth client was not found."}, "disabled or deleted"),
    ],
)
def test_verdicts_name_the_likely_cause(sandbox: Sandbox, key: Path, body: dict[str, str], cause: str) -> None:
    sandbox.faults.token_answer(400, json.dumps(body))
    with pytest.raises(ReauthRequired, match=cause) as error:
        source(key).access_token()
    assert body["error_description"][:20] in str(error.value)
    assert "docs/OAUTH2_SETUP.md" in str(error.value)


def test_without_delegation_the_administrators_page_is_named(sandbox: Sandbox, key: Path) -> None:
    """unauthorized_client: the text holds the client id and the scope that the administrator has to enter."""
    with pytest.raises(ReauthRequired, match="Domain-wide delegation") as error:
        source(key, "eve@example.com").access_token()
    for part in ("eve@example.com", service_account.EMAIL, service_account.CLIENT_ID, "https://mail.google.com/"):
        assert part in str(error.value)


def test_another_key_is_a_bad_signature(sandbox: Sandbox, key: Path) -> None:
    """The sandbox checks the signature: a JWT by another key is refused."""
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    content = json.loads(key.read_text())
    content["private_key"] = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    key.write_text(json.dumps(content))
    with pytest.raises(ReauthRequired, match=r"Invalid JWT Signature.*the key was deleted"):
        source(key).access_token()


def test_a_key_that_others_can_read_is_refused(key: Path) -> None:
    """One line with the command; the stamp changes when it is mended."""
    key.chmod(0o644)
    held = source(key)
    before = held.stamp()
    with pytest.raises(ConfigurationError, match=r"the key file .* is open to other users \(mode 0644\); run: chmod 600"):
        held.access_token()
    key.chmod(0o600)
    assert held.stamp() != before
    assert held.access_token()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("not json", "is not the JSON key of a service account"),
        ("[]", "is not the JSON key of a service account"),
        ('{"type": "authorized_user"}', "is not the JSON key of a service account"),
        ('{"type": "service_account"}', "is of no use"),
        ('{"type": "service_account", "client_email": "a", "token_uri": "b", "private_key": "c"}', "is of no use"),
    ],
)
def test_a_file_that_is_no_key(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "key.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=told):
        source(path).access_token()
    with pytest.raises(ConfigurationError, match="there is no key file"):
        source(tmp_path / "none.json").access_token()
