"""How the products of few rows in CUDA C++ are divided: evenly, and within a block's shared memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.kernels.gpu import few_rows, nvrtc


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(
    ("num_outputs", "row_bytes", "gated", "splits"),
    [
        (6144, 8192, False, 1),
        (4096, 8192, False, 2),
        (14336, 8192, True, 1),
        (4096, 28672, False, 2),
        (3072, 4096, False, 1),
        (2048, 4096, False, 4),
        (8192, 4096, True, 1),
        (2048, 16384, False, 4),
        (6144, 4096, False, 1),
        (4096, 4096, False, 1),
        (14336, 4096, True, 1),
        (4096, 14336, False, 2),
    ],
)
def test_shares_are_even(num_outputs: int, row_bytes: int, gated: bool, splits: int, tiles: int) -> None:
    how = few_rows.cut(num_outputs, row_bytes, tiles, gated, 132)
    assert how.splits == splits
    blocks = -(-num_outputs // few_rows.outputs_each(num_outputs, splits, 132)) * splits
    assert blocks == 128


@given(
    st.integers(1, 1 << 17),
    st.integers(1, 64).map(lambda chunks: chunks * few_rows.PITCH),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 200),
)
def test_cuts_fit(num_outputs: int, row_bytes: int, tiles: int, gated: bool, processors: int) -> None:
    how = few_rows.cut(num_outputs, row_bytes, tiles, gated, processors)
    each = few_rows.outputs_each(num_outputs, how.splits, processors)
    assert each % 8 == 0
    assert 1 <= how.splits <= max(1, row_bytes // (2 * few_rows.PITCH))
    assert each * max(1, processors // how.splits) >= num_outputs
    assert few_rows.shared_bytes(tiles, how.height, how.stages, how.x_stages) <= nvrtc.SHARED_BYTES
