"""The status page without a browser: minutes, the verdict, the markup, and what it asks Redis."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from src.common import registry
from src.common.clock import Clock
from src.common.error_groups import Group
from src.common.keys import Keys
from src.common.overview import Overview
from src.common.redis_client import RedisClient, pairs
from src.common.registry import News, Registration, Seen
from src.common.shutdown import Shutdown
from src.monitoring import page_look
from src.monitoring.page_flow import GAP_SECONDS, Flow
from src.monitoring.page_html import HEADERS, fragment, letter_page, note_page, page
from src.monitoring.page_look import Letter, Letters, Onlooker, Retry, Snapshot
from src.monitoring.page_verdict import View, ago, judge, parted, replay_group
from src.worker import erase
from tests.support import acl
from tests.support.servers import RedisServer
from tests.support.wait import until

NOW = datetime(2026, 1, 31, 3, 0, tzinfo=UTC)
GROUP, KEYS = "workers", Keys("stream")
PRODUCER = Registration("producer", "host-1-aa", "http://127.0.0.1:8080", "0.1.0", "host", 1, "2026-01-31T02:00:00Z")
WORKER = replace(PRODUCER, role="worker", name="host-2-bb", pid=2, address="http://127.0.0.1:8081")
BOX: dict[str, Any] = {
    "account": "ann@example.org",
    "mailbox": "INBOX",
    "state": "CONNECTED",
    "why": "",
    "seconds_since_contact": 1.0,
    "last_uid": 7,
    "lag": 0,
    "published": 5,
    "unaccounted": 0,
    "account_bytes_today": 10_000_000,
    "token": {"expires_in_seconds": 3000},
}
DEAD_TOKEN = "Google refuses the token of ann@example.org; run: python producer.py --auth-setup --username ann@example.org"


def a_view(
    *,
    me: Registration = PRODUCER,
    boxes: tuple[dict[str, Any], ...] = (BOX,),
    redis: str = "",
    news: tuple[str, ...] = (),
    **seen: Any,
) -> View:
    """A system in which all is well, but for what is named. `redis`: why it is away. `seen`: parts of the snapshot."""
    calm = Snapshot(NOW, NOW, Overview(0, 0, 0, 0, 5, 0.0), (Seen(PRODUCER, 1.0), Seen(WORKER, 2.0)))
    status: dict[str, Any] = {**vars(me), "redis": {"reachable": not redis, "why": redis}}
    status |= {"mailboxes": list(boxes)} if me.role == "producer" else {}
    return View(replace(calm, **seen), status, News(news), NOW)


def dead(
    group: str = "ValueError in shop.py:pay", *, age: float = 60, subject: str = "An order", letter_id: str = "5-0"
) -> Letters:
    died = (NOW - timedelta(seconds=age)).strftime("%Y-%m-%dT%H:%M:%SZ")
    newest = {letter_id: Letter(letter_id, group, died, subject)}
    return Letters(1, 1, (Group(group, 1, died, died, letter_id),), 0, newest)


# the last hour


def test_what_came_between_two_looks_counts_in_the_minute_of_the_second() -> None:
    """And the highest of live and oldest within a minute."""
    flow = Flow()
    for now, done, live in ((0, 100, 5), (30, 110, 9), (59, 115, 1), (61, 116, 2)):
        flow.add(now, {("done", "Redis"): done}, live, live / 2)
    first, second = flow.last_hour(61)[-2:]
    assert first is not None and second is not None
    assert (first.counts, first.live, first.oldest) == ({"done": 15}, 9, 4.5)
    assert (second.counts, second.live) == ({"done": 1}, 2)
    assert flow.last_hour(61)[:-2] == [None] * 58


def test_a_counter_that_went_back_began_anew_and_a_new_one_begins_here() -> None:
    """A flushed Redis, a worker that was started, one that is gone."""
    flow = Flow()
    flow.add(0, {("dead", "Redis"): 50, ("retried", "a"): 7}, 0, 0)
    flow.add(10, {("dead", "Redis"): 3, ("retried", "b"): 900}, 0, 0)
    flow.add(20, {("dead", "Redis"): 4, ("retried", "b"): 902}, 0, 0)
    [minute] = [minute for minute in flow.last_hour(20) if minute]
    assert minute.counts == {"dead": 4, "retried": 2}


def test_what_nobody_watched_belongs_to_no_minute_and_an_hour_is_kept() -> None:
    """After a gap counting begins anew; a clock that is put back does no harm."""
    flow = Flow()
    flow.add(0, {("done", "Redis"): 0}, 0, 0)
    flow.add(GAP_SECONDS + 1, {("done", "Redis"): 1000}, 0, 0)
    flow.add(GAP_SECONDS + 2, {("done", "Redis"): 1001}, 0, 0)
    assert [minute and minute.counts["done"] for minute in flow.last_hour(GAP_SECONDS + 2)[-3:]] == [0, None, 1]
    for number in range(200):
        flow.add(1000 + 30 * number, {("done", "Redis"): number}, 0, 0)
    assert all(flow.last_hour(1000 + 30 * 199))
    assert flow.last_hour(1000 + 30 * 199 + 3600) == [None] * 60
    flow.add(5, {("done", "Redis"): 0}, 0, 0)
    assert sum(1 for minute in flow.last_hour(5) if minute) == 1


# the verdict

VERDICTS = [
    ("all well", {}, "good", "Mail is flowing", ""),
    ("dead token of one of two", {"boxes": (BOX, {**BOX, "state": "REAUTH_REQUIRED", "why": DEAD_TOKEN})}, "bad",
     "Mail is flowing, but not all of it", "python producer.py --auth-setup --username ann@example.org"),
    ("dead token of the only one", {"boxes": ({**BOX, "state": "REAUTH_REQUIRED", "why": DEAD_TOKEN},)}, "bad",
     "No new mail comes in", "python producer.py --auth-setup --username ann@example.org"),
    ("old mail waits", {"boxes": ({**BOX, "state": "BACKFILL_PAUSED", "why": "DAILY_BYTES are spent"},)}, "warn",
     "Mail is flowing, with something to look at", ""),
    ("Redis is away", {"redis": "no answer for 7 s"}, "bad", "Mail stands still: Redis does not answer", ""),
    ("no worker, no mail", {"daemons": (Seen(PRODUCER, 1.0),)}, "warn", "Mail is flowing, with something to look at",
     "python worker.py"),
    ("no worker, mail", {"daemons": (Seen(PRODUCER, 1.0),), "overview": Overview(9, 0, 0, 0, 0, 5.0)}, "bad",
     "Mail is not handled", "python worker.py"),
    ("a worker just fell silent", {"daemons": (Seen(PRODUCER, 1.0), Seen(WORKER, 1.0), Seen(replace(WORKER, name="x"), 60.0))},
     "warn", "Mail is flowing, with something to look at", "python worker.py"),
    ("a worker fell silent long ago", {"daemons": (Seen(PRODUCER, 1.0), Seen(WORKER, 1.0), Seen(replace(WORKER, name="x"), 9e3))},
     "good", "Mail is flowing", ""),
    ("the only worker does not read", {"daemons": (Seen(PRODUCER, 1.0), Seen(WORKER, 1.0, News(("not reading: 9 dead letters",))))},
     "bad", "Mail is not handled", "python scripts/dlq.py groups"),
    ("one of two does not read",
     {"daemons": (Seen(PRODUCER, 1.0), Seen(replace(WORKER, name="x"), 1.0), Seen(WORKER, 1.0, News(("not reading: 9 dead",))))},
     "bad", "Mail is flowing, but not all of it", "python scripts/dlq.py groups"),
    ("a breaker holds it up", {"daemons": (Seen(PRODUCER, 1.0), Seen(WORKER, 1.0, News(("not reading: every breaker is open",))))},
     "bad", "Mail is not handled", ""),
    ("no producer, seen by a worker", {"me": WORKER, "daemons": (Seen(WORKER, 1.0),)}, "bad", "No new mail comes in",
     "python producer.py"),
    ("a mailbox's trouble, seen by a worker",
     {"me": WORKER, "daemons": (Seen(WORKER, 1.0), Seen(PRODUCER, 1.0, News((f"ann@example.org/INBOX: REAUTH_REQUIRED: {DEAD_TOKEN}",))))},
     "bad", "Mail is flowing, but not all of it", "python producer.py --auth-setup --username ann@example.org"),
    ("mail just died", {"letters": dead()}, "warn", "Mail is flowing, with something to look at",
     "python scripts/dlq.py replay --error 'ValueError in shop.py:pay'"),
    ("mail just died, of two errors", {"letters": replace(dead(), groups=(*dead("B").groups, *dead("A").groups),
                                                          newest={"5-0": Letter("5-0", "B", "", "")})},
     "warn", "Mail is flowing, with something to look at", "python scripts/dlq.py groups"),
    ("mail died long ago", {"letters": dead(age=5000)}, "good", "Mail is flowing", ""),
    ("workers too slow", {"overview": Overview(9, 1, 0, 0, 0, 5000.0)}, "warn", "Mail is flowing, with something to look at",
     "python worker.py"),
    ("an old mail waits for its retry", {"overview": Overview(1, 0, 1, 0, 0, 5000.0)}, "good", "Mail is flowing", ""),
    ("Redis evicts", {"news": ("the policy is bad. Run: redis-cli CONFIG SET maxmemory-policy noeviction (ALLOW…)",)}, "warn",
     "Mail is flowing, with something to look at", "redis-cli CONFIG SET maxmemory-policy noeviction"),
    ("rights are missing", {"faults": (("the flow", "NOPERM"),)}, "warn", "Mail is flowing, with something to look at", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "level", "headline", "command"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS]
)
def test_is_mail_flowing_and_what_do_i_run(given: dict[str, Any], level: str, headline: str, command: str) -> None:
    """One line each: what is seen → level, headline, the command of the first trouble; both stand in the page."""
    view = a_view(**given)
    verdict = judge(view)
    assert (verdict.level, verdict.headline) == (level, headline)
    assert (verdict.troubles[0].command if verdict.troubles else "") == command
    assert bool(verdict.troubles) == (level != "good")
    text = text_of(page(view, "localhost"))
    assert headline in text and command in text


def test_a_page_without_any_look_says_so() -> None:
    """Redis was never reached: no number is made up."""
    view = a_view(redis="not asked yet", at=None, overview=None, daemons=())
    text = text_of(page(view, "localhost"))
    assert "Mail stands still: Redis does not answer" in text
    assert "Redis has not been seen yet" in text and "Nothing was seen yet" in text


@pytest.mark.parametrize(
    ("why", "sentence", "command"),
    [
        (DEAD_TOKEN, "Google refuses the token of ann@example.org", "python producer.py --auth-setup --username ann@example.org"),
        ("open (mode 0644); run: chmod 600 'a b/t.json'", "open (mode 0644)", "chmod 600 'a b/t.json'"),
        ("fresh token. Consent again: python producer.py --auth-setup --username a; the IMAP server said: NO", None,
         "python producer.py --auth-setup --username a"),
        ("the server said: run: chmod 777 /etc", "the server said: run: chmod 777 /etc", ""),
        ("BYE run: python -m http.server", "BYE run: python -m http.server", ""),
        ("x; run: python producer.py --auth-setup --username $(id)", None, "python producer.py --auth-setup"),
        ("x; run: python producer.py --auth-setup --username a;id", None, "python producer.py --auth-setup --username a"),
        ("nothing to run", "nothing to run", ""),
    ],
)  # fmt: skip
def test_only_commands_of_ours_are_offered(why: str, sentence: str | None, command: str) -> None:
    """A cause may quote a mail server: what it says never becomes a line to copy."""
    assert parted(why)[1] == command
    assert sentence is None or parted(why)[0] == sentence


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (150, "2 min"), (7_500, "2 h 5 min"), (260_000, "3 d")]
)
def test_ages_are_words(seconds: float, words: str) -> None:
    """Rounded to what matters."""
    assert ago(seconds) == words


# the markup


class Reader(HTMLParser):
    """`tags`, `attributes` (tag, name, value), `text`."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def text_of(source: str) -> str:
    return "".join(Reader(source).pieces)


EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)> &lt;b&gt; {0} {} \ud800 javascript:alert(1) '; rm -rf ~"
LETTER = {
    "email_id": "gm:ann@example.org:7", "account": "ann@example.org", "mailbox": "INBOX", "uid": "7", "subject": "An order",
    "from": "Bob <bob@example.org>", "dead_reason": "attempts", "dead_error_type": "ValueError", "dead_error": "no price",
    "dead_traceback": "Traceback", "dead_attempts": "8",
    "record": json.dumps({"to": [{"name": "Ann", "address": "ann@example.org"}], "size": 5, "body_text": "the text of the mail",
                          "body_preview": "the text of", "attachments": [{"name": "a.pdf", "content_type": "application/pdf"}]}),
}  # fmt: skip


def evil(benign: Any) -> Any:
    """The same shape, every text of it hostile."""
    if isinstance(benign, str):
        return EVIL
    if isinstance(benign, dict):
        return {name: evil(value) for name, value in benign.items()}
    if isinstance(benign, (list, tuple)):
        return type(benign)(evil(value) for value in benign)
    return benign


def full_view(twist: Any) -> View:
    """Something in every part of the page."""
    worker = replace(WORKER, name=twist("w"), version=twist("1"), host=twist("h"), address=twist("http://127.0.0.1:8081"))
    box = {**BOX, **twist({"account": "a", "mailbox": "b", "why": "c"}), "state": "DISCONNECTED"}
    died = dead(twist("ValueError: no"), subject=twist("s"))
    group = replace(died.groups[0], first=twist("2026-01-31T02:59:00Z"))
    news = News((twist("the sky is low"),), {"done": 3})
    return a_view(
        boxes=(box,),
        news=(twist("so it is"),),
        daemons=(Seen(PRODUCER, 1.0), Seen(worker, 1.0, news), Seen(replace(worker, name=twist("v")), 99.0)),
        retries=(Retry(twist("gm:a:1"), twist("sub"), 4.0, 1),),
        overview=Overview(3, 1, 1, 1, 5, 9.0),
        letters=replace(died, groups=(group,)),
        faults=((twist("the flow"), twist("NOPERM")),),
    )


