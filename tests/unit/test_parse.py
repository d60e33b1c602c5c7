"""From bytes to record: what well-formed mail gives, what hostile mail cannot do."""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import json
import quopri
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.mail.mime import content, read_message
from src.mail.parse import Limits, parse, stub
from src.mail.record import RECORD_BYTES, Address, Attachment, Envelope, Record, record_from_json, record_to_json, to_fields
from src.mail.text import CODECS, decode_charset, enriched_to_text, html_to_text, unflow

ENVELOPE = Envelope(
    account="ann@example.org",
    mailbox="INBOX",
    uid=7,
    uidvalidity=3,
    internal_date="2024-05-01T12:00:00Z",
    size=1234,
    email_id="gm:ann@example.org:5",
    correlation_id="c-1",
    ingested_at="2024-05-01T12:00:05Z",
    gm_thrid="99",
    gm_labels=("\\Inbox", "work"),
    raw_ref="imap:INBOX;uid=7",
    traceparent="00-1-2-01",
)
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def read(text: str | bytes, envelope: Envelope = ENVELOPE, limits: Limits | None = None) -> Record:
    """The record of a mail written with LF in the test, CRLF on the wire."""
    raw = text.encode() if isinstance(text, str) else text
    return parse(raw.replace(b"\n", b"\r\n"), envelope, limits or Limits())


def multipart(*parts: str, kind: str = "mixed", boundary: str = "b") -> str:
    body = "".join(f"--{boundary}\n{part}\n" for part in parts)
    return f"Content-Type: multipart/{kind}; boundary={boundary}\n\n{body}--{boundary}--\n"


def assert_clean(record: Record) -> None:
    """The promise on every text of every record, and on the entry's size."""
    fields = to_fields(ENVELOPE, record)
    assert len(fields["record"].encode()) <= RECORD_BYTES
    kept = json.loads(fields["record"])
    one_liners = [kept[key] for key in ("subject", "message_id", "date", "in_reply_to", "body_preview")]
    one_liners += [half for key in ("to", "cc", "reply_to") for address in kept[key] for half in address.values()]
    one_liners += [*kept["from"].values(), *kept["references"], *kept["defects"], *kept["gm_labels"]]
    one_liners += [value for file in kept["attachments"] for value in (file["name"], file["content_type"])]
    for text in [*one_liners, kept["body_text"]]:
        assert not FORBIDDEN.search(text), text
    for text in one_liners:
        assert "\n" not in text, text
    for file in kept["attachments"]:
        assert "/" not in file["name"], file["name"]
        assert "\\" not in file["name"], file["name"]
    assert len(record.body_text.encode()) <= 64 * 1024
    assert len(record.body_preview) <= 200
    assert kept["date"] == "" or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", kept["date"])
    assert record_from_json(fields["record"]) == record or record.body_truncated or kept["body_truncated"] or kept["defects"]


# --- header ------------------------------------------------------------------------------------------------------------


def test_a_plain_mail() -> None:
    """Every field of the record of an ordinary mail."""
    record = read(
        "From: Bob Example <bob@example.org>\nTo: ann@example.org, Carl <carl@example.org>\nCc: Dora <dora@example.org>\n"
        "Reply-To: desk@example.org\nSubject: Hello\n there\nDate: Wed, 01 May 2024 14:00:00 +0200\nMessage-ID: <1@example.org>\n"
        "In-Reply-To: <0@example.org>\nReferences: <a@example.org>\n <0@example.org>\n\nFirst line\nSecond line\n"
    )
    assert record == Record(
        uidvalidity=3,
        message_id="<1@example.org>",
        gm_thrid="99",
        gm_labels=("\\Inbox", "work"),
        from_=Address("Bob Example", "bob@example.org"),
        to=(Address("", "ann@example.org"), Address("Carl", "carl@example.org")),
        cc=(Address("Dora", "dora@example.org"),),
        reply_to=(Address("", "desk@example.org"),),
        subject="Hello there",
        date="2024-05-01T12:00:00Z",
        size=1234,
        in_reply_to="<0@example.org>",
        references=("<a@example.org>", "<0@example.org>"),
        body_preview="First line Second line",
        body_text="First line\nSecond line",
        raw_ref="imap:INBOX;uid=7",
        traceparent="00-1-2-01",
        ingested_at="2024-05-01T12:00:05Z",
    )


