"""The user's code: loaded and checked once, called for each mail, never able to end the process."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.routes import load_routes
from config.settings import SettingsError, load_settings
from src.common.circuit_breaker import Breakers, Rules
from src.common.correlation import current
from src.common.exceptions import BreakerOpen, ConfigurationError, Permanent, RetryLater, SkipEmail
from src.mail.record import Address, Attachment, Email, Record, record_to_json
from src.worker.backoff import Policy
from src.worker.context import Context, encoded
from src.worker.delivery import Delivery
from src.worker.dlq import Failure
from src.worker.idempotency import Done
from src.worker.processor import Handler, Handlers, Started, Terms, handle_batch, load_handler, load_handlers, summarize
from src.worker.steps import MemoryServices
from src.worker.trial import run_once
from tests.support.fake import fields_of

MAIL = Delivery("1-0", 2, fields_of("gm:a:1", subject="hello", replays="2"))
TERMS = Terms(lambda: 0.5, 1000)
DEADLINE = datetime(2026, 2, 1, tzinfo=UTC)

Call = Callable[..., Any]


def run(
    call: Call, *, kind: Any = "plain", attempts: int = 0, mail: Delivery = MAIL, services: MemoryServices | None = None
) -> Done | Failure:
    handler = Handler("users:handle", call, kind, Policy(attempts=3), 60.0)
    return run_once(Started(mail, attempts, handler), services or memory(), TERMS, DEADLINE)


def memory(steps: dict[str, str] | None = None) -> MemoryServices:
    return MemoryServices(Breakers(Rules(failures=2), lambda: 0.0, lambda: 1.0), {} if steps is None else steps)


def done(result: str) -> Done:
    return Done(MAIL, "done", result, "users:handle")


# what becomes of a mail


def test_a_result_is_kept_as_compact_json() -> None:
    assert run(lambda email, context: {"b": [1, "é"], "a": None}) == done('{"b":[1,"é"],"a":null}')


def test_no_result_is_an_empty_one() -> None:
    """Every completion writes a result."""
    assert run(lambda email, context: None) == done("{}")


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


def raising(error: BaseException) -> Call:
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


class Blind(Exception):
    looks = 0

    @property
    def __notes__(self) -> list[str]:
        self.looks += 1
        if self.looks == 1:  # once: pytest looks too
            raise OSError("no notes")
        return []


class Unsure(RetryLater):
    @property
    def seconds(self) -> float:
        raise OSError("no clock")

    @seconds.setter
    def seconds(self, value: float) -> None:
        return


@pytest.mark.parametrize("error", [Blind(), Unsure(1)], ids=lambda error: type(error).__name__)
def test_an_error_that_cannot_be_looked_at_is_still_its_mails_fate(error: Exception) -> None:
    """Judging it runs the handler's code again; what is kept says of which class it was."""
    outcome = run(raising(error))
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.error) == ("retry", f"{type(error).__name__} cannot be looked at: that raises OSError")


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
    outcome = run(lambda email, context: result)
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
        encoded(result, 1000, "it")


def test_a_circular_result_buries() -> None:
    result: dict[str, Any] = {}
    result["self"] = result
    with pytest.raises(Permanent, match="not JSON"):
        encoded(result, 1000, "it")


def test_a_result_that_is_nested_too_deep_buries() -> None:
    """Alone, and in a batch without its neighbours."""
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    alone, nested, neighbour = run(lambda email, context: deep), *batch_of(lambda emails, contexts: [deep, {}], 1, 2)
    for outcome in (alone, nested):
        assert isinstance(outcome, Failure)
        assert (outcome.verb, "is not JSON" in outcome.error) == ("bury", True)
    assert isinstance(neighbour, Done)


def test_a_batchs_verdict_that_cannot_be_read_fails_its_mail_only() -> None:
    """A dict of the handler's own class."""

    class Broken(dict[str, Any]):
        def items(self) -> Any:
            raise OSError("gone")

    failed, neighbour = batch_of(lambda emails, contexts: [Broken(a=1), {}], 1, 2)
    assert isinstance(failed, Failure)
    assert (failed.verb, failed.error_type) == ("retry", "OSError")
    assert isinstance(neighbour, Done)


