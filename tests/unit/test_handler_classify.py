"""Keywords and priority from a rules file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from src.common.exceptions import ConfigurationError
from src.handlers import classify
from src.handlers.classify import Rules, load_rules
from src.mail.record import Email
from src.testing import context
from tests.support.daemons import ROOT

CONTEXT = context(Email({"email_id": "gm:a@example.org:1"}))


def email(subject: str = "", text: str = "", sender: str = "a@example.org", *attachments: str) -> Email:
    record: dict[str, Any] = {
        "from": {"name": "", "address": sender},
        "body_text": text,
        "attachments": [{"name": name, "content_type": "a/b", "size": 1, "sha256": ""} for name in attachments],
    }
    return Email({"subject": subject, "record": json.dumps(record)})


def rules(*given: dict[str, Any], priority: str = "normal") -> Rules:
    return Rules.model_validate({"priority": priority, "rule": given})


def labels(keyword: str, mail: Email, **rule: Any) -> list[str]:
    found = classify.classify(rules({"label": "found", "keywords": [keyword], **rule}), mail)["labels"]
    assert isinstance(found, list)
    return found


def test_highest_priority_and_all_labels_in_order_of_the_rules() -> None:
    """Three rules apply, two with one label: the highest priority, each label once."""
    given = rules(
        {"label": "money", "keywords": ["invoice"], "priority": "high"},
        {"label": "news", "keywords": ["unsubscribe"], "priority": "low"},
        {"label": "money", "keywords": ["payment"]},
        {"label": "other", "keywords": ["nothing of this mail"], "priority": "urgent"},
    )
    assert classify.classify(given, email("Invoice", "payment … unsubscribe")) == {
        "priority": "high",
        "labels": ["money", "news"],
    }


def test_low_is_not_raised_by_the_default() -> None:
    """Mail that a rule calls low is low, though mail without a rule is normal; without a rule the default stands."""
    given = rules({"label": "news", "keywords": ["sale"], "priority": "low"})
    assert classify.classify(given, email("sale"))["priority"] == "low"
    assert classify.classify(given, email("hello")) == {"priority": "normal", "labels": []}


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("invoice", "INVOICE 17"),
        ("payment due", "your payment\r\n\t due today"),
        ("invoice", "ｉｎｖｏｉｃｅ"),
        ("ﬁle", "the FILE"),
        ("c++", "we write c++, not c"),
        ("a-a", "xa-a-a"),
        ("é", "e\u0301"),
    ],
)
def test_found_whatever_its_form(keyword: str, text: str) -> None:
    """Case, folds, width, composed forms, line breaks and overlapping occurrences do not hide a keyword."""
    assert labels(keyword, email(text=text), **{"in": ["text"]}) == ["found"]


def test_case_folding_of_sharp_s() -> None:
    """ß and SS are one: `STRASSE` stands in `Straße`."""
    assert labels("STRASSE", email("Große Straße")) == ["found"]


@pytest.mark.parametrize(
    ("keyword", "text"), [("pay", "payload"), ("pay", "repay"), ("17", "2017"), ("in.oice", "invoice"), (".*", "all")]
)
def test_not_found_inside_words_and_no_pattern(keyword: str, text: str) -> None:
    """A keyword is no part of a longer word or number, and its characters mean themselves."""
    assert labels(keyword, email(text=text)) == []


def test_inside_words_on_request() -> None:
    """whole_words = false finds a keyword where words have no blanks between them."""
    assert labels("請求書", email("10月の請求書です")) == []
    assert labels("請求書", email("10月の請求書です"), whole_words=False) == ["found"]


def test_places() -> None:
    """A rule looks where it says: sender and attachment names only on request."""
    mail = email("s", "t", "billing@shop.example", "contract.pdf")
    assert labels("shop.example", mail) == []
    assert labels("shop.example", mail, **{"in": ["sender"]}) == ["found"]
    assert labels("contract.pdf", mail, **{"in": ["attachments"]}) == ["found"]


def test_hostile_text_is_searched_to_its_end() -> None:
    """64 KiB of near misses, which hold a backtracking pattern for hours, hide nothing that follows them."""
    assert labels("aaaaaaaaab", email(text="a" * 65_000 + " aaaaaaaaab")) == ["found"]


def test_shipped_rules_are_valid() -> None:
    """config/classify.toml loads, and does what its comments say."""
    shipped = load_rules(ROOT / "config" / "classify.toml")
    assert classify.classify(shipped, email("Production down!")) == {"priority": "urgent", "labels": ["incident"]}
    assert classify.classify(shipped, email("x", "", "", "Invoice 4.pdf")) == {"priority": "high", "labels": ["billing"]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[rule]]\nlabel = "a"\nkeywords = ["x"]\npriority = "top"', "rule.1.priority: Input should be 'low', 'normal', 'high'"),
        ('[[rule]]\nlabel = "a"\nkeywords = ["x"]\n[[rule]]\nlabel = "b"', "rule.2.keywords: Field required"),
        ('[[rule]]\nlabel = "a"\nkeywords = [" "]', "rule.1.keywords: an empty keyword would match every mail"),
        ('[[rule]]\nlabel = "a"\nkeywords = ["x"]\nregex = "y"', "rule.1.regex: Extra inputs are not permitted"),
        ("[[rule", "Expected ']]'"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    """The line names the setting, the file, the rule by its number and what is wrong with it."""
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_rules(path)
    assert str(caught.value).startswith(f"CLASSIFY_RULES={path}: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """A rules file that is not there is named."""
    with pytest.raises(ConfigurationError, match=r"^CLASSIFY_RULES=.*/none\.toml: .*No such file"):
        load_rules(tmp_path / "none.toml")


def test_handle_reads_its_rules_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler as the worker calls it."""
    (tmp_path / "rules.toml").write_text('[[rule]]\nlabel = "a"\nkeywords = ["x"]\npriority = "urgent"')
    monkeypatch.setenv("CLASSIFY_RULES", str(tmp_path / "rules.toml"))
    classify.prepare.cache_clear()
    try:
        assert classify.handle(email("x"), CONTEXT) == {"priority": "urgent", "labels": ["a"]}
    finally:
        classify.prepare.cache_clear()
