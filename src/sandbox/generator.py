"""Seeded mail as mailboxes hold it: letters, newsletters, invoices, bounces, lists, many charsets, and some hostile ones.

`generate(seed, n)` gives the same octets everywhere; mail number i of a seed does not depend on n. Pure.
"""

from __future__ import annotations

import base64
import quopri
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

_CRLF = "\r\n"


@dataclass(frozen=True, slots=True)
class Sample:
    """`raw`: the mail with CRLF line ends. `subject`: as a reader would see it."""

    raw: bytes
    kind: str
    subject: str


def generate(seed: int, count: int, kinds: Sequence[str] = ()) -> Iterator[Sample]:
    """`count` mails of these kinds (none named: all, the everyday ones more often). KeyError: an unknown kind."""
    chosen = list(kinds) or list(KINDS)
    weights = [_WEIGHTS.get(kind, 1) for kind in chosen]
    for number in range(count):
        draw = random.Random(f"{seed}:{number}")
        kind = draw.choices(chosen, weights)[0]
        mail = _Mail(draw, f"{seed}.{number}")
        subject = KINDS[kind](mail)
        yield Sample(mail.octets(), kind, subject)


class _Mail:
    """A mail being written: header lines and a body, in octets."""

    def __init__(self, draw: random.Random, unique: str) -> None:
        self.draw = draw
        self.unique = unique
        self.sender = draw.choice(_PEOPLE)
        self.header: list[bytes] = []
        self.body = b""

    def octets(self) -> bytes:
        return b"".join(line + b"\r\n" for line in self.header) + b"\r\n" + self.body

    def add(self, name: str, value: str | bytes) -> None:
        self.header.append(name.encode("ascii") + b": " + (value.encode("ascii") if isinstance(value, str) else value))

    def open(self, subject: str, *, sender: str = "", date: bool = True) -> None:
        """The lines that nearly every mail has."""
        name, address = self.sender
        self.add("Message-ID", f"<{self.unique}@mail.{address.partition('@')[2]}>")
        if date:
            moment = datetime(2026, 1, 1, 8, tzinfo=UTC) + timedelta(seconds=self.draw.randrange(200 * 86400))
            self.add("Date", format_datetime(moment))
        self.add("From", sender or f"{_word(name)} <{address}>")
        self.add("To", f"{_word('Ingrid Østby')} <ingrid@gmail.example>")
        self.add("Subject", subject if subject.startswith("=?") else _word(subject))
        self.add("MIME-Version", "1.0")

    def text(self, content: str, *, subtype: str = "plain", charset: str = "utf-8", encoding: str = "quoted-printable") -> None:
        """The whole body is one text."""
        head, body = _text_part(content, subtype, charset, encoding)
        self.header.extend(head)
        self.body = body

    def multipart(self, subtype: str, parts: Sequence[bytes], parameters: str = "") -> None:
        boundary = self.boundary()
        self.add("Content-Type", f'multipart/{subtype}; boundary="{boundary}"{parameters}')
        self.body = _joined(boundary, parts)

    def boundary(self) -> str:
        return f"=_{self.draw.getrandbits(64):016x}"

    def prose(self, low: int, high: int, words: Sequence[str] = ()) -> str:
        """Sentences of about `low` to `high` characters in all."""
        words = words or _WORDS
        wanted = self.draw.randint(low, high)
        lines: list[str] = []
        length = 0
        while length < wanted:
            line = " ".join(self.draw.choices(words, k=self.draw.randint(6, 13))).capitalize() + "."
            lines.append(line if self.draw.random() < 0.8 else line + "\n")
            length += len(line)
        return "\n".join(lines) + "\n"


def _plain(mail: _Mail) -> str:
    subject = f"{mail.draw.choice(_TOPICS)} on {mail.draw.choice(_DAYS)}"
    mail.open(subject)
    mail.text(f"Hi Ingrid,\n\n{mail.prose(300, 5000)}\n-- \n{mail.sender[0]}\n")
    return subject