@pytest.mark.parametrize("which", ["page", "letter", "note"])
def test_nothing_from_outside_becomes_markup(which: str) -> None:
    """Hostile names, subjects, errors, causes: the same tags as of tame ones, all addresses ours, and the text stands there as it is."""

    def made(twist: Any) -> Reader:
        view = full_view(twist)
        fields = {name: twist(value) for name, value in LETTER.items() if name != "record"}
        fields["record"] = json.dumps(twist(json.loads(LETTER["record"])))
        sources = {
            "page": lambda: page(view, twist("localhost")),
            "letter": lambda: letter_page(view, "5-0", fields, twist("group"), bodies=True),
            "note": lambda: note_page(view, twist("No"), twist("such")),
        }
        return Reader(sources[which]())

    tame, hostile = made(lambda value: value), made(evil)
    missing = {"a"} if which == "page" else set()  # an address that is none is no link
    assert [tag for tag in hostile.tags if tag not in missing] == [tag for tag in tame.tags if tag not in missing]
    assert {(tag, name) for tag, name, _ in hostile.attributes} == {(tag, name) for tag, name, _ in tame.attributes}
    links = [value for _, name, value in hostile.attributes if name in ("href", "src")]
    assert all(
        re.match(r"/|#|http://|data:image/svg\+xml,<svg xmlns='[^']+' viewBox='0 0 16 16'><circle [^<>]*></svg>$", link)
        for link in links
    )
    assert EVIL in "".join(hostile.pieces)


