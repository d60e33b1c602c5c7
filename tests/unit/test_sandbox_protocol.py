"""The pure half of the sandbox's IMAP: command lines, sets, names, dates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from imapclient.imap_utf7 import decode as client_decode
from imapclient.imap_utf7 import encode as client_encode

from src.sandbox import protocol
from src.sandbox.protocol import Malformed


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([b"a1 noop"], ("a1", "NOOP", [])),
        ([b'a1 EXAMINE "a \\"b\\\\ c"'], ("a1", "EXAMINE", [b'a "b\\ c'])),
        ([b"a1 FETCH 1:* (UID BODY.PEEK[HEADER]<0.5>)"], ("a1", "FETCH", ["1:*", ["UID", "BODY.PEEK[HEADER]<0.5>"]])),
        ([b"a FETCH 1 BODY[HEADER.FIELDS (FROM TO)]"], ("a", "FETCH", ["1", "BODY[HEADER.FIELDS (FROM TO)]"])),
        ([b"a APPEND {5}", b"INBOX", b" (\\Seen) {2+}", b"hi", b""], ("a", "APPEND", [b"INBOX", ["\\Seen"], b"hi"])),
    ],
)
def test_command_lines_become_values(parts: list[bytes], expected: tuple) -> None:
    """Atoms, quoted strings, literals, lists and sections, each as its own kind of value."""
    assert protocol.parse_command(parts) == expected


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=3))
def test_no_octets_break_the_parser(parts: list[bytes]) -> None:
    """Any octets give a command or Malformed, never another error."""
    try:
        tag, name, values = protocol.parse_command(parts)
    except Malformed:
        return
    assert tag
    assert name == name.upper()
    assert isinstance(values, list)


@given(
    st.sets(st.integers(1, 60)),
    st.lists(
        st.tuples(st.one_of(st.integers(1, 70), st.just("*")), st.one_of(st.none(), st.integers(1, 70), st.just("*"))), min_size=1
    ),
)
def test_uid_sets_name_what_the_grammar_says(held: set[int], ranges: list[tuple]) -> None:
    """Against the plain definition: a UID is named where it lies between the ends of a range, * being the last one."""
    uids = sorted(held)
    last = uids[-1] if uids else 0
    text = ",".join(f"{first}" if second is None else f"{first}:{second}" for first, second in ranges)

    def number(end: object) -> int:
        return last if end == "*" else int(str(end))

    spans = [sorted((number(first), number(first if second is None else second))) for first, second in ranges]
    assert protocol.uids_in(text, uids) == [uid for uid in uids if any(low <= uid <= high for low, high in spans)]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_folder_names_agree_with_imapclient(name: str) -> None:
    """Modified UTF-7: what the client decodes is the name, and the client's own encoding is read back."""
    assert client_decode(protocol.encode_name(name).encode()) == name
    assert protocol.decode_name(client_encode(name).decode()) == name


def test_search_keys_combine() -> None:
    """NOT, OR, lists and sets in one search; entries are loaded only for what the sets left over."""
    asked: list[list[int]] = []

    def load(uids: list[int]) -> list:
        asked.append(list(uids))
        return []

    assert protocol.search(["UID", "2:4", "1:3"], [1, 2, 3, 4], load) == [2, 3]
    assert asked == []
    protocol.search(["UID", "2:3", "SEEN"], [1, 2, 3, 4], load)
    assert asked == [[2, 3]]


@pytest.mark.parametrize("value", ["31-Feb-2026 00:00:00 +0000", "1-Jan-2026", "", "1-Foo-2026 00:00:00 +0000"])
def test_wrong_dates_are_malformed(value: str) -> None:
    """No other error leaves the parser."""
    with pytest.raises(Malformed):
        protocol.read_date_time(value)
