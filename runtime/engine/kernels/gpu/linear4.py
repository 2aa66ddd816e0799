"""The 4-bit linear on a GPU: CUDA C++ where it is faster (`linear4_cuda.py`, `linear4_wgmma.py`), otherwise Triton
(`linear4_triton.py`), and dequantisation with cuBLAS at many rows.
"""

import functools

import torch
import triton
from torch import Tensor
from torch.nn import functional

from runtime.checkpoint.layout_4bit import block_of
from runtime.checkpoint.quantized_shapes import BLOCK, GROUP
from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.codebooks import Codebook, codebook_values
from runtime.engine.kernels.gpu import linear4_cuda, linear4_wgmma, pdl
from runtime.engine.kernels.gpu.dot import precision
from runtime.engine.kernels.gpu.linear4_triton import dequantize_kernel, linear4_kernel, lookup_asm
from runtime.engine.kernels.scratch import Scratch

_PROCESSORS = 132  # multiprocessors of the GPU that the tilings were measured on


@functools.cache
def _codes_tensor(codebook: Codebook, device: torch.device) -> Tensor:
    return torch.tensor(codebook_values(codebook), dtype=torch.float32, device=device)


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
) -> None:
    """See runtime.engine.kernels.linear4.linear_4bit."""
    in_features = x.shape[-1]
    rows = x.reshape(-1, in_features)
    num_rows, num_outputs = rows.shape[0], weight.shape[0]
    if num_rows == 0:
        return
    if (
        cut := linear4_wgmma.choose(num_rows, num_outputs, _processors(x.device))
    ) is not None and linear4_wgmma.linear_4bit(
        rows, weight, absmax, codebook, bias, out.view(num_rows, -1), scratch, cut, gate
    ):
        return
    if gate is not None:
        both = x.new_empty((*x.shape[:-1], num_outputs))
        linear_4bit(x, weight, absmax, codebook, bias, None, both, scratch)
        act_mul(both, gate, out)
        return
    result = out.view(num_rows, num_outputs)
    if num_rows <= linear4_cuda.MAX_ROWS and linear4_cuda.linear_4bit(
        rows, weight, absmax, codebook, bias, result, scratch
    ):
        return
    if num_rows > max_fused_rows(weight.shape[0], in_features):
        _linear_unpacked(rows, weight, absmax, codebook, bias, result, scratch)
        return
    launch_fused(rows, weight, absmax, codebook, bias, out, scratch, *tiling(num_rows, num_outputs, in_features))


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else _PROCESSORS


def warm(device: torch.device, block: int) -> None:
    """Compile or load the CUDA C++ kernels for bf16 and blocks of this many elements, so that no request waits.

    The first time takes seconds.
    """
    linear4_cuda.module(device, block)
    linear4_wgmma.module(device, torch.bfloat16, block)


def max_fused_rows(num_outputs: int, in_features: int) -> int:
    """Return the number of rows up to which the fused kernel is faster.

    A weight that fits the L2 cache is cheap to unpack there.
    """
    return 256 if num_outputs * in_features > 32 << 20 else 128


def tiling(num_rows: int, num_outputs: int, in_features: int) -> tuple[int, int, int, int, int, bool]:
    """Return (BLOCK_M, BLOCK_N, splits of K, warps, stages, scale the sums) from docs/benchmarks/linear.md."""
    block_m = min(128, max(16, triton.next_power_of_2(num_rows)))
    most_programs = 2 * _PROCESSORS
    if block_m == 16:
        block_n, num_warps, most_programs = 64, 4, 7 * _PROCESSORS
    elif block_m <= 64:
        block_n, num_warps = 128, 8
    elif num_outputs < 16384:
        block_n, num_warps = 128, 4
    else:
        block_n, num_warps, most_programs = 256, 8, _PROCESSORS
    num_tiles = triton.cdiv(num_outputs, block_n) * triton.cdiv(num_rows, block_m)
    splits = 1
    while 2 * splits * num_tiles <= most_programs and in_features >= 2 * splits * 8 * GROUP:
        splits *= 2
    return block_m, block_n, splits, num_warps, 3, block_m <= 64


