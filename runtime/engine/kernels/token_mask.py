"""Applies packed token masks to logits: every token whose bit is not set gets -inf."""

import torch
from torch import Tensor


def apply_token_masks(logits: Tensor, lines: Tensor, masks: Tensor) -> None:
    """Mask `logits` [m, V] in place: line lines[i] by masks[i].

    `lines`: [n] int64, each at most once. `masks`: [n, ceil(V / 32)] int32; bit t % 32 of word t // 32 is set if token t is allowed.
    """
    if logits.is_cuda:
        from runtime.engine.kernels.gpu import token_mask

        token_mask.apply_token_masks(logits, lines, masks)
    else:
        apply_token_masks_torch(logits, lines, masks)


def apply_token_masks_torch(logits: Tensor, lines: Tensor, masks: Tensor) -> None:
    """Torch twin of the Triton launch."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = ((masks[:, :, None] >> bits) & 1).view(masks.shape[0], -1)[:, : logits.shape[1]] != 0
    logits.index_copy_(0, lines, logits[lines].masked_fill_(~allowed, float("-inf")))
