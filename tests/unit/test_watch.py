"""The look at Redis once a second: away, full, evicting; the heartbeat. Real Valkey where its word counts, else a scripted one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from src.common.circuit_breaker import CircuitBreaker, Rules
from src.common.clock import Clock
from src.common.exceptions import BreakerOpen, ConfigurationError, IngestionError, RedisUnavailable
from src.common.health import Beats, Memory
from src.common.keys import Keys
from src.common.redis_client import RedisClient, is_away
from src.common.registry import HEARTBEAT_SECONDS, News, Registration, registered
from src.common.retry import retry_on_redis_error
from src.common.shutdown import Shutdown
from src.common.watch import ANSWER_SECONDS, NOT_ASKED, Limits, Watch, check_policy
from tests.support.servers import RedisServer
from tests.support.wait import until

ME = Registration("producer", "host-1-aa", "http://127.0.0.1:8080", "0.1.0", "host", 1, "2026-01-31T00:00:00Z")
LIMITS = Limits(high=0.85, low=0.75, allow_eviction=False)
KEYS = Keys("stream")
EVICTS = r"^the maxmemory-policy of Redis is allkeys-lru: .*CONFIG SET maxmemory-policy noeviction"


class Scripted:
    """A transport that says what the test says of memory, and fails where it says so."""

    def __init__(self) -> None:
        self.used, self.limit, self.policy = 10, 100, "noeviction"
        self.error: Exception | None = None
        self.refuses: Exception | None = None  # writes
        self.heartbeats = self.asked = 0
        self.paused: list[str] = []

    def execute_command(self, *args: Any) -> Any:
        self.asked += 1
        if self.error:
            raise self.error
        if args[0] == "HGETALL":
            return self.paused
        if args[:2] == ("INFO", "memory"):
            return f"used_memory:{self.used}\r\nmaxmemory:{self.limit}\r\nmaxmemory_policy:{self.policy}\r\n"
        if args[0] == "INFO":
            return "redis_version:7.0.15\r\naof_enabled:1\r\n"
        assert args[0] == "EVALSHA"
        if self.refuses:
            raise self.refuses
        self.heartbeats += 1
        return "1"

    def close(self) -> None: ...


class Bench:
    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 0.0
        self.server = Scripted()
        self.client = RedisClient(self.server)
        self.shutdown = Shutdown()
        clock = Clock(wall=lambda: datetime(2026, 2, 1, tzinfo=UTC), monotonic=lambda: self.now)
        self.watch = Watch(self.client, KEYS, ME, limits, Beats(clock), self.shutdown, clock)

    def look(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.watch.look()


def test_an_outage_is_seen_at_the_next_look_and_its_end_too() -> None:
    """With the reason, and for how long; what was known before stays."""
    bench = Bench()
    bench.look()
    assert (bench.watch.away, bench.watch.degraded) == ("", [])
    bench.server.error = redis.ConnectionError("Connection refused.")
    bench.look(3)
    assert bench.watch.away == "no answer for 3 s (Connection refused.)"
    assert bench.watch.degraded == ["Redis: no answer for 3 s (Connection refused.)"]
    assert bench.watch.server()["maxmemory_policy"] == "noeviction"
    bench.server.error = None
    bench.look()
    assert bench.watch.away == ""


def test_a_look_that_hangs_is_an_outage_before_it_times_out() -> None:
    """A frozen server refuses nothing: its silence counts."""
    bench = Bench()
    bench.look()
    bench.now += ANSWER_SECONDS
    assert bench.watch.away == ""
    bench.now += 1
    assert bench.watch.away == "no answer for 6 s"


def test_the_breaker_does_not_hide_the_reason() -> None:
    """While it is open the last real error is shown."""
    bench = Bench()
    bench.client.breaker = CircuitBreaker(
        "Redis", Rules(failures=1, open_seconds=9), lambda: bench.now, lambda: 0.0, counts=is_away
    )
    bench.server.error = redis.ConnectionError("Connection refused.")
    bench.look()
    asked = bench.server.asked
    bench.look()
    assert bench.server.asked == asked
    assert "Connection refused." in bench.watch.away


def test_water_marks(caplog: pytest.LogCaptureFixture) -> None:
    """Paused from high on, until below low; each change is one line; the sentence says how full and what ends it."""
    caplog.set_level("INFO")
    bench = Bench()
    for used, full in ((84, False), (85, True), (76, True), (74, False), (80, False)):
        bench.server.used = used
        bench.look()
        assert bool(bench.watch.full) is full, used
        assert bench.watch.server()["intake_paused"] is full
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.messages[0].startswith("Redis holds 0.0 MB, 85% of its maxmemory; intake goes on below 75%.")
    bench.server.used, bench.server.limit = 10**9, 0
    bench.look()
    assert bench.watch.full == "", "no limit, no pause"


def test_heartbeats_go_on_while_writes_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """One each ten seconds; MISCONF is said once and shown, Redis is there nevertheless."""
    bench = Bench()
    bench.look()
    bench.look()
    assert bench.server.heartbeats == 1
    bench.server.refuses = redis.exceptions.ResponseError("MISCONF Errors writing to the AOF file: No space left on device")
    for _ in range(3):
        bench.look(HEARTBEAT_SECONDS)
    assert bench.watch.away == ""
    [wrong] = bench.watch.degraded
    assert "MISCONF" in wrong
    assert len(caplog.messages) == 1
    bench.server.refuses = None
    bench.look(HEARTBEAT_SECONDS)
    assert (bench.server.heartbeats, bench.watch.degraded) == (2, [])


def test_a_policy_that_evicts_ends_a_daemon_that_began_before_redis(caplog: pytest.LogCaptureFixture) -> None:
    """Exit code 2 at the first answer; a policy that changes later is shown, and ends nobody."""
    for limits, code in ((LIMITS, 2), (Limits(0.85, 0.75, allow_eviction=True), 0)):
        bench = Bench(limits)
        bench.server.policy = "volatile-ttl"
        bench.server.error = redis.ConnectionError("not yet")
        bench.look()
        assert not bench.shutdown.requested
        bench.server.error = None
        bench.look()
        assert (bench.shutdown.requested, bench.shutdown.exit_code) == (code == 2, code)
    bench = Bench()
    bench.look()
    bench.server.policy = "allkeys-lru"
    bench.look()
    bench.look()
    assert caplog.messages[1:] == bench.watch.degraded, "said once"
    assert not bench.shutdown.requested
    assert bench.watch.degraded[0].startswith("the maxmemory-policy of Redis is allkeys-lru")


# on real Valkey


@pytest.fixture
def client(valkey: RedisServer) -> Iterator[RedisClient]:
    with RedisClient.connect(valkey.url, max_connections=4, socket_timeout=10) as client:
        yield client


@pytest.mark.parametrize("binary", ["valkey", "redis7"])
def test_what_a_server_says_of_itself(binary: str, request: pytest.FixtureRequest) -> None:
    """Memory, policy, version."""
    server: RedisServer = request.getfixturevalue(binary)
    with RedisClient.connect(server.url, max_connections=4, socket_timeout=10) as client:
        memory = client.memory()
        assert memory is not None
        assert memory.used > 100_000
        assert (memory.limit, memory.policy) == (0, "noeviction")
        assert client.version().startswith("Valkey 9" if binary == "valkey" else "Redis 7.0")


def test_a_policy_that_evicts_is_refused_at_start(client: RedisClient, caplog: pytest.LogCaptureFixture) -> None:
    """One line with the command; a warning where the user wants it so; nothing for noeviction."""
    check_policy(client, allow_eviction=False)
    client.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigurationError, match=EVICTS):
            check_policy(client, allow_eviction=False)
        assert caplog.messages == []
        check_policy(client, allow_eviction=True)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    finally:
        client.call("CONFIG", "SET", "maxmemory-policy", "noeviction")


def test_where_it_may_not_be_asked_there_is_a_warning(valkey: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """An ACL without INFO: the daemon starts, and is reachable without knowing more."""
    with valkey.client() as admin:
        admin.execute_command("ACL", "SETUSER", "narrow", "on", "nopass", "~*", "+@all", "-info", "-config")
    try:
        url = valkey.tcp_url.replace("redis://", "redis://narrow:x@")
        with RedisClient.connect(url, max_connections=4, socket_timeout=10) as client:
            assert client.memory() is None
            assert client.version() == ""
            check_policy(client, allow_eviction=False)
            assert caplog.messages == [
                "Redis does not let us ask for its maxmemory-policy (INFO memory): make sure it is noeviction"
            ]
    finally:
        with valkey.client() as admin:
            admin.execute_command("ACL", "DELUSER", "narrow")


def test_redis_away_at_start_is_no_verdict() -> None:
    bench = Bench()
    bench.server.error = redis.ConnectionError("not yet")
    check_policy(bench.client, allow_eviction=False)


def test_its_thread_beats_and_leaves(client: RedisClient) -> None:
    """Registered from the start, with a loop that /health knows; stopped, it is gone from both."""
    shutdown = Shutdown()
    clock = Clock(wall=lambda: datetime.now(UTC), monotonic=lambda: 0.0)
    beats = Beats(clock)
    watch = Watch(client, KEYS, ME, LIMITS, beats, shutdown, clock)
    watch.start(10)
    assert [seen.daemon for seen in registered(client, KEYS)] == [ME]
    until(lambda: "watch" in beats.seen(), 20, "its first turn")
    watch.stop()
    assert (registered(client, KEYS), beats.seen()) == ([], {})
    assert not shutdown.requested


def test_a_new_trouble_is_told_at_once(client: RedisClient) -> None:
    """With the next look, not the next heartbeat; so is its end. The counts come with the heartbeats."""
    told, now = [News((), {"done": 1})], [100.0]
    clock = Clock(wall=lambda: datetime.now(UTC), monotonic=lambda: now[0])
    watch = Watch(client, KEYS, ME, LIMITS, Beats(clock), Shutdown(), clock, lambda: told[0])

    def looked(news: News, seconds: float = 1.0) -> News:
        told[0] = news
        now[0] += seconds
        watch.look()
        [seen] = registered(client, KEYS)
        return seen.news

    assert looked(News((), {"done": 1})) == News((), {"done": 1})
    assert looked(News((), {"done": 2})) == News((), {"done": 1})
    assert looked(News(("it rains",), {"done": 3})) == News(("it rains",), {"done": 3})
    assert looked(News((), {"done": 4})) == News((), {"done": 4})
    assert looked(News((), {"done": 5}), HEARTBEAT_SECONDS) == News((), {"done": 5})


# the breaker of Redis


def test_an_open_breaker_answers_for_redis() -> None:
    """After five failures nothing is sent until one call tries; callers see what they always see: RedisUnavailable."""
    bench = Bench()
    client, server = bench.client, bench.server
    client.breaker = CircuitBreaker(
        "Redis", Rules(open_seconds=1.0, open_cap=1.0), lambda: bench.now, lambda: 0.999, counts=is_away
    )
    server.error = redis.TimeoutError("no answer")
    for _ in range(5):
        with pytest.raises(RedisUnavailable, match="no answer"):
            client.ping()
    with pytest.raises(RedisUnavailable, match=r"\(no answer\): it is asked again in 1 s") as refused:
        client.run("missing", [], [])
    assert isinstance(refused.value.__cause__, BreakerOpen)
    assert server.asked == 5
    bench.now += 1.0
    server.error = None
    assert client.memory() == Memory(10, 100, "noeviction")
    assert client.breaker.snapshot()["state"] == "CLOSED"


def test_a_full_redis_is_no_failure() -> None:
    """OOM, MISCONF and refusals are answers."""
    bench = Bench()
    bench.client.breaker = CircuitBreaker("Redis", Rules(failures=1), lambda: 0.0, lambda: 0.0, counts=is_away)
    for line in ("OOM command not allowed", "MISCONF disk", "NOPERM no", "WRONGTYPE no"):
        bench.server.error = redis.exceptions.ResponseError(line)
        with pytest.raises(IngestionError):
            bench.client.call("SET", "k", "v")
    assert bench.client.breaker.snapshot()["state"] == "CLOSED"
    assert bench.client.breaker.snapshot()["failures"] == 0


def test_who_was_refused_waits_for_the_breaker_only() -> None:
    """However far the backoff has grown: when Redis is back, nobody sits out five seconds for a try that was not made."""
    bench = Bench()
    bench.client.breaker = breaker = CircuitBreaker(
        "Redis", Rules(open_seconds=1.0, open_cap=1.0), lambda: bench.now, lambda: 0.0, counts=is_away
    )
    bench.server.error = redis.TimeoutError("no answer")
    refused: list[float] = []

    class Moment(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            if breaker.snapshot()["state"] == "OPEN" and bench.server.asked == asked[-1]:
                refused.append(timeout)
            asked.append(bench.server.asked)
            bench.now += timeout
            if len(refused) == 50:
                bench.server.error = None
            return self.is_set()

    asked = [0]
    bench.shutdown.event = Moment()
    retry_on_redis_error(bench.shutdown)(bench.client.version)()
    assert len(refused) >= 50
    assert max(refused) <= 0.5


def test_what_is_paused_by_hand_is_known_from_the_first_look_and_through_an_outage() -> None:
    """Nothing begins before Redis has answered once; while it is away, what it said last holds."""
    bench = Bench()
    bench.server.error = redis.ConnectionError("Connection refused.")
    bench.server.paused = ["workers", "2026-01-31T00:00:00Z|too fast"]
    bench.look()
    assert bench.watch.paused("workers") == bench.watch.paused("a|INBOX") == NOT_ASKED
    bench.server.error = None
    bench.look()
    held = "paused by hand since 2026-01-31T00:00:00Z (too fast); go on: ./scripts/resume.sh --workers"
    assert (bench.watch.paused("workers"), bench.watch.paused("a|INBOX")) == (held, "")
    bench.server.error = redis.ConnectionError("Connection refused.")
    bench.look()
    assert bench.watch.paused("workers") == held
    bench.server.error, bench.server.paused = None, []
    bench.look()
    assert bench.watch.paused("workers") == ""
