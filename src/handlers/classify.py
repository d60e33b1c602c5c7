"""Labels and a priority for each mail, from a file of keyword rules: `WORKER_HANDLER=src.handlers.classify:handle`.

The rules stand in CLASSIFY_RULES (TOML, see config/classify.toml). Keywords are literals: no pattern language, so no mail can
make one run for long. Case, the width of characters and line breaks do not matter.
"""

from __future__ import annotations

import tomllib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import SettingsConfigDict

from src.common.exceptions import ConfigurationError
from src.handlers.settings import HandlerSettings, read
from src.mail.record import Email

Place = Literal["subject", "text", "sender", "attachments"]
Priority = Literal["low", "normal", "high", "urgent"]
RANK: dict[Priority, int] = {"low": 0, "normal": 1, "high": 2, "urgent": 3}


class ClassifySettings(HandlerSettings):
    model_config = SettingsConfigDict(env_prefix="CLASSIFY_")

    rules: Path = Field(Path("config/classify.toml"), description="File of the rules (TOML).")


class Rule(BaseModel):
    """`keywords` are folded when the rule is made; one of them in one of the places, and the rule applies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(min_length=1)
    keywords: tuple[str, ...] = Field(min_length=1)
    priority: Priority = "normal"
    places: tuple[Place, ...] = Field(("subject", "text"), alias="in", min_length=1)
    whole_words: bool = True

    @field_validator("keywords")
    @classmethod
    def _folded(cls, keywords: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(folded(keyword) for keyword in keywords)
        if "" in found:
            raise ValueError("an empty keyword would match every mail")
        return found


class Rules(BaseModel):
    """`priority`: of mail that no rule applies to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    priority: Priority = "normal"
    rule: tuple[Rule, ...] = ()


def handle(email: Email, context: object) -> dict[str, Any]:
    """Result: `{"priority": "high", "labels": ["billing"]}`, labels in the order of the rules."""
    return classify(prepare(), email)


@cache
def prepare() -> Rules:
    """Read the rules, once. Raises ConfigurationError."""
    return load_rules(read(ClassifySettings).rules)


def load_rules(path: Path) -> Rules:
    """Raises ConfigurationError: what is wrong and where, in one line."""
    try:
        return Rules.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"CLASSIFY_RULES={path}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        raise ConfigurationError(f"CLASSIFY_RULES={path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None


def classify(rules: Rules, email: Email) -> dict[str, Any]:
    """The highest priority and all labels of the rules that apply."""
    texts: dict[Place, str] = {
        "subject": folded(email.subject),
        "text": folded(email.text),
        "sender": folded(str(email.sender)),
        "attachments": folded("\n".join(attachment.name for attachment in email.attachments)),
    }
    applying = [rule for rule in rules.rule if applies(rule, [texts[place] for place in rule.places])]
    return {
        "priority": highest(rule.priority for rule in applying) if applying else rules.priority,
        "labels": list(dict.fromkeys(rule.label for rule in applying)),
    }


def highest(priorities: Iterable[Priority]) -> Priority:
    return max(priorities, key=RANK.__getitem__)


def applies(rule: Rule, texts: Sequence[str]) -> bool:
    """Whether one of the rule's keywords stands in one of the folded `texts`."""
    return any(contains(text, keyword, rule.whole_words) for text in texts for keyword in rule.keywords)


def contains(text: str, keyword: str, whole_words: bool) -> bool:
    """`whole_words`: no letter or digit right before or behind it. Both are folded."""
    start = text.find(keyword)
    while start >= 0:
        end = start + len(keyword)
        if not whole_words or not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum()):
            return True
        start = text.find(keyword, start + 1)
    return False


def folded(text: str) -> str:
    """Compatibility forms made plain, case folded (twice: folding may undo the form), every run of white space one blank."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", plain).split())
