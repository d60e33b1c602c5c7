"""The user's code: loaded and checked once, called for each mail, never able to end the process."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.correlation import current
from src.common.exceptions import ConfigurationError, Permanent
from src.mail.record import Address, Attachment, Email, Record, record_to_json
from src.worker.backoff import Policy
from src.worker.delivery import Delivery
from src.worker.dlq import Failure
from src.worker.idempotency import Done
from src.worker.processor import Context, Handler, encoded, handle, load_handler, summarize
from tests.support.fake import fields_of

MAIL = Delivery("1-0", 2, fields_of("gm:a:1", subject="hello", replays="2"))


def run(handler: Handler, *, attempts: int = 0, mail: Delivery = MAIL) -> Done | Failure:
    return handle(handler, mail, attempts, policy=Policy(attempts=3), chance=lambda: 0.5, result_max=1000)


# what becomes of a mail


def test_a_result_is_kept_as_compact_json() -> None:
    assert run(lambda email, context: {"b": [1, "é"], "a": None}) == Done(MAIL, "done", '{"b":[1,"é"],"a":null}')


def test_no_result_is_an_empty_one() -> None:
    """Every completion writes a result."""
    assert run(lambda email, context: None) == Done(MAIL, "done", "{}")


def test_a_handler_sees_the_mail_and_its_story() -> None:
    """The idempotency key is the email_id; attempts count from 1; replays and correlation id are told."""
    seen: list[Any] = []

    def handler(email: Email, context: Context) -> None:
        seen.extend([email.email_id, email.subject, context.idempotency_key, context.attempt, context.replays, current()])

    run(handler, attempts=4)
    assert seen == ["gm:a:1", "hello", "gm:a:1", 5, 2, "cgm:a:1"]
    assert current() == ""


def test_lines_that_a_handler_logs_carry_the_correlation_id(caplog: pytest.LogCaptureFixture) -> None:
    """Also by its own logger: the id is set around the call."""
    seen: list[str] = []

    class Note(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            seen.append(f"{record.name}: {record.getMessage()} {current()}")
            return True

    note = Note()
    logging.getLogger("handler").addFilter(note)
    try:
        with caplog.at_level(logging.INFO):
            run(lambda email, context: context.log.info("seen %s", email.uid))
    finally:
        logging.getLogger("handler").removeFilter(note)
    assert seen == ["handler: seen 1 cgm:a:1"]


def raising(error: BaseException) -> Handler:
    def handler(email: Email, context: Context) -> None:
        raise error

    return handler


def test_an_error_is_retried_after_a_jittered_delay_with_its_story() -> None:
    outcome = run(raising(ValueError("boom")), attempts=1)
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.delay, outcome.error_type, outcome.error) == ("retry", 1.0, "ValueError", "boom")
    assert "in handler" in outcome.traceback
    assert outcome.traceback.endswith("ValueError: boom\n")


@pytest.mark.parametrize(
    ("error", "attempts", "reason"), [(Permanent("no such customer"), 0, "permanent"), (ValueError("boom"), 2, "attempts")]
)
def test_permanent_and_the_last_attempt_bury(error: Exception, attempts: int, reason: str) -> None:
    outcome = run(raising(error), attempts=attempts)
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.reason, outcome.error) == ("bury", reason, str(error))


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Huge(Exception):
    def __str__(self) -> str:
        return "x" * 10_000_000


@pytest.mark.parametrize(
    "error",
    [SystemExit(1), asyncio.CancelledError(), GeneratorExit(), KeyboardInterrupt(), Mute(), RecursionError(), Huge()],
    ids=lambda error: type(error).__name__,
)
def test_nothing_that_a_handler_raises_ends_its_thread(error: BaseException) -> None:
    """A thread that dies silently would hold its mail for ever; one that dies loudly would end the process."""
    outcome = run(raising(error))
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.error_type) == ("retry", type(error).__name__)


def test_a_record_that_is_no_record_fails_its_mail_only() -> None:
    """Decoded when the handler touches it: an entry that somebody else wrote."""
    outcome = run(lambda email, context: {"text": email.text}, mail=Delivery("1-0", 1, fields_of("gm:a:1", record="{")))
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.error_type) == ("retry", "JSONDecodeError")


def test_a_deep_recursion_is_told_by_its_last_frames() -> None:
    """A dead letter has room for 8,000 characters, not for a thousand frames."""

    def handler(email: Email, context: Context) -> None:
        handler(email, context)

    outcome = run(handler)
    assert isinstance(outcome, Failure)
    assert outcome.error_type == "RecursionError"
    assert outcome.traceback.count("in handler") < 30


# results


@pytest.mark.parametrize("result", ["text", 1, ["list"], True])
def test_a_result_that_is_no_dict_buries(result: object) -> None:
    """Repeating would not change it: the mail is buried with what to mend."""
    outcome = run(lambda email, context: result)  # type: ignore[return-value,arg-type]
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.reason) == ("bury", "permanent")
    assert outcome.error == f"the handler returned {type(result).__name__}; it returns a dict or None"


@pytest.mark.parametrize(
    "result",
    [{"a": {1, 2}}, {"a": b"bytes"}, {("t",): 1}, {"a": float("nan")}, {"a": float("inf")}, {"a": "\ud800"}],
    ids=["set", "bytes", "tuple key", "nan", "inf", "lone surrogate"],
)
def test_a_result_that_is_no_json_buries(result: dict[str, Any]) -> None:
    """The results stream holds JSON that any reader can read."""
    with pytest.raises(Permanent, match="not JSON"):
        encoded(result, 1000)


def test_a_circular_result_buries() -> None:
    result: dict[str, Any] = {}
    result["self"] = result
    with pytest.raises(Permanent, match="not JSON"):
        encoded(result, 1000)


def test_the_size_of_a_result_is_counted_in_bytes() -> None:
    """One byte too many is named with the setting."""
    result = {"a": "é" * 10}
    size = len('{"a":""}') + 20
    assert json.loads(encoded(result, size)) == result
    with pytest.raises(Permanent, match=f"has {size} bytes of JSON; RESULT_MAX_BYTES is {size - 1}"):
        encoded(result, size - 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_any_json_result_is_read_back_as_it_was_returned(result: dict[str, Any]) -> None:
    assert json.loads(encoded(result, 10**6)) == result


# the built-in handler


def test_the_built_in_handler_logs_a_line_and_returns_a_summary(caplog: pytest.LogCaptureFixture) -> None:
    record = Record(
        from_=Address("Ann", "ann@example.org"),
        subject="hello",
        body_text="text",
        attachments=(Attachment("a.pdf", "application/pdf", 3, "0" * 64),),
        defects=("no date",),
    )
    mail = Delivery("1-0", 1, fields_of("gm:a:1", record=record_to_json(record), subject="hello"))
    with caplog.at_level(logging.INFO):
        outcome = run(summarize, mail=mail)
    assert isinstance(outcome, Done)
    assert json.loads(outcome.result) == {
        "from": "ann@example.org",
        "subject": "hello",
        "text_characters": 4,
        "attachments": 1,
        "defects": ["no date"],
    }
    assert caplog.messages == ["mail from ann@example.org: hello"]


# loading


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a user's module `users_handlers`."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "users_handlers.py"
    sys.modules.pop("users_handlers", None)


def test_without_a_setting_the_built_in_handler_runs() -> None:
    assert load_handler(None) is summarize


@pytest.mark.parametrize(
    "code",
    [
        "def handle(email, context): return {'n': 1}",
        "def handle(email, context, more=2): return {'n': 1}",
        "def handle(*args): return {'n': 1}",
        "class Handler:\n    def __call__(self, email, context): return {'n': 1}\nhandle = Handler()",
    ],
    ids=["function", "function with a default", "any arguments", "callable object"],
)
def test_what_can_be_called_with_a_mail_and_its_context_is_a_handler(module: Path, code: str) -> None:
    module.write_text(code)
    assert run(load_handler("users_handlers:handle")) == Done(MAIL, "done", '{"n":1}')


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, r"cannot import users_handlers \(ModuleNotFoundError"),
        ("import not_installed_at_all", r"cannot import users_handlers \(ModuleNotFoundError: .*not_installed_at_all"),
        ("def handle(", r"cannot import users_handlers \(SyntaxError"),
        ("1 / 0", r"cannot import users_handlers \(ZeroDivisionError: division by zero"),
        ("raise ValueError('a' + chr(10) + 'b')", r"cannot import users_handlers \(ValueError: a b\)"),
        ("raise SystemExit(0)", r"cannot import users_handlers \(SystemExit"),
        ("other = 1", "users_handlers has no function handle"),
        ("handle = 1", "users_handlers has no function handle"),
        ("async def handle(email, context): ...", "handle is async"),
        ("def handle(email): ...", r"handle must take \(email, context\)"),
        ("def handle(email, context, more): ...", r"handle must take \(email, context\)"),
        ("def handle(*, email, context): ...", r"handle must take \(email, context\)"),
    ],
)
def test_a_handler_that_cannot_be_one_is_refused_with_the_reason(module: Path, code: str | None, reason: str) -> None:
    """At start, in one line that names the setting."""
    if code is not None:
        module.write_text(code)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        load_handler("users_handlers:handle")
    assert str(caught.value).startswith("WORKER_HANDLER=users_handlers:handle: ")
    assert "\n" not in str(caught.value)
