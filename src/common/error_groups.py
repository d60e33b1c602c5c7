"""Which errors are one: the group of a dead letter, for the scripts, the worker and the status page. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_ERROR_CHARS = 2_000
MAX_TRACEBACK_CHARS = 8_000

_FRAME = re.compile(r'  File "(?P<file>.+)", line \d+, in (?P<function>.+)')
_GROUP_PREFIX = re.compile(r"^ +\| ", re.MULTILINE)
_LIBRARY = re.compile(r"^<|/(?:site|dist)-packages/|/lib(?:64)?/python\d")
_FRAMEWORK = re.compile(r"/src/(?:worker|common|mail|imap|auth|monitoring)/\w+\.py$")
_WITH_NUMBER = re.compile(r"\S+@\S+|\b[0-9a-fA-F]{8,}\b|[-+]?\b\w*\d\w*\b")
_NUMBERS = re.compile(r"#(?:[.,:/_+-]?#)+")
GROUP_CHARS = 120


@dataclass(frozen=True)
class Group:
    """`first`, `last`: when its letters died; `example`: id of the last one."""

    group: str
    count: int
    first: str
    last: str
    example: str


def grouped(letters: Iterable[tuple[str, str, str]]) -> list[Group]:
    """The groups of `letters` (id, group, when it died; the oldest first), the largest first."""
    found: dict[str, Group] = {}
    for letter_id, name, died in letters:
        before = found.get(name, Group(name, 0, died, died, letter_id))
        found[name] = Group(name, before.count + 1, before.first, died, letter_id)
    return sorted(found.values(), key=lambda group: (-group.count, group.group))


def group_of(fields: Mapping[str, str]) -> str:
    """See `fingerprint`. `fields`: of a dead letter."""
    note = fields.get
    return fingerprint(note("dead_error_type", ""), note("dead_error", ""), note("dead_traceback", ""))


def bounded(error: str, traceback: str) -> tuple[str, str]:
    """Both as they are kept. A long message is cut within the traceback too, or it would push the frames out of it. Safe to repeat."""
    if len(error) > MAX_ERROR_CHARS:
        traceback = traceback.replace(error, error[:MAX_ERROR_CHARS])
    return error[:MAX_ERROR_CHARS], traceback[-MAX_TRACEBACK_CHARS:]


def fingerprint(error_type: str, error: str, traceback: str) -> str:
    """The group of an error, one printable line: `<type> in <file>:<function>`, of the innermost frame that is the user's code (else of
    the innermost one); without a traceback `<type>: <message>`, its numbers, ids and addresses as #. Pure.

    The same for an error as it was raised and as it was kept; line numbers, chained errors and the message do not matter.
    """
    error, traceback = bounded(error, traceback)
    frames = _frames(error_type, error, traceback)
    kind = error_type or "unknown"
    if not frames:
        words = next((line.strip() for line in error.splitlines() if line.strip()), "")
        words = _NUMBERS.sub("#", _WITH_NUMBER.sub("#", words))
        return _plain(f"{kind}: {words}" if words else kind)
    own = [frame for frame in frames if not _LIBRARY.search(frame[0]) and not _FRAMEWORK.search(frame[0])]
    file, function = (own or frames)[-1]
    parts = file.split("/")
    name = "/".join(parts[-2:]) if parts[-1] in ("__init__.py", "__main__.py") else parts[-1]
    return _plain(f"{kind} in {name}:{function}")


def _frames(error_type: str, error: str, traceback: str) -> list[tuple[str, str]]:
    """(file, function) of the frames of the last exception, the innermost last.

    Read backwards from the last exception's own line, of which the text is known: so a message that looks like a traceback is none.
    """
    text = traceback.replace("\\", "/")
    if "Exception Group Traceback" in text:
        text = _GROUP_PREFIX.sub("", text)
    end = text.rfind((f"{error_type}: {error}" if error else error_type).replace("\\", "/"))
    lines = (text[:end] if end >= 0 else text).split("\n")
    last = len(lines) - 1
    if end < 0:  # an error that is not printed as its str(): a SyntaxError, or one whose __str__ fails
        last = next((number for number in range(last, 0, -1) if _FRAME.match(lines[number - 1])), 0)
    found = []
    for line in reversed(lines[:last]):
        frame = _FRAME.match(line)
        if frame:
            found.append((frame["file"], frame["function"]))
        elif not line.startswith(("    ", "  [Previous line")):
            break
    return found[::-1]


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:GROUP_CHARS]
