"""Token files and access tokens, against a token endpoint on 127.0.0.1 that says what each test needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from src.auth.oauth2_gmail import SCOPE, StoredToken, TokenSource, main, read_token, write_token
from src.common.circuit_breaker import Breakers, Rules
from src.common.clock import SYSTEM, Clock, iso
from src.common.exceptions import ConfigurationError, ReauthRequired, TokenEndpointUnavailable

ACCOUNT = "ann@gmail.example"
REPOSITORY = Path(__file__).parents[2]
GRANTED = {"access_token": "fresh-1", "expires_in": 3600, "scope": SCOPE, "token_type": "Bearer"}
HTML = "<html>captive portal</html>"


class Endpoint:
    """A token endpoint: `answers` are given in turn, the last one again and again; `asked` holds each request's fields."""

    def __init__(self, port: int) -> None:
        self.uri = f"http://127.0.0.1:{port}/token"
        self.asked: list[dict[str, str]] = []
        self.answers: list[tuple[int, object]] = [(200, GRANTED)]
        self.open = threading.Event()
        self.open.set()

    def answer(self, body: bytes) -> tuple[int, bytes]:
        self.open.wait(20)
        self.asked.append({name: values[0] for name, values in parse_qs(body.decode()).items()})
        status, content = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return status, content.encode() if isinstance(content, str) else json.dumps(content).encode()


@contextmanager
def serving() -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = here.answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Endpoint(server.server_address[1])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield here
    finally:
        here.open.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as one:
        yield one


def stored(token_uri: str, *, access_token: str = "", seconds: float | None = None, account: str = ACCOUNT) -> StoredToken:
    expiry = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
    return StoredToken(
        account, "client", "s3cret", "1//refresh", access_token, expiry, (SCOPE,), token_uri, "2026-01-02T03:04:05Z"
    )


@pytest.fixture
def path(tmp_path: Path, endpoint: Endpoint) -> Path:
    """A token file without an access token."""
    path = tmp_path / "gmail_token.json"
    write_token(path, stored(endpoint.uri))
    return path


def ahead(seconds: float) -> Clock:
    """The system's clock, so many seconds later."""
    return Clock(wall=lambda: datetime.now(UTC) + timedelta(seconds=seconds), monotonic=SYSTEM.monotonic)


# The file


def test_a_written_token_is_read_back_whole_from_a_0600_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    token = stored("http://127.0.0.1:1/token", access_token="a", seconds=100)
    write_token(path, token)
    back = read_token(path)
    assert token.expiry is not None
    assert back == StoredToken(**{**token.__dict__, "expiry": token.expiry.replace(microsecond=0)})
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.json"]


def test_the_file_holds_googles_authorized_user_form(path: Path, endpoint: Endpoint) -> None:
    assert json.loads(path.read_text()) == {
        "type": "authorized_user",
        "account": ACCOUNT,
        "client_id": "client",
        "client_secret": "s3cret",
        "refresh_token": "1//refresh",
        "token": "",
        "expiry": "",
        "scopes": [SCOPE],
        "token_uri": endpoint.uri,
        "obtained_at": "2026-01-02T03:04:05Z",
    }