def test_the_size_of_a_result_is_counted_in_bytes() -> None:
    """One byte too many is named with the setting."""
    result = {"a": "é" * 10}
    size = len('{"a":""}') + 20
    assert json.loads(encoded(result, size, "it")) == result
    with pytest.raises(Permanent, match=f"has {size} bytes of JSON; RESULT_MAX_BYTES is {size - 1}"):
        encoded(result, size - 1, "it")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_any_json_result_is_read_back_as_it_was_returned(result: dict[str, Any]) -> None:
    assert json.loads(encoded(result, 10**6, "it")) == result


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
    assert load_handler(None, "x") == (summarize, "plain")


@pytest.mark.parametrize(
    "code",
    [
        "def handle(email, context): return {'n': 1}",
        "def handle(email, context, more=2): return {'n': 1}",
        "def handle(*args): return {'n': 1}",
        "class Handler:\n    def __call__(self, email, context): return {'n': 1}\nhandle = Handler()",
        "async def handle(email, context): return {'n': 1}",
        "class Handler:\n    async def __call__(self, email, context): return {'n': 1}\nhandle = Handler()",
        "def handle(emails, contexts): return [{'n': 1}]",
    ],
    ids=["function", "function with a default", "any arguments", "callable object", "async", "async object", "batch"],
)
def test_what_can_be_called_with_a_mail_and_its_context_is_a_handler(module: Path, code: str) -> None:
    module.write_text(code)
    call, kind = load_handler("users_handlers:handle", "x")
    assert run(call, kind=kind) == done('{"n":1}')


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
        ("async def handle(emails, contexts): ...", "handle takes batches, so it must be a plain function"),
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
        load_handler("users_handlers:handle", "WORKER_HANDLER=users_handlers:handle")
    assert str(caught.value).startswith("WORKER_HANDLER=users_handlers:handle: ")
    assert "\n" not in str(caught.value)


def test_a_plain_file_is_a_handler_by_its_path_or_by_its_name_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded once, and what it defines knows its module: dataclasses and pickle need that."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A: x: int\ndef handle(email, context): return {'n': A(1).x}"
    )
    monkeypatch.chdir(tmp_path)
    try:
        by_path, _ = load_handler(f"{tmp_path}/mine.py:handle", "x")
        by_name, _ = load_handler("mine:handle", "x")
        assert by_path is by_name
        assert run(by_path) == done('{"n":1}')
    finally:
        sys.modules.pop("mine", None)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot import .*FileNotFoundError"):
        load_handler(f"{tmp_path}/nothing.py:handle", "x")


# what a handler can say


def test_retry_later_sets_the_delay_and_the_attempt_counts() -> None:
    outcome = run(raising(RetryLater(77)))
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.delay) == ("retry", 77.0)
    last = run(raising(RetryLater(77)), attempts=2)
    assert isinstance(last, Failure)
    assert (last.verb, last.reason) == ("bury", "attempts")


@pytest.mark.parametrize("reason", ["a newsletter", "lone \ud800", "x" * 10_000])
def test_skip_is_done_with_the_reason(reason: str) -> None:
    """Whatever the reason is made of."""
    outcome = run(raising(SkipEmail(reason)))
    assert isinstance(outcome, Done)
    assert outcome.outcome == "skipped"
    assert json.loads(outcome.result)["reason"] == reason[:500].replace("\ud800", "?")


def test_an_open_breaker_postpones_and_counts_no_attempt() -> None:
    """Due at its reopening, at most a second later so that not all come at once."""
    outcome = run(raising(BreakerOpen("crm", 30.0)), attempts=2)
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.delay) == ("postpone", 30.5)


def test_failed_calls_open_the_breaker_of_their_name() -> None:
    """A verdict on the mail is no failure of the other side; the third call is not made."""
    services, calls = memory(), []

    def handler(email: Any, context: Context) -> None:
        with context.breaker("crm"):
            calls.append(context.attempt)
            raise Permanent("no such customer") if context.attempt == 1 else OSError("down")

    verbs = [run(handler, attempts=attempt, services=services) for attempt in (0, 0, 1, 1, 1)]
    assert [outcome.verb for outcome in verbs if isinstance(outcome, Failure)] == ["bury", "bury", "retry", "retry", "postpone"]
    assert calls == [1, 1, 2, 2]


