"""Google's consent against the sandbox's pages: the whole way, every way it comes to nothing, and taking it back."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from imapclient import IMAPClient

from config.settings import AuthSettings
from src.auth.consent import GUIDE, SCOPES, Client, ConsentFailed, ask, client_of, file_for, granted, keep, revoke, revoke_uri
from src.auth.loopback import Answer, answer_in
from src.auth.oauth2_gmail import SCOPE, TOKEN_URI, StoredToken, TokenSource, main, read_token, write_token
from src.common.exceptions import ConfigurationError, ReauthRequired, TokenEndpointUnavailable
from src.sandbox.server import Sandbox
from src.sandbox.tokens import CLIENT_ID, CLIENT_SECRET, challenge_of
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
ANN, BOB = "ann@gmail.example", "bob@gmail.example"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a consent at the sandbox sets for oauthlib ends with the test."""
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "")
    monkeypatch.delenv("OAUTHLIB_INSECURE_TRANSPORT")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        running.add_account(ANN)
        running.add_account(BOB)
        yield running


@pytest.fixture
def client(sandbox: Sandbox, tmp_path: Path) -> Client:
    path = tmp_path / "client_secrets.json"
    sandbox.write_client_secrets(path)
    return client_of(AuthSettings(GMAIL_CLIENT_SECRETS_FILE=path))


