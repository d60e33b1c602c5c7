"""The parser against the careful path: src.mail.parse and the reference record of compat32 agree, but for what is listed here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from src.mail.parse import parse
from src.mail.record import Address, Envelope
from src.sandbox.generator import KINDS, generate
from tests.support.reference_parse import Reference, reference, squeeze

ODD_MAILS = sorted((Path(__file__).parent / "mails").glob("*.eml"))
ENRICHED = ({"text", "files"}, "text/enriched is a text that is read, compat32 knows plain and HTML only")
ALLOWED: dict[str, tuple[set[str], str]] = {
    "boundary-twice": ({"text"}, "compat32 takes the delimiters of the inner multipart for the outer one's"),
    "boundary-twice-closed": ({"text", "files"}, "compat32 takes the delimiters of the inner multipart for the outer one's"),
    "broken-fold": ({"files"}, "compat32 ends the header at a line that is no field, whatever follows"),
    "byte-order-mark": ({"subject", "senders", "text"}, "compat32 takes the mark for a text and the header for its body"),
    "empty-multipart": ({"text"}, "compat32 drops what stands behind a lone closing delimiter"),
    "forgotten-semicolon": ({"text", "files"}, "compat32 knows no parameter without a semicolon before it"),
    "local-names": ({"recipients"}, "getaddresses takes the first word of a name for an address"),
    "one-bad-byte": ({"text"}, "the reference reads the whole text as windows-1252"),
    "rfc1896-enriched": ENRICHED,
    "rfc2046-4-1-4-unknown-text": ({"text", "files"}, "compat32 shows plain and HTML only"),
    "rfc2046-5-1-4-alternative": ({"files"}, ENRICHED[1]),
    "rfc2047-comma-in-word": ({"senders"}, "getaddresses splits inside of encoded words"),
    "rfc2049-a-complex": ENRICHED,
    "rfc3676-4-5-quoted": ({"text"}, "compat32 does not join flowed lines, whose quote marks then go"),
    "rfc5322-a5-comments": ({"senders", "recipients"}, "getaddresses adds comments to names"),
    "rfc5322-a6-3-obsolete-white-space": (
        {"subject", "senders", "recipients", "text"},
        "compat32 knows no blank before the colon",
    ),
    "rfc8551-3-5-3-signed": ({"files"}, "compat32 leaves broken base64 as it is, we decode as far as it goes"),
}

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


@pytest.mark.parametrize("path", ODD_MAILS, ids=lambda path: path.stem)
def test_odd_mails_agree_or_differ_for_a_reason(path: Path) -> None:
    """They differ in the fields that ALLOWED lists for them, in no other and in all of those."""
    fields, _reason = ALLOWED.get(path.stem, (set(), ""))
    found = differences(path.read_bytes())
    assert found.keys() == fields, found


def test_every_exception_has_its_mail() -> None:
    """No reason outlives what it was for."""
    assert ALLOWED.keys() <= {path.stem for path in ODD_MAILS}


def standard_library_mails() -> list[Path]:
    """The message files of the interpreter's own tests; none where it was installed without them."""
    package = find_spec("test.test_email") if find_spec("test") else None
    folders = package.submodule_search_locations if package else None
    return sorted(path for folder in folders or [] for path in (Path(folder) / "data").glob("msg_*.txt"))


def test_the_standard_librarys_own_mails_agree() -> None:
    """All of them in every field, but for the two whose multiparts have the boundary of the one around them."""
    mails = standard_library_mails()
    if not mails:
        pytest.skip("this interpreter comes without its tests")
    for path in mails:
        fields = {"msg_15.txt": {"text", "files"}, "msg_39.txt": {"files"}}.get(path.name, set())
        assert differences(path.read_bytes()).keys() == fields, path.name
