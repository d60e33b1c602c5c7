"""/health: 503 only where a restart would help; /ready; water marks; the endpoint and the port it is answered on."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

import pytest

from src.common.clock import Clock
from src.common.exceptions import ConfigurationError
from src.common.health import Beats, Loop, Memory, Page, intake_reasons, is_full, liveness, readiness, work_reasons
from src.common.shutdown import Shutdown
from src.monitoring.endpoint import address_of, allowed_hosts, is_allowed, open_port, plain, serve, serve_metrics
from src.monitoring.metrics import CONTENT_TYPE
from tests.support.processes import free_port
from tests.support.wait import until


def test_a_loop_that_turns_in_time_is_healthy() -> None:
    """The body says how long ago each turned."""
    assert liveness({"reader": Loop(100.0, 10.0), "leases": Loop(109.5, 10.0)}, 110.0) == (
        200,
        {"status": "ok", "loops": {"leases": 0.5, "reader": 10.0}},
    )


def test_a_loop_that_stands_still_is_not() -> None:
    """A restart would help: it is named, and so is every other one."""
    loops = {"reader": Loop(100.0, 10.0), "leases": Loop(109.5, 10.0), "a/INBOX": Loop(0.0, 109.0)}
    assert liveness(loops, 110.1) == (503, {"status": "stuck", "why": "no turn in time: a/INBOX, reader"})


def test_a_process_without_loops_is_healthy() -> None:
    """It has just begun."""
    assert liveness({}, 5.0) == (200, {"status": "ok", "loops": {}})


def test_beats_keep_the_last_turn_and_forget_what_ended() -> None:
    """A loop that ended on purpose is not stuck."""
    now = [10.0]
    beats = Beats(Clock(wall=lambda: datetime(2026, 2, 1, tzinfo=UTC), monotonic=lambda: now[0]))
    beats.turn("reader", limit=5)
    beats.turn("leases", limit=7)
    now[0] = 12.0
    beats.turn("reader", limit=6)
    assert beats.seen() == {"reader": Loop(12.0, 6), "leases": Loop(10.0, 7)}
    beats.ended("leases")
    beats.ended("never began")
    assert beats.seen() == {"reader": Loop(12.0, 6)}


def test_what_is_wrong_elsewhere_is_said_and_kills_nobody() -> None:
    """Redis is away, a token is dead: degraded, and healthy. A loop of ours that stands still is stuck, whatever else is wrong."""
    loops = {"reader": Loop(100.0, 10.0)}
    wrong = ["Redis: no answer for 30 s", "a/INBOX: REAUTH_REQUIRED: consent again"]
    assert liveness(loops, 101.0, wrong) == (
        200,
        {
            "status": "degraded",
            "why": "Redis: no answer for 30 s; a/INBOX: REAUTH_REQUIRED: consent again",
            "loops": {"reader": 1.0},
        },
    )
    assert liveness(loops, 111.0, wrong)[0] == 503


# is it at work


def test_ready_without_a_reason_against_it() -> None:
    assert readiness([]) == (200, {"ready": True, "why": []})
    assert readiness(["Redis: away"]) == (503, {"ready": False, "why": ["Redis: away"]})


@pytest.mark.parametrize(
    ("redis", "states", "reasons"),
    [
        ("", {"a/INBOX": ("CONNECTED", "")}, []),
        ("", {"a/INBOX": ("REAUTH_REQUIRED", "consent"), "b/INBOX": ("CONNECTED", "")}, []),
        ("", {"a/INBOX": ("STANDBY", "another producer reads it")}, []),
        ("", {"a/INBOX": ("BACKFILL_PAUSED", "DAILY_BYTES")}, []),
        ("", {"a/INBOX": ("PAUSED", "full")}, ["a/INBOX: PAUSED: full"]),
        ("", {"a/INBOX": ("STARTING", ""), "b/X": ("DISCONNECTED", "no")}, ["a/INBOX: STARTING", "b/X: DISCONNECTED: no"]),
        ("", {"a/INBOX": ("REREADING", "forgotten")}, ["a/INBOX: REREADING: forgotten"]),
        ("no answer", {"a/INBOX": ("CONNECTED", "")}, ["Redis: no answer"]),
        ("no answer", {"a/INBOX": ("MISCONFIGURED", "x")}, ["Redis: no answer", "a/INBOX: MISCONFIGURED: x"]),
    ],
)
def test_a_producer_is_ready_with_redis_and_one_mailbox(
    redis: str, states: Mapping[str, tuple[str, str]], reasons: list[str]
) -> None:
    """One mailbox at work is enough; a standby is at work; without any each says why."""
    assert intake_reasons(redis, states) == reasons


def test_a_worker_is_ready_in_its_group_while_it_reads() -> None:
    """Each thing that keeps it from work is named."""
    assert work_reasons("", joined=True, blocked="") == []
    assert work_reasons("away", joined=False, blocked="10 dead letters") == [
        "Redis: away",
        "the consumer group is not joined yet",
        "not reading: 10 dead letters",
    ]


# may it take more in


def test_intake_pauses_from_high_and_goes_on_below_low() -> None:
    """In between it does what it did: no flapping."""
    full, seen = False, []
    for level in (0.0, 0.84, 0.85, 0.80, 0.75, 0.7499, 0.80, 0.9):
        full = is_full(full, level, high=0.85, low=0.75)
        seen.append(full)
    assert seen == [False, False, True, True, True, False, False, True]


def test_no_limit_is_never_full() -> None:
    """maxmemory 0 allows everything."""
    assert Memory(10**12, 0, "noeviction").level == 0.0
    assert Memory(85, 100, "noeviction").level == 0.85


# the endpoint


@contextmanager
def served(pages: Mapping[str, Callable[[], Page]], hosts: Collection[str] = allowed_hosts("127.0.0.1", ())) -> Iterator[str]:
    """The address of an endpoint with these pages."""
    listener = open_port("127.0.0.1", 0, 1)
    port, address = listener.getsockname()[1], address_of(listener)
    stop = serve(listener, pages, hosts, Shutdown())
    assert address == f"http://127.0.0.1:{port}"
    yield address
    stop()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
        pass


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_page_is_asked_anew_for_each_request_and_the_end_closes_the_port() -> None:
    """The status code is for a supervisor, the body for a person."""
    health: list[Page] = [(200, {"status": "ok"})]
    with served({"/health": lambda: health[-1]}) as url:
        assert get(f"{url}/health") == (200, {"status": "ok"})
        health.append((503, {"status": "stuck", "why": "é"}))
        assert get(f"{url}/health") == (503, {"status": "stuck", "why": "é"})


def test_other_pages_and_methods_do_not_exist() -> None:
    """Every other path is answered with what there is, in JSON."""
    with served({"/health": lambda: (200, {}), "/ready": lambda: (200, {})}) as url:
        assert get(f"{url}/") == (404, {"error": "no such page: /", "pages": ["/health", "/ready"]})
        assert get(f"{url}/health/../etc/passwd")[0] == 404
        assert get(f"{url}/health", method="POST") == (405, {"error": "POST is not answered here"})


def test_a_page_that_hangs_holds_up_no_other() -> None:
    """/status looks at token files: a disk that hangs must not make /health look dead."""
    hanging, let_go = threading.Event(), threading.Event()

    def status() -> Page:
        hanging.set()
        let_go.wait(20)
        return 200, {}

    with served({"/health": lambda: (200, {"status": "ok"}), "/status": status}) as url:
        waiting = threading.Thread(target=get, args=(f"{url}/status",))
        waiting.start()
        assert hanging.wait(20)
        assert get(f"{url}/health") == (200, {"status": "ok"})
        let_go.set()
        waiting.join()


def test_a_foreign_host_name_is_refused() -> None:
    """A page of the web that points its own name at this machine reads nothing; who asks without a name is no browser."""
    with served({"/health": lambda: (200, {"status": "ok"})}) as url:
        assert get(f"{url}/health", Host="evil.example")[0] == 400
        assert get(f"{url}/health", Host="127.0.0.1.evil.example:80")[0] == 400
        assert get(f"{url}/nothing", Host="evil.example")[0] == 400
        assert get(f"{url}/health", Host="LOCALHOST:9")[0] == 200
        bare = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        bare._http_vsn, bare._http_vsn_str = 10, "HTTP/1.0"
        bare.putrequest("GET", "/health", skip_host=True)
        bare.endheaders()
        assert bare.getresponse().status == 200


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8080", True),
        ("[::1]", True),
        ("[::1]:8080", True),
        ("::1", True),
        ("10.1.2.3:8080", True),
        ("twins.internal:1", True),
        ("Twins.Internal", True),
        ("10.1.2.4", False),
        ("[::2]:8080", False),
        ("localhost.evil.example", False),
        ("[127.0.0.1].evil.example:80", False),
        ("127.0.0.1:80@evil.example", False),
    ],
)
def test_host_names(header: str, allowed: bool) -> None:
    """Loopback, HTTP_HOST and what HTTP_ALLOWED_HOSTS names, with or without a port."""
    assert is_allowed(header, allowed_hosts("10.1.2.3", ("Twins.internal",))) is allowed
    assert is_allowed(header, allowed_hosts("10.1.2.3", ("*",)))


# pages that are no JSON, and the second port

HOSTS = allowed_hosts("127.0.0.1", ())
METRICS = plain("/metrics", CONTENT_TYPE, lambda: "email_a 1.0 é\n".encode())


def whole(url: str, **headers: str) -> tuple[int, str | None, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


def test_a_plain_page_has_its_own_content_type() -> None:
    """As Prometheus reads it, whatever it asks for, beside the JSON pages; it is named where a page is missing."""
    listener = open_port("127.0.0.1", 0, 1)
    url = address_of(listener)
    stop = serve(listener, {"/health": lambda: (200, {"status": "ok"})}, HOSTS, Shutdown(), [METRICS])
    for accept in ("*/*", "application/openmetrics-text;version=1.0.0", "text/html"):
        answer = whole(f"{url}/metrics", Accept=accept)
        assert answer == (200, "text/plain; version=0.0.4; charset=utf-8", "email_a 1.0 é\n".encode())
    assert get(f"{url}/health") == (200, {"status": "ok"})
    assert get(f"{url}/metric") == (404, {"error": "no such page: /metric", "pages": ["/health", "/metrics"]})
    assert get(f"{url}/metrics", Host="evil.example")[0] == 400
    assert get(f"{url}/metrics", method="POST")[0] == 405
    stop()


def test_the_second_port_answers_metrics_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Any other path is 404 in JSON, a foreign host 400; the log names its address; its end closes it."""
    caplog.set_level("INFO")
    stop = serve_metrics("127.0.0.1", 0, METRICS, HOSTS, Shutdown(), asks_again=False)
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("metrics: ")]
    url = line.removeprefix("metrics: ").removesuffix("/metrics")
    assert whole(f"{url}/metrics")[:2] == (200, CONTENT_TYPE)
    for page in ("", "health", "targets"):
        assert get(f"{url}/{page}") == (404, {"error": f"no such page: /{page}", "pages": ["/metrics"]})
    assert get(f"{url}/metrics", Host="evil.example")[0] == 400
    stop()
    with pytest.raises(urllib.error.URLError):
        whole(f"{url}/metrics")