def test_a_failed_write_leaves_the_old_file_and_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_token(path, stored("http://127.0.0.1:1/other"))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_missing_file_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TokenSource(tmp_path / "none.json", ACCOUNT).access_token()
    assert str(caught.value) == (
        f"there is no token file {tmp_path}/none.json; run: python producer.py --auth-setup --username {ACCOUNT}"
    )


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_may_open_is_refused_with_the_chmod_to_run(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        read_token(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "\xff\xfe",
        '{"client_id": "c", "client_secret": "s"}',
        '{"installed": {"client_id": "c"}}',
        '{"client_id": 1, "client_secret": "s", "refresh_token": "r"}',
        '{"client_id": "c", "client_secret": "s", "refresh_token": "r", "expiry": "tomorrow"}',
        '{"client_id": "c", "client_secret": "s", "refresh_token": "r", "scopes": 5}',
    ],
)
def test_a_file_that_is_no_token_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.json"
    path.touch(0o600)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigurationError) as caught:
        read_token(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_googles_own_authorized_user_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.touch(0o600)
    path.write_text(json.dumps({"type": "authorized_user", "client_id": "c", "client_secret": "s", "refresh_token": "r"}))
    token = read_token(path)
    assert (token.account, token.access_token, token.expiry, token.token_uri) == (
        "",
        "",
        None,
        "https://oauth2.googleapis.com/token",
    )


def test_another_accounts_file_is_refused(path: Path, endpoint: Endpoint) -> None:
    with pytest.raises(ConfigurationError, match=r"belongs to ann@gmail\.example, not to bob@gmail\.example"):
        TokenSource(path, "bob@gmail.example").access_token()
    assert TokenSource(path, "Ann@Gmail.example").access_token() == "fresh-1"


def test_no_secret_stands_in_the_repr() -> None:
    text = repr(stored("http://127.0.0.1:1/token", access_token="ya29.secret"))
    assert not any(secret in text for secret in ("ya29", "s3cret", "1//"))


# Refreshing


def test_the_first_use_refreshes_and_stores_the_token_with_its_end(path: Path, endpoint: Endpoint) -> None:
    assert TokenSource(path, ACCOUNT).access_token() == "fresh-1"
    token = read_token(path)
    assert token.expiry is not None
    assert token.access_token == "fresh-1"
    assert 3500 < (token.expiry - datetime.now(UTC)).total_seconds() <= 3600
    assert (token.account, token.obtained_at, token.scopes) == (ACCOUNT, "2026-01-02T03:04:05Z", (SCOPE,))
    assert path.stat().st_mode & 0o777 == 0o600
    assert endpoint.asked == [
        {"grant_type": "refresh_token", "client_id": "client", "client_secret": "s3cret", "refresh_token": "1//refresh"}
    ]


def test_a_good_token_is_handed_out_without_asking(path: Path, endpoint: Endpoint) -> None:
    write_token(path, stored(endpoint.uri, access_token="good", seconds=1000))
    assert TokenSource(path, ACCOUNT).access_token() == "good"
    assert endpoint.asked == []


@pytest.mark.parametrize(("seconds", "asked"), [(290, 1), (310, 0), (-5, 1)])
def test_a_token_is_replaced_five_minutes_before_its_end(path: Path, endpoint: Endpoint, seconds: float, asked: int) -> None:
    write_token(path, stored(endpoint.uri, access_token="old", seconds=seconds))
    assert TokenSource(path, ACCOUNT).access_token() == ("fresh-1" if asked else "old")
    assert len(endpoint.asked) == asked


def test_the_clock_handed_in_decides_when_a_token_is_old(path: Path, endpoint: Endpoint) -> None:
    write_token(path, stored(endpoint.uri, access_token="old", seconds=3600))
    assert TokenSource(path, ACCOUNT, clock=ahead(3000)).access_token() == "old"
    assert TokenSource(path, ACCOUNT, clock=ahead(3400)).access_token() == "fresh-1"


def test_a_refused_token_is_replaced_though_it_is_not_over(path: Path, endpoint: Endpoint) -> None:
    write_token(path, stored(endpoint.uri, access_token="refused", seconds=3000))
    assert TokenSource(path, ACCOUNT).access_token(refuse="refused") == "fresh-1"
    assert len(endpoint.asked) == 1


def test_a_token_another_process_stored_meanwhile_is_used_instead_of_asking(path: Path, endpoint: Endpoint) -> None:
    source = TokenSource(path, ACCOUNT)
    write_token(path, stored(endpoint.uri, access_token="theirs", seconds=3000))
    assert source.access_token(refuse="mine") == "theirs"
    assert endpoint.asked == []


def test_many_threads_with_sources_of_their_own_ask_once(path: Path, endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda _: TokenSource(path, ACCOUNT).access_token(), range(8)))
    assert tokens == ["fresh-1"] * 8
    assert len(endpoint.asked) == 1


