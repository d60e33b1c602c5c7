"""Numbers that somebody else wrote as text. Pure."""

from __future__ import annotations

MOST_DIGITS = 20  # those of 2^64


def number_in(text: str) -> int | None:
    """The number that `text` is in ASCII digits; None where it is none. `int()` alone raises for "²", which isdigit() takes for one, and
    for 5,000 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None