@pytest.mark.parametrize(
    ("value", "subject"),
    [
        ("=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
        ("=?UTF-8?B?R3LDvMOfZQ==?= again", "Grüße again"),
        ("=?utf-8?q?a_b?= =?utf-8?q?c?=", "a bc"),
        ("=?utf-8?q?a?=\n =?utf-8?q?b?=", "ab"),
        ("=?utf-8?b?w6Q=?= x =?utf-8?q?y?=", "ä x y"),
        ("=?utf-8?q?=E2=82?= =?utf-8?q?=AC?=", "€"),  # one character over two words
        ("=?iso-8859-1?q?=E4?= =?utf-8?q?=C3=B6?=", "äö"),
        ("=?utf-8*de?q?x?=", "x"),
        ("=?iso-2022-jp?b?GyRCRnxLXBsoQg==?=", "日本"),
        ("=?gb2312?b?1tDOxA==?=", "中文"),
        ("=?nonsense?q?abc?=", "abc"),
        ("=?utf-8?b?R3L?=", "Gr"),  # broken padding
        ("=?utf-8?x?abc?=", "=?utf-8?x?abc?="),
        ("=?utf-8?q?unfinished", "=?utf-8?q?unfinished"),
        ("a=?utf-8?q?b?=c", "abc"),
        ("plain 8 bit: ä", "plain 8 bit: ä"),
        ("", ""),
    ],
)
def test_subjects_are_decoded(value: str, subject: str) -> None:
    """Encoded words (RFC 2047) as senders write them."""
    assert read(f"Subject: {value}\n\nx").subject == subject


def test_a_latin_1_header_is_readable() -> None:
    """Raw 8-bit bytes that are no UTF-8 are windows-1252."""
    assert read(b"Subject: Gr\xfc\xdfe \x96 \x80\n\nx").subject == "Grüße – €"


def test_a_subject_cannot_smuggle_lines_or_terminal_sequences() -> None:
    """Encoded CRLF and ESC are gone from the text and named in the defects."""
    record = read("Subject: =?utf-8?q?a=0D=0ABcc:_x=1B[31m=00?=\nFrom: =?utf-8?q?x=0Ay?= <a@b>\n\nx")
    assert record.subject == "a Bcc: x[31m"
    assert record.from_ == Address("x y", "a@b")
    assert "line ends or control characters in subject" in record.defects
    assert "line ends or control characters in from" in record.defects


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a@b.c", [("", "a@b.c")]),
        ("<a@b.c>", [("", "a@b.c")]),
        ("Ann <a@b.c>", [("Ann", "a@b.c")]),
        ('"Doe, Ann" <a@b.c>, d@e.f', [("Doe, Ann", "a@b.c"), ("", "d@e.f")]),
        ('"A \\"x\\" B" <a@b.c>', [('A "x" B', "a@b.c")]),
        ("a@b.c (Ann (the) Doe)", [("Ann (the) Doe", "a@b.c")]),
        ("=?utf-8?q?Doe=2C_Ann?= <a@b.c>", [("Doe, Ann", "a@b.c")]),
        ('"=?utf-8?q?J=C3=B6rg?=" <a@b.c>', [("Jörg", "a@b.c")]),
        ("Team: a@b.c, Dora <d@e.f>;, g@h.i", [("", "a@b.c"), ("Dora", "d@e.f"), ("", "g@h.i")]),
        ("Team (ours): a@b.c, d@e.f (Dora);", [("", "a@b.c"), ("Dora", "d@e.f")]),
        ('"a b"@c.d, <"e f"@g.h>', [("", '"a b"@c.d'), ("", '"e f"@g.h')]),
        ("a (x) @ b . c", [("x", "a@b.c")]),
        ('"a@b.c"', [("", "a@b.c")]),
        ("undisclosed-recipients:;", []),
        ("a@b.c; d@e.f", [("", "a@b.c"), ("", "d@e.f")]),
        ("Ann", [("Ann", "")]),
        ("Doe, Ann <a@b.c>", [("Doe", ""), ("Ann", "a@b.c")]),
        ("Ann <<a@b.c>>", [("Ann", "a@b.c")]),
        ("<ann>", [("", "ann")]),
        ("Ann Example", [("Ann Example", "")]),
        ("Ann a@b.c", [("Ann", "a@b.c")]),
        ("<@r1,@r2:a@b.c>", [("", "a@b.c")]),
        ("a@[IPv6:2001:db8::1]", [("", "a@[IPv6:2001:db8::1]")]),
        ("Ann <a@b.c", [("Ann", "a@b.c")]),
        (",,,", []),
        ("", []),
    ],
)
def test_addresses(value: str, expected: list[tuple[str, str]]) -> None:
    """Address lists (RFC 5322 section 3.4) as senders write them."""
    assert read(f"To: {value}\n\nx").to == tuple(Address(*pair) for pair in expected)


def test_several_fields_of_one_name_are_one_list() -> None:
    """A second To is not lost."""
    assert [a.address for a in read("To: a@b\nTo: c@d\n\nx").to] == ["a@b", "c@d"]


@pytest.mark.parametrize("value", ["<@", "<", "@", '"', "(", "Ann", "<>", ",", "=?utf-8?q??="])
def test_a_sender_that_cannot_be_read_is_a_defect(value: str) -> None:
    """The mail is kept and says so."""
    assert "the sender's address cannot be read" in read(f"From: {value}\n\nx").defects


@pytest.mark.parametrize(
    ("value", "date"),
    [
        ("Wed, 01 May 2024 14:00:00 +0200", "2024-05-01T12:00:00Z"),
        ("1 May 2024 14:00 -0000", "2024-05-01T14:00:00Z"),
        ("Wed, 1 May 24 14:00:00 GMT", "2024-05-01T14:00:00Z"),
        ("Wed, 01 May 2024 14:00:00 EST (x)", "2024-05-01T19:00:00Z"),
        ("Wed, 01 May 2024 14:00:00", "2024-05-01T14:00:00Z"),
        ("Fri, 31 Dec 2021 23:59:60 +0000", "2021-12-31T23:59:59Z"),
        ("Wed, 31 Feb 2024 14:00:00 +0000", ""),
        ("yesterday", ""),
        ("Wed, 01 May 9999 14:00:00 +0000", ""),
        ("Wed, 01 May 2024 14:00:00 +99999999999999", ""),
        ("Wed, 01 May 1902 14:00:00 +0000", "1902-05-01T14:00:00Z"),
        ("Wed, 01 May 1802 14:00:00 +0000", ""),
        ("1 Jan 1900 00:00:00 +2359", ""),
        ("1 May 2024 14 (two o'clock): 00 (sharp) : 30 +0000", "2024-05-01T14:00:30Z"),
        ("9" * 5000, ""),
    ],
)
def test_dates(value: str, date: str) -> None:
    """The Date header in UTC, or nothing and a defect."""
    record = read(f"Date: {value}\n\nx")
    assert record.date == date
    assert ("the date cannot be read" in record.defects) is (date == "")


