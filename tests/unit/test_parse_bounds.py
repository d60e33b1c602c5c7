"""What hostile mail cannot do: every limit is set by the kernel on a child process, see tests/support/bounded_parse.py.

Up to 8 MiB no mail takes more than 2 seconds of CPU time or 200 MB of address space, interpreter included; above, no more than
8 times its size. None raises, and every record can be encoded and read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.bounded_parse import SMALL, BoundedParser
from tests.unit.test_parse_differential import ODD_MAILS, standard_library_mails


@pytest.fixture(scope="module")
def bounded() -> Iterator[BoundedParser]:
    with BoundedParser() as parser:
        yield parser


def filled(head: bytes, chunk: bytes, size: int = SMALL) -> bytes:
    """`head` and as many chunks as fit into `size` bytes."""
    return head + (chunk * ((size - len(head)) // len(chunk) + 1))[: size - len(head)]


def part(kind: str, encoding: str = "7bit") -> bytes:
    return f"Content-Type: {kind}\nContent-Transfer-Encoding: {encoding}\n\n".encode()


def nested(levels: int) -> bytes:
    return b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (level, level) for level in range(levels))


def header(name: bytes, chunk: bytes) -> bytes:
    """Sixteen fields of just under 64 KiB: all the header that is read."""
    return filled(name + b": ", chunk, 64_000) + b"\n"


MULTIPART = b"Content-Type: multipart/mixed; boundary=b\n\n"
SHAPES: dict[str, Callable[[int], bytes]] = {
    "nesting": lambda size: filled(nested(170_000), b"x", size),
    "parts": lambda size: filled(MULTIPART, b"--b\n\nx\n", size),
    "parts with a header": lambda size: filled(MULTIPART, b"--b\n" + b"a:\n" * 340 + b"\nx\n", size),
    "parts with long names": lambda size: filled(
        MULTIPART, b"--b\nContent-Type: a/b; name*=utf-8''" + b"%aa" * 300 + b"\n\nx\n", size
    ),
    "parts of deep HTML": lambda size: filled(
        MULTIPART, b"--b\n" + part("text/html") + b"<b x>" * 499 + b"</p>" * 2_000 + b"\n", size
    ),
    "closing delimiters": lambda size: filled(MULTIPART, b"--b--\n", size),
    "dashes": lambda size: filled(MULTIPART + b"--b\n\n", b"--\n", size),
    "long dashes": lambda size: filled(MULTIPART, b"--" + b"b" * 2_000 + b"\n", size),
    "one field": lambda size: filled(b"Subject: ", b"=?utf-8?q?=C3?= ", size),
    "short fields": lambda size: filled(b"", b"a:\n", size),
    "folds": lambda size: filled(b"Subject: x", b"\n ", size),
    "no line end": lambda size: filled(b"", b"x", size),
    "carriage returns": lambda size: filled(b"", b"\r", size),
    "recipients": lambda _: header(b"To", b"u@example.org, ") * 16,
    "open quotes": lambda _: header(b"To", b'<\\"') * 16,
    "open comments": lambda _: header(b"To", b"(") * 16,
    "loose at signs": lambda _: header(b"To", b" @") * 16,
    "loose dots": lambda _: header(b"From", b" .") * 16,
    "colons": lambda _: header(b"From", b"a@b:") * 16,
    "encoded words": lambda _: header(b"To", b"=?utf-8?b?w6Q=?= ") * 16,
    "words without an end": lambda _: header(b"To", b"=?a?q? ") * 16,
    "parameters": lambda _: header(b"Content-Type", b';a="x;"') * 16,
    "pieces of parameters": lambda _: header(b"Content-Type", b";a*0*=x''%C3") * 16,
    "references": lambda _: header(b"References", b"<(") * 16,
    "a sender of <@": lambda size: filled(b"From: <@\n\n", b"x", size),
    "smuggled line ends": lambda size: filled(b"Subject: =?utf-8?q?x=0D=0A=1B[2J?=\n\n", b"x", size),
    "a path for a name": lambda size: filled(b"Content-Type: a/b; name*=utf-8''..%2F..%2Fetc%2Fpasswd\n\n", b"x", size),
    "quoted-printable blanks": lambda size: filled(part("text/plain", "quoted-printable"), b" ", size),
    "quoted-printable lines": lambda size: filled(part("text/plain", "quoted-printable"), b"a \n", size),
    "base64 of nothing": lambda size: filled(part("application/x", "base64"), b"=", size),
    "base64 rubbish": lambda size: filled(part("application/x", "base64"), b"a*", size),
    "uuencode that grows": lambda size: filled(part("text/html", "x-uuencode") + b"begin 644 a\n", b"M\n", size),
    "uuencode that grows in a file": lambda size: filled(part("application/x", "x-uuencode") + b"begin 644 a\n", b"M\n", size),
    "uuencode in short lines": lambda size: filled(part("application/x", "x-uuencode") + b"begin 644 a\n", b"!\n", size),
    "flowed lines": lambda size: filled(part("text/plain; format=flowed"), b"> \n", size),
    "enriched text": lambda size: filled(part("text/enriched"), b"<param>", size),
    "UTF-7": lambda size: filled(part("text/plain; charset=utf-7"), b"+A", size),
    "ISO-2022-JP": lambda size: filled(part("text/plain; charset=iso-2022-jp"), b"\x1b$B", size),
    "HTML comments": lambda size: filled(part("text/html"), b"<!--", size),
    "HTML end tags": lambda size: filled(part("text/html") + b"<b x>" * 499, b"</p>", size),
    "HTML attributes": lambda size: filled(part("text/html") + b"<a ", b"b='c' ", size),
    "HTML references": lambda size: filled(part("text/html"), b"&a", size),
    "HTML tables": lambda size: filled(part("text/html"), b"<table><tr><td>", size),
    "UTF-16 HTML": lambda size: filled(part("text/html; charset=utf-16"), b"<\0b\0>\0", size),
    "the outer boundary inside": lambda size: filled(b"", b"Content-Type: multipart/mixed; boundary=b\n\n--b\n", size),
    "the outer boundary closed": lambda size: filled((MULTIPART + b"--b\n") * 99, b"--b--\n--b\n\nx\n", size),
    "lines that are no field": lambda size: filled(b"", b"x\nTo:\n", size),
    "named inline texts": lambda size: filled(MULTIPART, b"--b\nContent-Disposition: inline; filename=a\n\nx\n", size),
    "forgotten semicolons": lambda size: filled(MULTIPART, b"--b\nContent-Type: a/b" + b" =x" * 300 + b"\n\nx\n", size),
    "words for base64": lambda size: filled(part("text/plain", "base64"), b"word word\n", size),
    "invisible characters": lambda size: filled(part("text/html"), b"\xad ", size),
    "soft line ends": lambda size: filled(part("text/plain", "quoted-printable"), b"=\n", size),
}


@pytest.mark.parametrize("size", [SMALL, 9 << 20])
@pytest.mark.parametrize("name", SHAPES)
def test_a_hostile_shape_keeps_within_its_bounds(bounded: BoundedParser, name: str, size: int) -> None:
    """8 MiB of one trick, or all the header that is read; a little above, where 8 times the size is least."""
    raw = SHAPES[name](size)[:size]
    assert len(raw) > 1_000_000
    assert bounded.parse(raw) == ""


@pytest.mark.parametrize("size", [9 << 20, 25 << 20])
@pytest.mark.parametrize("encoding", ["base64", "quoted-printable", "7bit", "x-uuencode"])
def test_a_large_mail_takes_a_few_times_its_size(bounded: BoundedParser, encoding: str, size: int) -> None:
    """One attachment; the bytes of it are there as often as they must be."""
    chunk = {"base64": b"AAAA" * 19 + b"\n", "x-uuencode": b"M" + b"'" * 60 + b"\n"}.get(encoding, b"x=20 " * 12 + b"\n")
    head = MULTIPART + b"--b\n\nhello\n--b\n" + part("application/x; name=a", encoding)
    assert bounded.parse(filled(head + b"begin 644 a\n" * (encoding == "x-uuencode"), chunk, size)) == ""


def test_a_large_text_takes_a_few_times_its_size(bounded: BoundedParser) -> None:
    """Only its beginning is decoded."""
    for kind in ("text/plain; charset=utf-8", "text/html"):
        assert bounded.parse(filled(part(kind), "<p>ä €\n".encode(), 25 << 20)) == ""


def test_the_bounds_bite() -> None:
    """A process that takes more is ended and says so: without this the other tests could not fail."""
    hungry = "import resource\nfrom tests.support import bounded_parse as b\n"
    for body, answer in (
        ("while True: pass", "ended by signal"),
        ("return bytes(10**9)", "exit code 1"),
        ("raise ValueError", "exit code 1"),
    ):
        code = f"{hungry}def parse(*_):\n {body}\nb.parse = parse\nb.CPU_SECONDS = 1\nb._serve()"
        with BoundedParser(("-c", code)) as parser:
            assert parser.parse(b"x").startswith(answer)


def test_odd_mails_keep_within_their_bounds(bounded: BoundedParser) -> None:
    """Those of this project and those of the interpreter's own tests."""
    for path in [*ODD_MAILS, *standard_library_mails()]:
        assert bounded.parse(path.read_bytes()) == "", path.name


