"""Whose mail is read and how: the TOML file of accounts, passwords, and what a dead token most likely died of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from config.accounts import KEYS, load_accounts
from config.settings import MailSettings, SettingsError, load_settings
from src.auth.credentials import credentials_of
from src.auth.oauth2_gmail import SCOPE, StoredToken, TokenSource, first_existing, likely_cause, token_files, write_token
from src.auth.password import RETRY_SECONDS, PasswordSource
from src.common.clock import SYSTEM, Clock
from src.common.exceptions import ConfigurationError, ReauthRequired

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in MailSettings.model_fields.values():
        monkeypatch.delenv(str(field.alias), raising=False)


def settings(**flags: object) -> MailSettings:
    return load_settings(flags, env_file=None).mail


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# accounts


def test_without_a_file_the_variables_name_the_accounts() -> None:
    """One entry a name, once; none named: the account of the token file ("")."""
    [nobody] = load_accounts(settings())
    assert nobody.username == ""
    found = load_accounts(settings(GMAIL_USERNAME="ann@example.com,Bob@example.com,ANN@example.com"))
    assert [account.username for account in found] == ["ANN@example.com", "Bob@example.com"]


def test_each_account_has_its_own_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of an account wins over the environment, what it does not name comes from there, and a flag wins over both."""
    path = written(
        tmp_path / "accounts.toml",
        """
        [[account]]
        username = "ann@example.com"
        mailboxes = ["INBOX", '\\Sent', "a, b"]
        poll_interval = 7
        initial_sync = "all"

        [[account]]
        username = "post@example.org"
        host = "imap.example.org"
        port = 1993
        auth_method = "password"
        password_file = "secrets/post"
        dedup_scope = "mailbox"
        batch_size = 9
        """,
    )
    monkeypatch.setenv("POLL_INTERVAL", "50")
    monkeypatch.setenv("MAILBOXES", "Work")
    monkeypatch.setenv("IMAP_PORT", "993")
    flags = {"ACCOUNTS_FILE": path, "PRODUCER_BATCH_SIZE": "3", "MAILBOXES": None}
    ann, post = load_accounts(settings(**flags), flags)
    assert (ann.username, ann.mail.usernames, ann.mail.poll_interval) == ("ann@example.com", ("ann@example.com",), 7)
    assert (ann.mail.mailboxes, ann.mail.initial_sync) == (("INBOX", "\\Sent", "a, b"), "all")
    assert (ann.mail.host, ann.mail.auth_method, ann.mail.batch_size) == ("imap.gmail.com", "oauth2", 3)
    assert (post.mail.mailboxes, post.mail.poll_interval, post.mail.initial_sync) == (("Work",), 50, "since:7d")
    assert (post.mail.host, post.mail.port, post.mail.dedup_scope) == ("imap.example.org", 1993, "mailbox")
    assert (post.mail.password_file, post.mail.batch_size) == (Path("secrets/post"), 3)


def test_every_mail_setting_can_be_overridden(tmp_path: Path) -> None:
    """No field of the section is forgotten but those that are of all accounts, and the password, which is a secret."""
    assert set(MailSettings.model_fields) - set(KEYS) == {"usernames", "accounts_file", "password"}
    path = written(tmp_path / "a.toml", '[[account]]\nusername = "ann@example.com"\nlease = 5\nca_file = "ca.pem"\n')
    [ann] = load_accounts(settings(ACCOUNTS_FILE=path))
    assert (ann.mail.lease, ann.mail.ca_file) == (5, Path("ca.pem"))


def test_names_given_choose_among_the_accounts(tmp_path: Path) -> None:
    """GMAIL_USERNAME takes some of the file's accounts, in its order; one that is not there is an error."""
    path = written(tmp_path / "a.toml", "".join(f'[[account]]\nusername = "{name}@example.com"\n' for name in "abc"))
    chosen = load_accounts(settings(ACCOUNTS_FILE=path, GMAIL_USERNAME="C@example.com,a@example.com"))
    assert [account.username for account in chosen] == ["c@example.com", "a@example.com"]
    with pytest.raises(SettingsError, match=r"GMAIL_USERNAME=d@example.com: there is no such account in .*a\.toml$"):
        load_accounts(settings(ACCOUNTS_FILE=path, GMAIL_USERNAME="d@example.com"))


