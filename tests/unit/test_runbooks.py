"""What leads into docs/runbooks leads somewhere: links and their headings, alerts, and the lines of the log."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("deploy/*.md"), *ROOT.glob("docs/**/*.md")])
TROUBLESHOOTING = ROOT / "docs" / "runbooks" / "troubleshooting.md"
PROSE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LEVELS = ("warning", "error", "critical", "exception", "log")
DIRECTIVE = re.compile(r"%[-+.\d]*[a-zA-Z]|%%")
LETTERS = 8  # a row must say so many characters of its line, that it be no row for anything


def prose(page: Path) -> str:
    """Without fenced blocks: a `# comment` in one is no heading."""
    return PROSE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The names under which GitHub shows the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    """Every relative link of every document."""
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page))):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_every_alert_has_a_heading_in_a_runbook() -> None:
    """runbook_url is a page of this repository and a heading with the alert's own name."""
    rules = [rule for group in yaml.safe_load((ROOT / "config" / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    assert rules
    for rule in rules:
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert anchor == rule["alert"].lower()
        assert anchor in anchors(ROOT / page), rule["alert"]


def test_the_headings_of_a_page_are_named_as_github_does(tmp_path: Path) -> None:
    """Punctuation goes, blanks become hyphens, a second one gets a number, comments in blocks are none."""
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c: [d](e.md)\n\n```\n# no heading\n```\n\n## Twice\n\n## Twice\n")
    assert anchors(page) == {"a-b-c-d", "twice", "twice-1"}


# lines of the log


def rows() -> list[str]:
    """The lines that the page names, with `…` for what differs."""
    part = TROUBLESHOOTING.read_text().partition("## By log line\n")[2].partition("## By alert\n")[0]
    cells = [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| ")]
    return [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def logged() -> Iterator[tuple[str, str]]:
    """(where, format) of every line at WARNING or above that says something itself; `%s: %s` hands on the text of an error."""
    files = [ROOT / "producer.py", ROOT / "worker.py", *sorted((ROOT / "src").rglob("*.py"))]
    tools = ("sandbox", "backup", "testing")  # run by a person, who reads the line where it is written
    for file in files:
        if set(tools) & set(file.parts):
            continue
        for call in ast.walk(ast.parse(file.read_text())):
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "_log"), attr=attr), args=[*arguments]) if (
                    attr in LEVELS
                ):
                    text = next(a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str))
                    if len(re.sub(r"\W", "", DIRECTIVE.sub("", text))) >= LETTERS:
                        yield f"{file.relative_to(ROOT)}:{call.lineno}", text


def says(row: str, text: str) -> bool:
    """Is one a part of the other, whatever stands where they have a blank? A row may cut a long line short; a line may get its text from
    an error that the row names."""
    words, parts = [piece.strip() for piece in row.split("…")], DIRECTIVE.split(text)
    if sum(map(len, words)) < LETTERS:
        return False
    within = re.search(".*".join(map(re.escape, words)), DIRECTIVE.sub("…", text))
    return bool(within or re.search(".*".join(map(re.escape, parts)), row))


@pytest.mark.parametrize(("where", "text"), [pytest.param(*line, id=line[0].rpartition("/")[2]) for line in logged()])
def test_every_warning_and_error_stands_in_troubleshooting(where: str, text: str) -> None:
    """Its table *By log line* has a row whose words are in it."""
    assert any(says(row, text) for row in rows()), f"{where}: {text}"


def test_every_row_is_a_line_that_the_code_can_write() -> None:
    """Nothing in the table is left over from an older version: each piece of a row stands in some text of the code."""
    files = [ROOT / "producer.py", ROOT / "worker.py", *(ROOT / "src").rglob("*.py"), *(ROOT / "config").rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    whole = "\n".join(DIRECTIVE.sub("…", text) for text in texts)
    pieces = [piece.strip() for row in rows() for piece in re.split("[…:;=]", row) if len(piece.strip()) >= LETTERS]
    assert len(pieces) > 50
    assert not [piece for piece in pieces if piece not in whole]