def launch_fused(
    rows: Tensor,
    weight: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch | None,
    block_m: int,
    block_n: int,
    splits: int,
    num_warps: int,
    num_stages: int,
    scale_sums: bool,
) -> None:
    """Launch the fused kernel with a given tiling."""
    num_rows, in_features = rows.shape
    num_outputs = weight.shape[0]
    num_groups = weight.shape[1] // BLOCK
    tiles_n, tiles_m = triton.cdiv(num_outputs, block_n), triton.cdiv(num_rows, block_m)
    groups_each = triton.cdiv(num_groups, splits)
    splits = triton.cdiv(num_groups, groups_each)
    if splits > 1:
        elements = tiles_n * tiles_m * splits * block_n * block_m
        if scratch is None:
            scratch = Scratch.allocate(rows.device, partial_elements=elements, num_counters=tiles_n * tiles_m)
        elif not scratch.holds(elements, tiles_n * tiles_m):
            groups_each, splits = num_groups, 1
    asm = lookup_asm(codebook, rows.dtype) if rows.is_cuda and rows.element_size() == 2 else ""
    linear4_kernel[(tiles_n, splits, tiles_m)](
        rows,
        weight.view(torch.int32),
        absmax,
        absmax if asm else _codes_tensor(codebook, rows.device),
        bias if bias is not None else rows,
        out,
        scratch.partials if scratch is not None else absmax,
        scratch.counters if scratch is not None else absmax,
        num_rows,
        num_outputs,
        in_features,
        rows.stride(0),
        num_groups,
        groups_each,
        ASM=asm,
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
        SCALE_SUMS=scale_sums or rows.element_size() == 4,
        SCALES=GROUP // block_of(weight, absmax),
        EVEN_N=num_outputs % block_n == 0,
        PADDED=in_features % GROUP != 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION=precision(rows),
        PDL=pdl.overlaps(rows),
        num_warps=num_warps,
        num_stages=num_stages,
        **pdl.options(rows),
    )


def dequantize_4bit(weight: Tensor, absmax: Tensor, codebook: Codebook, out: Tensor) -> None:
    """Unpack `weight` [N, P/2] into `out` [N, K]."""
    num_rows, in_features = out.shape
    num_groups = weight.shape[1] // BLOCK
    block_n = 64
    asm = lookup_asm(codebook, out.dtype) if out.is_cuda and out.element_size() == 2 else ""
    dequantize_kernel[(num_groups, triton.cdiv(num_rows, block_n))](
        weight.view(torch.int32),
        absmax,
        absmax if asm else _codes_tensor(codebook, weight.device),
        out,
        num_rows,
        in_features,
        num_groups,
        ASM=asm,
        WIDE=asm == "",
        SCALES=GROUP // block_of(weight, absmax),
        BLOCK_N=block_n,
        num_warps=4,
    )


def _linear_unpacked(
    rows: Tensor,
    weight: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch | None,
) -> None:
    """Repeatedly unpack as many output rows as `scratch` holds and multiply. Without `scratch`, unpack all at once."""
    num_outputs, in_features = weight.shape[0], rows.shape[1]
    row_bytes = in_features * rows.element_size()
    step = num_outputs
    if scratch is not None and scratch.staging.numel() >= row_bytes:
        step = min(num_outputs, scratch.staging.numel() // row_bytes)
        memory = scratch.staging[: step * row_bytes].view(rows.dtype)
    else:
        memory = torch.empty(step * in_features, dtype=rows.dtype, device=rows.device)
    for start in range(0, num_outputs, step):
        end = min(start + step, num_outputs)
        wide = memory[: (end - start) * in_features].view(end - start, in_features)
        dequantize_4bit(weight[start:end], absmax[start:end], codebook, wide)
        part = bias[start:end] if bias is not None else None
        if end - start == num_outputs:
            torch.mm(rows, wide.t(), out=out)
            if part is not None:
                out.add_(part)
        else:
            out[:, start:end] = functional.linear(rows, wide, part)
