"""The generator's mail is deterministic, complete, and what each kind says it is."""

from __future__ import annotations

import email
import email.policy
import hashlib
from email.header import decode_header, make_header

import pytest

from src.sandbox.generator import KINDS, generate


def test_a_seed_is_one_set_of_mails() -> None:
    """Same seed, same octets, whatever the count; another seed, other octets."""
    first = list(generate(5, 40))
    assert list(generate(5, 10)) == first[:10]
    assert list(generate(6, 10)) != first[:10]
    digest = hashlib.sha256(b"".join(sample.raw for sample in first)).hexdigest()
    assert (
        digest == "5f687226bd4c8d757b8bf58bafabea898af31382a3a24241e5fe0267707e05e7"
    )  # pins the octets: a change of the generator is a decision


def test_every_kind_comes_up_and_sizes_are_those_of_mail() -> None:
    """Among 1,000 mails all kinds; most between 1 and 60 KB; no two Message-IDs alike; senders repeat."""
    samples = list(generate(1, 1000))
    assert {sample.kind for sample in samples} == set(KINDS)
    assert sum(1_000 <= len(sample.raw) <= 60_000 for sample in samples) > 700
    assert max(len(sample.raw) for sample in samples) < 100_000
    parsed = [email.message_from_bytes(sample.raw) for sample in samples]
    ids = [message["Message-ID"] for message in parsed if message["Message-ID"]]
    assert len(ids) == len(set(ids)) == sum(sample.kind != "hostile_no_header" for sample in samples)
    assert len({str(message["From"]) for message in parsed}) < 15


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("hostile")])
def test_everyday_mail_is_well_formed(kind: str) -> None:
    """The standard library finds no defect anywhere, CRLF everywhere, and the subject that was promised."""
    for sample in generate(2, 5, [kind]):
        assert sample.raw.count(b"\n") == sample.raw.count(b"\r\n")
        message = email.message_from_bytes(sample.raw, policy=email.policy.default)
        assert [part.defects for part in message.walk() if part.defects] == []
        header = email.message_from_bytes(sample.raw)["Subject"]
        assert str(make_header(decode_header(header))) == sample.subject
        for part in message.walk():
            if part.get_content_maintype() == "text":
                part.get_content()


@pytest.mark.parametrize(
    ("kind", "mark"),
    [
        ("auto_reply", b"Auto-Submitted: auto-replied"),
        ("bounce", b"Content-Type: message/delivery-status"),
        ("mailing_list", b"List-Id: "),
        ("calendar", b"BEGIN:VCALENDAR"),
        ("forward", b"Content-Type: message/rfc822"),
        ("file_names", b"filename*0*="),
        ("invoice", b"Invoice"),
        ("iso_2022_jp", b"\x1b$B"),
        ("koi8_r", "счёт".encode("koi8-r")),
        ("hostile_script", b"Subject: <script>"),
        ("hostile_raw_subject", b"Subject: \xdcbergr\xf6\xdfe"),
    ],
)
def test_a_kind_is_what_it_says(kind: str, mark: bytes) -> None:
    """Each kind carries the octets that make it one."""
    for sample in generate(4, 3, [kind]):
        assert sample.kind == kind
        assert mark in sample.raw


def test_hostile_kinds_are_hostile() -> None:
    """No Date, no header, CRLF inside an encoded word, a last boundary that never comes."""
    (undated,) = generate(1, 1, ["hostile_no_date"])
    assert email.message_from_bytes(undated.raw)["Date"] is None
    (bare,) = generate(1, 1, ["hostile_no_header"])
    assert email.message_from_bytes(bare.raw).keys() == []
    (injected,) = generate(1, 1, ["hostile_injection"])
    assert "\r\nBcc:" in str(make_header(decode_header(email.message_from_bytes(injected.raw)["Subject"])))
    (cut,) = generate(1, 1, ["hostile_cut_short"])
    assert not cut.raw.rstrip().endswith(b"--")