def test_a_step_is_done_once_whatever_comes_after_it() -> None:
    """The second attempt gets what the first one's step returned, also None; another step is another one."""
    steps: dict[str, str] = {}
    calls: list[str] = []

    def book() -> dict[str, int]:
        calls.append("book")
        return {"number": len(calls)}

    def handler(email: Any, context: Context) -> dict[str, Any]:
        booked = context.once("book", book)
        context.once("tell", lambda: calls.append("tell"))
        if context.attempt == 1:
            raise OSError("down")
        return {"booked": booked}

    assert isinstance(run(handler, services=memory(steps)), Failure)
    assert run(handler, attempts=1, services=memory(steps)) == done('{"booked":{"number":1}}')
    assert calls == ["book", "tell"]
    assert steps == {"book": '{"number":1}', "tell": "null"}


def test_a_step_of_an_async_handler_is_awaited() -> None:
    async def book() -> int:
        return 7

    async def handler(email: Any, context: Context) -> dict[str, Any]:
        return {"booked": [await context.once("book", book), context.once("plain", lambda: 8), await context.once("book", book)]}

    assert run(handler, kind="async") == done('{"booked":[7,8,7]}')


@pytest.mark.parametrize("result", [{1, 2}, "x" * 2000], ids=["no JSON", "too large"])
def test_a_step_whose_result_cannot_be_kept_buries(result: object) -> None:
    outcome = run(lambda email, context: context.once("book", lambda: result))
    assert isinstance(outcome, Failure)
    assert (outcome.verb, outcome.error.split(" ")[:5]) == ("bury", ["the", "result", "of", "step", "'book'"])


# batches


def batch_of(call: Call, *numbers: int) -> list[Done | Failure]:
    handler = Handler("users:handle", call, "batch", Policy(attempts=3), 60.0)
    mails = [Started(Delivery(f"{number}-0", 1, fields_of(f"gm:a:{number}")), 0, handler) for number in numbers]
    return handle_batch(mails, [memory() for _ in mails], TERMS, DEADLINE)


def test_each_mail_of_a_batch_gets_its_own_verdict() -> None:
    """A dict or None is done, an exception is what would have been raised for it; what cannot be kept buries that mail alone."""
    outcomes = batch_of(
        lambda emails, contexts: [{"n": emails[0].uid}, None, ValueError("no"), SkipEmail("s"), {"a": {1}}], 1, 2, 3, 4, 5
    )
    assert [outcome.delivery.email_id for outcome in outcomes] == [f"gm:a:{number}" for number in range(1, 6)]
    assert [outcome.outcome if isinstance(outcome, Done) else outcome.verb for outcome in outcomes] == [
        "done",
        "done",
        "retry",
        "skipped",
        "bury",
    ]


@pytest.mark.parametrize("answer", [None, [], [{}], {"a": 1, "b": 2}, "ab"], ids=repr)
def test_a_batch_handler_that_answers_for_other_than_its_mails_buries_them(answer: object) -> None:
    outcomes = batch_of(lambda emails, contexts: answer, 1, 2)
    assert [(outcome.verb, "one verdict a mail" in outcome.error) for outcome in outcomes if isinstance(outcome, Failure)] == [
        ("bury", True)
    ] * 2


def test_a_batch_handler_that_raises_fails_all_its_mails() -> None:
    outcomes = batch_of(raising_batch, 1, 2)
    assert [(outcome.verb, outcome.error) for outcome in outcomes if isinstance(outcome, Failure)] == [("retry", "boom")] * 2


def raising_batch(emails: Any, contexts: Any) -> None:
    raise ValueError("boom")


# several handlers


ROUTES = """
[[route]]
handler = "tests.unit.routed:invoices"
sender_domain = ["supplier.example"]
keyword = ["invoice", "RECHNUNG"]
max_attempts = 2
timeout = 5

[[route]]
handler = "tests.unit.routed:tickets"
mailbox = "Support"
is_auto = false

[[route]]
handler = "tests.unit.routed:labelled"
label = ["VIP", "Boss"]
"""


