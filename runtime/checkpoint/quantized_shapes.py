"""Decides which weights are quantised and which shapes they then have, for the packer and for the prediction of sizes."""

from math import prod

from common.model_key import Quantization

BLOCK = 64
"""Elements of a row that share a scale in 4-bit formats."""

GROUP = 2 * BLOCK
"""Elements to which the rows of 4-bit codes are padded."""


def padded_width(in_features: int) -> int:
    """Elements of a row as it lies in memory."""
    return -(-in_features // GROUP) * GROUP


def is_layer_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether this is a linear layer's weight inside a numbered decoder layer, by its name and shape. Only those are quantised."""
    numbered = any(part.isdigit() for part in name.split("."))
    return numbered and len(shape) == 2 and name.endswith(".weight") and "norm" not in name


def packed_shapes(
    shape: tuple[int, ...], quantization: Quantization
) -> tuple[tuple[int, ...], str, tuple[int, ...]] | None:
    """Return the shape of a matrix's codes, and the name and shape of its float32 scales.

    None for a matrix that stays as it is: 4-bit blocks must not cross rows.
    """
    rows, columns = shape
    if quantization in (Quantization.INT8, Quantization.FP8):
        return (rows, columns), "scale", (rows,)
    if columns % BLOCK:
        return None
    width = padded_width(columns)
    return (rows, width // 2), "absmax", (rows, width // BLOCK)


def packed_bytes(shape: tuple[int, ...], quantization: Quantization) -> int | None:
    """Return the bytes of a matrix's codes and scales; None for one that stays as it is."""
    shapes = packed_shapes(shape, quantization)
    return None if shapes is None else prod(shapes[0]) + 4 * prod(shapes[2])
