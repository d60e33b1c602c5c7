"""The stream entry, its JSON, the handler's view of it, and the ids."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.mail.record import (
    RECORD_BYTES,
    Address,
    Attachment,
    Email,
    Envelope,
    Record,
    gmail_email_id,
    hashed_email_id,
    header_email_id,
    in_mailbox_scope,
    member_of,
    record_from_json,
    record_to_json,
    split_email_id,
    to_fields,
)

ENVELOPE = Envelope(
    account="ann@example.org",
    mailbox="INBOX",
    uid=7,
    uidvalidity=3,
    internal_date="2024-05-01T12:00:00Z",
    size=1234,
    email_id="gm:ann@example.org:18446744073709551615",
    correlation_id="c-1",
    ingested_at="2024-05-01T12:00:05Z",
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
addresses = st.builds(Address, texts, texts)
attachments = st.builds(Attachment, texts, texts, st.integers(0, 1 << 62), texts)
records = st.builds(
    Record,
    uidvalidity=st.integers(0, 1 << 32),
    message_id=texts,
    gm_thrid=texts,
    gm_labels=st.lists(texts, max_size=3).map(tuple),
    from_=addresses,
    to=st.lists(addresses, max_size=3).map(tuple),
    cc=st.lists(addresses, max_size=3).map(tuple),
    reply_to=st.lists(addresses, max_size=3).map(tuple),
    subject=texts,
    date=texts,
    size=st.integers(0, 1 << 62),
    in_reply_to=texts,
    references=st.lists(texts, max_size=3).map(tuple),
    is_auto=st.booleans(),
    is_bounce=st.booleans(),
    is_list=st.booleans(),
    body_preview=texts,
    body_text=texts,
    body_truncated=st.booleans(),
    attachments=st.lists(attachments, max_size=3).map(tuple),
    raw_ref=texts,
    defects=st.lists(texts, max_size=3).map(tuple),
    traceparent=texts,
    ingested_at=texts,
)


@given(records)
def test_a_record_survives_its_json(record: Record) -> None:
    """What is written is what is read, field by field, on one line."""
    text = record_to_json(record)
    assert record_from_json(text) == record
    assert "\n" not in text


def test_the_json_has_the_documented_keys() -> None:
    """Handlers in other languages read these names."""
    names = list(json.loads(record_to_json(Record())))
    assert names == [field.name.rstrip("_") for field in fields(Record)]


def test_unknown_keys_are_ignored_and_missing_ones_have_their_default() -> None:
    """A record of a later minor version is read."""
    assert record_from_json('{"subject":"x","new_in_1.1":[1]}') == Record(subject="x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        "null",
        '{"subject":1}',
        '{"to":{}}',
        '{"to":["a@b"]}',
        '{"from":null}',
        '{"size":"1"}',
        '{"size":true}',
        '{"is_auto":1}',
        '{"references":[1]}',
        '{"attachments":[1]}',
        '{"subject":"\\ud800"}',
        '{"size":' + "9" * 5000 + "}",
        "[" * 200_000,
        '{"a":' * 100_000,
    ],
)
def test_rubbish_is_a_value_error(text: str) -> None:
    """A broken record is one kind of error, whatever is broken about it."""
    with pytest.raises(ValueError):
        record_from_json(text)


def test_the_entry_shows_what_people_read_and_keeps_the_rest_in_one_field() -> None:
    """The names and texts of a stream entry."""
    entry = to_fields(ENVELOPE, Record(from_=Address("Bob", "bob@example.org"), subject="Grüße"))
    record = entry.pop("record")
    assert entry == {
        "schema": "1",
        "email_id": "gm:ann@example.org:18446744073709551615",
        "account": "ann@example.org",
        "mailbox": "INBOX",
        "uid": "7",
        "internal_date": "2024-05-01T12:00:00Z",
        "from": "Bob <bob@example.org>",
        "subject": "Grüße",
        "correlation_id": "c-1",
    }
    assert record_from_json(record).subject == "Grüße"


@given(
    records,
    st.sampled_from(['"', "\\", "\n", "a", "ä", "€", "😀", "\u007f"]),
    st.integers(0, 70_000),
    st.integers(0, 2_000),
    st.integers(0, 2_000),
    st.integers(0, 50_000),
)
def test_no_record_is_larger_than_its_limit(record: Record, letter: str, body: int, many: int, files: int, line: int) -> None:
    """Whatever grows is cut to 128 KiB of UTF-8, and the cut is a prefix that is told."""
    large = replace(
        record,
        body_text=letter * body,
        subject=letter * line,
        from_=Address(letter * line, ""),
        to=(Address(letter * 20, "a@b"),) * many,
        attachments=(Attachment(letter * 20, "text/plain", 1, "0" * 64),) * files,
    )
    text = to_fields(ENVELOPE, large)["record"]
    assert len(text.encode()) <= RECORD_BYTES
    kept = record_from_json(text)
    assert large.body_text.startswith(kept.body_text)
    assert kept.body_truncated or kept.body_text == large.body_text
    assert large.to[: len(kept.to)] == kept.to
    if kept.to != large.to:
        assert f"to: {len(kept.to)} of {many} kept" in kept.defects


def test_a_long_list_leaves_room_for_the_text() -> None:
    """5,000 recipients do not push the body out."""
    record = Record(to=(Address("", "someone@example.org"),) * 5000, body_text="x" * 60_000)
    kept = record_from_json(to_fields(ENVELOPE, record)["record"])
    assert kept.body_text == record.body_text
    assert 100 < len(kept.to) < 5000


def test_a_record_that_fits_exactly_is_not_touched() -> None:
    """The limit itself is allowed; one byte more is cut by one byte."""
    room = RECORD_BYTES - len(record_to_json(Record()).encode())
    exact = Record(body_text="x" * room)
    assert record_from_json(to_fields(ENVELOPE, exact)["record"]) == exact
    over = record_from_json(to_fields(ENVELOPE, Record(body_text="x" * (room + 1)))["record"])
    assert over.body_truncated
    assert room - 10 < len(over.body_text) <= room


@given(records)
def test_a_handler_sees_what_was_published(record: Record) -> None:
    """Every property of Email is the published value."""
    email = Email(to_fields(ENVELOPE, record))
    assert (email.email_id, email.account, email.mailbox, email.uid) == (ENVELOPE.email_id, "ann@example.org", "INBOX", 7)
    assert (email.internal_date, email.correlation_id, email.subject) == ("2024-05-01T12:00:00Z", "c-1", record.subject)
    assert (email.sender, email.to, email.cc, email.reply_to) == (record.from_, record.to, record.cc, record.reply_to)
    assert (email.date, email.text, email.preview, email.size) == (
        record.date,
        record.body_text,
        record.body_preview,
        record.size,
    )
    assert (email.attachments, email.labels, email.defects) == (record.attachments, record.gm_labels, record.defects)
    assert (email.message_id, email.in_reply_to, email.references) == (record.message_id, record.in_reply_to, record.references)
    assert (email.is_auto, email.is_bounce, email.is_list) == (record.is_auto, record.is_bounce, record.is_list)
    assert (email.truncated, email.raw_ref, email.traceparent) == (record.body_truncated, record.raw_ref, record.traceparent)
    assert email.record == record


def test_the_flat_fields_are_read_without_the_record() -> None:
    """A broken record hurts only those who touch it."""
    email = Email({"email_id": "gm:a:1", "subject": "x", "record": "{"})
    assert (email.email_id, email.subject, email.mailbox) == ("gm:a:1", "x", "")
    with pytest.raises(ValueError):
        _ = email.text
    with pytest.raises(ValueError):
        _ = email.uid


def test_gmail_ids_keep_all_their_bits() -> None:
    """X-GM-MSGID is unsigned 64-bit and stays a string."""
    email_id = gmail_email_id("ann@example.org", "18446744073709551615")
    assert email_id == "gm:ann@example.org:18446744073709551615"
    assert split_email_id(email_id) == ("gm", "ann@example.org", "18446744073709551615")


@pytest.mark.parametrize("msgid", ["", "0", "01", "-1", "1.0", " 1", "18446744073709551616", "1e3", "٣", "9" * 30, "1\n"])
def test_what_is_no_msgid_makes_no_id(msgid: str) -> None:
    """A value that Gmail cannot have sent is refused."""
    with pytest.raises(ValueError):
        gmail_email_id("ann@example.org", msgid)
    assert split_email_id(f"gm:ann@example.org:{msgid}") is None


@pytest.mark.parametrize("account", ["", "a" * 321, "a\nb", "a\x00", "a\x7f", "a\u2028b", "a\ud800"])
def test_what_is_no_account_makes_no_id(account: str) -> None:
    """An account that could break a key or a log line is refused."""
    with pytest.raises(ValueError):
        gmail_email_id(account, "1")
    with pytest.raises(ValueError):
        hashed_email_id(account, b"x")


@pytest.mark.parametrize("email_id", ["", "gm", "gm:1", "gm::1", "x:a:1", "h:a:" + "A" * 64, "h:a:" + "0" * 63, "<a@b>", "H:a:1"])
def test_what_is_no_id_is_not_split(email_id: str) -> None:
    """None says that this module cannot have made the id."""
    assert split_email_id(email_id) is None
    with pytest.raises(ValueError):
        member_of(email_id)
    with pytest.raises(ValueError):
        in_mailbox_scope(email_id, "INBOX")


def test_an_account_may_hold_colons() -> None:
    """The value is behind the last colon."""
    assert split_email_id(gmail_email_id("imap:ann", "5")) == ("gm", "imap:ann", "5")


@given(st.text(max_size=80))
def test_any_text_is_an_id_or_none(text: str) -> None:
    """Nothing that stands in a stream makes the split raise; what it takes apart it can put together."""
    known = split_email_id(text)
    assert known is None or ":".join(known) == text


def test_hashed_parts_do_not_run_into_each_other() -> None:
    """The same bytes cut elsewhere are another mail."""
    ids = {
        hashed_email_id("a", b"ab", b"c"),
        hashed_email_id("a", b"a", b"bc"),
        hashed_email_id("a", b"abc"),
        hashed_email_id("b", b"ab", b"c"),
    }
    assert len(ids) == 4


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_stub_and_whole_mail_have_the_same_id(end: bytes) -> None:
    """The header counts, with or without its empty line or a body behind it."""
    header = b"From: a" + end + b"Subject: b"
    ids = {
        header_email_id("a", "2024-05-01T12:00:00Z", 99, header + tail)
        for tail in (b"", end, end + end, end + end + b"body" + end + end + b"more")
    }
    assert len(ids) == 1


def test_date_size_and_header_each_make_another_id() -> None:
    """Two mails differ if any of the three differs."""
    base = ("2024-05-01T12:00:00Z", 99, b"From: a")
    others = [
        ("2024-05-01T12:00:01Z", 99, b"From: a"),
        ("2024-05-01T12:00:00Z", 98, b"From: a"),
        ("2024-05-01T12:00:00Z", 99, b"From: b"),
    ]
    starts = {header_email_id("a", *base, start) for start in (b"", b"From: a\r\n\r\none", b"From: a\r\n\r\ntwo")}
    assert len({header_email_id("a", *parts) for parts in [base, *others]} | starts) == 6


def test_ids_are_the_same_for_ever() -> None:
    """A changed rule would publish every mail again: these values are fixed."""
    header = header_email_id("ann@example.org", "2024-05-01T12:00:00Z", 1234, b"Subject: x\r\n\r\n")
    assert header == "h:ann@example.org:c8f59002126ba9a2d2611c3f5a6c3c09a7e8154e0237aaa9b0d0b6554d15252e"
    scoped = in_mailbox_scope("gm:ann@example.org:5", "INBOX")
    assert scoped == "h:ann@example.org:661867a07f1c436ca9b0ab794ac605c448341adabc55b05810b02027b32a877d"


def test_in_mailbox_scope_each_folder_has_its_own_id() -> None:
    """The same mail in two folders is two mails, of the same account."""
    ids = {in_mailbox_scope("gm:ann@example.org:5", mailbox) for mailbox in ("INBOX", "Archive")}
    assert len(ids) == 2
    assert {split_email_id(email_id)[:2] for email_id in ids} == {("h", "ann@example.org")}  # type: ignore[index]


@pytest.mark.parametrize(
    ("email_id", "member"),
    [
        ("gm:a:1", "1"),
        ("gm:a:9223372036854775807", "9223372036854775807"),
        ("gm:a:9223372036854775808", "0"),
        ("gm:a:18446744073709551615", "9223372036854775807"),
        ("h:a:" + "f" * 64, "9223372036854775807"),
        ("h:a:" + "0" * 15 + "2" + "f" * 48, "1"),
    ],
)
def test_members_are_63_bit_integers(email_id: str, member: str) -> None:
    """What stands in a processed set fits an intset."""
    assert member_of(email_id) == member