def visit(address: str, form: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(status, text) of a page, redirects followed; with a form: of the page its POST leads to."""
    try:
        with urllib.request.urlopen(address, urlencode(form).encode() if form else None, timeout=10) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def redirected(address: str, account: str = ANN, **choice: str) -> str:
    """The address to which Google's answer sends the browser of a person who looks at the page and decides."""
    status, page = visit(address)
    assert (status, ANN in page) == (200, True)
    request = urlsplit(address)
    form = {**dict(parse_qsl(request.query)), "account": account, "decision": "allow", "mail": "on", **choice}
    try:
        urllib.request.build_opener(NoRedirect).open(f"http://{request.netloc}/consent", urlencode(form).encode(), timeout=10)
    except urllib.error.HTTPError as answer:
        assert answer.code == 302, answer.read()
        return str(answer.headers["Location"])
    raise AssertionError("the sandbox did not redirect")


def person(account: str = ANN, **choice: str) -> Callable[[str], bool]:
    """A browser with somebody in front of it."""

    def browse(address: str) -> bool:
        status, page = visit(redirected(address, account, **choice))
        assert (status, "has arrived" in page) == (200, True)
        return True

    return browse


def consent(client: Client, browse: Callable[[str], object], account: str = "", **options: object) -> StoredToken:
    return ask(client, account, 0, io.StringIO(), browse=browse, typed=None, **{"patience": 20, **options})  # type: ignore[arg-type]


# The whole way


@contextmanager
def setting_up(folder: Path, sandbox: Sandbox, *command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    sandbox.write_client_secrets(folder / "client_secrets.json")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OAUTHLIB")},
        "GMAIL_CLIENT_SECRETS_FILE": str(folder / "client_secrets.json"),
        "TOKEN_DIR": str(folder / "tokens"),
        "DATA_DIR": str(folder / "data"),
        **variables,
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        [sys.executable, *command],
        text=True,
        cwd=ROOT,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests run in the background inherit a deaf one
        **pipes,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def shown(process: subprocess.Popen[str], start: str = "http") -> tuple[str, str]:
    """(the line that begins with `start`, what was printed before it)."""
    assert process.stdout is not None
    before = ""
    for line in process.stdout:
        if line.startswith(start):
            return line.strip(), before
        before += line
    raise AssertionError(f"it ended: {before}")


def assert_no_secret(printed: str, token: StoredToken, code: str) -> None:
    for secret in (CLIENT_SECRET, token.refresh_token, token.access_token, code):
        assert secret
        assert secret not in printed


def test_auth_setup_ends_in_a_token_that_opens_the_mailbox(sandbox: Sandbox, tmp_path: Path) -> None:
    """producer.py --auth-setup: consent in a browser, private token file, refresh and IMAP work; no secret even at DEBUG."""
    command = ("producer.py", "--auth-setup", "--username", ANN, "--no-browser")
    with setting_up(tmp_path, sandbox, *command, LOG_LEVEL="DEBUG") as process:
        address, before = shown(process)
        assert dict(parse_qsl(urlsplit(address).query))["login_hint"] == ANN
        back = redirected(address)
        assert visit(back)[0] == 200
        printed, _ = process.communicate(timeout=20)
        assert process.returncode == 0, printed
    path = tmp_path / "tokens" / "gmail_token.json"
    token = read_token(path)
    assert f"{ANN}: allowed; the token is in {path}\n" in printed
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert (token.account, set(token.scopes), token.token_uri) == (ANN, set(SCOPES), sandbox.token_uri)
    assert_no_secret(before + printed, token, dict(parse_qsl(urlsplit(back).query))["code"])
    fresh = TokenSource(path, ANN).access_token(refuse=token.access_token)
    assert fresh != token.access_token
    imap = IMAPClient("127.0.0.1", sandbox.imap_port, ssl=False, timeout=10)
    imap.oauth2_login(ANN, fresh)
    imap.logout()


def test_a_pasted_address_will_do(sandbox: Sandbox, tmp_path: Path) -> None:
    """The ssh line names the port; a wrong line is told so and waited on; the right address ends it, whoever visits the port."""
    with setting_up(tmp_path, sandbox, "-m", "src.auth.oauth2_gmail", "--setup", "--no-browser") as process:
        address, _ = shown(process)
        port = urlsplit(dict(parse_qsl(urlsplit(address).query))["redirect_uri"]).port
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in shown(process, "  - run there first:")[0]
        assert process.stdin is not None
        process.stdin.write("4/only-a-code\n")
        process.stdin.flush()
        shown(process, "That was no answer")
        printed, _ = process.communicate(redirected(address, BOB) + "\n", timeout=20)
    assert process.returncode == 0, printed
    assert read_token(tmp_path / "tokens" / "gmail_token.json").account == BOB


def test_ctrl_c_ends_it_and_writes_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    """One line, exit code 1, no token file (the lock beside it may stand)."""
    with setting_up(tmp_path, sandbox, "producer.py", "--auth-setup", "--no-browser") as process:
        shown(process)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=20)
    assert (process.returncode, printed.splitlines()[-1]) == (1, "stopped; nothing more was written")
    assert not list((tmp_path / "tokens").glob("*.json"))


def test_another_account_than_the_files_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    """Without --username the account of gmail_token.json is meant: another one does not replace its token."""
    path = tmp_path / "tokens" / "gmail_token.json"
    sandbox.write_token_file(path, ANN)
    before = path.read_bytes()
    with setting_up(tmp_path, sandbox, "producer.py", "--auth-setup", "--no-browser") as process:
        address, _ = shown(process)
        visit(redirected(address, BOB))
        printed, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"{BOB} was chosen, {ANN} was asked for" in printed
    assert path.read_bytes() == before


def test_each_of_several_accounts_gets_its_file(sandbox: Sandbox, tmp_path: Path) -> None:
    """--username twice: two consents, one after the other, a file each."""
    with setting_up(
        tmp_path, sandbox, "producer.py", "--auth-setup", "--no-browser", "--username", ANN, "--username", BOB
    ) as process:
        for account in (ANN, BOB):
            visit(redirected(shown(process)[0], account))
        assert process.wait(20) == 0
    assert [read_token(tmp_path / "tokens" / f"{account}.json").account for account in (ANN, BOB)] == [ANN, BOB]


def test_accounts_of_a_file_consent_into_the_places_it_names(sandbox: Sandbox, tmp_path: Path) -> None:
    """ACCOUNTS_FILE: each account that logs in by a consent is asked, the others are not; where none does, exit 2 says so."""
    path = tmp_path / "accounts.toml"
    password = '[[account]]\nusername = "post@example.org"\nauth_method = "password"\npassword_file = "p"\n'
    path.write_text(
        f'[[account]]\nusername = "{ANN}"\n{password}[[account]]\nusername = "{BOB}"\ntoken_file = "{tmp_path}/bobs.json"\n'
    )
    with setting_up(tmp_path, sandbox, "producer.py", "--auth-setup", "--no-browser", ACCOUNTS_FILE=str(path)) as process:
        for account in (ANN, BOB):
            visit(redirected(shown(process)[0], account))
        assert process.wait(20) == 0
    assert read_token(tmp_path / "tokens" / f"{ANN}.json").account == ANN
    assert read_token(tmp_path / "bobs.json").account == BOB
    path.write_text(password)
    with setting_up(tmp_path, sandbox, "producer.py", "--auth-setup", "--no-browser", ACCOUNTS_FILE=str(path)) as process:
        printed, _ = process.communicate(timeout=20)
    assert (process.returncode, printed) == (2, "producer.py: AUTH_METHOD=password: needs no consent\n")


def test_one_file_takes_one_account(sandbox: Sandbox, tmp_path: Path) -> None:
    """--token-file with two accounts in GMAIL_USERNAME: exit 2, or the second token would replace the first."""
    command = ("-m", "src.auth.oauth2_gmail", "--setup", "--no-browser", "--token-file", str(tmp_path / "t.json"))
    with setting_up(tmp_path, sandbox, *command, GMAIL_USERNAME=f"{ANN},{BOB}") as process:
        printed, _ = process.communicate(timeout=20)
    assert (process.returncode, printed) == (2, f"TOKEN_FILE: is of one account, not of {ANN}, {BOB}; give each its own\n")


def test_the_sandbox_of_the_flag_consents_too(tmp_path: Path) -> None:
    """producer.py --sandbox --auth-setup needs no client of Google's."""
    environment = {**os.environ, "DATA_DIR": str(tmp_path)}
    command = [sys.executable, "producer.py", "--sandbox", "--auth-setup", "--no-browser"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        address, _ = shown(process)
        query = dict(parse_qsl(urlsplit(address).query))
        visit(
            f"http://{urlsplit(address).netloc}/consent",
            {**query, "account": query["login_hint"], "decision": "allow", "mail": "on"},
        )
        printed, _ = process.communicate(timeout=20)
        assert process.returncode == 0, printed
    token = read_token(tmp_path / "sandbox" / "tokens" / "gmail_token.json")
    assert (token.account, token.access_token[:5]) == (query["login_hint"], "ya29.")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_sandbox_of_the_flag_ends_with_its_producer(tmp_path: Path, end: signal.Signals) -> None:
    """However a consent is ended: no sandbox stays behind, and whoever reads the producer's output gets to its end."""
    state_file = tmp_path / "sandbox" / "sandbox.json"
    environment = {**os.environ, "DATA_DIR": str(tmp_path)}
    command = [sys.executable, "producer.py", "--sandbox", "--auth-setup", "--no-browser"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        shown(process)
        state = json.loads(state_file.read_text())
        held_open = {Path(f"/proc/{state['pid']}/fd/{number}").readlink() for number in (1, 2)}  # by the sandbox
        process.send_signal(end)
        try:
            assert process.wait(timeout=20) == -end
            until(lambda: not state_file.exists(), what="the sandbox takes its state file away")
            until(lambda: not answers(state["http_port"]), what="the sandbox ends")
        finally:
            if answers(state["http_port"]):
                os.kill(state["pid"], signal.SIGKILL)
        process.communicate(timeout=20)
    assert held_open == {Path("/dev/null"), tmp_path / "sandbox" / "sandbox.log"}


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_sandbox_that_cannot_be_kept_is_a_setting_to_mend(tmp_path: Path) -> None:
    """DATA_DIR that cannot be written: one line, exit code 2."""
    (tmp_path / "file").write_text("")
    ended = subprocess.run(
        [sys.executable, "producer.py", "--sandbox", "--once"],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=ROOT,
        env={**os.environ, "DATA_DIR": str(tmp_path / "file")},
    )
    assert (ended.returncode, ended.stderr) == (
        2,
        f"producer.py: DATA_DIR={tmp_path}/file: is a file, not a folder\n",
    )


# Every way it comes to nothing


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ({"decision": "deny"}, "access denied"),
        ({"account": BOB}, f"{BOB} was chosen, {ANN} was asked for"),
        ({"mail": "off"}, "left unticked"),
    ],
    ids=["denied", "wrong account", "scope unticked"],
)
def test_what_the_person_did_is_said_in_words(client: Client, choice: dict[str, str], word: str) -> None:
    """Cancel, another account, an unticked box."""
    with pytest.raises(ConsentFailed, match=word):
        consent(client, person(**choice), ANN)


def test_an_account_is_the_same_in_capitals(client: Client) -> None:
    """Addresses are compared without regard to case; the file gets Google's spelling."""
    assert consent(client, person(), ANN.upper()).account == ANN


def test_without_a_refresh_token_there_is_no_token(sandbox: Sandbox, client: Client) -> None:
    """An access token alone ends within the hour: refused, with the cure."""
    sandbox.faults.no_refresh_token()
    with pytest.raises(ConsentFailed, match=r"no refresh token.*connections"):
        consent(client, person())


@pytest.mark.parametrize("error", ["admin_policy_enforced", "org_internal", "server_error\x1b[2J"])
def test_other_refusals_are_named(client: Client, error: str) -> None:
    """Google's word is in the sentence, control characters are not."""

    def browse(address: str) -> None:
        query = dict(parse_qsl(urlsplit(address).query))
        visit(f"{query['redirect_uri']}?{urlencode({'state': query['state'], 'error': error})}")

    with pytest.raises(ConsentFailed, match=error.partition("\x1b")[0]) as failed:
        consent(client, browse)
    assert str(failed.value).isprintable()


@pytest.mark.parametrize("status", [503, 429, 200])
def test_an_outage_of_the_token_endpoint_is_told_apart(sandbox: Sandbox, client: Client, status: int) -> None:
    """503 and 429: try again; HTML instead of JSON: no token. Then a further consent works."""
    sandbox.faults.token_answer(status=status)
    with pytest.raises(ConsentFailed if status == 200 else TokenEndpointUnavailable):
        consent(client, person())
    assert consent(client, person()).account == ANN


def test_a_token_endpoint_that_is_away_is_said(client: Client) -> None:
    """Connection refused after the consent."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}/token"
        with pytest.raises(TokenEndpointUnavailable, match="cannot be reached"):
            consent(Client(client.client_id, client.client_secret, client.auth_uri, away), person())


def test_a_wrong_client_secret_is_a_wrong_setting(client: Client) -> None:
    """invalid_client names the two variables, and not the secret."""
    with pytest.raises(ConfigurationError, match=r"invalid_client.*GMAIL_CLIENT_SECRET is wrong") as failed:
        consent(Client(client.client_id, "not-the-secret", client.auth_uri, client.token_uri), person())
    assert "not-the-secret" not in str(failed.value)


def test_stray_requests_end_nothing(client: Client) -> None:
    """Silent connections, a favicon, an old tab's answer, nonsense: each gets its page, the consent goes on to its token."""
    silent: list[socket.socket] = []

    def browse(address: str) -> bool:
        query = dict(parse_qsl(urlsplit(address).query))
        back = query["redirect_uri"]
        port = urlsplit(back).port
        silent.extend(socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3))
        silent[0].sendall(b"\x16\x03\x01 no http\r\n\r\n")
        for stray in ("favicon.ico", "?", "?state=old&code=4/other", "?error=access_denied", f"?state={query['state']}"):
            assert visit(back + stray)[0] == 404
        return person()(address)

    out = io.StringIO()
    assert ask(client, "", 0, out, browse=browse, typed=None, patience=20).account == ANN
    assert out.getvalue().count("still waiting") == 3
    for connection in silent:
        connection.close()


