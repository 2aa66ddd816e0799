"""How 4-bit weights lie in memory for the kernels, and how they come from and go back to bitsandbytes' layout. Pure tensor arithmetic.

bitsandbytes packs row-major pairs, the first element in the high nibble, with one absmax for each 64 elements. A kernel wants to unpack one loaded
byte tile into two operands that each lie in one block of 64. So each row is cut into groups of 128, and byte i of a group holds

    high nibble = element i          (first block of 64)
    low nibble  = element 64 + i     (second block)

Same bytes, same absmax, other order. A row of an odd number of blocks is padded by one block whose absmax is 0.
"""

import torch
from torch import Tensor

BLOCK = 64
GROUP = 2 * BLOCK


def padded_width(in_features: int) -> int:
    """Elements of a row as it lies in memory."""
    return -(-in_features // GROUP) * GROUP


def kernel_layout_4bit(weight: Tensor, absmax: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """bitsandbytes' `weight` (uint8, N·K/2 bytes in any shape) and `absmax` (float32, N·K/64) as uint8 [N, P/2] and float32 [N, P/64].

    P is `padded_width(K)`. Where K is no multiple of 64, blocks run across rows and nothing is moved: returns the bytes and scales flat (1-D).
    """
    if in_features % BLOCK:
        return weight.reshape(-1), absmax.reshape(-1).float()
    pairs = weight.reshape(out_features, in_features // 2)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).reshape(out_features, in_features)
    scales = absmax.reshape(out_features, in_features // BLOCK).float()
    extra = padded_width(in_features) - in_features
    if extra:
        codes = torch.nn.functional.pad(codes, (0, extra))
        scales = torch.nn.functional.pad(scales, (0, 1))
    groups = codes.view(out_features, -1, 2, BLOCK)
    return ((groups[:, :, 0] << 4) | groups[:, :, 1]).reshape(out_features, -1), scales.contiguous()


def codes_4bit(weight: Tensor, in_features: int) -> Tensor:
    """The codes [N, K] (uint8 0..15) of a weight in the kernels' layout [N, P/2]."""
    groups = weight.view(weight.shape[0], -1, BLOCK)
    return torch.stack((groups >> 4, groups & 15), dim=2).reshape(weight.shape[0], -1)[:, :in_features]


def bitsandbytes_layout_4bit(weight: Tensor, absmax: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `kernel_layout_4bit` for 2-D weights: uint8 [N·K/2, 1] and float32 [N·K/64]."""
    codes = codes_4bit(weight, in_features)
    return ((codes[:, 0::2] << 4) | codes[:, 1::2]).reshape(-1, 1), absmax[:, : in_features // BLOCK].reshape(-1)
