"""GET /health: 503 only where a restart would help; the port it is answered on."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest

from src.common.clock import Clock
from src.common.exceptions import ConfigurationError
from src.common.health import Beats, Loop, liveness
from src.common.shutdown import Shutdown
from src.monitoring.endpoint import open_port, serve
from tests.support.processes import free_port


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


# the endpoint


@contextmanager
def served(health: dict[str, tuple[int, dict[str, object]]]) -> Iterator[str]:
    """The address of an endpoint that answers `health["now"]`."""
    listener = open_port("127.0.0.1", 0, 1)
    port = listener.getsockname()[1]
    stop = serve(listener, lambda: health["now"], Shutdown())
    yield f"http://127.0.0.1:{port}"
    stop()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
        pass


def get(url: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health_is_asked_anew_for_each_request_and_the_end_closes_the_port() -> None:
    """The status code is for a supervisor, the body for a person."""
    health: dict[str, tuple[int, dict[str, object]]] = {"now": (200, {"status": "ok"})}
    with served(health) as url:
        assert get(f"{url}/health") == (200, {"status": "ok"})
        health["now"] = (503, {"status": "stuck", "why": "é"})
        assert get(f"{url}/health") == (503, {"status": "stuck", "why": "é"})


def test_other_pages_do_not_exist() -> None:
    """Every other path is answered with what it is not."""
    with served({"now": (200, {"status": "ok"})}) as url:
        assert get(f"{url}/") == (404, {"error": "no such page: /"})
        assert get(f"{url}/health/../etc/passwd")[0] == 404


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
