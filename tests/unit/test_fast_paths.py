"""Where a short cut is taken for well-formed mail, it ends where the careful way ends."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from src.common.archive import raw_ref_in
from src.mail import mime, text
from src.mail.mime import Headers, Part, content
from src.worker.delivery import is_internal_date

ODD = st.sampled_from(
    ["\n", "\r", "\r\n", "\t", " ", "\0", "\x7f", "\x85", "\u00a0", "\u200b", "\ufeff", "\ud800", "é", "x", "-"]
)
TEXTS = st.lists(st.one_of(ODD, st.text(max_size=5)), max_size=60).map("".join)


@given(TEXTS)
def test_clean_text_drops_what_the_patterns_name(given_text: str) -> None:
    """Whichever way it takes: printable, ASCII, printable but for line ends, or none of these."""
    lines = given_text.replace("\r\n", "\n").replace("\r", "\n")
    assert text.clean_text(given_text) == text._SURROGATES.sub("\ufffd", text._CONTROLS.sub("", lines))
    assert text.has_controls(given_text) == (text._CONTROLS.search(given_text.replace("\r", "")) is not None)


@given(TEXTS, st.integers(1, 12))
@example("xy" + " " * 9 + "\u200b\u200bz", 4)
def test_a_preview_of_less_is_the_preview_of_more(given_text: str, characters: int) -> None:
    """Reading three times as many characters as are shown gives the same as reading twenty times as many."""
    whole = text.one_line(text._INVISIBLE_PADDING.sub(" ", given_text[: characters * 20]))
    assert text.preview(given_text, characters) == whole[:characters].rstrip()


@pytest.mark.parametrize("stretch", [3, 4, 7])
@given(
    data=st.lists(st.sampled_from([b"\n", b"-", b"--", b"a", b"\n--", b"aaaa"]), max_size=30).map(b"".join),
    line=st.integers(0, 20),
)
def test_the_next_dashes_are_found_wherever_a_stretch_ends(stretch: int, data: bytes, line: int) -> None:
    """The line that a plain search finds, or none."""
    plain = line if data.startswith(b"--", line) else data.find(b"\n--", line) + 1 or -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mime, "_STRETCH", stretch)
        assert mime._next_dashes(data, line) == plain


@given(
    data=st.binary(min_size=1, max_size=120),
    width=st.integers(1, 12),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    changes=st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from([b"", b"=", b" ", b"\t", b"!", b"A", b"\n", b"\r"])), max_size=3
    ),
)
@example(data=b"a" * 30, width=4, line_end=b"\n", changes=[(9, b"!"), (14, b"!")])
def test_base64_without_a_flaw_is_read_as_the_careful_way_reads_it(
    data: bytes, width: int, line_end: bytes, changes: list[tuple[int, bytes]]
) -> None:
    """Well-formed or broken anywhere: the same content and the same defect."""
    letters = base64.b64encode(data)
    raw = b"".join(letters[at : at + width] + line_end for at in range(0, len(letters), width))
    for place, byte in changes:
        raw = raw[:place] + byte + raw[place + 1 :]
    part = Part(Headers([("content-transfer-encoding", b" base64")]), start=0, end=len(raw))
    found = content(raw, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mime.pybase64, "b64decode", refuses)
        assert content(raw, part) == found


def refuses(letters: bytes, *, validate: bool) -> bytes:
    raise binascii.Error


@given(
    st.one_of(
        st.datetimes().map(lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ")),
        st.from_regex(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}T[0-9]{1,2}:[0-9]{2}:[0-9]{2}Z?\n?", fullmatch=True),
        st.text(max_size=25),
    )
)
def test_a_date_is_one_where_strptime_says_so(given_text: str) -> None:
    """Dates as the producer writes them, and what is nearly one."""
    try:
        wanted = given_text == "" or (given_text.isascii() and datetime.strptime(given_text, "%Y-%m-%dT%H:%M:%SZ") is not None)
    except ValueError:
        wanted = False
    assert is_internal_date(given_text) == wanted


def test_a_reference_named_in_the_text_is_none() -> None:
    """Only the record's own field counts, with or without a text that speaks of one."""
    ref = f"sha256:{'a' * 64}"
    assert raw_ref_in(f'{{"body_text":"\\"raw_ref\\":\\"sha256:{"b" * 64}\\"","raw_ref":"{ref}"}}') == ref
    assert raw_ref_in('{"body_text":"raw_ref","raw_ref":""}') == ""
    assert raw_ref_in("{}") == ""
