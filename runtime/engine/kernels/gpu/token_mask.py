"""Packed token masks in Triton: a grid of (masks, blocks of the vocabulary) stores -inf where a bit is not set."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["logits_stride", "masks_stride", "vocab"])
def _mask_kernel(logits_ptr, lines_ptr, masks_ptr, logits_stride, masks_stride, vocab, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    word = tl.load(masks_ptr + i * masks_stride + ids // 32, mask=inside, other=0)
    forbidden = ((word >> (ids % 32)) & 1) == 0
    row_ptr = logits_ptr + tl.load(lines_ptr + i) * logits_stride
    tl.store(row_ptr + ids, tl.full((BLOCK,), float("-inf"), tl.float32), mask=inside & forbidden)


def apply_token_masks(logits: Tensor, lines: Tensor, masks: Tensor) -> None:
    """See runtime.engine.kernels.token_mask.apply_token_masks."""
    vocab = logits.shape[1]
    _mask_kernel[(lines.shape[0], triton.cdiv(vocab, _BLOCK))](
        logits, lines, masks, logits.stride(0), masks.stride(0), vocab, BLOCK=_BLOCK, num_warps=8
    )