def _newsletter(mail: _Mail) -> str:
    subject = f"This week: {mail.draw.choice(_TOPICS)} and {mail.draw.choice(_TOPICS).lower()}"
    mail.open(subject, sender="The Weekly <news@weekly.example>")
    mail.add("List-Unsubscribe", f"<https://weekly.example/out?u={mail.draw.getrandbits(48):x}>")
    mail.add("List-Unsubscribe-Post", "List-Unsubscribe=One-Click")
    mail.add("Precedence", "bulk")
    mail.text(_html(mail, subject, 8000, 50_000), subtype="html", encoding="base64")
    return subject


def _alternative(mail: _Mail) -> str:
    subject = f"{mail.draw.choice(_TOPICS)}: what we agreed"
    mail.open(subject)
    plain = _part(*_text_part(mail.prose(500, 4000), "plain", "utf-8", "quoted-printable"))
    html = _part(*_text_part(_html(mail, subject, 1000, 12_000), "html", "utf-8", "quoted-printable"))
    mail.multipart("alternative", [plain, html])
    return subject


def _pdf(mail: _Mail) -> str:
    subject = f"Offer {mail.draw.randint(1000, 9999)} attached"
    mail.open(subject)
    content = b"%PDF-1.4\n" + mail.draw.randbytes(mail.draw.randint(2000, 30_000)) + b"\n%%EOF\n"
    mail.multipart("mixed", [_letter(mail), _attachment("application/pdf", 'filename="offer.pdf"', content)])
    return subject


def _png(mail: _Mail) -> str:
    subject = f"Photos of {mail.draw.choice(_DAYS)}"
    mail.open(subject)
    content = b"\x89PNG\r\n\x1a\n" + mail.draw.randbytes(mail.draw.randint(2000, 30_000))
    html = _part(*_text_part('<p>Look:</p><img src="cid:photo1">', "html", "utf-8", "7bit"))
    image = _attachment("image/png", 'filename="photo.png"', content, b"Content-ID: <photo1>")
    boundary = mail.boundary()
    related = _part([f'Content-Type: multipart/related; boundary="{boundary}"'.encode()], _joined(boundary, [html, image]))
    mail.multipart("mixed", [related])
    return subject


def _invoice(mail: _Mail) -> str:
    number, total = mail.draw.randint(10_000, 99_999), mail.draw.randint(500, 900_000) / 100
    subject = f"Invoice {number}: {total:.2f} EUR due in 14 days"
    mail.open(subject, sender="Accounts <billing@supplier.example>")
    text = f"Dear customer,\n\nplease find our invoice {number}.\n\nAmount due: {total:.2f} EUR\nVAT included. IBAN DE00 1234.\n"
    letter = _part(*_text_part(text + mail.prose(200, 800), "plain", "utf-8", "quoted-printable"))
    content = b"%PDF-1.4\n" + mail.draw.randbytes(mail.draw.randint(1500, 9000)) + b"\n%%EOF\n"
    mail.multipart("mixed", [letter, _attachment("application/pdf", f'filename="invoice-{number}.pdf"', content)])
    return subject


def _auto_reply(mail: _Mail) -> str:
    subject = f"Automatic reply: {mail.draw.choice(_TOPICS)}"
    mail.open(subject)
    mail.add("Auto-Submitted", "auto-replied")  # RFC 3834
    mail.add("X-Auto-Response-Suppress", "All")
    mail.add("In-Reply-To", f"<asked.{mail.unique}@gmail.example>")
    mail.text(f"I am out of office until {mail.draw.choice(_DAYS)}.\n\n{mail.prose(100, 900)}")
    return subject


