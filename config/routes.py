"""Several handlers in one worker: the TOML file HANDLERS_FILE, one table for each, tried in order, the first match wins.

    [[route]]
    handler = "invoices:handle"
    sender_domain = ["supplier.example", "shop.example"]
    keyword = ["invoice", "rechnung"]
    max_attempts = 3

    [[route]]
    handler = "tickets.py:handle"
    mailbox = "Support"
    is_auto = false

All rules of a route must hold; of a rule with several values one must. What no route matches goes to WORKER_HANDLER. Attempts,
backoff and time-out of a route win over the settings of all.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from config.settings import HANDLER, Positive, SettingsError


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Several = Annotated[tuple[Text, ...], BeforeValidator(_several), Field(min_length=1)]


class Route(BaseModel):
    """Rules (None: any mail), and what holds for this handler alone (None: as for all)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    handler: Annotated[str, StringConstraints(pattern=HANDLER.pattern)]
    mailbox: Several | None = None
    label: Several | None = None
    sender_domain: Several | None = None
    keyword: Several | None = None
    is_auto: bool | None = None

    max_attempts: Annotated[int, Field(ge=1)] | None = None
    backoff_base: Positive | None = None
    backoff_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    backoff_cap: Positive | None = None
    backoff_jitter: Annotated[float, Field(ge=0, le=1)] | None = None
    timeout: Positive | None = None

    @property
    def rules(self) -> dict[str, Any]:
        """The rules that it has, by their keys in the file."""
        return {rule: getattr(self, rule) for rule in RULES if getattr(self, rule) is not None}


RULES = ("mailbox", "label", "sender_domain", "keyword", "is_auto")


def load_routes(path: Path | None) -> tuple[Route, ...]:
    """The routes of HANDLERS_FILE, () without one. Raises SettingsError: one line that names file, route, key and rule."""
    if path is None:
        return ()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"HANDLERS_FILE={path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"HANDLERS_FILE={path}: not TOML: {error}") from None
    tables = content.pop("route", None)
    if content:
        raise SettingsError(f"{path}: {next(iter(content))}: no such table; each handler is a [[route]]")
    if not isinstance(tables, list) or not tables:
        raise SettingsError(f"{path}: there is no [[route]] in it")
    routes = tuple(_route(path, number, table) for number, table in enumerate(tables, 1))
    for number, route in enumerate(routes[:-1], 1):
        if not route.rules:
            raise SettingsError(
                f"{path}: route {number}: it has no rule and matches every mail, so the routes after it never run"
            )
    return routes


def _route(path: Path, number: int, table: Any) -> Route:
    try:
        return Route.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    title = f"{path}: route {number}: " + (f"{key}" if key else "")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Route.model_fields, 1)
        raise SettingsError(f"{title}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
    if first["type"] == "missing":
        raise SettingsError(f"{title}: is missing; it names package.module:function or path/to/file.py:function")
    if first["type"] == "string_pattern_mismatch":
        raise SettingsError(f"{title}={first['input']}: must look like package.module:function or path/to/file.py:function")
    message = first["msg"].removeprefix("Value error, ")
    raise SettingsError(f"{title}={first['input']}: {message[:1].lower()}{message[1:]}")