def test_a_mail_without_a_date_has_no_defect() -> None:
    """Only what is there can be unreadable."""
    assert read("Subject: x\n\nx").defects == ()


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        ("Subject: x", ""),
        ("Auto-Submitted: auto-replied", "auto"),
        ("Auto-Submitted: auto-generated; x=y", "auto"),
        ("Auto-Submitted: No (really)", ""),
        ("Precedence: Bulk", "auto"),
        ("Precedence: junk", "auto"),
        ("Precedence: auto_reply", "auto"),
        ("Precedence: list", "list"),
        ("X-Auto-Response-Suppress: All", "auto"),
        ("X-Auto-Response-Suppress: None", ""),
        ("X-Autoreply: yes", "auto"),
        ("List-Id: <x.example.org>", "list"),
        ("List-Post: <mailto:x@example.org>", "list"),
        ("List-Unsubscribe: <mailto:x@example.org>", "list"),
        ("Content-Type: multipart/report; report-type=delivery-status; boundary=b", "bounce"),
        ("Content-Type: multipart/report; report-type=disposition-notification; boundary=b", ""),
        ("Return-Path: <>\nFrom: MAILER-DAEMON@example.org", "bounce"),
        ("Return-Path: <>\nFrom: MAILER-DAEMON (Mail Delivery System)", "bounce"),
        ("Return-Path: <>\nX-Failed-Recipients: a@b", "bounce"),
        ("Return-Path: <>\nFrom: bob@example.org", ""),
        ("Return-Path: <a@b>\nFrom: MAILER-DAEMON@example.org", ""),
    ],
)
def test_what_kind_of_mail_it_is(header: str, flags: str) -> None:
    """is_auto, is_bounce, is_list by their headers."""
    record = read(f"{header}\n\nx")
    found = [name for name, flag in [("auto", record.is_auto), ("bounce", record.is_bounce), ("list", record.is_list)] if flag]
    assert " ".join(found) == flags


def test_a_header_line_that_is_no_field_begins_the_body() -> None:
    """As the standard library reads it: nothing is lost."""
    record = read("Subject: x\nthis is no field\nmore\n")
    assert record.body_text == "this is no field\nmore"
    assert "a line of the header is no field" in record.defects


def test_mbox_lines_in_the_header_are_passed_over() -> None:
    """What mail spools leave behind does not end the header."""
    record = read("From bob@example.org Wed May 1\nSubject: x\n>From old\nTo: a@b\n\nbody\n")
    assert (record.subject, record.to, record.body_text) == ("x", (Address("", "a@b"),), "body")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_is_a_line_end(end: bytes) -> None:
    """CRLF, LF and bare CR mails have the same record."""
    raw = multipart("Content-Type: text/plain\n\nhello\nyou").encode().replace(b"\n", end)
    assert parse(raw, ENVELOPE).body_text == "hello\nyou"


# --- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("charset", "data", "text", "defect"),
    [
        ("utf-8", "grün".encode(), "grün", False),
        ("UTF-8", "grün".encode(), "grün", False),
        ("iso-8859-1", "grün".encode("latin-1"), "grün", False),
        ("iso-8859-1", "grün".encode(), "grün", True),  # the claim is wrong
        ("iso-8859-1", b"\x80 1", "€ 1", False),  # windows-1252 is meant
        ("utf-8", "grün".encode("latin-1"), "grün", True),
        ("us-ascii", "grün".encode(), "grün", True),
        ("", "grün".encode(), "grün", False),
        ("", "grün".encode("cp1252"), "grün", True),
        ("nonsense", "grün".encode(), "grün", True),
        ("iso-2022-jp", b"\x1b(I1\x1b(B", "ｱ", False),  # half-width, as Japanese senders use it
        ("gb2312", "中文".encode("gb18030"), "中文", False),
        ("iso-2022-jp", "日本".encode("iso-2022-jp"), "日本", False),
        ("shift_jis", "日本".encode("cp932"), "日本", False),
        ("koi8-r", "привет".encode("koi8-r"), "привет", False),
        ("utf-16", "grün".encode("utf-16"), "grün", False),
        ("utf-16", "grün".encode("utf-16-le"), "grün", False),
        ("utf-16", "grün".encode("utf-16-be"), "grün", False),
        ("", "grün".encode("utf-16"), "grün", False),
        ("'UTF-8'", "grün".encode(), "grün", False),
        ("shift_jis", "日本".encode("cp932") + b"\x81", "日本\ufffd", True),
        ("zlib", b"x", "x", True),  # a codec, no charset
        ("unicode_escape", b"\\ud800", "\\ud800", True),
        ("utf-8", b"\xed\xa0\x80", "í\xa0€", True),
        ("", b"\x81\x8d", "", True),
    ],
)
def test_charsets(charset: str, data: bytes, text: str, defect: bool) -> None:
    """Unknown and wrong charsets are rescued, and told."""
    record = read(
        b"Content-Type: text/plain; charset="
        + charset.encode()
        + b"\nContent-Transfer-Encoding: base64\n\n"
        + base64.b64encode(data)
    )
    assert record.body_text == text
    assert bool(record.defects) is defect