def _bounce(mail: _Mail) -> str:
    subject = "Delivery Status Notification (Failure)"
    mail.open(subject, sender="Mail Delivery Subsystem <mailer-daemon@googlemail.example>")
    mail.add("Auto-Submitted", "auto-replied")
    mail.add("Return-Path", "<>")
    recipient = f"nobody{mail.draw.randint(1, 999)}@elsewhere.example"
    status = (  # RFC 3464
        "Reporting-MTA: dns; googlemail.example\r\nArrival-Date: Thu, 01 Jan 2026 08:00:00 +0000\r\n\r\n"
        f"Final-Recipient: rfc822; {recipient}\r\nAction: failed\r\nStatus: 5.1.1\r\n"
        "Diagnostic-Code: smtp; 550 5.1.1 no such user\r\n"
    )
    mail.multipart(
        "report",
        [
            _part(*_text_part(f"Your message to {recipient} could not be delivered.\n", "plain", "utf-8", "7bit")),
            _part([b"Content-Type: message/delivery-status"], status.encode()),
            _part([b"Content-Type: message/rfc822"], b"Subject: lunch?\r\nFrom: ingrid@gmail.example\r\n\r\nAt noon?\r\n"),
        ],
        "; report-type=delivery-status",
    )
    return subject


def _list(mail: _Mail) -> str:
    subject = f"[dev] {mail.draw.choice(_TOPICS)}"
    mail.open(subject)
    mail.add("List-Id", "Development <dev.lists.example>")
    mail.add("List-Post", "<mailto:dev@lists.example>")
    mail.add("Reply-To", "dev@lists.example")
    mail.add("Precedence", "list")
    first = f"<{mail.draw.randint(1, 99)}.thread@lists.example>"
    mail.add("In-Reply-To", first)
    mail.add("References", f"{first}{_CRLF} <{mail.draw.randint(100, 199)}.thread@lists.example>")
    quote = "\n".join(f"> {line}" for line in mail.prose(200, 1500).splitlines())
    mail.text(f"{quote}\n\n{mail.prose(200, 3000)}")
    return subject


def _utf8(mail: _Mail) -> str:
    subject = f"Grüße aus Łódź – {mail.draw.choice(_TOPICS)} 🎉"
    mail.open(subject)
    mail.text(mail.prose(500, 3000, ("schön", "żółw", "naïve", "año", "Σωκράτης", "日本", "🙂", "und")), encoding="base64")
    return subject


def _latin1(mail: _Mail) -> str:
    subject = f"Réunion décalée à {mail.draw.choice(_DAYS)}"
    mail.open(_word(subject, "iso-8859-1", "q"))
    mail.text(mail.prose(500, 3000, ("été", "garçon", "où", "très", "même", "déjà")), charset="iso-8859-1")
    return subject


def _koi8(mail: _Mail) -> str:
    subject = "Договор и счёт"
    mail.open(_word(subject, "koi8-r", "b"))
    mail.text(mail.prose(500, 3000, ("привет", "счёт", "договор", "завтра", "спасибо")), charset="koi8-r", encoding="8bit")
    return subject


def _iso2022jp(mail: _Mail) -> str:
    subject = "会議のお知らせ"
    mail.open(_word(subject, "iso-2022-jp", "b"))
    mail.text(mail.prose(300, 1500, ("会議", "明日", "資料", "確認", "お願い")), charset="iso-2022-jp", encoding="7bit")
    return subject


def _file_names(mail: _Mail) -> str:
    subject = f"Two files with long names, {mail.draw.choice(_DAYS)}"
    mail.open(subject)
    extended = "filename*=UTF-8''%C3%9Cbersicht%20%E2%82%AC.xlsx"  # RFC 2231
    continued = "filename*0*=UTF-8''a%20rather%20;" + _CRLF + " filename*1*=long%20n%C3%A4me;" + _CRLF + ' filename*2=".csv"'
    sheet = mail.draw.randbytes(mail.draw.randint(1000, 8000))
    mail.multipart(
        "mixed",
        [
            _letter(mail),
            _attachment("application/vnd.openxmlformats-officedocument.spreadsheetml.sheet", extended, sheet),
            _attachment("text/csv", continued, b"a;b\r\n1;2\r\n"),
        ],
    )
    return subject