def test_several_processes_ask_once(path: Path, endpoint: Endpoint) -> None:
    program = (
        "import sys; from pathlib import Path; from src.auth.oauth2_gmail import TokenSource\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
        "sys.stdout.write(TokenSource(Path(sys.argv[1]), sys.argv[2]).access_token())"
    )
    argv = [sys.executable, "-c", program, str(path), ACCOUNT]
    started = [subprocess.Popen(argv, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in started] == ["fresh-1"] * 3
    assert len(endpoint.asked) == 1


def test_a_new_refresh_token_in_the_answer_replaces_the_old_one(path: Path, endpoint: Endpoint) -> None:
    endpoint.answers = [(200, GRANTED | {"refresh_token": "1//rotated"})]
    TokenSource(path, ACCOUNT).access_token()
    assert read_token(path).refresh_token == "1//rotated"


@pytest.mark.parametrize("name", [f"{ACCOUNT}.json", "gmail_token.json"])
def test_a_consent_that_is_given_during_a_refresh_counts(
    path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In the account's own file, which came meanwhile, or put over the one that is refreshed: its token is used, its file left alone."""
    own = path.with_name(f"{ACCOUNT}.json")
    consent = replace(
        stored(endpoint.uri, access_token="new", seconds=3000), refresh_token="1//new", obtained_at=iso(SYSTEM.wall())
    )
    answer = endpoint.answer

    def meanwhile(body: bytes) -> tuple[int, bytes]:
        write_token(path.with_name(name), consent)
        return answer(body)

    monkeypatch.setattr(endpoint, "answer", meanwhile)
    assert TokenSource(own, ACCOUNT, instead=path).access_token() == "new"
    assert read_token(path.with_name(name)).refresh_token == "1//new"
    assert [asked["refresh_token"] for asked in endpoint.asked] == ["1//refresh"]


def test_a_disk_that_refuses_costs_no_token_and_one_refresh(
    path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    source = TokenSource(path, ACCOUNT)
    assert [source.access_token(), source.access_token()] == ["fresh-1", "fresh-1"]
    assert len(endpoint.asked) == 1
    assert "cannot be written: No space left on device" in caplog.text
    assert read_token(path).access_token == ""


def test_a_source_that_keeps_nothing_writes_no_file_and_asks_once(path: Path, endpoint: Endpoint) -> None:
    before = path.read_bytes()
    source = TokenSource(path, ACCOUNT, keep=False)
    assert [source.access_token(), source.access_token()] == ["fresh-1", "fresh-1"]
    assert len(endpoint.asked) == 1
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# Verdicts


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}, "expired or revoked"),
        (401, {"error": "invalid_client", "error_description": "The OAuth client was deleted."}, "client was deleted"),
        (401, {"error": "unauthorized_client"}, "unauthorized_client"),
        (400, {"error": "invalid_grant", "error_subtype": "invalid_rapt"}, "invalid_grant"),
    ],
)
def test_a_verdict_of_the_endpoint_asks_for_consent_with_cause_and_command(
    path: Path, endpoint: Endpoint, status: int, body: object, cause: str
) -> None:
    endpoint.answers = [(status, body)]
    with pytest.raises(ReauthRequired, match=cause) as caught:
        TokenSource(path, ACCOUNT).access_token()
    assert str(caught.value).endswith(f"run: python producer.py --auth-setup --username {ACCOUNT}")
    assert not any(secret in str(caught.value) for secret in ("s3cret", "1//"))
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, {"error": "internal_failure"}),
        (503, {"error": "invalid_grant"}),
        (503, HTML),
        (502, ""),
        (429, {"error": "rate_limit_exceeded"}),
        (404, HTML),
        (403, ["no"]),
        (408, ""),
        (400, {"error": "invalid_request"}),
        (400, {"error": {"code": 400}}),
        (400, {}),
        (200, HTML),
        (200, ""),
        (200, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")),
        (200, []),
        (200, None),
        (200, {}),
        (200, {"access_token": "t"}),
        (200, {"access_token": 7, "expires_in": 10}),
        (200, {"access_token": "", "expires_in": 10}),
        (200, {"access_token": "t", "expires_in": "soon"}),
        (200, {"access_token": "t", "expires_in": 10**18}),
        (200, {"access_token": "t", "expires_in": [1]}),
    ],
)
def test_what_is_no_verdict_may_pass_and_is_asked_once(path: Path, endpoint: Endpoint, status: int, body: object) -> None:
    endpoint.answers = [(status, body)]
    before = path.read_bytes()
    with pytest.raises(TokenEndpointUnavailable, match=r"http://127\.0\.0\.1"):
        TokenSource(path, ACCOUNT).access_token()
    assert path.read_bytes() == before
    assert len(endpoint.asked) == 1


def test_an_endpoint_that_does_not_listen_or_does_not_answer_is_unavailable(path: Path, endpoint: Endpoint) -> None:
    endpoint.open.clear()
    with pytest.raises(TokenEndpointUnavailable, match="timed out"):
        TokenSource(path, ACCOUNT, timeout=0.2).access_token()
    endpoint.open.set()
    with serving() as gone:
        pass
    write_token(path, stored(gone.uri))
    with pytest.raises(TokenEndpointUnavailable):
        TokenSource(path, ACCOUNT).access_token()


def test_while_the_endpoint_is_down_a_token_is_used_to_its_very_end(path: Path, endpoint: Endpoint) -> None:
    endpoint.answers = [(503, HTML)]
    write_token(path, stored(endpoint.uri, access_token="last", seconds=200))
    assert TokenSource(path, ACCOUNT).access_token() == "last"
    with pytest.raises(TokenEndpointUnavailable):
        TokenSource(path, ACCOUNT).access_token(refuse="last")
    with pytest.raises(TokenEndpointUnavailable):
        TokenSource(path, ACCOUNT, clock=ahead(201)).access_token()


def test_after_an_outage_the_next_call_gets_a_token(path: Path, endpoint: Endpoint) -> None:
    endpoint.answers = [(503, HTML), (200, GRANTED)]
    source = TokenSource(path, ACCOUNT)
    with pytest.raises(TokenEndpointUnavailable):
        source.access_token()
    assert source.access_token() == "fresh-1"