def test_every_charset_of_the_table_can_be_decoded() -> None:
    """No name leads to a codec that raises something else than UnicodeError."""
    for name in CODECS:
        for data in (b"abc", b"\xff\xfe\x00", b"~{\x1b$B\xa4\xa2+AGE-", bytes(range(256))):
            for whole in (True, False):
                decode_charset(data, name, whole=whole)


def test_quoted_printable_text() -> None:
    """Soft line breaks and escapes are decoded."""
    record = read(
        "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: Quoted-Printable\n\ngr=C3=BCn and =\nlong\n"
    )
    assert record.body_text == "grün and long"


def test_control_characters_are_dropped_from_the_text() -> None:
    """Newline and tab stay, CR becomes newline."""
    assert read(b"\nA\x00\x07B\tC\x1b[0m\x7f\r\rD\n").body_text == "AB\tC[0m\n\nD"


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>one</p><p>two</p>", "one\n\ntwo"),
        ("a<br>b<BR/>c", "a\nb\nc"),
        ("<style>p {x}</style><script>if (a<b) {}</script><title>t</title>seen", "seen"),
        ("<!-- <p>no</p> -->yes<!-- open", "yes"),
        ("&lt;b&gt; &amp; &eacute; &#8364; &nbsp; &#x20AC;", "<b> & é € €"),
        ("&#99999999999999; &#x1b;[31m &#xD800;", "\ufffd [31m \ufffd"),
        ('<a title="1 > 0">x</a>', "x"),
        ("<a title=it's>x</a> it's", "x it's"),
        ('<a title="open>x</a>', ""),  # as in a browser: the tag has no end
        ("<pre>a\n b</pre>", "a\nb"),
        ("a<br><br>b<p>c</p>\n<p>d</p>", "a\n\nb\n\nc\n\nd"),
        ("<body><noscript>a</noscript><textarea><b>c</textarea><template><p>d</template></body>", "a<b>c"),
        ("<p>a</b></i></font></p></td>b", "a\n\nb"),
        ("1 < 2 and 3 <4", "1 < 2 and 3 <4"),
        ("I <3 you", "I <3 you"),
        ("<table><tr><td>a</td><td>b</td></tr>\n<tr><td>c</td></tr></table>", "a b\nc"),
        ("many     \n blanks", "many blanks"),
        ("<b>bo</b>ld", "bold"),
        ("<!DOCTYPE html><?xml x?><html><body>x</body></html>", "x"),
        ("<p>cut <a href=", "cut"),
        ("&#" + "9" * 5000 + ";x", "\ufffdx"),
    ],
)
def test_html(markup: str, text: str) -> None:
    """Tags, scripts and styles go, what a reader sees stays."""
    assert html_to_text(markup) == (text, "")
    assert read(f"Content-Type: text/html; charset=utf-8\n\n{markup}").body_text == text


def test_html_that_nests_too_deep_is_read_up_to_there() -> None:
    """What libxml2 would take quadratic time for is left out and told; elements without an end tag do not nest."""
    record = read("Content-Type: text/html; charset=utf-8\n\n<p>seen" + "<b x>" * 600 + "unseen")
    assert (record.body_text, record.defects) == ("seen", ("HTML nested deeper than 500",))
    record = read("Content-Type: text/html; charset=utf-8\n\n" + "<br><img src=x><hr><p>" * 2_000 + "<li>seen" * 2_000)
    assert (record.body_text, record.defects) == ("seen\n" * 1999 + "seen", ())


def test_the_markup_that_is_read_is_bounded_over_all_parts() -> None:
    """Parts that show nothing do not buy time for more of them."""
    part = "Content-Type: text/html\n\n" + "<b></b>" * 15_000
    record = read(multipart(*[part] * 12, "\ntoo late"))
    assert (record.body_text, record.body_truncated) == ("", True)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a\nb\n\nc\n\n\nd", "a b\nc\n\nd"),
        ("<bold>a</bold><nl>b <lt> <<c>", "a\nb < <c>"),
        ("<param>x</param>a<comment>y</comment></param>b", "ab"),
        ("a < b <", "a < b <"),
    ],
)
def test_enriched_text(markup: str, text: str) -> None:
    """RFC 1896, and what text/richtext had in its place."""
    assert enriched_to_text(markup) == text


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("a \nb\nc", "a b\nc"),
        ("a \n\nb", "a \nb"),
        ("> a \n> b \n>> c", "> a b \n>> c"),
        ("> a \nb", "> a \nb"),
        (" >a \n b", ">a b"),
        ("a \n-- \nb", "a \n-- \nb"),
        ("-- \nb", "-- \nb"),
        ("", ""),
    ],
)
def test_flowed_text(text: str, joined: str) -> None:
    """RFC 3676 section 4: paragraphs, quotes, stuffed blanks, signatures."""
    assert unflow(text, delete_space=False) == joined


def test_html_may_name_its_charset_itself() -> None:
    """Where the part does not: a page that was written for the web."""
    page = '<html><head><meta http-equiv=x content="text/html; charset=koi8-r"></head><p>привет</p>'.encode("koi8-r")
    assert parse(b"Content-Type: text/html\n\n" + page, ENVELOPE).body_text == "привет"
    assert parse(b"Content-Type: text/html; charset=cp1251\n\n" + page, ENVELOPE).body_text != "привет"


def test_the_preview_is_one_line_without_padding() -> None:
    """Newsletters pad their preview with invisible characters."""
    record = read("Content-Type: text/html; charset=utf-8\n\n<p>Offer" + "&zwnj;&nbsp;" * 300 + "</p>\n<p>Now\nor never</p>")
    assert record.body_preview == "Offer Now or never"