def test_a_second_port_that_is_taken_is_one_warning_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is raised, nothing else is tried."""
    shutdown = Shutdown()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serve_metrics("127.0.0.1", port, METRICS, HOSTS, shutdown, asks_again=False)()
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"METRICS_PORT={port}: cannot listen on 127.0.0.1:{port} (")
    assert "; choose another, or METRICS_PORT=off. /metrics is answered on the daemon's own port" in line
    assert not shutdown.requested


def test_a_second_port_is_taken_when_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby is found where the producer before it was."""
    monkeypatch.setattr("src.monitoring.endpoint.AGAIN_SECONDS", 0.02)
    shutdown = Shutdown()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stop = serve_metrics("127.0.0.1", port, METRICS, HOSTS, shutdown, asks_again=True)

    def answers() -> bool:
        try:
            return whole(f"http://127.0.0.1:{port}/metrics")[:2] == (200, CONTENT_TYPE)
        except OSError:
            return False

    until(answers, 20, "the second port answers")
    shutdown.request("enough")
    stop()
    assert not answers()


@pytest.mark.parametrize("port", [None, "off"])
def test_no_second_port(port: Literal["off"] | None) -> None:
    """Unset for a worker, off for either: no thread is started."""
    threads = threading.active_count()
    serve_metrics("127.0.0.1", port, METRICS, HOSTS, Shutdown(), asks_again=True)()
    assert threading.active_count() == threads


