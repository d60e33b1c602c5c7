"""A mailbox as people have them, the same octets everywhere: of 50 mails 35 small ones, 10 newsletters, 4 with an attachment, 1 large."""

from __future__ import annotations

import base64
import quopri
import random
from collections.abc import Iterator
from email.message import Message
from functools import cache

from src.sandbox.generator import generate

SMALL = ("plain", "mailing_list", "utf8", "iso_8859_1", "koi8_r", "auto_reply", "bounce", "calendar", "invoice")
NEWSLETTER = (10_500, 35_500)  # characters of HTML: with its text version 20 to 60 KB
ATTACHMENT = (75_000, 219_000)  # bytes before base64: mails of 100 to 300 KB
LARGE = (980_000, 1_460_000)  # the same: 1.3 to 2 MB


def mails(count: int, seed: int = 1) -> Iterator[bytes]:
    """`count` mails with CRLF line ends; of 10,000 the sum is about 609 MB."""
    letters = generate(seed, count, SMALL)
    for number in range(count):
        letter = next(letters)
        draw = random.Random(f"{seed}:{number}")
        place = number * 37 % 50  # the kinds mixed evenly
        if place < 35:
            yield letter.raw
        elif place < 45:
            yield _newsletter(draw, f"{seed}.{number}")
        else:
            yield _with_attachment(draw, f"{seed}.{number}", *(ATTACHMENT if place < 49 else LARGE))


@cache
def _paragraphs() -> tuple[str, ...]:
    """To choose from: writing each anew would take longer than reading the mails."""
    draw = random.Random("paragraphs")
    words = ["".join(draw.choices("aeiorstnlücé", k=draw.randint(2, 9))) for _ in range(400)]
    return tuple(" ".join(draw.choices(words, k=60)) for _ in range(300))


def _newsletter(draw: random.Random, unique: str) -> bytes:
    wanted, length = draw.randint(*NEWSLETTER), 0
    blocks: list[str] = []
    texts: list[str] = []
    while length < wanted:
        paragraph = draw.choice(_paragraphs())
        link = f"https://news.example/{draw.getrandbits(64):x}"
        style = "color:#333333;font-family:Arial,sans-serif;font-size:14px;line-height:20px"
        blocks.append(f'<tr><td style="{style}"><p>{paragraph}</p><a href="{link}">Read&nbsp;on &raquo;</a></td></tr>\n')
        length += len(blocks[-1])
        if len(texts) < 5:
            texts.append(f"{paragraph}\n{link}\n")
    html = f"<html><head><title>The week</title></head><body><table>\n{''.join(blocks)}</table></body></html>\n"
    parts = [_text("plain", "\n".join(texts)), _text("html", html)]
    return _mail("The Weekly <news@weekly.example>", "The week in eleven lines", unique, "alternative", parts, bulk=True)


def _with_attachment(draw: random.Random, unique: str, low: int, high: int) -> bytes:
    content = draw.randbytes(draw.randint(low, high))
    head = b'Content-Type: application/pdf; name="offer.pdf"\r\nContent-Transfer-Encoding: base64\r\n'
    head += b'Content-Disposition: attachment; filename="offer.pdf"\r\n\r\n'
    attachment = head + base64.encodebytes(content).replace(b"\n", b"\r\n")
    letter = _text("plain", "\n".join(draw.choices(_paragraphs(), k=4)))
    return _mail("Ada Winter <ada@firm.example>", "Our offer", unique, "mixed", [letter, attachment], bulk=False)


def _text(subtype: str, content: str) -> bytes:
    body = quopri.encodestring(content.encode()).replace(b"\n", b"\r\n")
    head = f"Content-Type: text/{subtype}; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
    return head.encode() + body


def _mail(sender: str, subject: str, unique: str, subtype: str, parts: list[bytes], *, bulk: bool) -> bytes:
    head = Message()
    for name in ("Received", "Received", "Received"):
        head[name] = f"from relay.example (relay.example [192.0.2.7]) by mx.example with ESMTPS id {unique}"
    head["DKIM-Signature"] = "v=1; a=rsa-sha256; c=relaxed/relaxed; d=example; s=s1; bh=" + "A" * 43 + "=; b=" + "B" * 171 + "="
    head["Message-ID"] = f"<{unique}@mail.example>"
    head["Date"] = "Thu, 05 Feb 2026 09:30:00 +0100"
    head["From"], head["To"], head["Subject"] = sender, "Ingrid <ingrid@example.org>", subject
    head["MIME-Version"] = "1.0"
    if bulk:
        head["List-Unsubscribe"] = f"<https://weekly.example/out/{unique}>"
    boundary = f"=_{unique}"
    head["Content-Type"] = f'multipart/{subtype}; boundary="{boundary}"'
    top = "".join(f"{name}: {value}\r\n" for name, value in head.items()).encode()
    body = b"".join(b"--" + boundary.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return top + b"\r\n" + body + b"--" + boundary.encode() + b"--\r\n"
