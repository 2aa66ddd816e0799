"""Sizes: parsing, and the round trip through their shortest form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.units import GIB, MIB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("123", 123), ("4GiB", 4 * GIB), ("4G", 4 * GIB), ("4GB", 4 * 10**9), (" 1.5 m ", 3 * MIB // 2), ("1tb", 10**12)],
)
def test_parse_size_units(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "much", "12XB", "-1", "1 GiB 2", "GiB"])
def test_parse_size_refuses_and_quotes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@given(st.integers(0, 2**50))
def test_format_size_round_trips(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes
