"""Token masks: the Triton kernel and its torch twin against a plain loop over bits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from runtime.engine.kernels import token_mask
from runtime.engine.kernels.gpu import token_mask as gpu


@pytest.mark.parametrize("run", [gpu.apply_token_masks, token_mask.apply_token_masks_torch])
@pytest.mark.parametrize("vocab", [31, 32, 4097, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_token_masks_equals_bit_by_bit(
    device: torch.device, run: Callable[..., None], vocab: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(vocab)
    logits = torch.randn(5, vocab, device=device).to(dtype)
    lines = [3, 0, 4]
    masks = rng.integers(-(2**31), 2**31, (3, -(-vocab // 32)), dtype=np.int64).astype(np.int32)
    masks[1] = -1
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    expected = logits.clone()
    for line, row in zip(lines, allowed, strict=True):
        expected[line, torch.from_numpy(~row).to(device)] = float("-inf")
    run(logits, torch.tensor(lines, device=device), torch.from_numpy(masks).to(device))
    assert torch.equal(logits, expected)
    assert torch.isinf(logits[3]).any()
    assert not torch.isinf(logits[[0, 1, 2]]).any()