def test_time_out(client: Client) -> None:
    """Nobody answers: a sentence that points at the guide."""
    with pytest.raises(ConsentFailed, match=r"time out.*OAUTH2_SETUP"):
        consent(client, lambda address: True, patience=0.05)


def test_a_taken_port_is_said(client: Client) -> None:
    """A port asked for by number that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConsentFailed, match=f"port {port} of 127.0.0.1 is taken.*GMAIL_AUTH_PORT"):
            ask(client, "", port, io.StringIO(), browse=person(), typed=None)


def test_a_browser_that_cannot_be_opened_is_told_apart(client: Client) -> None:
    """Nothing says that one was; the answer may come later, from elsewhere."""
    for opens in (True, False):
        out = io.StringIO()

        def browse(address: str, opens: bool = opens) -> bool:
            threading.Thread(target=person(), args=(address,)).start()
            return opens

        assert ask(client, "", 0, out, browse=browse, typed=None, patience=20).account == ANN
        assert ("A browser was opened with it" in out.getvalue()) is opens


def test_the_address_is_shown_before_a_browser_is_opened(client: Client) -> None:
    """A text browser does not return while it is open: who cannot use it reads the address above it."""
    out = io.StringIO()
    shown_before: list[bool] = []

    def browse(address: str) -> bool:
        shown_before.append(out.getvalue().startswith("Open in a browser") and f"\n{address}\n" in out.getvalue())
        return person()(address)

    assert ask(client, "", 0, out, browse=browse, typed=None, patience=20).account == ANN
    assert shown_before == [True]


def test_what_is_asked_for(client: Client) -> None:
    """Offline access, a consent each time, PKCE with S256, a fresh state, the IMAP scope and the account's address."""
    asked: list[dict[str, str]] = []

    def browse(address: str) -> bool:
        asked.append(dict(parse_qsl(urlsplit(address).query)))
        return person()(address)

    consent(client, browse)
    consent(client, browse)
    first, second = asked
    assert (first["access_type"], first["prompt"], first["response_type"]) == ("offline", "consent", "code")
    assert (set(first["scope"].split()), first["code_challenge_method"]) == (set(SCOPES), "S256")
    assert not {first["state"], first["code_challenge"]} & {second["state"], second["code_challenge"]}
    assert "login_hint" not in first