# its port


def test_the_first_free_port_is_taken() -> None:
    """The second daemon on a machine takes the next one."""
    while True:
        first = free_port()
        try:
            with socket.create_server(("127.0.0.1", first)), open_port("127.0.0.1", None, first) as listener:
                assert first < listener.getsockname()[1] < first + 100
            return
        except OSError:  # another process took `first` in between
            continue


def test_a_port_asked_for_by_name_and_taken_is_an_error() -> None:
    """One line that names the setting; nothing else is tried."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"^HTTP_PORT={port}: cannot listen on 127.0.0.1:{port} \(.*in use\)"):
            open_port("127.0.0.1", port, 8080)


def test_port_0_is_any_free_one() -> None:
    with open_port("127.0.0.1", 0, 8080) as listener:
        assert listener.getsockname()[1] not in (0, 8080)


def test_an_address_that_is_not_ours_is_an_error() -> None:
    """HTTP_HOST of another machine (192.0.2.0/24 is nobody's): no loop over a hundred ports without a word."""
    with pytest.raises(ConfigurationError, match=r"HTTP_PORT: no free port on 192\.0\.2\.1"):
        open_port("192.0.2.1", None, 20000)


def test_an_ipv6_address_can_be_listened_on() -> None:
    try:
        with open_port("::1", 0, 8080) as listener:
            assert listener.family is socket.AF_INET6
    except ConfigurationError:
        pytest.skip("this machine has no IPv6")
