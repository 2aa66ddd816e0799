"""Quantises one matrix to the packed layout, as bitsandbytes does or to fp8 by row, and converts serialised matrices to that layout.

The layouts are those of runtime.types.Checkpoint and, for 4-bit codes and scales, runtime.checkpoint.layout_4bit.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from common.model_key import Quantization
from runtime.checkpoint.fp8 import by_rows, quantize_rows
from runtime.checkpoint.layout_4bit import kernel_layout_4bit
from runtime.checkpoint.quantized_shapes import BLOCK
from runtime.errors import LoadFailed


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantised matrix. `scale_name` is absmax (4 bit), scale (int8, fp8), or the type of GGUF blocks that are kept."""

    weight: Tensor
    scale_name: str
    scale: Tensor


def quantize(weight: Tensor, quantization: Quantization, *, double_quant: bool) -> Matrix:
    """Quantise `weight` [N, K], given in the model's dtype, on its device. INT8, NF4 and FP4 equal what bitsandbytes' layers would hold."""
    rows, columns = weight.shape
    if quantization is Quantization.INT8:
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous(), threshold=0.0)
        return Matrix(codes.view(rows, columns), "scale", absmax.float().view(rows) / 127.0)
    if quantization is Quantization.FP8:
        return _fp8(weight.float())
    codes, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type=quantization.value
    )
    return _matrix(codes, _absmax(state), rows, columns)


def _fp8(weight: Tensor) -> Matrix:
    codes, scale = quantize_rows(weight)
    return Matrix(codes, "scale", scale.view(-1))


def _matrix(codes: Tensor, absmax: Tensor, rows: int, columns: int) -> Matrix:
    weight, scales = kernel_layout_4bit(codes, absmax, rows, columns)
    return Matrix(weight, "absmax", scales)


def _absmax(state: "bnb.QuantState") -> Tensor:
    absmax: Tensor = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return absmax.float()


@dataclass(frozen=True, slots=True)
class Stored4Bit:
    """One serialised 4-bit matrix: `parts` by what follows the weight's name (absmax, quant_map, quant_state…, nested_…).

    `weight` holds the codes' bytes as any type (bnb_4bit_quant_storage), which FSDP needs to be that of the other weights.
    """

    weight: Tensor
    parts: Mapping[str, Tensor]


def stored_shape(state: Tensor) -> tuple[int, ...]:
    """Return the matrix's shape, from its `quant_state.bitsandbytes__…` tensor."""
    return tuple(int(size) for size in _state_fields(state)["shape"])


def unpack_4bit(stored: Stored4Bit, name: str) -> Matrix | Tensor:
    """Serialised → ours, bit for bit; a matrix whose rows our blocks do not fit comes back dequantised."""
    keys = [key for key in stored.parts if key.startswith("quant_state.")]
    if not keys:
        raise LoadFailed(f"tensor {name} is quantised and has no quant_state")
    state = bnb.QuantState.from_dict(dict(stored.parts), device=torch.device("cpu"))
    if state.blocksize != BLOCK:
        raise LoadFailed(f"tensor {name} is quantised in blocks of {state.blocksize}; only {BLOCK} is supported")
    rows, columns = (int(size) for size in state.shape)
    codes = stored.weight.contiguous().view(torch.uint8)
    if columns % BLOCK:
        plain: Tensor = bnb.dequantize_4bit(codes.reshape(-1, 1), state)
        return plain
    return _matrix(codes, _absmax(state), rows, columns)


def unpack_int8(codes: Tensor, absmax: Tensor) -> Matrix:
    return Matrix(codes, "scale", absmax.float().reshape(-1) / 127.0)


def unpack_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int] | None, name: str) -> Matrix:
    """Convert a serialised fp8 matrix, whose scales are per tensor, row or block. Raises LoadFailed if they do not fit."""
    weight, rows = by_rows(codes, scale, block, name)
    return Matrix(weight, "scale", rows)


def _state_fields(state: Tensor) -> "dict[str, list[int]]":
    fields: dict[str, list[int]] = json.loads(bytes(state.tolist()))
    return fields