@pytest.mark.parametrize("folder", ["/proc", "/dev/null"], ids=["nothing can be written", "no folder"])
def test_a_folder_that_takes_no_token_is_seen_before_anybody_is_asked(sandbox: Sandbox, tmp_path: Path, folder: str) -> None:
    """Exit 2 and one line, no address."""
    with setting_up(tmp_path, sandbox, "producer.py", "--auth-setup", "--no-browser", TOKEN_DIR=folder) as process:
        printed, _ = process.communicate(timeout=20)
    assert (process.returncode, len(printed.splitlines()), folder in printed) == (2, 1, True)


def id_token(**claims: str) -> str:
    parts = (json.dumps(part).encode() for part in ({"alg": "RS256"}, claims, "signature"))
    return ".".join(base64.urlsafe_b64encode(part).decode() for part in parts)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ({}, "whose account"),
        ({"id_token": "x"}, "whose account"),
        ({"id_token": id_token(aud="app")}, "whose account"),
        ({"id_token": id_token(aud="other", email=ANN)}, "another app"),
        ({"id_token": id_token(aud="app", email=ANN), "scope": [f"{SCOPE}feeds/atom"]}, "unticked"),
    ],
)
def test_an_answer_for_somebody_else_is_refused(answer: dict[str, object], word: str) -> None:
    """No id token, one without an address, one for another app, a scope that only begins like ours."""
    complete = {"access_token": "a", "refresh_token": "r", "expires_in": 5, **answer}
    with pytest.raises(ConsentFailed, match=word):
        granted(complete, Client("app", "s"), "", datetime(2026, 1, 1, tzinfo=UTC))


def test_a_token_knows_its_end_and_its_beginning() -> None:
    """expires_in counts from now; an endpoint that names no scopes granted those asked for (RFC 6749, 5.1)."""
    answer = {"access_token": "a", "refresh_token": "r", "expires_in": 90, "id_token": id_token(aud="app", email=ANN)}
    token = granted(answer, Client("app", "s"), "", datetime(2026, 1, 1, tzinfo=UTC))
    assert token == StoredToken(
        ANN, "app", "s", "r", "a", datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC), SCOPES, TOKEN_URI, "2026-01-01T00:00:00Z"
    )


# The sandbox keeps Google's side


def exchange(sandbox: Sandbox, **fields: str) -> tuple[int, dict[str, object]]:
    form = {"grant_type": "authorization_code", "client_id": CLIENT_ID, "client_secret": CLIENT_SECRET, **fields}
    status, text = visit(sandbox.token_uri, form)
    return status, json.loads(text)


def test_the_sandbox_wants_the_verifier_and_takes_a_code_once(sandbox: Sandbox) -> None:
    """PKCE (RFC 7636): a wrong verifier or redirect gets nothing and spends the code; a spent code is refused."""
    back = "http://127.0.0.1:1/"
    query = {"client_id": CLIENT_ID, "redirect_uri": back, "response_type": "code", "scope": " ".join(SCOPES), "state": "s"}
    pkce = {"code_challenge": challenge_of("verifier"), "code_challenge_method": "S256"}

    def code() -> str:
        address = f"{sandbox.auth_uri}?{urlencode({**query, **pkce})}"
        return dict(parse_qsl(urlsplit(redirected(address)).query))["code"]

    right = {"redirect_uri": back, "code_verifier": "verifier"}
    for wrong in ({"code_verifier": "guess"}, {"redirect_uri": "http://127.0.0.1:2/"}):
        spent = code()
        assert exchange(sandbox, code=spent, **{**right, **wrong})[0] == 400
        assert exchange(sandbox, code=spent, **right)[1]["error"] == "invalid_grant"
    used = code()
    assert exchange(sandbox, code=used, **right)[0] == 200
    assert exchange(sandbox, code=used, **right)[1]["error"] == "invalid_grant"


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"client_id": "other"}, "invalid_client"),
        ({"redirect_uri": "https://evil.example/"}, "redirect_uri_mismatch"),
        ({"code_challenge": ""}, "invalid_request"),
        ({"response_type": "token"}, "invalid_request"),
    ],
)
def test_the_sandbox_shows_a_wrong_request_to_the_person(sandbox: Sandbox, wrong: dict[str, str], word: str) -> None:
    """Google's error page instead of a redirect, for the page and for its buttons."""
    query = {"client_id": CLIENT_ID, "redirect_uri": "http://127.0.0.1:1/", "response_type": "code", "scope": SCOPE}
    query |= {"code_challenge": "x", "code_challenge_method": "S256", **wrong}
    for page in (visit(f"{sandbox.auth_uri}?{urlencode(query)}"), visit(f"{sandbox.auth_uri[:-4]}consent", query)):
        assert (page[0], word in page[1]) == (400, True)


