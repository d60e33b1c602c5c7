"""The group of an error: what is one error stays one, as raised and as kept in the dead letters."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from src.common.error_groups import bounded, fingerprint
from src.worker.dlq import DeadLetter
from src.worker.processor import TRACEBACK_FRAMES

HERE = "test_fingerprint.py"


def raised(call: Callable[[], object]) -> tuple[str, str, str]:
    """(type, message, traceback) of what `call` raises, as a worker has them."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  # whatever the test lets it raise
        return type(error).__name__, str(error), "".join(traceback.format_exception(error, limit=-TRACEBACK_FRAMES))
    raise AssertionError("nothing was raised")


def group(call: Callable[[], object]) -> str:
    """Its group, which must be that of the dead letter it becomes."""
    error_type, error, frames = raised(call)
    kept_error, kept_frames = bounded(error, frames)
    letter = DeadLetter("1-0", {"dead_error_type": error_type, "dead_error": kept_error, "dead_traceback": kept_frames})
    assert letter.group == fingerprint(error_type, error, frames)
    return letter.group


def charge(amount: object) -> None:
    if amount == 1:
        raise ValueError("customer 17 has no card")
    raise ValueError(f"customer {amount!r} has no card")


IMITATION = """no

Traceback (most recent call last):
  File "/app/evil.py", line 3, in evil
    pay()
ValueError: inner

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/app/evil.py", line 3, in evil
    pay()
"""


def test_type_and_place_of_the_users_code() -> None:
    """Message and line do not matter; function and type do."""
    assert group(lambda: charge(1)) == f"ValueError in {HERE}:charge"
    assert group(lambda: charge(2)) == group(lambda: charge("x\ny")) == f"ValueError in {HERE}:charge"
    assert group(lambda: {}["missing"]) == f"KeyError in {HERE}:<lambda>"  # type: ignore[index]


def test_library_frames_are_not_the_place() -> None:
    """json and re raise deep inside; the place is who called them."""
    assert group(lambda: json.loads("{")) == f"JSONDecodeError in {HERE}:<lambda>"
    assert group(lambda: re.compile("(")) == f"error in {HERE}:<lambda>"


def test_without_the_users_code_the_innermost_frame_is_the_place() -> None:
    """The framework's own error: still a place."""
    frames = (
        'Traceback (most recent call last):\n  File "/srv/src/worker/processor.py", line 9, in encoded\n    raise Permanent(x)\n'
    )
    assert (
        fingerprint("Permanent", "x 5", f"{frames}src.common.exceptions.Permanent: x 5\n") == "Permanent in processor.py:encoded"
    )


def test_a_handler_beside_a_package_of_the_same_name() -> None:
    """`__init__.py` says nothing: its folder is named too."""
    frames = 'Traceback (most recent call last):\n  File "/srv/shop/__init__.py", line 9, in pay\n    1 / 0\nZeroDivisionError: by zero\n'
    assert fingerprint("ZeroDivisionError", "by zero", frames) == "ZeroDivisionError in shop/__init__.py:pay"


def chained() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        raise RuntimeError(f"order {id(error)} is broken") from error


def while_handling() -> None:
    try:
        charge(1)
    except ValueError:
        _ = {}["x"]  # type: ignore[var-annotated]


def same_message() -> None:
    try:
        raise ValueError("twice")
    except ValueError as error:
        raise ValueError("twice") from error


def test_of_chained_errors_the_last_one_counts() -> None:
    """`from` and `during handling`: type and place of what reached the worker, whatever it came from."""
    assert group(chained) == f"RuntimeError in {HERE}:chained"
    assert group(while_handling) == f"KeyError in {HERE}:while_handling"
    assert group(same_message) == f"ValueError in {HERE}:same_message"


def test_the_cause_may_imitate_a_traceback() -> None:
    """The message of the error that came first holds frames: they are not the last error's."""

    def outer() -> None:
        try:
            raise ValueError(IMITATION)
        except ValueError as error:
            raise RuntimeError("second") from error

    assert group(outer) == f"RuntimeError in {HERE}:outer"


