"""Decides which weights are quantised and which shapes they then have, for the packer and for the prediction of sizes."""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Literal

from common.model_key import Quantization

BLOCK = 64
"""Elements of a row that share a scale in 4-bit formats."""

GROUP = 2 * BLOCK
"""Elements to which the rows of 4-bit codes are padded."""

GGUF_BLOCK = 32
"""Elements of a row that share a float16 scale in the block types of GGUF that are kept."""

KEPT_BLOCKS: Mapping[str, Literal["q4_0", "iq4_nl"]] = MappingProxyType({"Q4_0": "q4_0", "IQ4_NL": "iq4_nl"})
"""GGUF's block types that the kernels read → the name of a matrix's scales in a packed file, which is also that of the codebook."""

SCALE_NAMES = ("absmax", "scale", *KEPT_BLOCKS.values())
"""The names under which a module can have the scales of its weight."""


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


def kept_shapes(shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the shapes of the codes and the float16 scales of a matrix whose GGUF blocks are kept; None if blocks would cross rows."""
    rows, columns = shape
    if columns % GGUF_BLOCK:
        return None
    width = padded_width(columns)
    return (rows, width // 2), (rows, width // GGUF_BLOCK)


def kept_bytes(name: str, shape: tuple[int, ...], blocks: str) -> int | None:
    """Return the bytes of a GGUF file's tensor whose blocks are kept; None for one that is unpacked."""
    if blocks not in KEPT_BLOCKS or not is_layer_matrix(name, shape):
        return None
    shapes = kept_shapes((shape[0], shape[1]))
    return None if shapes is None else prod(shapes[0]) + 2 * prod(shapes[1])
