"""Which sums over ranks the kernels accept, and that those fit the inboxes. What they compute is shown on two GPUs in tests/model/parallel."""

import pytest
import torch

from runtime.engine.kernels.gpu import rank_sum
from runtime.engine.kernels.gpu.rank_sum import MOST_BYTES, MOST_PACKET_BYTES, RankSum


def _sums(num_ranks: int) -> RankSum:
    return RankSum(range(num_ranks), 0, torch.device("cpu"))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_rank_sum_serves_what_fits_an_inbox(num_ranks: int) -> None:
    sums = _sums(num_ranks)
    constants = dict(define.split("=") for define in rank_sum.defines(num_ranks, torch.bfloat16))
    plain_bytes, packet_bytes = 8 * int(constants["PLAIN_UNITS"]), 8 * int(constants["PACKET_UNITS"])
    assert plain_bytes * (num_ranks - 1) <= MOST_BYTES
    assert packet_bytes <= min(plain_bytes, MOST_PACKET_BYTES)
    assert rank_sum.inbox_bytes(num_ranks) >= 2 * num_ranks * (plain_bytes + 2 * packet_bytes)
    rows = torch.zeros(plain_bytes // 2048 + 1, 1024, dtype=torch.bfloat16)
    assert sums.serves(rows[:-1])
    assert not sums.serves(rows)
    assert sums.serves_gather(rows[: packet_bytes // 2048])
    assert not sums.serves_gather(rows[: packet_bytes // 2048 + 1])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (torch.zeros(2, 64, dtype=torch.float16), True),
        (torch.zeros(2, 64), False),
        (torch.zeros(2, 66, dtype=torch.bfloat16), False),
        (torch.zeros(0, 64, dtype=torch.bfloat16), False),
        (torch.zeros(64, 8, dtype=torch.bfloat16).T, False),
        (torch.zeros(1, 16384, dtype=torch.bfloat16), True),
        (torch.zeros(1, 16388, dtype=torch.bfloat16), False),
    ],
)
def test_rank_sum_serves_rows_of_16_bits(rows: torch.Tensor, expected: bool) -> None:
    assert _sums(2).serves(rows) is expected


def test_rank_sum_is_not_available_without_a_gpu() -> None:
    assert _sums(2).num_processors == 0