def test_a_token_without_the_mail_scope_opens_no_mailbox(sandbox: Sandbox) -> None:
    """The unticked box counts at IMAP and in tokeninfo, not only in the client."""
    back = "http://127.0.0.1:1/"
    query = {"client_id": CLIENT_ID, "redirect_uri": back, "response_type": "code", "scope": " ".join(SCOPES), "state": "s"}
    address = f"{sandbox.auth_uri}?{urlencode({**query, 'code_challenge': challenge_of('v'), 'code_challenge_method': 'S256'})}"
    code = dict(parse_qsl(urlsplit(redirected(address, mail="off")).query))["code"]
    token = str(exchange(sandbox, code=code, redirect_uri=back, code_verifier="v")[1]["access_token"])
    assert sandbox.tokens.login(token) is None
    info = json.loads(visit(f"http://127.0.0.1:{sandbox.http_port}/tokeninfo?access_token={token}")[1])
    assert (info["email"], SCOPE in info["scope"]) == (ANN, False)


# Settings, files, answers


def test_without_a_client_it_is_one_line_and_exit_2(tmp_path: Path) -> None:
    """Both commands name the variable and the guide."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GMAIL_")}
    for command in (["producer.py", "--auth-setup"], ["-m", "src.auth.oauth2_gmail", "--setup"]):
        ended = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            timeout=20,
            cwd=ROOT,
            env={**environment, "TOKEN_DIR": str(tmp_path / "tokens")},
        )
        assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
        assert "GMAIL_CLIENT_ID is not set" in ended.stderr
        assert "docs/OAUTH2_SETUP.md" in ended.stderr
    assert not (tmp_path / "tokens").exists()


def test_the_two_variables_do_as_well_as_the_file(tmp_path: Path) -> None:
    """Google's addresses by default; the file wins over the variables; the secret is in no repr."""
    by_variables = client_of(AuthSettings(GMAIL_CLIENT_ID="id", GMAIL_CLIENT_SECRET="hush"))
    assert by_variables == Client("id", "hush")
    assert (by_variables.auth_uri, by_variables.token_uri) == (
        "https://accounts.google.com/o/oauth2/auth",
        "https://oauth2.googleapis.com/token",
    )
    assert "hush" not in repr(by_variables)
    path = tmp_path / "c.json"
    path.write_text('{"installed": {"client_id": "other", "client_secret": "s", "project_id": "p", "redirect_uris": []}}')
    settings = AuthSettings(GMAIL_CLIENT_ID="id", GMAIL_CLIENT_SECRET="hush", GMAIL_CLIENT_SECRETS_FILE=path)
    assert client_of(settings) == Client("other", "s")


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"web": {"client_id": "i", "client_secret": "s"}}'),
        *('{"installed": {"client_id": "i"}}', '{"installed": []}', '{"installed": {"client_id": 5, "client_secret": "s"}}'),
    ],
)
def test_a_file_that_is_no_desktop_client_is_one_line(tmp_path: Path, content: str) -> None:
    """ConfigurationError with the variable, the path and the guide."""
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"GMAIL_CLIENT_SECRETS_FILE=.*Desktop app.*OAUTH2_SETUP"):
        client_of(AuthSettings(GMAIL_CLIENT_SECRETS_FILE=path))
    with pytest.raises(ConfigurationError, match="No such file"):
        client_of(AuthSettings(GMAIL_CLIENT_SECRETS_FILE=tmp_path / "none.json"))