TOKENS = st.sampled_from(
    [
        *(
            b"\n",
            b"\r\n",
            b"\r",
            b" ",
            b"\t",
            b"--b",
            b"--",
            b"=",
            b"=?",
            b"?=",
            b"?q?",
            b"?b?",
            b"utf-8",
            b"<",
            b">",
            b"<b>",
            b"</b>",
        ),
        *(
            b"<!--",
            b"-->",
            b"<script>",
            b"&",
            b"&#",
            b";",
            b":",
            b",",
            b'"',
            b"\\",
            b"(",
            b")",
            b"@",
            b".",
            b"*",
            b"'",
            b"%41",
            b"a",
            b"Z",
        ),
        *(
            b"Content-Type: ",
            b"text/html",
            b"multipart/mixed; boundary=b",
            b"message/rfc822",
            b"To: ",
            b"\n\n",
            b"begin 644 a\n",
            b"M",
        ),
        *(
            b"\x00",
            b"\x1b$B",
            b"\x80",
            b"\xc3",
            b"\xa4",
            b"\xff\xfe",
            b"*0*=",
            b"name",
            b"+A",
            b"> ",
            b"<pre>",
            b"<table>",
            b"<p x>",
        ),
        *(
            b"=C3",
            b"=\n",
            b"\xad",
            b"\xe2\x80\x8b",
            b"X-a: b\n",
            b"--b\n",
            b"--b--\n",
            b"Content-Disposition: inline; filename=a\n",
            b"multipart/alternative; boundary=b\n\n",
            b"utf-7''",
            b"<meta charset=",
        ),
    ]
)
HEADS = st.sampled_from(
    [b"", b"To: ", b"From: ", b"Subject: ", b"Content-Type: ", b"Date: ", b"References: ", MULTIPART, MULTIPART + b"--b\n"]
)
KINDS = st.sampled_from(
    ["text/plain", "text/html", "text/enriched", "text/plain; format=flowed", "a/b", "text/html; charset=utf-16"]
)
ENCODINGS = st.sampled_from(["7bit", "base64", "quoted-printable", "x-uuencode", "x"])