@pytest.mark.parametrize(
    "message",
    [
        "first\nsecond\nthird",
        IMITATION,
        IMITATION + "x" * 9000,
        "x" * 9000 + IMITATION,
        '\n  File "/app/evil.py", line 1, in evil',
        "ValueError: ValueError: x",
        "",
        " ",
        "no \udcff.txt",
        "C:\\temp\\file",
    ],
    ids=["lines", "imitation", "then long", "long then", "frame", "itself", "empty", "blank", "surrogate", "backslash"],
)
def test_no_message_moves_its_error_to_another_group(message: str) -> None:
    """Many lines, lines that look like frames, messages longer than what is kept, none at all."""

    def fails() -> None:
        raise ValueError(message)

    assert group(fails) == f"ValueError in {HERE}:fails"


def test_another_line_of_the_same_function_is_the_same_group() -> None:
    """A handler that was edited between two attempts, or fails in two places of one function."""

    def variant(lines: int) -> str:
        module = ModuleType("handler")
        source = "def handle():\n" + "    pass\n" * lines + "    raise ValueError('x')\n"
        exec(compile(source, "/app/handler.py", "exec"), module.__dict__)
        return group(module.handle)

    assert {variant(lines) for lines in (0, 3, 40)} == {"ValueError in handler.py:handle"}


def test_errors_that_are_printed_otherwise_than_by_their_text(tmp_path: Path) -> None:
    """A SyntaxError of generated code, an exception group, notes, a recursion without end."""

    def syntax() -> None:
        compile("a b", str(tmp_path / "generated.py"), "exec")

    def several() -> None:
        raise ExceptionGroup("two things", [ValueError("1"), KeyError("2")])

    def noted() -> None:
        error = ValueError("x")
        error.add_note('see\n  File "/app/note.py", line 1, in note')
        raise error

    def endless(depth: int = 0) -> None:
        endless(depth + 1)

    assert group(syntax) == f"SyntaxError in {HERE}:syntax"
    assert group(several) == f"ExceptionGroup in {HERE}:several"
    assert group(noted) == f"ValueError in {HERE}:noted"
    assert group(endless) == f"RecursionError in {HERE}:endless"


def test_an_error_whose_text_cannot_be_had() -> None:
    """`__str__` raises: the worker writes something else than the traceback shows."""

    class Broken(Exception):
        def __str__(self) -> str:
            raise KeyError

    def fails() -> None:
        raise Broken

    try:
        fails()
    except Broken as error:
        frames = "".join(traceback.format_exception(error))
    assert fingerprint("Broken", "(str() of the error raised KeyError)", frames) == f"Broken in {HERE}:fails"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (
            "started alone 3 times and never finished",
            "started alone 5 times and never finished",
            "E: started alone # times and never finished",
        ),
        ("killed by signal 11 after 10.5 s", "killed by signal 9 after 7 s", "E: killed by signal # after # s"),
        ("object at 0x7f01ab", "object at 0x7f99ff", "E: object at #"),
        ("order 550e8400-e29b-41d4-a716-446655440000", "order 00000000-0000-0000-0000-00000000000a", "E: order #"),
        ("no customer bob@example.org", "no customer eve@shop.example", "E: no customer #"),
        ("digest deadbeefcafe of msg_1a2b", "digest cafedeadbeef of msg_77", "E: digest # of #"),
        ("10.0.0.1:5432 refuses", "10.0.0.2:5433 refuses", "E: # refuses"),
        ("\n\nfirst words 1\nsecond 2", "first words 2", "E: first words #"),
    ],
)
def test_without_a_traceback_the_message_without_numbers(one: str, other: str, expected: str) -> None:
    """Poison, a child process that died, foreign entries."""
    assert fingerprint("E", one, "") == fingerprint("E", other, "") == expected


def test_a_group_is_one_printable_line() -> None:
    """Whatever an error is called and says: it stands in a log and on a command line."""
    name = fingerprint("E\x1b[31m", "a\x07" + "word " * 100, "")
    assert name.isprintable()
    assert len(name) == 120


def test_a_letter_without_notes_has_a_group() -> None:
    """Somebody else's entry among the dead letters."""
    assert DeadLetter("1-0", {"hello": "world"}).group == "unknown"