def test_the_header_is_found_behind_what_does_not_belong_there() -> None:
    """Empty lines, a byte order mark, a folded line of a field that is gone: as long as fields follow."""
    for before in ("\n\n", "\ufeff", " rest of a field\n"):
        assert read(f"{before}Subject: x\n\ny").subject == "x", before
    assert read("\nno header: at all\n\ny").body_text == "no header: at all\n\ny"


def test_plain_text_goes_before_html() -> None:
    """Of an alternative the plain text is shown, and neither is an attachment."""
    parts = ("Content-Type: text/html\n\n<b>html</b>", "Content-Type: text/plain\n\nplain")
    for order in (parts, parts[::-1]):
        record = read(multipart(*order, kind="alternative"))
        assert (record.body_text, record.attachments) == ("plain", ())


def test_a_list_footer_does_not_hide_an_html_mail() -> None:
    """Text behind an alternative is added to it, not taken for it."""
    inner = multipart("Content-Type: text/html\n\n<b>hello</b>", kind="alternative", boundary="i")
    assert read(multipart(inner, "Content-Type: text/plain\n\nfooter")).body_text == "hello\n\nfooter"


def test_long_text_is_cut_and_says_so() -> None:
    """64 KiB of UTF-8, at a character's end."""
    record = read("\n" + "€" * 30_000)
    assert record.body_text == "€" * (64 * 1024 // 3)
    assert record.body_truncated
    assert not read("\n" + "x" * 65_536).body_truncated


def test_a_huge_text_is_read_only_as_far_as_needed() -> None:
    """Cutting the encoded bytes leaves no defect behind."""
    for encoding, data in (("base64", base64.encodebytes("€".encode() * 400_000)), ("8bit", "€".encode() * 400_000)):
        head = f"Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: {encoding}\n\n".encode()
        record = parse(head + data, ENVELOPE)
        assert record.body_text == "€" * (64 * 1024 // 3)
        assert (record.body_truncated, record.defects) == (True, ())


# --- attachments -------------------------------------------------------------------------------------------------------


def attached(data: bytes, name: str, kind: str = "application/pdf") -> Attachment:
    return Attachment(name, kind, len(data), hashlib.sha256(data).hexdigest())


def test_attachments_are_measured_decoded() -> None:
    """Size and hash are those of the file, not of its base64."""
    data = bytes(range(256)) * 40
    part = "Content-Type: application/pdf\nContent-Disposition: attachment; filename=a.pdf\nContent-Transfer-Encoding: base64\n\n"
    record = read(multipart("\nhello", part + base64.encodebytes(data).decode()))
    assert (record.body_text, record.attachments, record.defects) == ("hello", (attached(data, "a.pdf"),), ())


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Content-Disposition: attachment; filename=a.pdf", "a.pdf"),
        ('Content-Disposition: attachment; filename="a; b.pdf"', "a; b.pdf"),
        ("Content-Disposition: attachment; filename*=utf-8''gr%C3%BCn.pdf", "grün.pdf"),
        ('Content-Disposition: attachment; filename*0="lo"; filename*1=ng.pdf', "long.pdf"),
        ("Content-Disposition: attachment; filename*0*=utf-8''gr%C3; filename*1*=%BCn; filename*2=.pdf", "grün.pdf"),
        ("Content-Disposition: attachment; filename*=utf-8''a.pdf; filename=b.pdf", "a.pdf"),
        ('Content-Disposition: attachment; filename="=?utf-8?q?gr=C3=BCn.pdf?="', "grün.pdf"),
        ("Content-Disposition: attachment; filename*=utf-8''..%2F..%2Fetc%2Fpasswd", "passwd"),
        ('Content-Disposition: attachment; filename="C:\\\\Windows\\\\x.exe"', "x.exe"),
        ("Content-Disposition: attachment; filename=..", ""),
        ("Content-Disposition: attachment; filename=/", ""),
        ("Content-Disposition: attachment; filename*=utf-8''a%0D%0Ab%00%1B.pdf", "a b.pdf"),
        ("Content-Disposition: attachment; filename*=utf-8''exe%E2%80%AEfdp.pdf", "exefdp.pdf"),
        ("Content-Disposition: attachment", ""),
    ],
)
def test_file_names_are_plain_names(header: str, name: str) -> None:
    """RFC 2231 and 2047 decoded, no path, no control character."""
    record = read(multipart("\nhello", f"Content-Type: application/pdf\n{header}\n\ndata"))
    assert [file.name for file in record.attachments] == [name]


def test_the_name_of_the_content_type_is_the_second_choice() -> None:
    """Old senders name files only there."""
    assert read("Content-Type: image/png; name=x.png\n\ndata").attachments[0].name == "x.png"


def test_an_attached_text_is_no_body() -> None:
    """By its disposition or its name."""
    record = read(
        multipart("Content-Disposition: attachment\n\nnot me", "Content-Type: text/plain; name=n.txt\n\nnor me", "\nme")
    )
    assert record.body_text == "me"
    assert record.attachments == (attached(b"not me", "", "text/plain"), attached(b"nor me", "n.txt", "text/plain"))


def test_the_texts_of_a_related_are_its_root() -> None:
    """A later text that the page refers to is a file, another is read on."""
    page = "Content-Type: text/html\n\n<p>page</p>"
    record = read(multipart(page, "Content-ID: <1>\n\nfile", "\nmore", kind="related"))
    assert (record.body_text, record.attachments) == ("page\n\nmore", (attached(b"file", "", "text/plain"),))


