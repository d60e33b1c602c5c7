"""Odd mails with the record that their RFC promises: tests/unit/mails/NAME.eml, and beside it NAME.json.

The JSON names its source and every field that is not empty (or false); `body_preview` follows from `body_text`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from src.mail.parse import parse
from src.mail.record import Envelope, Record, record_from_json, record_to_json

MAILS = sorted((Path(__file__).parent / "mails").glob("*.eml"))
ENVELOPE = Envelope("", "", 0, 0, "", 0, "", "", "")


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_an_odd_mail_has_the_record_that_its_rfc_promises(path: Path) -> None:
    """Every field, defects too."""
    wanted = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert wanted.pop("source")
    assert wanted.keys() <= json.loads(record_to_json(Record())).keys()
    record = parse(path.read_bytes(), ENVELOPE)
    assert record.body_preview == " ".join(record.body_text.split())[:200].rstrip()
    assert replace(record, body_preview="") == record_from_json(json.dumps(wanted))


def test_there_are_odd_mails() -> None:
    """An empty directory would pass the test above."""
    assert len(MAILS) >= 60
