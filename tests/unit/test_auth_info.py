"""`python -m src.auth.oauth2_gmail --info` for every way to log in: what there is to say, never a secret; nobody is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.auth.oauth2_gmail import main
from src.sandbox import service_account
from src.sandbox.server import Sandbox

ANN, BOB, POST = "ann@gmail.example", "bob@firm.example", "post@example.org"
PASSWORD = "correct-horse"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def accounts(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ACCOUNTS_FILE of three accounts, each with a way of its own; it is set. What any request would meet is an error."""
    sandbox.write_token_file(tmp_path / f"{ANN}.json", ANN)
    sandbox.write_service_account_key(tmp_path / "key.json", BOB)
    (tmp_path / "password").touch(0o600)
    (tmp_path / "password").write_text(PASSWORD)
    path = tmp_path / "accounts.toml"
    path.write_text(
        f"""
        [[account]]
        username = "{ANN}"
        [[account]]
        username = "{BOB}"
        auth_method = "service_account"
        service_account_file = "{tmp_path}/key.json"
        [[account]]
        username = "{POST}"
        auth_method = "password"
        password_file = "{tmp_path}/password"
        host = "imap.example.org"
        """
    )
    monkeypatch.setenv("TOKEN_DIR", str(tmp_path))
    monkeypatch.setenv("ACCOUNTS_FILE", str(path))
    sandbox.faults.token_answer(500, "asked", times=100)
    yield path
    assert sandbox.faults.state()["token_answer"]["left"] == 100, "nobody was asked"
    sandbox.faults.clear()


def fields(block: str) -> dict[str, str]:
    return dict(map(str.strip, line.split(":", 1)) for line in block.splitlines())  # type: ignore[misc]


def test_every_account_of_the_file_is_shown(accounts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block each: who, by what, scopes, where it lies and how old it is, what ends it; and no secret of any of them."""
    assert main(["--info"]) == 0
    shown = capsys.readouterr().out
    ann, bob, post = map(fields, shown.split("\n\n"))
    assert (ann["account"], ann["scopes"], ann["token file"]) == (
        ANN,
        "https://mail.google.com/",
        str(accounts.parent / f"{ANN}.json"),
    )
    assert ann["consented"].endswith(", 0 days ago")
    assert "7 days after the consent if the app is in testing" in ann["ended by"]
    key = json.loads((accounts.parent / "key.json").read_text())
    assert bob["account"] == BOB
    assert bob["service account"] == service_account.EMAIL
    assert (bob["project"], bob["key id"], bob["scopes"]) == ("sandbox", "1", "https://mail.google.com/")
    assert bob["client id"].startswith(service_account.CLIENT_ID)
    assert bob["key file"].startswith(f"{accounts.parent}/key.json, written ")
    assert bob["key file"].endswith(", 0 days ago")
    assert "the delegation taken back" in bob["ended by"]
    assert (post["account"], post["server"]) == (POST, "imap.example.org:993")
    assert post["password"].startswith(f"in {accounts.parent}/password, written ")
    assert "a new password" in post["ended by"]
    token = json.loads((accounts.parent / f"{ANN}.json").read_text())
    secrets = [PASSWORD, token["refresh_token"], token["client_secret"], *key["private_key"].splitlines()[1:-1]]
    assert not [secret for secret in secrets if secret in shown]


def test_one_account_is_chosen(accounts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--username among the file's accounts; one that is not there is named."""
    assert main(["--info", "--username", POST]) == 0
    assert fields(capsys.readouterr().out)["account"] == POST
    assert main(["--info", "--username", "eve@gmail.example"]) == 2
    assert "eve@gmail.example" in capsys.readouterr().err


def test_what_cannot_be_used_is_said_and_hides_no_other(accounts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key and a password file that others can read, no token: exit 2, a line for each; what is left is shown."""
    (accounts.parent / "password").chmod(0o644)
    (accounts.parent / f"{ANN}.json").unlink()
    assert main(["--info"]) == 2
    told = capsys.readouterr()
    assert fields(told.out)["account"] == BOB
    assert told.err.splitlines() == [
        f"{ANN}: there is no token file {accounts.parent}/gmail_token.json; run: python producer.py --auth-setup --username {ANN}",
        f"{POST}: the password file {accounts.parent}/password is open to other users (mode 0644); "
        f"run: chmod 600 {accounts.parent}/password",
    ]
    (accounts.parent / "key.json").write_text(json.dumps({"type": "service_account", "private_key": "secret"}))
    assert main(["--info", "--username", BOB]) == 2
    told = capsys.readouterr()
    assert "is of no use" in told.err
    assert "secret" not in told.err


def test_a_password_of_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named by its variable, and not shown."""
    monkeypatch.setenv("AUTH_METHOD", "password")
    monkeypatch.setenv("IMAP_PASSWORD", PASSWORD)
    assert main(["--info", "--username", POST]) == 0
    shown = capsys.readouterr().out
    assert fields(shown)["password"] == "in IMAP_PASSWORD"
    assert PASSWORD not in shown


@pytest.mark.parametrize("action", ["--refresh", "--revoke"])
def test_nothing_is_refreshed_or_revoked_by_guess(accounts: Path, capsys: pytest.CaptureFixture[str], action: str) -> None:
    """Of several accounts one has to be named; where no consent is, there is nothing to do."""
    before = {path.name: path.read_bytes() for path in accounts.parent.iterdir()}
    assert main([action]) == 2
    assert f"{action} is for one account, of {ANN}, {BOB}, {POST}: --username says which" in capsys.readouterr().err
    assert main([action, "--username", BOB]) == 2
    assert "AUTH_METHOD=service_account has no token file" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in accounts.parent.iterdir()} == before


def test_a_named_token_file_is_shown_whatever_else_is_set(accounts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--token-file beside ACCOUNTS_FILE: that file and no other."""
    assert main(["--info", "--token-file", str(accounts.parent / f"{ANN}.json")]) == 0
    assert fields(capsys.readouterr().out)["account"] == ANN