def _forward(mail: _Mail) -> str:
    inner = _Mail(mail.draw, f"inner.{mail.unique}")
    subject = f"Fwd: {_alternative(inner)}"
    mail.open(subject)
    mail.multipart("mixed", [_letter(mail), _part([b"Content-Type: message/rfc822"], inner.octets())])
    return subject


def _calendar(mail: _Mail) -> str:
    subject = f"Invitation: {mail.draw.choice(_TOPICS)}"
    mail.open(subject)
    invite = _CRLF.join(
        [
            "BEGIN:VCALENDAR",
            "VERSION:2.0",
            "PRODID:-//sandbox//EN",
            "METHOD:REQUEST",
            "BEGIN:VEVENT",
            f"UID:{mail.unique}@calendar.example",
            "DTSTAMP:20260101T080000Z",
            f"DTSTART:202602{mail.draw.randint(10, 27)}T090000Z",
            "DURATION:PT30M",
            f"SUMMARY:{subject}",
            "END:VEVENT",
            "END:VCALENDAR",
            "",
        ]
    )
    plain = _part(*_text_part(mail.prose(100, 600), "plain", "utf-8", "quoted-printable"))
    event = _part([b"Content-Type: text/calendar; charset=utf-8; method=REQUEST"], invite.encode())
    mail.multipart("alternative", [plain, event])
    return subject


def _broken_base64(mail: _Mail) -> str:
    subject = "Scan"
    mail.open(subject)
    broken = [b'Content-Type: application/pdf; name="scan.pdf"', b"Content-Transfer-Encoding: base64"]
    mail.multipart("mixed", [_letter(mail), _part(broken, b"JVBERi0xLjQK%%%not base64 at all\x00\r\nAAA=BBB\r\n")])
    return subject


def _no_date(mail: _Mail) -> str:
    subject = f"Undated {mail.draw.choice(_TOPICS).lower()}"
    mail.open(subject, date=False)
    mail.text(mail.prose(200, 1000))
    return subject


def _no_header(mail: _Mail) -> str:
    mail.body = f"There is no header here, only this ({mail.unique}).\r\n{mail.prose(50, 300)}".encode()
    return ""


def _raw_subject(mail: _Mail) -> str:
    subject = f"Übergröße {mail.draw.choice(_DAYS)}"
    mail.open("unused")
    mail.header = [line for line in mail.header if not line.startswith(b"Subject:")]
    mail.add("Subject", subject.encode("latin-1"))
    mail.text(mail.prose(200, 1000))
    return subject


def _injection(mail: _Mail) -> str:
    hidden = "Hello\r\nBcc: victim@elsewhere.example\r\n\x1b[2Jgone"
    mail.open(f"=?utf-8?b?{base64.b64encode(hidden.encode()).decode()}?=")
    mail.text(mail.prose(200, 1000))
    return hidden


def _script(mail: _Mail) -> str:
    subject = "<script>alert(document.cookie)</script>"
    mail.open(subject)
    mail.text(_html(mail, subject, 300, 2000), subtype="html")
    return subject


def _cut_short(mail: _Mail) -> str:
    subject = "Half a mail"
    mail.open(subject)
    boundary = mail.boundary()
    mail.add("Content-Type", f'multipart/mixed; boundary="{boundary}"')
    mail.body = _joined(boundary, [_letter(mail)]).removesuffix(f"--{boundary}--\r\n".encode())
    return subject


KINDS: dict[str, Callable[[_Mail], str]] = {
    "plain": _plain,
    "newsletter": _newsletter,
    "alternative": _alternative,
    "attachment_pdf": _pdf,
    "attachment_png": _png,
    "invoice": _invoice,
    "auto_reply": _auto_reply,
    "bounce": _bounce,
    "mailing_list": _list,
    "utf8": _utf8,
    "iso_8859_1": _latin1,
    "koi8_r": _koi8,
    "iso_2022_jp": _iso2022jp,
    "file_names": _file_names,
    "forward": _forward,
    "calendar": _calendar,
    "hostile_base64": _broken_base64,
    "hostile_no_date": _no_date,
    "hostile_no_header": _no_header,
    "hostile_raw_subject": _raw_subject,
    "hostile_injection": _injection,
    "hostile_script": _script,
    "hostile_cut_short": _cut_short,
}
_WEIGHTS = {"plain": 20, "newsletter": 8, "alternative": 12, "invoice": 6, "mailing_list": 6, "attachment_pdf": 4, "bounce": 2}