def test_secrets_go_nowhere_in_clear_text(tmp_path: Path) -> None:
    """http is for this machine only."""
    path = tmp_path / "c.json"
    path.write_text('{"installed": {"client_id": "i", "client_secret": "s", "token_uri": "http://google.example/token"}}')
    with pytest.raises(ConfigurationError, match="clear text"):
        client_of(AuthSettings(GMAIL_CLIENT_SECRETS_FILE=path))


def test_a_client_id_without_its_secret_names_the_secret() -> None:
    """The missing half is named."""
    with pytest.raises(ConfigurationError, match="GMAIL_CLIENT_SECRET is not set"):
        client_of(AuthSettings(GMAIL_CLIENT_ID="id"))


@pytest.mark.parametrize(
    ("present", "account", "alone", "expected"),
    [
        ({}, "", True, "gmail_token.json"),
        ({}, ANN, True, "gmail_token.json"),
        ({}, ANN, False, f"{ANN}.json"),
        ({"gmail_token.json": ANN}, ANN, True, "gmail_token.json"),
        ({"gmail_token.json": ANN.upper()}, ANN, True, "gmail_token.json"),
        ({"gmail_token.json": BOB}, ANN, True, f"{ANN}.json"),
        ({f"{ANN}.json": ANN}, ANN, True, f"{ANN}.json"),
        ({f"{ANN}.json": ANN}, "", True, "gmail_token.json"),
    ],
)
def test_no_account_takes_anothers_file(
    tmp_path: Path, present: dict[str, str], account: str, alone: bool, expected: str
) -> None:
    """gmail_token.json for one account, a file each for several; never over another account's token."""
    for name, owner in present.items():
        (tmp_path / name).write_text(json.dumps({"account": owner}))
    assert file_for(tmp_path, account, alone=alone) == tmp_path / expected


def test_an_account_is_no_path(tmp_path: Path) -> None:
    """A name with a slash in it is refused."""
    with pytest.raises(ConfigurationError, match="e-mail address"):
        file_for(tmp_path, "../../etc/cron.d/ann", alone=False)


def test_a_useless_token_file_is_replaced(tmp_path: Path, client: Client) -> None:
    """What is no token file names no account, and a consent puts it right."""
    path = tmp_path / "gmail_token.json"
    path.write_text("[half a")
    assert file_for(tmp_path, ANN, alone=True) == path
    keep(path, consent(client, person()))
    assert read_token(path).account == ANN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:5/?state=S&code=4/c%2Fd&scope=x", Answer("4/c/d", "")),
        ("  state=S&code=c  \r", Answer("c", "")),
        ("http://127.0.0.1:5/?state=S&code=c#", Answer("c", "")),
        ("?state=S&error=access_denied", Answer("", "access_denied")),
        ("?state=T&code=c", None),
        ("?code=c", None),
        ("?state=S", None),
        ("?state=é&code=c", None),
        ("4/c", None),
        ("", None),
    ],
)
def test_answers_are_known_by_their_state(text: str, expected: Answer | None) -> None:
    """A whole address or its query; nothing without our state."""
    assert answer_in(text, "S") == expected


