"""Numbers that somebody else wrote as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.digits import number_in


@given(st.integers(0, 2**64))
def test_a_number_is_read_back(value: int) -> None:
    assert number_in(str(value)) == value


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1_0", "1.0", "²", "٣", "9" * 21, "9" * 5000], ids=lambda text: text[:5])
def test_what_is_no_number_is_none(text: str) -> None:
    """Also what isdigit() or int() take for one, and what int() refuses by its length."""
    assert number_in(text) is None