# The command line


def test_info_shows_account_and_end_and_no_secret(path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    write_token(path, stored(endpoint.uri, access_token="ya29.secret", seconds=1000))
    assert main(["--info", "--token-file", str(path)]) == 0
    shown = capsys.readouterr().out
    assert ACCOUNT in shown
    assert SCOPE in shown
    assert re.search(r"good for (999|1000) s", shown)
    assert not any(secret in shown for secret in ("ya29", "s3cret", "1//"))
    assert endpoint.asked == []


def test_refresh_replaces_even_a_good_token_and_shows_no_secret(
    path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    write_token(path, stored(endpoint.uri, access_token="good", seconds=3000))
    assert main(["--refresh", "--token-file", str(path)]) == 0
    assert read_token(path).access_token == "fresh-1"
    assert "fresh-1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "code"), [((400, {"error": "invalid_grant"}), 3), ((503, HTML), 1)], ids=["consent needed", "endpoint down"]
)
def test_refresh_tells_by_its_exit_code_what_is_needed(
    path: Path, endpoint: Endpoint, answer: tuple[int, object], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.answers = [answer]
    assert main(["--refresh", "--token-file", str(path)]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_file_is_exit_code_2_for_the_module_run_as_a_user_runs_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "src.auth.oauth2_gmail", "--info", "--token-file", str(tmp_path / "none.json")]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("there is no token file")
    assert done.stderr.count("\n") == 1


# an endpoint that is down, seen by a daemon


def breakers_at(now: list[float]) -> Breakers:
    return Breakers(Rules(failures=2, open_seconds=8.0), lambda: now[0], lambda: 0.999)


def test_an_endpoint_that_fails_is_left_alone_by_all_accounts(tmp_path: Path, endpoint: Endpoint) -> None:
    """After two failures nobody asks until its time is over; then one asks, and all go on."""
    now = [0.0]
    breakers = breakers_at(now)
    sources = []
    for number in range(3):
        path = tmp_path / f"{number}.json"
        write_token(path, stored(endpoint.uri, account=f"{number}@x"))
        sources.append(TokenSource(path, f"{number}@x", breakers=breakers))
    endpoint.answers = [(503, HTML), (200, HTML), (200, GRANTED)]
    for source in sources[:2]:
        with pytest.raises(TokenEndpointUnavailable):
            source.access_token()
    for source in sources:
        with pytest.raises(TokenEndpointUnavailable, match=r"token endpoint 127\.0\.0\.1:\d+ failed again and again \(http"):
            source.access_token()
    assert len(endpoint.asked) == 2
    now[0] = 8.0
    assert [source.access_token() for source in sources] == ["fresh-1"] * 3
    assert len(endpoint.asked) == 5


def test_a_token_that_is_still_good_is_used_while_the_endpoint_is_left_alone(path: Path, endpoint: Endpoint) -> None:
    """Within the last five minutes of a token a refresh is tried, and not needed."""
    breakers = breakers_at([0.0])
    breaker = breakers.get(f"token endpoint 127.0.0.1:{endpoint.uri.split(':')[2].split('/')[0]}")
    for _ in range(2):
        breaker.enter().failure()
    write_token(path, stored(endpoint.uri, access_token="good", seconds=100))
    assert TokenSource(path, ACCOUNT, breakers=breakers).access_token() == "good"
    assert endpoint.asked == []


def test_a_verdict_on_an_account_is_no_failure_of_the_endpoint(path: Path, endpoint: Endpoint) -> None:
    """Dead tokens, however many, do not keep the others from being refreshed."""
    breakers = breakers_at([0.0])
    endpoint.answers = [(400, {"error": "invalid_grant"})]
    for _ in range(4):
        with pytest.raises(ReauthRequired):
            TokenSource(path, ACCOUNT, breakers=breakers).access_token()
    assert len(endpoint.asked) == 4


def test_what_status_shows_of_a_token(path: Path, endpoint: Endpoint) -> None:
    """Age and end, and what is wrong with the file; no secret, no question asked."""
    source = TokenSource(path, ACCOUNT)
    facts = source.facts()
    assert set(facts) == {"method", "consented", "consented_days_ago"}
    assert facts["consented"] == "2026-01-02T03:04:05Z"
    write_token(path, stored(endpoint.uri, access_token="good", seconds=100))
    facts = source.facts()
    assert 90 <= int(str(facts["expires_in_seconds"])) <= 100
    assert not {"good", "s3cret", "1//refresh"} & set(map(str, facts.values()))
    path.unlink()
    assert "there is no token file" in str(source.facts()["error"])
    assert endpoint.asked == []