SAID = [
    *("is not set", "not the JSON of a client of type Desktop app", "would be used in clear text", "for tokens cannot be made"),
    *("access denied", "the wrong account", "was left unticked", "Google gave no refresh token"),
    *("That was no answer to this request", "is taken", "time out", "Google does not take the code"),
    *("Google does not know this client", "the token endpoint", "Not the answer that is waited for"),
    *("there is no token file", "is open to other users", "is of no use", "belongs to", "Google refuses the token of"),
    "the token is not refreshed yet",
]


@pytest.mark.parametrize("words", SAID)
def test_the_guide_has_the_cure_for_what_is_said(words: str) -> None:
    """Each error text stands in the source and, word for word, in the guide's tables."""
    source = "".join(path.read_text() for path in (ROOT / "src" / "auth").glob("*.py"))
    assert words in source
    assert any(words in line.split("|")[1] for line in (ROOT / GUIDE).read_text().splitlines() if line.startswith("| "))


# Taking it back


def test_revoke_ends_the_consent_and_removes_the_file(
    sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--revoke: Google refuses the refresh token from then on, access tokens too; the file is gone; no secret is shown."""
    path = tmp_path / "gmail_token.json"
    sandbox.write_token_file(path, ANN)
    access = TokenSource(path, ANN).access_token()
    token = read_token(path)
    assert main(["--revoke", "--token-file", str(path)]) == 0
    assert not path.exists()
    assert sandbox.tokens.login(access) is None
    write_token(path, token)
    with pytest.raises(ReauthRequired, match="invalid_grant"):
        TokenSource(path, ANN).access_token(refuse=access)
    printed = capsys.readouterr()
    assert ANN in printed.out
    assert_no_secret(printed.out + printed.err, token, access)


def test_a_dead_token_is_removed_too(sandbox: Sandbox, tmp_path: Path) -> None:
    """Revoked at Google before: nothing to take back, the file goes."""
    path = tmp_path / "gmail_token.json"
    sandbox.write_token_file(path, ANN)
    sandbox.revoke(ANN)
    assert revoke(path) == ANN
    assert not path.exists()


def test_revoke_keeps_the_file_while_google_is_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, one line, the token stands."""
    path = tmp_path / "gmail_token.json"
    with Sandbox() as gone:
        gone.write_token_file(path, ANN)
    assert main(["--revoke", "--token-file", str(path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert read_token(path).account == ANN


@pytest.mark.parametrize(
    ("token_uri", "expected"),
    [
        ("https://oauth2.googleapis.com/token", "https://oauth2.googleapis.com/revoke"),
        ("https://accounts.google.com/o/oauth2/token", "https://oauth2.googleapis.com/revoke"),
        ("http://127.0.0.1:5/token", "http://127.0.0.1:5/revoke"),
        ("https://evil-google.com/token", "https://evil-google.com/revoke"),
    ],
)
def test_a_token_is_revoked_where_it_came_from(token_uri: str, expected: str) -> None:
    """Google's endpoint for all of Google's addresses, old ones too; else the one beside the token endpoint."""
    assert revoke_uri(token_uri) == expected


def test_token_dir_and_username_find_the_file(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--info without --token-file looks where the producer looks; it shows the consent's age and what ends it."""
    monkeypatch.setenv("TOKEN_DIR", str(tmp_path))
    sandbox.write_token_file(tmp_path / "gmail_token.json", ANN)
    sandbox.write_token_file(tmp_path / f"{BOB}.json", BOB)
    for arguments, account in ((["--info"], ANN), (["--info", "--username", BOB], BOB)):
        assert main(arguments) == 0
        info = capsys.readouterr().out
        assert f"account:         {account}\n" in info
        assert ", 0 days ago" in info
        assert "7 days after the consent" in info
    assert main(["--info", "--username", "eve@gmail.example"]) == 2