class Repeated(NamedTuple):
    """A mail of up to 9 MiB by its recipe: Hypothesis keeps what it draws, thousands of them."""

    head: bytes
    kind: str
    encoding: str
    first: list[bytes]
    chunk: list[bytes]
    size: int

    def raw(self) -> bytes:
        body = b"" if self.head.endswith(b": ") else part(self.kind, self.encoding)
        return filled(self.head + body + b"".join(self.first), b"".join(self.chunk), self.size)


REPEATED = st.builds(
    Repeated,
    HEADS,
    KINDS,
    ENCODINGS,
    st.lists(TOKENS, max_size=3),
    st.lists(TOKENS, min_size=1, max_size=6),
    st.sampled_from([4_000, 64_000, 1 << 20, SMALL, 9 << 20]),
)
SEARCH = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], database=None)


@settings(SEARCH, max_examples=60)
@given(REPEATED)
def test_no_repetition_breaks_the_bounds(bounded: BoundedParser, mail: Repeated) -> None:
    """Any few tokens, thousands of times: what is quadratic shows."""
    assert bounded.parse(mail.raw()) == ""


@pytest.mark.full
@settings(SEARCH, max_examples=1_000)
@given(REPEATED)
def test_no_repetition_breaks_the_bounds_in_a_long_search(bounded: BoundedParser, mail: Repeated) -> None:
    """The same, seventeen times as long."""
    assert bounded.parse(mail.raw()) == ""
