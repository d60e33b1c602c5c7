"""One line an event, whatever the message holds; the correlation id in each."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Literal

import pytest

from src.common.correlation import correlated, current
from src.common.logging_config import configure

log = logging.getLogger("src.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_json_lines_hold_level_logger_message_and_correlation_id() -> None:
    """What a log collector needs, and the fields given by `extra`."""
    stream = io.StringIO()
    configure("json", "INFO", stream)
    with correlated("c1"):
        log.warning("read %d mails", 3, extra={"mailbox": "INBOX"})
    log.debug("below the level")
    [line] = lines(stream)
    entry = json.loads(line)
    timestamp = entry.pop("timestamp")
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", timestamp)
    assert entry == {
        "level": "WARNING",
        "logger": "src.test",
        "message": "read 3 mails",
        "correlation_id": "c1",
        "mailbox": "INBOX",
    }


def test_text_lines_are_for_people() -> None:
    """Time, level, message, then what else is known; no correlation id where there is none."""
    stream = io.StringIO()
    configure("text", "DEBUG", stream)
    with correlated("c1"):
        log.info("read %d mails", 3, extra={"mailbox": "INBOX"})
    log.debug("idle")
    first, second = lines(stream)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    read 3 mails  mailbox=INBOX correlation_id=c1", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d DEBUG   idle", second)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_subject_cannot_forge_a_line_nor_drive_the_terminal(form: Literal["text", "json"]) -> None:
    """Line breaks of every kind and escape sequences are shown, not obeyed."""
    stream = io.StringIO()
    configure(form, "INFO", stream)
    log.info("subject: %s", "a\r\n12:00:00 ERROR   forged\x1b[2J\u2028\x85b\x00\x9b2J\u202e", extra={"more": "x\ny"})
    [line] = stream.getvalue().rstrip("\n").split("\n")
    assert "forged" in line
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", line)
    if form == "text":
        assert line.isprintable()


def test_a_traceback_follows_its_line_indented() -> None:
    """No line of it can pass for a line of the log, whatever the exception's text holds, nor drive the terminal."""
    stream = io.StringIO()
    configure("text", "INFO", stream)
    try:
        raise ValueError("boom\n12:00:00 ERROR   forged\r12:00:00 x\x1b[2J\u2028\x85\x9b2J")
    except ValueError:
        log.exception("it broke", stack_info=True)
    first, *rest = stream.getvalue().rstrip("\n").split("\n")
    assert first.endswith("ERROR   it broke")
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
    assert "  ValueError: boom" in rest
    assert "  12:00:00 ERROR   forged" in rest
    assert "  Stack (most recent call last):" in rest


def test_auto_is_text_on_a_terminal_and_json_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    configure("auto", "INFO", terminal)
    log.info("hello")
    configure("auto", "INFO", file)
    log.info("hello")
    assert not lines(terminal)[0].startswith("{")
    assert json.loads(lines(file)[0])["message"] == "hello"


def test_libraries_are_quiet_below_warning() -> None:
    """imapclient would log every literal, uvicorn every start."""
    stream = io.StringIO()
    configure("text", "DEBUG", stream)
    logging.getLogger("imapclient.imaplib").info("< literal")
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("imapclient").warning("odd")
    assert [line[17:] for line in lines(stream)] == ["odd"]


def test_correlation_ids_nest_and_end() -> None:
    """Also when the inner block raises."""
    with correlated("outer"):
        with pytest.raises(ValueError, match="x"), correlated("inner"):
            assert current() == "inner"
            raise ValueError("x")
        assert current() == "outer"
    assert current() == ""