def test_the_policy_allows_this_script_and_this_style_and_nothing_else() -> None:
    """Their hashes are in the header; no element carries a style or a handler of its own; nothing is loaded."""
    source = page(full_view(lambda value: value), "localhost")
    policy = HEADERS["Content-Security-Policy"]
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    names = {name for _, name, _ in Reader(source).attributes}
    assert not {name for name in names if name.startswith("on") or name in ("style", "src", "srcset", "action")}
    assert HEADERS["X-Content-Type-Options"] == "nosniff" and HEADERS["Referrer-Policy"] == "no-referrer"


def test_every_id_stands_once_and_every_button_is_one() -> None:
    """Landmarks, one h1, headings in order, each section named."""
    reader = Reader(page(full_view(lambda value: value), "localhost"))
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [value for _, name, value in reader.attributes if name in ("aria-labelledby", "aria-describedby")]
    assert set(named) <= set(ids)
    assert (reader.tags.count("main"), reader.tags.count("h1")) == (1, 1)
    levels = [int(tag[1]) for tag in reader.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


def test_a_copied_command_is_one_argument_of_the_shell() -> None:
    """Whatever the error's name holds."""
    group = "It's $(id) `id`; rm -rf ~ in x.py:f"
    assert shlex.split(replay_group(group)) == ["python", "scripts/dlq.py", "replay", "--error", group]


def test_a_letter_shows_no_text_of_the_mail_unless_asked_to() -> None:
    """STATUS_PAGE_BODIES; headers, error, attempts, and both commands stand there either way."""
    for bodies in (False, True):
        text = text_of(letter_page(a_view(), "5-0", LETTER, "ValueError: no price", bodies=bodies))
        assert ("the text of" in text) == bodies
        for part in (
            "An order",
            "Bob <bob@example.org>",
            "Ann <ann@example.org>",
            "a.pdf",
            "ValueError: no price",
            "Traceback",
            "8",
        ):
            assert part in text
        assert "python scripts/dlq.py replay 5-0" in text and "replay --error 'ValueError: no price'" in text


@pytest.mark.parametrize("record", ["", "garbage", "[1]", '{"to": 5, "attachments": [1], "size": "x", "body_text": 7}'])
def test_a_letter_that_somebody_else_wrote_is_shown_too(record: str) -> None:
    """And can be given up only."""
    text = text_of(letter_page(a_view(), "5-0", {"dead_reason": "foreign", "record": record, "x": "y"}, "Foreign", bodies=True))
    assert "python scripts/dlq.py discard 5-0" in text and "dlq.py replay" not in text


@pytest.mark.parametrize(
    ("address", "its_host", "link"),
    [
        ("http://127.0.0.1:8081", "host", "http://box.lan:8081/"),
        ("http://0.0.0.0:8081", "host", "http://box.lan:8081/"),
        ("http://0.0.0.0:8081", "other", "http://other:8081/"),
        ("http://10.0.0.7:8081", "other", "http://10.0.0.7:8081/"),
        ("http://[fd00::1]:8081", "other", "http://[fd00::1]:8081/"),
        ("javascript:alert(1)//", "host", None),
        ("http://x:99999", "host", None),
        ("", "host", None),
    ],
)
def test_another_daemons_page_is_linked_under_a_name_that_reaches_it(address: str, its_host: str, link: str | None) -> None:
    """What listens on this machine under the name the reader used; what listens everywhere under its machine's name."""
    view = a_view(daemons=(Seen(PRODUCER, 1.0), Seen(replace(WORKER, address=address, host=its_host), 1.0)))
    found = [
        value
        for _, name, value in Reader(fragment(view, "box.lan")).attributes
        if name == "href" and value.startswith(("h", "j"))
    ]
    assert found == ([link] if link else [])


# what it asks Redis


@contextmanager
def onlooker(redis: RedisClient, keys: Keys = KEYS) -> Iterator[tuple[Onlooker, list[float]]]:
    """One at work, and its clock in seconds, for the test to move."""
    now = [0.0]
    seen = Onlooker(redis, keys, GROUP, Clock(lambda: NOW + timedelta(seconds=now[0]), lambda: now[0]))
    seen.seen(patient=False)  # somebody reads the page
    seen.start(Shutdown())
    try:
        yield seen, now
    finally:
        seen.stop()


@pytest.fixture(params=["valkey", "redis7"])
def client(request: pytest.FixtureRequest) -> Iterator[RedisClient]:
    server: RedisServer = request.getfixturevalue(request.param)
    with RedisClient.connect(server.url, max_connections=4, socket_timeout=5) as redis:
        yield redis


def bury(redis: RedisClient, number: int, error: str, **more: str) -> None:
    fields = {"subject": f"mail {number}", "dead_error_type": error, "dead_at": "2026-01-31T02:59:00Z", **more}
    redis.call("XADD", KEYS.dlq, f"{number}-0", *(part for pair in fields.items() for part in pair))


def look(seen: Onlooker, now: list[float], seconds: float = 10) -> Snapshot:
    now[0] += seconds
    return seen.seen()


def test_the_counters_of_redis_become_minutes(client: RedisClient) -> None:
    """Entries that ever came, also those that are deleted or trimmed since; retries from the heartbeats; an empty Redis is no fault."""
    with onlooker(client) as (seen, now):
        first = look(seen, now)
        assert (first.faults, first.overview and first.overview.live) == ((), 0)
        registry.register(client, KEYS, WORKER, News((), {"retried": 4}))
        look(seen, now)
        for number in range(1, 6):
            client.call("XADD", KEYS.stream, f"{number}-0", "a", "b")
            client.call("XADD", KEYS.results, f"{number}-0", "a", "b")
        client.call("XDEL", KEYS.stream, "5-0", "4-0")
        client.call("XTRIM", KEYS.results, "MAXLEN", 0)
        bury(client, 1, "E")
        registry.register(client, KEYS, WORKER, News((), {"retried": 6}))
        last = look(seen, now)
    counts = {kind: sum(minute.counts[kind] for minute in last.flow if minute) for kind in ("entered", "done", "dead", "retried")}
    assert counts == {"entered": 5, "done": 5, "dead": 1, "retried": 2}
    assert last.overview is not None and (last.overview.live, last.overview.dead) == (3, 1)
    assert [one.news.counts for one in last.daemons] == [{"retried": 6}]


def test_what_was_seen_last_stays_while_redis_is_away() -> None:
    """The numbers and the daemons are kept, and since when; back, they are new. Who asks for `last` waits for nothing."""
    with (
        RedisServer("valkey", appendonly=True) as server,
        RedisClient.connect(server.url, max_connections=4, socket_timeout=5) as redis,
        onlooker(redis) as (seen, now),
    ):
        look(seen, now)
        redis.call("XADD", KEYS.stream, "*", "a", "b")
        registry.register(redis, KEYS, WORKER)
        before = look(seen, now)
        assert before.overview is not None and (before.overview.live, len(before.daemons)) == (1, 1)
        server.kill9()
        away = look(seen, now)
        assert (away.overview, away.daemons, away.at) == (before.overview, before.daemons, before.at)
        assert [name for name, _ in away.faults] == ["the stream"]
        assert seen.last == away
        server.start()
        redis.call("DEL", KEYS.stream)
        back = look(seen, now)
        assert back.overview is not None and (back.overview.live, back.faults) == (0, ())


def test_what_redis_refuses_to_tell_is_one_line_and_no_end(valkey: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A user of an older docs/security.md, without ZCARD: one warning, the rest is seen; allowed again, all is."""
    admin, keys = valkey.client(), Keys("email_ingestion_stream")
    acl.make_users(admin)
    admin.execute_command("ACL", "SETUSER", "producer", "-zcard")
    try:
        with RedisClient.connect(acl.as_user(valkey.url, "producer"), max_connections=4, socket_timeout=10) as redis:
            registry.register(redis, keys, WORKER)
            with onlooker(redis, keys) as (seen, now):
                look(seen, now)
                refused = look(seen, now)
                assert (refused.overview, len(refused.daemons)) == (None, 1)
                assert [record.message.partition(":")[0] for record in caplog.records] == ["the stream"]
                admin.execute_command("ACL", "SETUSER", "producer", "+zcard")
                assert look(seen, now).overview is not None
    finally:
        if not acl.EVERYWHERE:
            admin.execute_command("ACL", "DELUSER", "producer", "worker", "operator")


def test_the_first_reader_after_a_while_sees_the_dead_letters_of_now(client: RedisClient) -> None:
    """While nobody reads the page they are not looked at; who opens it waits for a whole look, however fresh the rest is."""
    with onlooker(client) as (seen, now):
        look(seen, now)
        now[0] += 1000
        seen._order(seen._look)  # its own look, with nobody there
        bury(client, 1, "A")
        now[0] += 1
        assert [group.count for group in seen.seen().letters.groups] == [1]


def test_dead_letters_are_grouped_as_they_come_and_go(client: RedisClient) -> None:
    """The largest group first, its newest letter named; what was replayed is gone."""
    with onlooker(client) as (seen, now):
        for number, error in enumerate(("A", "B", "B", "A", "B"), start=1):
            bury(client, number, error)
        assert [(g.group, g.count, g.example) for g in look(seen, now).letters.groups] == [("B", 3, "5-0"), ("A", 2, "4-0")]
        bury(client, 9, "A")
        letters = look(seen, now).letters
        assert [(g.group, g.count, g.example) for g in letters.groups] == [("A", 3, "9-0"), ("B", 3, "5-0")]
        assert letters.newest["9-0"].subject == "mail 9"
        client.call("XDEL", KEYS.dlq, "9-0", "4-0", "1-0")
        assert [(g.group, g.count) for g in look(seen, now).letters.groups] == [("B", 3)]
        client.call("DEL", KEYS.dlq)
        assert look(seen, now).letters.groups == ()


def test_what_is_erased_is_gone_at_the_next_look(client: RedisClient) -> None:
    """A letter is erased and its stream written anew, then the last one too: neither is shown on, and nothing looks as if it had come."""
    with onlooker(client) as (seen, now):
        look(seen, now)
        for number in (1, 2):
            bury(client, number, f"E{number}")
        for number in range(1, 10):
            client.call("XADD", KEYS.results, f"{number}-0", "a", "b")
        client.call("XTRIM", KEYS.results, "MAXLEN", 5)
        before = look(seen, now)
        assert sorted(letter.subject for letter in before.letters.newest.values()) == ["mail 1", "mail 2"]
        for erased, left in ((1, ["mail 2"]), (2, [])):
            client.call("XDEL", KEYS.dlq, f"{erased}-0")
            client.call("XDEL", KEYS.results, f"{6 + erased}-0")
            client.call("SADD", KEYS.erasing, KEYS.dlq, KEYS.results)
            assert erase.rewrite(client, KEYS) == {}
            after = look(seen, now)
            assert [letter.subject for letter in after.letters.newest.values()] == left
            assert (after.letters.total, after.letters.looked_at) == (len(left), len(left))
    counts = {kind: sum(minute.counts[kind] for minute in after.flow if minute) for kind in ("done", "dead")}
    assert counts == {"done": 9, "dead": 2}
    about = pairs(client.call("XINFO", "STREAM", KEYS.results))
    assert [about[name] for name in ("entries-added", "last-generated-id", "max-deleted-entry-id")] == [9, "9-0", "8-0"]


def test_looking_at_dead_letters_is_bounded(client: RedisClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones, by number and by size, and so many groups; the page says that there are more."""
    monkeypatch.setattr(page_look, "MOST_LETTERS", 150)
    monkeypatch.setattr(page_look, "MOST_GROUPS", 3)
    for number in range(1, 201):
        bury(client, number, "A" if number < 100 else f"E{'x' * (number % 7)}")
    with onlooker(client) as (seen, now):
        letters = look(seen, now).letters
        assert (letters.total, letters.looked_at, len(letters.groups), letters.more_groups) == (200, 150, 3, 5)
        bury(client, 999, "A")
        snapshot = look(seen, now)
        assert (snapshot.letters.total, snapshot.letters.looked_at) == (201, 150)
    text = text_of(fragment(a_view(letters=snapshot.letters), "localhost"))
    assert "the newest 150 were looked at" in text and "5 more groups" in text
    monkeypatch.setattr(page_look, "LETTERS_BYTES", 1)
    with onlooker(client) as (seen, now):
        assert look(seen, now).letters.looked_at == page_look.LETTERS_PAGE


def test_what_waits_is_shown_by_its_due_time(client: RedisClient) -> None:
    """Subject, attempts, when; a mark whose entry was deleted by hand does no harm."""
    stamp = int(client.call("TIME")[0])
    client.call("XADD", KEYS.stream, "1-0", "subject", "later", "email_id", "gm:a:1")
    client.call("ZADD", KEYS.due, (stamp + 500) * 1000, "1-0|gm:a:1", (stamp + 100) * 1000, "2-0|gm:a:2|odd")
    client.call("ZADD", KEYS.due, "inf", "3-0|gm:a:3")  # by hand: never due
    client.call("HSET", KEYS.tries, "gm:a:1", "3|4|5")
    with onlooker(client) as (seen, now):
        first, second = look(seen, now).retries
    assert (first.email_id, first.subject, first.failed) == ("gm:a:2|odd", "", 0)
    assert (second.email_id, second.subject, second.failed) == ("gm:a:1", "later", 3)
    assert 90 < first.due <= 100 and 490 < second.due <= 500


def test_what_redis_does_not_allow_is_said_and_the_rest_is_shown(client: RedisClient) -> None:
    """A user without XINFO STREAM and XREVRANGE, as before this page came."""
    registry.register(client, KEYS, WORKER)
    bury(client, 1, "A")
    client.call("ACL", "SETUSER", "old", "on", ">pw", "~*", "+@all", "-xinfo|stream", "-xrevrange")
    try:
        client.call("AUTH", "old", "pw")  # this connection, and the page has no other
        with onlooker(client) as (seen, now):
            snapshot = look(seen, now)
    finally:
        client.call("AUTH", "default", "")
        client.call("ACL", "DELUSER", "old")
    assert [what for what, _ in snapshot.faults] == ["the flow", "the dead letters"]
    assert [one.daemon for one in snapshot.daemons] == [WORKER]
    assert snapshot.overview is not None and snapshot.overview.dead == 1
    assert "This page cannot look at the flow" in text_of(fragment(a_view(faults=snapshot.faults), "localhost"))


def patient(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except TimeoutError:
        return None


def test_a_redis_that_hangs_keeps_nobody_waiting(valkey: RedisServer) -> None:
    """What was seen last is shown, with its time; one letter asked for is a TimeoutError; back, all is fresh."""
    with RedisClient.connect(valkey.url, max_connections=4, socket_timeout=30) as redis, onlooker(redis) as (seen, now):
        bury(redis, 1, "A")
        before = look(seen, now)
        assert before.at == NOW + timedelta(seconds=10)
        valkey.freeze()
        try:
            assert look(seen, now).at == before.at
            with pytest.raises(TimeoutError):
                seen.letter("1-0")
        finally:
            valkey.thaw()
        assert until(lambda: patient(lambda: seen.letter("1-0")), what="Redis is asked again")["subject"] == "mail 1"
        after = look(seen, now)
        assert after.at is not None and before.at is not None and after.at > before.at
