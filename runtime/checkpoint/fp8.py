"""The fp8 format of weights, e4m3 with one float32 scale per row, and the conversion of other fp8 formats to it."""

import torch
from torch import Tensor

from runtime.errors import LoadFailed

LARGEST = 448.0  # the largest finite number of e4m3


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of `x` [..., K] to e4m3. Returns the codes and the float32 scales [..., 1] = absmax / 448.

    A row of zeros has the scale 0.
    """
    wide = x.float()
    absmax = wide.abs().amax(-1, keepdim=True)
    factor = torch.where(absmax > 0, LARGEST / absmax, torch.zeros_like(absmax))
    return (wide * factor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), absmax / LARGEST


def by_rows(codes: Tensor, scale: Tensor, block: tuple[int, int] | None, name: str) -> tuple[Tensor, Tensor]:
    """Return stored `codes` [N, K] with one float32 scale per row [N].

    `scale` holds one number, one per row, or one per `block` (rows, columns). Codes with scales per block are quantised again by row. Raises
    LoadFailed naming the tensor if the scales do not fit the matrix.
    """
    num_rows, num_columns = codes.shape
    wide = scale.float()
    if wide.numel() == 1:
        return codes, wide.reshape(1).expand(num_rows).contiguous()
    if tuple(wide.shape) in ((num_rows,), (num_rows, 1)):
        return codes, wide.reshape(num_rows).contiguous()
    if block is None or tuple(wide.shape) != (-(-num_rows // block[0]), -(-num_columns // block[1])):
        raise LoadFailed(
            f"tensor {name} of shape {list(codes.shape)} has scales of shape {list(scale.shape)}, which are neither one "
            f"per row nor one per block ({'none is configured' if block is None else f'{block[0]} × {block[1]}'})"
        )
    spread = wide.repeat_interleave(block[0], 0)[:num_rows].repeat_interleave(block[1], 1)[:, :num_columns]
    requantised, row_scale = quantize_rows(codes.float() * spread)
    return requantised, row_scale.view(-1)