_PEOPLE = (
    ("Ada Winter", "ada@firm.example"),
    ("Bernd Äcker", "bernd@firm.example"),
    ("Chloé Martin", "chloe@studio.example"),
    ("Dmitri Orlow", "dmitri@partner.example"),
    ("Emi Tanaka", "emi@partner.example"),
    ("Farid Haddad", "farid@home.example"),
    ("Grace O'Neill", "grace@home.example"),
    ("Hugo da Silva", "hugo@studio.example"),
)
_TOPICS = (
    "Budget",
    "Release plan",
    "Office move",
    "Support rota",
    "Contract",
    "Team lunch",
    "Backup report",
    "Hiring",
    "Roadmap",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_WORDS = (
    *("the", "a", "and", "of", "to", "we", "you", "please", "meeting", "report", "number", "customer", "order", "delivery"),
    *("question", "answer", "time", "tomorrow", "project", "server", "change", "review", "draft", "agreed", "later", "team"),
    *("payment", "account", "document", "attached", "next", "week", "should", "could", "when", "because", "again", "almost"),
)


def _html(mail: _Mail, title: str, low: int, high: int) -> str:
    escaped = title.replace("<", "&lt;")
    paragraphs = "\n".join(f"<p>{line}</p>" for line in mail.prose(low, high).splitlines() if line)
    return f"<html><head><title>{escaped}</title><style>p {{ margin: 0 }}</style></head><body>\n{paragraphs}\n</body></html>\n"


def _letter(mail: _Mail) -> bytes:
    return _part(*_text_part(mail.prose(100, 1200), "plain", "utf-8", "quoted-printable"))


def _text_part(content: str, subtype: str, charset: str, encoding: str) -> tuple[list[bytes], bytes]:
    head = [f"Content-Type: text/{subtype}; charset={charset}".encode(), f"Content-Transfer-Encoding: {encoding}".encode()]
    octets = content.encode(charset)
    if encoding == "base64":
        return head, _base64_lines(octets)
    if encoding == "quoted-printable":
        octets = quopri.encodestring(octets)
    return head, octets.replace(b"\n", b"\r\n")


def _attachment(content_type: str, file_name: str, content: bytes, *extra: bytes) -> bytes:
    head = [f"Content-Type: {content_type}".encode(), f"Content-Disposition: attachment; {file_name}".encode()]
    return _part([*head, b"Content-Transfer-Encoding: base64", *extra], _base64_lines(content))


def _part(head: Sequence[bytes], body: bytes) -> bytes:
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _joined(boundary: str, parts: Sequence[bytes]) -> bytes:
    line = f"--{boundary}".encode()
    return b"".join(line + b"\r\n" + part + b"\r\n" for part in parts) + line + b"--\r\n"


def _base64_lines(content: bytes) -> bytes:
    return base64.encodebytes(content).replace(b"\n", b"\r\n")


def _word(text: str, charset: str = "utf-8", encoding: str = "b") -> str:
    """The text as it stands in a header: itself, or encoded words of at most 75 characters (RFC 2047), folded."""
    if text.isascii():
        return text
    step = 10
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    return f"{_CRLF} ".join(f"=?{charset}?{encoding}?{_encoded(piece.encode(charset), encoding)}?=" for piece in pieces)


def _encoded(octets: bytes, encoding: str) -> str:
    if encoding == "b":
        return base64.b64encode(octets).decode()
    return "".join(chr(octet) if chr(octet).isalnum() and octet < 128 else f"={octet:02X}" for octet in octets)