ANN = 'username = "ann@example.com"\n'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[[account]\n", "not TOML: .*line 1"),
        ("", r"a\.toml: there is no \[\[account\]\] in it"),
        ("account = []", r"there is no \[\[account\]\] in it"),
        ("account = 7", r"there is no \[\[account\]\] in it"),
        (f"[[account]]\n{ANN}[default]\nport = 1", r"default: no such table"),
        ("[[account]]\nport = 1", r"account 1: username: is missing"),
        (f"[[account]]\n{ANN}[[account]]\nusername = 7", r"account 2: username: is missing or not a text"),
        (
            f"[[account]]\n{ANN}[[account]]\n" + ANN.replace("ann", "ANN"),
            r"account ANN@example.com: username: stands there twice",
        ),
        (f"[[account]]\n{ANN}hots = 'x'", r"account ann@example.com: hots: no such key; did you mean host\?"),
        (f"[[account]]\n{ANN}colour_of_sky = 'x'", r"account ann@example.com: colour_of_sky: no such key$"),
        (f"[[account]]\n{ANN}port = 70000", r"account ann@example.com: port=70000: input should be less than or equal to 65535"),
        (
            f"[[account]]\n{ANN}poll_interval = 'soon'",
            r"account ann@example.com: poll_interval=soon: input should be a valid number",
        ),
        (f"[[account]]\n{ANN}initial_sync = 'x'", r"account ann@example.com: initial_sync=x: must be since:<days>d"),
        (
            f"[[account]]\n{ANN}auth_method = 'kerberos'",
            r"account ann@example.com: auth_method=kerberos: input should be 'oauth2'",
        ),
        (f"[[account]]\n{ANN}mailboxes = []", r"account ann@example.com: mailboxes=\[\]: must name at least one folder"),
        (f"[[account]]\n{ANN}password = 'hunter2'", r"account ann@example.com: password: secrets have no place here"),
        (f"[[account]]\n{ANN}security = 'none'", r"account ann@example.com: IMAP_SECURITY=none would send"),
        (f"[[account]]\n{ANN}auth_method = 'password'", r"ann@example.com: auth_method=password: .*: password_file is not set"),
        (
            f"[[account]]\n{ANN}auth_method = 'service_account'",
            r"auth_method=service_account: .*: service_account_file is not set",
        ),
        (
            f"[[account]]\n{ANN}token_file = 't'\n[[account]]\nusername = 'bob'\ntoken_file = 't'",
            r"account ann@example.com: token_file: is of one account, not of ann@example.com, bob; give each its own",
        ),
        (
            f"[[account]]\n{ANN}auth_method='password'\npassword_file = 'p'\n"
            "[[account]]\nusername = 'bob'\nauth_method='password'\npassword_file = 'p'",
            r"account ann@example.com: password_file: is of one account, not of ann@example.com, bob",
        ),
    ],
)
def test_what_is_wrong_is_one_line_with_file_account_and_key(tmp_path: Path, content: str, told: str) -> None:
    path = written(tmp_path / "a.toml", content)
    with pytest.raises(SettingsError, match=told) as error:
        load_accounts(settings(ACCOUNTS_FILE=path))
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert "hunter2" not in text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"ACCOUNTS_FILE=.*none\.toml: No such file or directory"):
        load_accounts(settings(ACCOUNTS_FILE=tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"AUTH_METHOD": "password", "IMAP_PASSWORD": "x"}, "AUTH_METHOD=password: GMAIL_USERNAME is not set"),
        ({"AUTH_METHOD": "password", "GMAIL_USERNAME": "ann"}, "AUTH_METHOD=password: IMAP_PASSWORD_FILE is not set"),
        (
            {"AUTH_METHOD": "service_account", "GMAIL_USERNAME": "ann"},
            "AUTH_METHOD=service_account: SERVICE_ACCOUNT_FILE is not set",
        ),
        (
            {"AUTH_METHOD": "password", "GMAIL_USERNAME": "ann,bob", "IMAP_PASSWORD": "hunter2"},
            "IMAP_PASSWORD_FILE: is of one account, not of ann, bob; give each its own",
        ),
        (
            {"TOKEN_FILE": "t.json", "GMAIL_USERNAME": "ann,bob"},
            "TOKEN_FILE: is of one account, not of ann, bob; give each its own",
        ),
    ],
)
def test_wrong_variables_are_one_line(flags: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_accounts(settings(**flags))
    assert str(error.value) == told


def test_one_key_serves_many_accounts() -> None:
    """A service account's key, unlike a token or a password, is of all accounts."""
    flags = {"AUTH_METHOD": "service_account", "GMAIL_USERNAME": "ann,bob", "SERVICE_ACCOUNT_FILE": "key.json"}
    assert len(load_accounts(settings(**flags))) == 2


# passwords


class Seconds:
    """A clock whose monotonic time a test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = Clock(wall=SYSTEM.wall, monotonic=lambda: self.now)


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_password_comes_from_its_file_without_the_line_end(tmp_path: Path) -> None:
    path = secret(tmp_path / "p", "abcd efgh ijkl mnop\n")
    assert PasswordSource("ann", path, "other", clock=SYSTEM).access_token() == "abcd efgh ijkl mnop"
    assert PasswordSource("ann", None, "from the variable", clock=SYSTEM).access_token() == "from the variable"


@pytest.mark.parametrize("content", ["", "\n", "one\ntwo\n", "a\x00b"])
def test_a_password_file_without_a_password(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigurationError, match="does not hold one line of text"):
        PasswordSource("ann", secret(tmp_path / "p", content), "", clock=SYSTEM).access_token()


def test_a_password_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = secret(tmp_path / "p", "hunter2")
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match=r"the password file .* is open to other users \(mode 0640\)"):
        PasswordSource("ann", path, "", clock=SYSTEM).access_token()
    with pytest.raises(ConfigurationError, match="there is no password file"):
        PasswordSource("ann", tmp_path / "none", "", clock=SYSTEM).access_token()


def test_a_refused_password_is_given_out_again_after_an_hour_or_when_it_changed(tmp_path: Path) -> None:
    """Every mailbox of the account shares the verdict: one wrong password is one failed login an hour, or accounts are locked."""
    time, path = Seconds(), secret(tmp_path / "p", "old")
    source = PasswordSource("ann@example.com", path, "", clock=time.clock)
    before = source.stamp()
    with pytest.raises(ReauthRequired, match=r"refuses the password of ann@example.com; set a new one: in .*/p") as error:
        source.access_token(refuse=source.access_token())
    assert "old" not in str(error.value)
    time.now = RETRY_SECONDS - 1
    with pytest.raises(ReauthRequired):
        source.access_token()
    assert source.stamp() == before
    secret(path, "new")
    assert source.stamp() != before
    assert source.access_token() == "new"
    secret(path, "old")
    time.now = RETRY_SECONDS + 1
    assert source.access_token() == "old"


# tokens


def token(**dates: object) -> StoredToken:
    held = {"expiry": NOW, "obtained_at": "2026-01-02T03:04:05Z", **dates}
    return StoredToken(
        "ann@example.com", "client", "s3cret", "1//r", "", scopes=(SCOPE,), token_uri="http://127.0.0.1:1/", **held
    )


@pytest.mark.parametrize(
    ("stored", "error", "cause"),
    [
        (token(obtained_at="2026-05-25T11:30:00Z"), "invalid_grant", "in testing"),
        (token(obtained_at="2026-05-25T12:30:00Z"), "invalid_grant", "in testing"),
        (token(obtained_at="2026-05-24T13:00:00Z"), "invalid_grant", "in testing"),
        (token(obtained_at="2026-05-28T12:00:00Z"), "invalid_grant", "new password"),
        (token(obtained_at="2026-05-10T12:00:00Z"), "invalid_grant", "new password"),
        (token(obtained_at=""), "invalid_grant", "new password"),
        (token(obtained_at="2025-01-01T00:00:00Z", expiry=NOW - timedelta(days=190)), "invalid_grant", "not used for 190 days"),
        (token(obtained_at="2026-05-25T12:00:00Z"), "invalid_client", "secret is a new one"),
        (token(), "unauthorized_client", "deleted in Google Cloud"),
    ],
)
def test_the_likely_cause_follows_from_the_dates(stored: StoredToken, error: str, cause: str) -> None:
    """Seven days after the consent: the app is in testing. Half a year after the last use: idle. Else the usual suspects."""
    assert cause in likely_cause(stored, error, NOW)


def test_a_stamp_changes_with_the_consent_and_not_with_a_refresh(tmp_path: Path) -> None:
    """So that other processes that refresh the token do not send a refused mailbox to the server again and again."""
    path = tmp_path / "t.json"
    source = TokenSource(path, "ann@example.com")
    stamps = [source.stamp()]
    write_token(path, token())
    stamps.append(source.stamp())
    path.chmod(0o644)
    stamps.append(source.stamp())
    path.chmod(0o600)
    assert source.stamp() == stamps[1]
    write_token(path, token(expiry=NOW + timedelta(hours=1)))
    assert source.stamp() == stamps[1]
    write_token(path, token(obtained_at="2026-06-01T00:00:00Z"))
    stamps.append(source.stamp())
    assert len(set(stamps)) == len(stamps) == 4


def test_an_accounts_own_file_is_noticed_when_it_comes(tmp_path: Path) -> None:
    """gmail_token.json is another's: the file that a later consent writes for this account counts at once."""
    mail = settings(TOKEN_DIR=tmp_path, GMAIL_USERNAME="bob@example.com")
    [bob] = load_accounts(mail)
    write_token(tmp_path / "gmail_token.json", token())
    source = credentials_of(bob, SYSTEM)
    with pytest.raises(ConfigurationError, match=r"belongs to ann@example\.com, not to bob@example\.com"):
        source.access_token()
    before = source.stamp()
    assert first_existing(token_files(mail, "bob@example.com")) == tmp_path / "gmail_token.json"
    fresh = StoredToken(**{**token().__dict__, "account": "bob@example.com", "access_token": "b", "expiry": SYSTEM.wall()})
    write_token(
        tmp_path / "bob@example.com.json", StoredToken(**{**fresh.__dict__, "expiry": SYSTEM.wall() + timedelta(hours=1)})
    )
    assert source.stamp() != before
    assert source.access_token() == "b"


def test_token_file_wins_over_token_dir(tmp_path: Path) -> None:
    mail = settings(TOKEN_DIR=tmp_path, TOKEN_FILE=tmp_path / "elsewhere.json", GMAIL_USERNAME="ann@example.com")
    write_token(tmp_path / "ann@example.com.json", token())
    assert first_existing(token_files(mail, "ann@example.com")) == tmp_path / "elsewhere.json"
