"""The status page of real daemons in a real browser: it loads, it moves, it says what is wrong, and a keyboard or a phone is enough."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from src.common.keys import Keys
from tests.support.browser import Browser, have_chromium
from tests.support.daemons import Daemon
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.servers import need
from tests.support.wait import until

KEYS = Keys("email_ingestion_stream")
BOB = "bob@example.org"


@pytest.fixture(autouse=True)
def chromium() -> None:
    need(have_chromium(), "chromium")


@contextmanager
def reading(daemon: Daemon, browser: Browser) -> Iterator[str]:
    """`browser` shows the page of `daemon`; its address. At the end: nobody else was asked for anything, and the console is empty."""
    origin = daemon.wait_for(r"health: (http://127\.0\.0\.1:\d+)/health", DEADLINE)[1]
    browser.open(f"{origin}/")
    yield origin
    assert browser.complaints == []
    assert {url for url in browser.requests if not url.startswith(("data:", f"{origin}/"))} == set()


def sees(browser: Browser, text: str, where: str = "main") -> None:
    """Wait until the page shows `text`: by itself, it is not loaded again."""
    until(lambda: text in browser.text(where), DEADLINE, f"{where} shows {text!r}")


def answered(url: str, host: str = "") -> tuple[int, str, str, str]:
    """(status, content type, what the browser may load, what it guesses) of a page."""
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            status, headers = answer.status, answer.headers
    except urllib.error.HTTPError as error:
        status, headers = error.code, error.headers
    policy, guesses = headers.get("Content-Security-Policy", ""), headers.get("X-Content-Type-Options", "")
    return status, headers["Content-Type"], policy.partition(";")[0], guesses


def fell_silent(pipeline: Pipeline, daemon: Daemon) -> None:
    """As if the last heartbeat of a daemon that was killed were a minute old."""
    for name, entry in pipeline.client.hgetall(KEYS.daemons).items():
        beat, _, content = entry.partition("|")
        if json.loads(content)["pid"] == daemon.pid:
            pipeline.client.hset(KEYS.daemons, name, f"{int(beat) - 60_000}|{content}")


def test_the_page_moves_by_itself(pipeline: Pipeline) -> None:
    """Mail comes, is done, dies, and a worker is killed: all of it is seen without a reload. A subject is text, and a keyboard enough."""
    evil = "permanent <script>document.body.id='owned'</script><img src=x onerror=document.body.id='owned'>"
    with pipeline.producer() as producer, pipeline.worker() as worker, pipeline.worker() as other, Browser() as browser:
        with reading(producer, browser) as origin:
            for path, status in (("/", 200), ("/fragment", 200), ("/dead/1-0", 404), ("/dead/..%2f", 404)):
                assert answered(origin + path) == (status, "text/html; charset=utf-8", "default-src 'none'", "nosniff"), path
            assert answered(f"{origin}/", "evil.example")[0] == 400
            sees(browser, "2 workers alive", "#daemons")
            assert browser.text("h1") == "Mail is flowing"
            browser.run("window.loaded = 'once'")
            *_, dead = pipeline.deliver("one", "two", "three", evil)
            sees(browser, evil, "#letters")
            sees(browser, "Done\n3\n", "#flow")
            sees(browser, "Died\n1\n", "#flow")
            sees(browser, "4 published", "#mailboxes")
            sees(browser, "Mail is flowing, with something to look at", "h1")
            assert browser.run("document.title").startswith("Mail is flowing, with something to look at · producer ")
            other.kill9()
            fell_silent(pipeline, other)
            sees(browser, "is gone", "#verdict")
            assert "gone" in browser.text("#daemons") and "1 worker alive" in browser.text("#daemons")
            assert browser.run(
                "[window.loaded, document.body.id, document.querySelectorAll('main img, main script').length]"
            ) == ["once", "", 0]

            browser.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
            browser.press("Tab")
            assert browser.run("document.activeElement.getAttribute('href')") == "#main"
            command = "python scripts/dlq.py replay --error 'Permanent in handlers.py:obey'"
            for _ in range(30):
                if browser.run(
                    "document.activeElement.dataset.copy !== undefined && !!document.activeElement.closest('#letters')"
                ):
                    break
                browser.press("Tab")
            browser.press("Enter")
            until(lambda: browser.run("window.copied") == command, DEADLINE, "the command is copied")
            sees(browser, "The command is copied.", "#said")
            pipeline.deliver("four")
            sees(browser, "Done\n4\n", "#flow")
            assert browser.run("!!document.activeElement.closest('#letters') && document.activeElement.tagName") == "BUTTON"

            browser.run("document.querySelector('#letters a').click()")
            sees(browser, "Traceback (most recent call last):")
            whole = browser.text()
            assert (
                evil in whole and "Ann <ann@example.org>" in whole and "STATUS_PAGE_BODIES=true" in whole and "hello" not in whole
            )
        assert producer.terminate() == 0 and worker.terminate() == 0
    pipeline.assert_accounted(dead={dead: "permanent"})


def test_a_worker_shows_the_whole_too_and_bodies_only_if_asked(pipeline: Pipeline) -> None:
    """Flow, daemons, dead letters; for the mailboxes it links to their producer. STATUS_PAGE_BODIES=true shows its text."""
    pipeline.write_token(BOB)
    pipeline.source.revoke(BOB)  # type: ignore[union-attr]  # a sandbox
    [dead] = pipeline.deliver("permanent", body=b"<b>the text</b> of a mail\r\n")
    producing = pipeline.producer(GMAIL_USERNAME=f"{pipeline.account},{BOB}")
    working = pipeline.worker(STATUS_PAGE_BODIES="true")
    with producing as producer, working as worker, Browser(360, 740, dark=True) as phone, reading(worker, phone) as origin:
        pipeline.wait_until_settled()
        address = producer.wait_for(r"health: (http://\S+)/health")[1]
        sees(phone, "Permanent in handlers.py:obey", "#letters")
        sees(phone, f"{BOB}/INBOX is not read: it needs a new consent", "#verdict")
        assert f"python producer.py --auth-setup --username {BOB}" in phone.text("#verdict")
        assert phone.run("document.querySelector('#mailboxes a').href") == f"{address}/"
        assert phone.run("matchMedia('(prefers-color-scheme: dark)').matches") is True
        assert phone.run("document.documentElement.scrollWidth") == 360, "no horizontal scroll on a phone"
        phone.open(f"{origin}/dead/{next(iter(pipeline.books().dead))}")
        assert "<b>the text</b> of a mail" in phone.text()
        assert phone.run("document.documentElement.scrollWidth") == 360
    pipeline.assert_accounted(dead={dead: "permanent"})


def test_without_redis_the_page_says_so_and_shows_what_it_knew(pipeline: Pipeline) -> None:
    """Frozen: the page still answers, and what was done is still there; back, it goes on. When the daemon ends, the page says that too."""
    pipeline.deliver("one", "two")
    with pipeline.producer(REDIS_SOCKET_TIMEOUT="2") as producer, pipeline.worker(), Browser() as browser:
        origin = producer.wait_for(r"health: (http://127\.0\.0\.1:\d+)/health", DEADLINE)[1]
        browser.open(f"{origin}/")
        sees(browser, "Mail is flowing", "h1")
        pipeline.wait_until_settled()
        sees(browser, "2 published", "#mailboxes")
        pipeline.redis.freeze()
        try:
            sees(browser, "Mail stands still: Redis does not answer", "h1")
            assert "Last seen" in browser.text("#verdict") and "2 published" in browser.text("#mailboxes")
            with urllib.request.urlopen(f"{origin}/dead/1-0", timeout=20) as answer:
                raise AssertionError(answer.status)
        except urllib.error.HTTPError as error:
            assert error.code == 503 and "Redis does not answer now" in error.read().decode()
        finally:
            pipeline.redis.thaw()
        until(lambda: not browser.text("h1").startswith("Mail stands still"), DEADLINE, "Redis is seen again")
        producer.kill9()
        sees(browser, "This daemon has not answered since", "#lost")
    pipeline.assert_accounted()
