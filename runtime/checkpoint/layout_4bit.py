"""Converts 4-bit weights between the layouts of bitsandbytes and GGUF and that of the kernels.

bitsandbytes packs row-major pairs, the first element in the high nibble, with one absmax for each 64 elements. A kernel wants 32-bit words
that unpack into operands of a matrix product without moving anything between threads. So each row is cut into groups of 128 elements, 16 words of
8 codes, and code j of word i (bits 4j to 4j + 3, counted from the least) is element 16j + i of the group: the eight codes of a row of words are
eight stretches of 16 neighbouring elements, four of them in either block of 64.

Same size, same absmax, other order. A row of an odd number of blocks is padded by one block whose absmax is 0.

GGUF's blocks of 32 elements have two bytes of scale and 16 bytes of codes, byte i with the elements i (low nibble) and i + 16. Byte b of word i
of a group is byte i of its block b, so that only bytes change places. The four scales of a group stay float16.
"""

import torch
from torch import Tensor

from runtime.checkpoint.quantized_shapes import BLOCK, GGUF_BLOCK, GROUP, padded_width

_WORDS = GROUP // 8
_BLOCK_BYTES = GGUF_BLOCK // 2
_SCALE_BYTES = 2


def kernel_layout_4bit(weight: Tensor, absmax: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """bitsandbytes' `weight` (uint8, N·K/2 bytes in any shape) and `absmax` (float32, N·K/64) as uint8 [N, P/2] and float32 [N, P/64].

    P is `padded_width(K)`. Where K is not a multiple of 64, blocks cross rows and nothing is moved: the bytes and scales are returned flat (1-D).
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
    # [N, groups, j, word] -> [N, groups, word, byte, nibble]; a word's bytes lie least first
    nibbles = codes.view(out_features, -1, 4, 2, _WORDS).permute(0, 1, 4, 2, 3)
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).reshape(out_features, -1), scales.contiguous()


def codes_4bit(weight: Tensor, in_features: int) -> Tensor:
    """Return the codes [N, K] (uint8 0..15) of a weight in the kernels' layout [N, P/2]."""
    num_rows = weight.shape[0]
    words = weight.view(num_rows, -1, _WORDS, 4)
    nibbles = torch.stack((words & 15, words >> 4), dim=-1)  # [N, groups, word, byte, nibble]
    return nibbles.permute(0, 1, 3, 4, 2).reshape(num_rows, -1)[:, :in_features]


def bitsandbytes_layout_4bit(weight: Tensor, absmax: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Invert `kernel_layout_4bit` for 2-D weights: return uint8 [N·K/2, 1] and float32 [N·K/64]."""
    codes = codes_4bit(weight, in_features)
    return ((codes[:, 0::2] << 4) | codes[:, 1::2]).reshape(-1, 1), absmax[:, : in_features // BLOCK].reshape(-1)


def kernel_layout_gguf(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of GGUF blocks `stored` (uint8 [N, 18·K/32]) as codes uint8 [N, P/2] and scales float16 [N, P/32].

    P is `padded_width(K)`. Blocks that fill up a row have the scale 0.
    """
    num_rows = stored.shape[0]
    blocks = stored.view(num_rows, -1, _SCALE_BYTES + _BLOCK_BYTES)
    num_blocks = padded_width(blocks.shape[1] * GGUF_BLOCK) // GGUF_BLOCK
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, num_blocks - blocks.shape[1]))
    scales = blocks[..., :_SCALE_BYTES].contiguous().view(torch.float16).view(num_rows, num_blocks)
    codes = blocks[..., _SCALE_BYTES:].reshape(num_rows, -1, GROUP // GGUF_BLOCK, _BLOCK_BYTES)
    return codes.transpose(2, 3).reshape(num_rows, -1), scales


def gguf_layout(weight: Tensor, scales: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales in the kernels' layout as the codes of GGUF's blocks, uint8 [N, K/2], and scales [N, K/32]."""
    codes = weight.view(weight.shape[0], -1, _WORDS, GROUP // GGUF_BLOCK).transpose(2, 3).flatten(1)
    return codes[:, : in_features // 2].contiguous(), scales[:, : in_features // GGUF_BLOCK].contiguous()


def block_of(weight: Tensor, scales: Tensor) -> int:
    """Return the elements that share a scale, of codes and scales in the kernels' layout."""
    return 2 * weight.shape[1] // scales.shape[1]