def routed(tmp_path: Path, text: str = ROUTES) -> Handlers:
    path = tmp_path / "handlers.toml"
    path.write_text(text)
    settings = load_settings({"HANDLERS_FILE": path, "BACKOFF_CAP": 9}, env_file=None)
    return load_handlers(settings.work, load_routes(path))


@pytest.fixture(autouse=True)
def routed_module() -> Iterator[None]:
    module = ModuleType("tests.unit.routed")
    for name in ("invoices", "tickets", "labelled"):
        setattr(module, name, lambda email, context: None)
    sys.modules["tests.unit.routed"] = module
    yield
    del sys.modules["tests.unit.routed"]


@pytest.mark.parametrize(
    ("sender", "mailbox", "labels", "text", "is_auto", "chosen"),
    [
        ("a@supplier.example", "INBOX", [], "your Invoice 7", False, "invoices"),
        ("a@mail.supplier.example", "INBOX", [], "Rechnung", False, "invoices"),
        ("a@notsupplier.example", "INBOX", [], "your invoice", False, "summarize"),
        ("a@supplier.example", "Support", [], "hello", False, "tickets"),
        ("a@supplier.example", "Support", [], "invoice", False, "invoices"),
        ("a@b.example", "Support", [], "", True, "summarize"),
        ("a@b.example", "INBOX", ["Boss"], "", True, "labelled"),
        ("", "INBOX", ["boss"], "", True, "summarize"),
    ],
)
def test_the_first_route_whose_rules_all_hold_wins(
    tmp_path: Path, sender: str, mailbox: str, labels: list[str], text: str, is_auto: bool, chosen: str
) -> None:
    """One value of several is enough; a domain includes what is under it; keywords are literal and ignore case."""
    record = {"from": {"name": "", "address": sender}, "gm_labels": labels, "body_text": text, "is_auto": is_auto}
    fields = {**fields_of("gm:a:1", record=json.dumps(record)), "mailbox": mailbox}
    assert routed(tmp_path).of(fields).spec.rpartition(":")[2] == chosen


def test_a_mail_whose_record_is_broken_goes_to_the_handler_of_all(tmp_path: Path) -> None:
    """Rules about it cannot hold; what the handler makes of it is its business."""
    assert routed(tmp_path).of(fields_of("gm:a:1", record="{")).spec.endswith(":summarize")


def test_a_route_has_its_own_attempts_and_time_out_and_shares_the_rest(tmp_path: Path) -> None:
    first, *_, default = routed(tmp_path).all
    assert (first.policy.attempts, first.policy.cap, first.timeout) == (2, 9.0, 5.0)
    assert (default.policy.attempts, default.policy.cap, default.timeout) == (8, 9.0, 1800.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "not TOML"),
        ("", "there is no [[route]] in it"),
        ("[[rout]]", "rout: no such table; each handler is a [[route]]"),
        ("[[route]]\nmailbox = 'x'", "route 1: handler: is missing"),
        ("[[route]]\nhandler = 'x'", "route 1: handler=x: must look like"),
        ("[[route]]\nhandler = 'a:b'\nlabels = 'x'", "route 1: labels: no such key; did you mean label?"),
        ("[[route]]\nhandler = 'a:b'\nkeyword = []", "route 1: keyword=[]: "),
        ("[[route]]\nhandler = 'a:b'\nmax_attempts = 0", "route 1: max_attempts=0: "),
        ("[[route]]\nhandler = 'a:b'\nis_auto = 'perhaps'", "route 1: is_auto=perhaps: "),
        ("[[route]]\nhandler = 'a:b'\n[[route]]\nhandler = 'a:b'\nlabel = 'x'", "route 1: it has no rule and matches every mail"),
        ("[[route]]\nhandler = 'nowhere_at_all:b'\nlabel = 'x'", "nowhere_at_all:b: cannot import nowhere_at_all"),
    ],
)
def test_a_wrong_file_of_handlers_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises((SettingsError, ConfigurationError)) as caught:
        routed(tmp_path, text)
    assert said in str(caught.value)
    assert "handlers.toml" in str(caught.value)


def test_a_file_of_handlers_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"HANDLERS_FILE=.*: No such file or directory"):
        load_routes(tmp_path / "none.toml")
