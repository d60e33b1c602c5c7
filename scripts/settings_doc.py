"""Makes .env.example and the table of docs/settings.md from config/settings.py, or checks that they are up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

import _path  # noqa: F401  # before the project's own modules
from config.settings import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
ENV, PAGE = ROOT / ".env.example", ROOT / "docs" / "settings.md"
BEGIN, END = "<!-- settings: begin (scripts/settings_doc.py --write) -->", "<!-- settings: end -->"
SIGNS: tuple[tuple[type[Any], str, str], ...] = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))
HEAD = """\
# Settings of producer.py and worker.py: copy this file to .env and change what you need. It is valid as it stands: every line
# below is commented out and shows the default. A variable of the environment wins over this file, a command-line flag over both.
# Made by scripts/settings_doc.py from config/settings.py.
"""


@dataclass(frozen=True)
class Setting:
    """`default`: as it would stand in .env, "" for unset. `rule`: which values are allowed, "" for any."""

    name: str
    default: str
    rule: str
    meaning: str


def settings(section: str) -> Iterator[Setting]:
    for field in SECTIONS[section].model_fields.values():
        yield Setting(str(field.alias), default_of(field), rule_of(field), field.description or "")


def default_of(field: FieldInfo) -> str:
    match field.default:
        case None:
            return ""
        case bool() as flag:
            return str(flag).lower()
        case tuple() as names:
            return ",".join(map(str, names))
        case value:
            return str(value)


def rule_of(field: FieldInfo) -> str:
    """`a|b` for a choice, and the bounds."""
    choice = [part for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is Literal]
    if field.annotation is bool:
        return "true|false"
    bounds = ", ".join(
        f"{sign} {getattr(limit, name):g}" for limit in limits_of(field) for kind, name, sign in SIGNS if isinstance(limit, kind)
    )
    return " or ".join(filter(None, ["|".join(map(str, get_args(choice[0]))) if choice else "", bounds]))


def limits_of(field: FieldInfo) -> list[object]:
    nested = [limit for part in get_args(field.annotation) if get_origin(part) is Annotated for limit in part.__metadata__]
    return [*field.metadata, *nested]


def env_text() -> str:
    """The text of .env.example."""
    parts = [HEAD]
    for section in SECTIONS:
        parts.append(f"\n# --- {section} ---\n")
        for setting in settings(section):
            rule = f" ({setting.rule})" if setting.rule else ""
            said = fill(setting.meaning + rule, 120, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
            parts.append(f"\n{said}\n#{setting.name}={setting.default}\n")
    return "".join(parts)


def table_text() -> str:
    """The table of docs/settings.md, in Markdown."""
    lines = []
    for section in SECTIONS:
        lines += [f"**{section}**", "", "| Variable | Default | Allowed | Meaning |", "|---|---|---|---|"]
        for setting in settings(section):
            default = f"`{setting.default}`" if setting.default else "unset"
            lines.append(f"| `{setting.name}` | {default} | {cell(setting.rule)} | {cell(setting.meaning)} |")
        lines.append("")
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def page_with_table(page: str) -> str:
    """The page with the table between its two marks. Raises ValueError where the marks are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table_text()}\n{END}{after}"


def main() -> int:
    """Exit code 0; 1 with --check where a file is not what config/settings.py makes of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--env", action="store_true", help="print the text of .env.example")
    what.add_argument("--table", action="store_true", help="print the table of docs/settings.md")
    what.add_argument("--write", action="store_true", help="bring both files up to date")
    what.add_argument("--check", action="store_true", help="say which of the files is out of date")
    options = parser.parse_args()
    if options.env or options.table:
        sys.stdout.write(env_text() if options.env else table_text())
        return 0
    page = PAGE.read_text(encoding="utf-8")
    stale = False
    for path, wanted in ((ENV, env_text()), (PAGE, page_with_table(page))):
        if path.exists() and path.read_text(encoding="utf-8") == wanted:
            continue
        if options.write:
            path.write_text(wanted, encoding="utf-8")
        else:
            stale = True
            print(f"{path.name} is not what config/settings.py says: run python scripts/settings_doc.py --write", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