def test_versions_of_a_text_may_have_names() -> None:
    """Some senders name both; neither is a file for that."""
    record = read(multipart("\nplain", "Content-Type: text/html; name=a.html\n\n<p>html</p>", kind="alternative"))
    assert (record.body_text, record.attachments) == ("plain", ())


def test_parameters_in_pieces_stand_beside_whole_ones() -> None:
    """RFC 2231 for one of them changes nothing for the others."""
    record = read("Content-Type: text/plain; charset=koi8-r; x*=utf-8''%41\nContent-Transfer-Encoding: base64\n\n0NLJ18XU")
    assert (record.body_text, record.defects) == ("привет", ())


def test_all_texts_of_the_chosen_version_are_read() -> None:
    """A version may be texts around a file; the texts of another version are not read."""
    inner = multipart("\none", "Content-Type: a/b\n\nx", "\ntwo", boundary="i")
    record = read(multipart("Content-Type: text/html\n\n<p>other</p>", inner, kind="alternative"))
    assert (record.body_text, record.attachments) == ("one\n\ntwo", (attached(b"x", "", "a/b"),))


@pytest.mark.parametrize(
    ("encoded", "data", "broken"),
    [
        ("begin 644 a\n#0V%T\n`\nend\n", b"Cat", False),
        ("\nsome text\nbegin 0600 a b\n#0V%T\n \nend", b"Cat", False),
        ("begin 644 a\n#0V%T\n", b"Cat", True),
        ("begin 644 a\n#0V%T\n~~~\nend", b"Cat", True),
        ("no begin", b"no begin", True),
    ],
)
def test_uuencode(encoded: str, data: bytes, broken: bool) -> None:
    """The x-uuencode of old senders, whole and cut short."""
    record = read(multipart(f"Content-Type: application/pdf\nContent-Transfer-Encoding: x-uuencode\n\n{encoded}"))
    assert record.attachments == (attached(data, ""),)
    assert record.defects == (("attachment: broken uuencode",) if broken else ())


def test_an_attached_mail_is_one_attachment() -> None:
    """Its text is not mixed into the mail's, its own attachments are not listed."""
    inner = "Subject: inner\n" + multipart("\ninner text", "Content-Type: image/png\n\nx", boundary="i")
    record = read(multipart("\nouter", f"Content-Type: message/rfc822\n\n{inner}"))
    assert record.body_text == "outer"
    assert [file.content_type for file in record.attachments] == ["message/rfc822"]
    assert record.attachments[0].size == len(inner.rstrip("\n").replace("\n", "\r\n")) + 2


def test_parts_of_a_digest_are_mails() -> None:
    """RFC 2046 section 5.1.5: their default type is message/rfc822."""
    record = read(multipart("\nSubject: a\n\nx", "\nSubject: b\n\ny", kind="digest"))
    assert [file.content_type for file in record.attachments] == ["message/rfc822"] * 2


@pytest.mark.parametrize(
    ("encoded", "data"),
    [
        ("aGVsbG8", b"hello"),  # no padding
        ("aGVs*bG8=", b"hello"),
        ("aGVsbG8=\n-- \nfooter", b"hello"),
        ("aGVsbG8=x", b"hello"),
        ("aGVsbG8hX", b"hello!"),
        ("!!!", b"!!!"),
    ],
)
def test_broken_base64_is_decoded_as_far_as_it_goes(encoded: str, data: bytes) -> None:
    """The rest of the mail does not suffer, the defect is told."""
    record = read(multipart(f"Content-Type: application/pdf\nContent-Transfer-Encoding: base64\n\n{encoded}", "\nhello"))
    assert record.attachments == (attached(data, ""),)
    assert record.defects == ("attachment: broken base64",)
    assert record.body_text == "hello"


def test_words_that_claim_to_be_base64_are_words() -> None:
    """In base64 no line has a blank inside; text with a wrong header is shown as it is."""
    record = read("Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\nwords, as they are\nand more\n")
    assert record.body_text == "words, as they are\nand more"
    assert record.defects == ("words instead of base64, left as they are",)
    assert read("Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\naGVs bG8=\n").body_text == "hello"


def test_an_unknown_transfer_encoding_leaves_the_bytes() -> None:
    """They are the file as far as anyone can tell."""
    record = read("Content-Type: application/pdf\nContent-Transfer-Encoding: x-own\n\ndata")
    assert record.attachments == (attached(b"data", ""),)
    assert record.defects == ("attachment: unknown transfer encoding, content left as it is",)


def test_a_multipart_without_its_boundary_is_shown_as_text() -> None:
    """Text that cannot be taken apart is not lost."""
    assert read("Content-Type: multipart/mixed\n\n--b\n\nhello\n").body_text == "--b\n\nhello"
    record = read("Content-Type: multipart/mixed; boundary=other\n\n--b\n\nhello\n")
    assert record.body_text == "--b\n\nhello"
    assert "multipart without parts" in record.defects


# --- stubs -------------------------------------------------------------------------------------------------------------


def test_a_stub_is_what_is_at_hand_and_the_reason() -> None:
    """Header and first text are read, what is cut off has no hash."""
    head = multipart("\nhello", "Content-Type: application/pdf; name=a.pdf\nContent-Transfer-Encoding: base64\n\naGVsbG8hX")
    record = stub(replace(ENVELOPE, defects=("before",)), ("Subject: big\n" + head).split("hX")[0].encode(), "larger than 35 MB")
    assert (record.subject, record.body_text, record.body_truncated) == ("big", "hello", True)
    assert record.defects[:2] == ("before", "larger than 35 MB")
    assert [(file.name, file.sha256) for file in record.attachments] == [("a.pdf", "")]


