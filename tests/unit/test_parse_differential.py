"""The parser against the careful path: src.mail.parse and the reference record of compat32 agree, but for what is listed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.mail.parse import parse
from src.mail.record import Address, Envelope
from src.sandbox.generator import KINDS, generate
from tests.support.reference_parse import Reference, reference, squeeze

ENVELOPE = Envelope("ann@example.org", "INBOX", 7, 3, "2024-05-01T12:00:00Z", 1234, "gm:ann@example.org:5", "c-1", "")


def ours(raw: bytes) -> Reference:
    """Our record in the shape of the reference."""
    record = parse(raw, ENVELOPE)
    assert not record.body_truncated, "a mail too long to compare"

    def pairs(*people: Address) -> list[tuple[str, str]]:
        found = [(squeeze(person.name), squeeze(person.address)) for person in people]
        return [pair for pair in found if pair != ("", "")]

    return Reference(
        subject=squeeze(record.subject),
        senders=pairs(record.from_),
        recipients=pairs(*record.to, *record.cc, *record.reply_to),
        text=squeeze(record.body_text),
        files=[(file.content_type, file.size, file.sha256) for file in record.attachments],
    )


def differences(raw: bytes) -> dict[str, tuple[object, object]]:
    """field -> (reference, ours) where they differ."""
    theirs, mine = vars(reference(raw)), vars(ours(raw))
    return {name: (theirs[name], mine[name]) for name in theirs if theirs[name] != mine[name]}


def compare(seed: int, count: int) -> dict[str, int]:
    """How many mails of each kind agreed. AssertionError: one did not."""
    agreed = dict.fromkeys(KINDS, 0)
    for number, sample in enumerate(generate(seed, count)):
        found = differences(sample.raw)
        assert not found, (seed, number, sample.kind, found)
        agreed[sample.kind] += 1
    return agreed


def test_a_thousand_generated_mails_agree() -> None:
    """Every kind of the generator, its hostile ones too, and every field that is compared."""
    agreed = compare(31, 1000)
    assert sum(agreed.values()) == 1000
    assert min(agreed.values()) > 0


@pytest.mark.full
def test_ten_thousand_generated_mails_agree() -> None:
    """The same, ten times as many."""
    assert sum(compare(32, 10_000).values()) == 10_000
