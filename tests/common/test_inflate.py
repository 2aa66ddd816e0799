"""Compressed bodies: decoded within the limit, or refused."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.inflate import InflateError, InflateLimitError, inflate


@given(st.binary(max_size=2000))
def test_inflate_round_trips_each_encoding(data: bytes) -> None:
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    assert inflate(gzip.compress(data), "gzip", len(data)) == data
    assert inflate(zlib.compress(data), "deflate", len(data)) == data
    if data:
        assert inflate(raw.compress(data) + raw.flush(), "deflate", len(data)) == data


def test_inflate_stops_at_the_limit() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 60_000
    with pytest.raises(InflateLimitError):
        inflate(bomb, "gzip", 1_000_000)


@pytest.mark.parametrize("body", [b"", b"not gzip", gzip.compress(b"text", mtime=0)[:-6]], ids=["empty", "text", "cut"])
def test_inflate_refuses_other_bytes_and_cut_ones(body: bytes) -> None:
    with pytest.raises(InflateError):
        inflate(body, "gzip", 100)