def test_a_stub_of_nothing() -> None:
    """A mail that cannot be had still has a record."""
    record = stub(ENVELOPE, b"", "the server has no body")
    assert (record.defects, record.body_truncated, record.size) == (("the server has no body",), True, 1234)


# --- hostile mail ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nasty:
    build: Callable[[], bytes]
    defect: str


def nested(levels: int) -> bytes:
    return b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (level, level) for level in range(levels))


NASTY = {
    "52 KiB of nesting": Nasty(lambda: nested(1000), "nested deeper than 100"),
    "125 KiB of recipients": Nasty(
        lambda: b"To: " + b", ".join(b"u%d@example.org" % number for number in range(7000)) + b"\n\nx",
        "a header field of more than 65536 bytes",
    ),
    "125 KiB of recipients in many fields": Nasty(
        lambda: b"".join(b"To: u%d@example.org\n" % number for number in range(990)) + b"To: " + b"a," * 300 + b"\n\nx",
        "more than 1000 addresses in to",
    ),
    "976 KiB of parts": Nasty(
        lambda: b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\nx\n" * 140_000, "more than 1000 parts"
    ),
    "nested comments": Nasty(lambda: b"From: a@b\nTo: " + b"(" * 125_000 + b"\n\nx", "a header field of more than 65536 bytes"),
    "a sender of <@": Nasty(lambda: b"From: <@\n\nx", "the sender's address cannot be read"),
    "smuggled line ends": Nasty(lambda: b"Subject: =?utf-8?q?x=0D=0A=1B[2J?=\n\nx", "line ends or control characters in subject"),
    "a path for a name": Nasty(
        lambda: b"Content-Type: application/x; name*=utf-8''..%2F..%2Fetc%2Fpasswd\n\nx",
        "an attachment's name is no plain file name",
    ),
    "many fields": Nasty(lambda: b"a: b\n" * 200_000 + b"\nx", "more than 1000 header fields"),
    "2 MiB of header": Nasty(lambda: b"Subject: " + b"x" * (1 << 21) + b"\n\nx", "more than 1048576 bytes of header"),
    "2 MiB of header in parts": Nasty(
        lambda: b"Content-Type: multipart/mixed; boundary=b\n\n" + (b"--b\nX: " + b"x" * 60_000 + b"\n\nx\n") * 40,
        "too much header",
    ),
    "6 million dashes": Nasty(
        lambda: b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\n" + b"--\n" * 2_000_000,
        "more than 200000 lines that begin with two dashes",
    ),
    "open quotes in tags": Nasty(lambda: b"Content-Type: text/html; charset=x\n\n" + b"<a b='" * 100_000, "unknown charset x"),
    "open tags": Nasty(lambda: b"Content-Type: text/html; charset=x\n\n" + b"<a " * 300_000, "unknown charset x"),
    "references": Nasty(lambda: b"Content-Type: text/html; charset=x\n\n" + b"&a" * 400_000, "unknown charset x"),
    "open comments": Nasty(lambda: b"Content-Type: text/html; charset=x\n\n" + b"<!--" * 200_000, "unknown charset x"),
    "parameters": Nasty(lambda: b"Content-Type: text/plain" + b';a="x;"' * 9_000 + b";charset=x\n\nx", "unknown charset x"),
    "colons in addresses": Nasty(lambda: b"From: a@b" + b":x" * 60_000 + b"\n\nx", "a header field of more than 65536 bytes"),
    "encoded words": Nasty(
        lambda: (b"To: " + b"=?a?q?b?= " * 6_000 + b"\n") * 16 + b"From: <@\n\nx", "the sender's address cannot be read"
    ),
}


@pytest.mark.parametrize("name", NASTY)
def test_hostile_mail_has_a_partial_record_with_the_reason(name: str) -> None:
    """None of them raises or recurses, and each says what was left out."""
    record = parse(NASTY[name].build(), ENVELOPE)
    assert NASTY[name].defect in record.defects
    assert_clean(record)


def test_limits_are_those_handed_in() -> None:
    """Smaller limits cut earlier."""
    limits = Limits(depth=1, parts=2, headers=3, body_text=10, preview=4)
    record = read(multipart(*["\n" + "long text here"] * 3), limits=limits)
    assert (record.body_text, record.body_preview, record.body_truncated) == ("long text ", "long", True)
    assert "more than 2 parts" in record.defects
    assert "more than 3 header fields" in read("A: 1\nB: 2\nC: 3\nSubject: late\n\nx", limits=limits).defects


@given(st.binary(max_size=400))
def test_any_bytes_have_a_record(raw: bytes) -> None:
    """Nothing raises, everything encodes, nothing is too large."""
    assert_clean(parse(raw, ENVELOPE))
    assert_clean(stub(ENVELOPE, raw, "a reason"))


LINES = st.sampled_from(
    [
        b"",
        b"Content-Type: multipart/mixed; boundary=a",
        b'Content-Type: multipart/alternative; boundary="b"',
        b"Content-Type: multipart/digest; boundary=a",
        b"Content-Type: multipart/mixed",
        b"Content-Type: text/html; charset=utf-16",
        b"Content-Type: text/plain; charset=\xff; name*0*=x''%ff%fe; name*1=\x00/..",
        b"Content-Type: message/rfc822",
        b'Content-Type: /; ;=;"',
        b"Content-Transfer-Encoding: base64",
        b"Content-Transfer-Encoding: quoted-printable",
        b'Content-Disposition: attachment; filename="../\x1b\xe2\x80\xae"',
        b"--a",
        b"--b",
        b"--a--",
        b"--b--",
        b"--",
        b"From: \xff <@",
        b'To: "\\',
        b"To: x:(a(b)\\;<y@z>,,<",
        b"Subject: =?utf-8?q?=0D=0A=ED=A0=80?= =?utf-7?b?K0FHRS0=?= =?punycode?q?x?=",
        b"Date: Mon, 99 Foo 99999 99:99:99 +9999",
        b"Date: 1 Jan 1970 0:0:0 +2359",
        b" continued\t",
        b"From x",
        b">From x",
        b": x",
        b"Return-Path: <>",
        b"=C3=BC =\x00=ZZ",
        b"aGVsbG8",
        b"<script><p>&#xD800;&#27;<!--",
        b"\xed\xa0\x80\xff\r\r",
    ]
)


@settings(max_examples=300)
@given(st.lists(st.one_of(LINES, LINES, LINES, st.binary(max_size=20)), max_size=25), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_nastiness_in_the_shape_of_mail_has_a_record(lines: list[bytes], end: bytes) -> None:
    """The same for what resembles mail in all the wrong ways."""
    assert_clean(parse(end.join(lines), ENVELOPE))


@given(st.text(max_size=200))
def test_any_header_value_is_readable(value: str) -> None:
    """Every decoder of header values takes any text."""
    line = value.encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    names = (
        b"From",
        b"To",
        b"Subject",
        b"Date",
        b"Content-Type",
        b"Content-Disposition",
        b"References",
        b"Content-Transfer-Encoding",
    )
    assert_clean(parse(b"".join(name + b": " + line + b"\n" for name in names) + b"\n" + line, ENVELOPE))


@given(st.text("<>!-/ '\"=&#;xasctyle \n", max_size=120))
def test_any_markup_is_text(markup: str) -> None:
    """Whatever the tags, the result is text of this project's kind."""
    assert_clean(replace(Record(), body_text=html_to_text(markup)[0]))


# --- the same parts as the standard library ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    kind: str
    encoding: str
    data: bytes

    def lines(self, path: str) -> bytes:
        body = {
            "base64": lambda: base64.encodebytes(self.data).rstrip(b"\n"),
            "quoted-printable": lambda: quopri.encodestring(self.data).rstrip(b"\n"),
            "8bit": lambda: self.data,
        }[self.encoding]()
        return f"Content-Type: {self.kind}\nContent-Transfer-Encoding: {self.encoding}\nX-Path: {path}\n\n".encode() + body


@dataclass(frozen=True)
class Tree:
    kind: str
    children: tuple[Leaf | Tree, ...]
    preamble: bytes

    def lines(self, path: str) -> bytes:
        boundary = f"=_b{path}".encode()
        parts = b"".join(b"--" + boundary + b"\n" + child.lines(f"{path}.{n}") + b"\n" for n, child in enumerate(self.children))
        head = b"Content-Type: multipart/" + self.kind.encode() + b';\n boundary="' + boundary + b'"\n\n'
        return head + self.preamble + parts + b"--" + boundary + b"--\n"


plain_lines = st.lists(st.sampled_from([b"text", b"-- ", b"--=_", b"--x", b"", b"a: b", b"gr\xfcn"]), max_size=6).map(b"\n".join)
leaves = st.builds(
    Leaf,
    st.sampled_from(["text/plain", "text/html; charset=utf-8", "image/png; name=x.png", "application/pdf"]),
    st.sampled_from(["base64", "quoted-printable", "8bit"]),
    plain_lines,
)
trees = st.recursive(
    leaves,
    lambda children: st.builds(
        Tree,
        st.sampled_from(["mixed", "alternative", "related"]),
        st.lists(children, min_size=1, max_size=4).map(tuple),
        st.sampled_from([b"", b"This is a mail in parts.\n"]),
    ),
    max_leaves=12,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(trees, st.sampled_from([b"\n", b"\r\n"]))
def test_the_parts_are_those_of_the_standard_library(tree: Leaf | Tree, end: bytes) -> None:
    """Same leaves, same order, same types, same decoded bytes as its parser with the compat32 policy."""
    raw = tree.lines("").replace(b"\n", end)
    parsed = email.message_from_bytes(raw, policy=email.policy.compat32)
    theirs = [(part.get_content_type(), part.get_payload(decode=True)) for part in parsed.walk() if not part.is_multipart()]
    message = read_message(raw, Limits())
    assert [(part.content_type, content(raw, part)[0]) for part in message.leaves] == theirs
    assert message.defects == []


@given(
    st.lists(st.builds(Address, st.text('abc ,;"\\()äö=?_<>', max_size=12), st.text("abc", min_size=1, max_size=5)), max_size=5)
)
def test_addresses_written_by_the_standard_library_are_read_back(people: list[Address]) -> None:
    """Names that need quotes or encoded words come back as they were, but for white space."""
    pairs = [Address(" ".join(person.name.split()), f"{person.address}@example.org") for person in people]
    line = ", ".join(email.utils.formataddr((person.name, person.address)) for person in pairs)
    if "=?" not in "".join(person.name for person in pairs):
        assert parse(f"To: {line}\n\nx".encode(), ENVELOPE).to == tuple(pairs)


def test_json_of_a_record_is_the_record() -> None:
    """What `--parse` prints is what the stream would hold."""
    record = read(multipart("\nhello", "Content-Type: image/png\n\nx"))
    assert record_from_json(record_to_json(record)) == record
