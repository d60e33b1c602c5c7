"""The documents say what the code and the tree say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
STATES = ("done", "part", "not yet")


def test_env_example_and_the_table_are_made_from_the_settings() -> None:
    """scripts/settings_doc.py finds nothing to change in .env.example and docs/settings.md."""
    command = [sys.executable, "scripts/settings_doc.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_check_of_the_settings_can_fail(tmp_path: Path) -> None:
    """With an .env.example that names a setting wrongly, the check says so and exits with 1."""
    wrong = tmp_path / ".env.example"
    wrong.write_text((ROOT / ".env.example").read_text().replace("#STREAM_MAXLEN", "#STREAM_MAX"))
    program = f"import settings_doc, pathlib, sys; settings_doc.ENV = pathlib.Path({str(wrong)!r}); sys.exit(settings_doc.main())"
    command = [sys.executable, "-c", program, "--check"]
    checked = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert ".env.example is not what config/settings.py says" in checked.stderr


def rows(kind: str) -> list[str]:
    """The states of the lines of one kind of table (Task, Check, Risk) in PROGRESS.md."""
    found, inside = [], False
    for line in (ROOT / "PROGRESS.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == kind:
            inside = True
        elif inside and not cells[0].startswith("---"):
            found.append(cells[1])
    return found


@pytest.mark.parametrize(("kind", "expected"), [("Task", 42), ("Check", 26), ("Risk", 6)])
def test_progress_lists_every_line_of_the_brief_and_counts_them(kind: str, expected: int) -> None:
    """42 tasks, 26 checks, 6 risks, each with a state; the totals at the top are their sums."""
    states = rows(kind)
    assert len(states) == expected
    counted = Counter(states)
    assert set(counted) <= set(STATES)
    line = f"| {kind.lower()}s | {' | '.join(str(counted[state]) for state in STATES)} | {len(states)} |"
    assert line in (ROOT / "PROGRESS.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_that_pages_name_exist(page: Path) -> None:
    """Relative links lead somewhere; tests named in PROGRESS.md are there."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for path, name in re.findall(r"\b((?:unit|integration)/test_\w+\.py)(?:::(test_\w+))?", text):
        assert (ROOT / "tests" / path).exists(), path
        assert f"def {name}" in (ROOT / "tests" / path).read_text(), name
