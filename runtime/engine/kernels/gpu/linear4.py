"""The 4-bit linear in Triton: fused at few rows, dequantise + cuBLAS at many.

The fused kernel computes W · xᵀ, so that weights, unpacked in registers, are the first operand of the matrix unit. A byte tile [BLOCK_N, 64] gives two
operands of one absmax block each: the products are scaled as sums (few rows), or the weights as they are unpacked (more rows).

Unpacking must cost less than the memory it saves: about two integer instructions a weight is all there is room for. `_lookup_asm` gets there with
byte permutes: a permute picks four bytes out of eight by four 3-bit indices, so two of them and a third by each code's top bit look up one byte of
four codes at once; bf16 and fp16 values are two such bytes.
"""

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.gpu.products import dot, dot_add, precision
from runtime.engine.kernels.layout import BLOCK, GROUP
from runtime.engine.kernels.linear4 import Codebook, codebook_values
from runtime.engine.kernels.scratch import Scratch

MAX_FUSED_ROWS = 256


@functools.cache
def _lookup_asm(codebook: Codebook, dtype: torch.dtype) -> str:
    """PTX that turns four bytes into the four high-nibble values ($0, $1) and the four low-nibble values ($2, $3), 16 bits each."""
    if dtype == torch.bfloat16:
        halves = torch.tensor(codebook_values(codebook), dtype=torch.float32).to(torch.bfloat16).view(torch.int16).tolist()
    else:
        halves = torch.tensor(codebook_values(codebook), dtype=torch.float32).to(torch.float16).view(torch.int16).tolist()
    low = bytes(half & 0xFF for half in halves)
    high = bytes((half >> 8) & 0xFF for half in halves)
    a = [f"0x{word:08x}" for word in struct.unpack("<4I", low)]
    b = [f"0x{word:08x}" for word in struct.unpack("<4I", high)]
    lines = [
        "{", ".reg .b32 s, m, p, q, l, h;",
        "and.b32 s, $4, 0x77777777;",
        "shr.u32 m, $4, 1;",
        "lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;",
    ]
    for first, second in (("$0", "$2"), ("$1", "$3")):
        lines += [
            f"prmt.b32 p, {a[0]}, {a[1]}, s;", f"prmt.b32 q, {a[2]}, {a[3]}, s;", "prmt.b32 l, p, q, m;",
            f"prmt.b32 p, {b[0]}, {b[1]}, s;", f"prmt.b32 q, {b[2]}, {b[3]}, s;", "prmt.b32 h, p, q, m;",
            f"prmt.b32 {first}, l, h, 0x7351;", f"prmt.b32 {second}, l, h, 0x6240;",
        ]
        if first == "$0":
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
    return "\n".join([*lines, "}"])


@triton.jit
def _unpack(packed, codes_ptr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes to (high-nibble values, low-nibble values), unscaled."""
    if ASM != "":
        first, second = tl.inline_asm_elementwise(ASM, "=&r,=&r,=&r,=&r,r", [packed], dtype=(DTYPE, DTYPE), is_pure=True, pack=4)
    else:
        first = tl.load(codes_ptr + (packed >> 4).to(tl.int32)).to(DTYPE)
        second = tl.load(codes_ptr + (packed & 15).to(tl.int32)).to(DTYPE)
    return first, second


@triton.jit
def _linear4_kernel(
    x_ptr, weight_ptr, absmax_ptr, codes_ptr, bias_ptr, out_ptr, partials_ptr, counters_ptr, M, N, K, x_stride, num_groups, groups_each,
    ASM: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, SCALE_SUMS: tl.constexpr, EVEN_N: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if PRECISION == "widen" else DTYPE
    split = tl.program_id(1)
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows_n < N
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows_m < M
    group = split * groups_each
    last_group = tl.minimum(group + groups_each, num_groups)
    bytes_k = tl.arange(0, 64)
    safe_n = rows_n if EVEN_N else tl.where(mask_n, rows_n, 0)
    w_ptrs = weight_ptr + safe_n.to(tl.int64)[:, None] * (num_groups * 64) + group * 64 + bytes_k[None, :]
    s_ptrs = absmax_ptr + safe_n.to(tl.int64) * (num_groups * 2) + group * 2
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * x_stride + group * 128 + bytes_k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for g in range(group, last_group):
        packed = tl.load(w_ptrs)
        x_first = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
        if PADDED:
            x_second = tl.load(x_ptrs + 64, mask=mask_m[None, :] & (g * 128 + 64 + bytes_k < K)[:, None], other=0.0)
        else:
            x_second = tl.load(x_ptrs + 64, mask=mask_m[None, :], other=0.0)
        s_first = tl.load(s_ptrs)
        s_second = tl.load(s_ptrs + 1)
        first, second = _unpack(packed, codes_ptr, ASM, WORK)
        if SCALE_SUMS:
            acc += dot(first, x_first, PRECISION) * s_first[:, None]
            acc += dot(second, x_second, PRECISION) * s_second[:, None]
        else:
            acc = dot_add(first * s_first.to(WORK)[:, None], x_first, acc, PRECISION)
            acc = dot_add(second * s_second.to(WORK)[:, None], x_second, acc, PRECISION)
        w_ptrs += 64
        s_ptrs += 2
        x_ptrs += 128
    mask = mask_n[:, None] & mask_m[None, :]
    place = rows_m.to(tl.int64)[None, :] * N + rows_n[:, None]
    if SPLIT:
        num_splits = tl.num_programs(1)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        cells = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        base = partials_ptr + tile.to(tl.int64) * num_splits * (BLOCK_N * BLOCK_M)
        tl.store(base + split * (BLOCK_N * BLOCK_M) + cells, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < num_splits - 1:
            return
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for _ in range(num_splits):
            acc += tl.load(base + cells, cache_modifier=".cg")
            base += BLOCK_N * BLOCK_M
        tl.store(counters_ptr + tile, 0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + place, acc.to(DTYPE), mask=mask)


@triton.jit
def _dequantize_kernel(
    weight_ptr, absmax_ptr, codes_ptr, out_ptr, num_rows, K, num_groups, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    group = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < num_rows
    rows = rows.to(tl.int64)
    cols = tl.arange(0, 64)
    packed = tl.load(weight_ptr + rows[:, None] * (num_groups * 64) + group * 64 + cols[None, :], mask=mask[:, None], other=0)
    s_ptrs = absmax_ptr + rows * (num_groups * 2) + group * 2
    s_first = tl.load(s_ptrs, mask=mask, other=0.0)
    s_second = tl.load(s_ptrs + 1, mask=mask, other=0.0)
    first, second = _unpack(packed, codes_ptr, ASM, tl.float32 if ASM == "" else DTYPE)
    place = out_ptr + rows[:, None] * K + group * 128 + cols[None, :]
    tl.store(place, (first.to(tl.float32) * s_first[:, None]).to(DTYPE), mask=mask[:, None])
    tl.store(place + 64, (second.to(tl.float32) * s_second[:, None]).to(DTYPE), mask=mask[:, None] & (group * 128 + 64 < K))


@functools.cache
def _codes_tensor(codebook: Codebook, device: torch.device) -> Tensor:
    return torch.tensor(codebook_values(codebook), dtype=torch.float32, device=device)


def _asm_for(tensor: Tensor, codebook: Codebook) -> str:
    return _lookup_asm(codebook, tensor.dtype) if tensor.is_cuda and tensor.element_size() == 2 else ""


def linear_4bit(
    x: Tensor, weight: Tensor, absmax: Tensor, codebook: Codebook, bias: Tensor | None, out: Tensor, scratch: Scratch | None
) -> None:
    """See runtime.engine.kernels.linear4.linear_4bit."""
    in_features = x.shape[-1]
    rows = x.reshape(-1, in_features)
    num_rows, num_outputs = rows.shape[0], weight.shape[0]
    if num_rows == 0:
        return
    if num_rows > MAX_FUSED_ROWS:
        _linear_unpacked(rows, weight, absmax, codebook, bias, out.view(num_rows, num_outputs), scratch)
        return
    launch_fused(rows, weight, absmax, codebook, bias, out, scratch, *_tiling(num_rows, num_outputs, in_features))


def _tiling(num_rows: int, num_outputs: int, in_features: int) -> tuple[int, int, int, int, int, bool]:
    """(BLOCK_M, BLOCK_N, splits of K, warps, stages, scale the sums) from measurements: docs/benchmarks/linear.md."""
    block_m = max(16, triton.next_power_of_2(num_rows))
    block_n, num_warps, num_stages = (64, 4, 4) if block_m <= 64 else (128, 8, 3)
    num_tiles = triton.cdiv(num_outputs, block_n)
    splits = max(1, min(triton.cdiv(2 * 132, num_tiles), triton.cdiv(in_features, 4 * GROUP)))
    return block_m, block_n, splits, num_warps, num_stages, block_m <= 32


def launch_fused(
    rows: Tensor, weight: Tensor, absmax: Tensor, codebook: Codebook, bias: Tensor | None, out: Tensor, scratch: Scratch | None, block_m: int,
    block_n: int, splits: int, num_warps: int, num_stages: int, scale_sums: bool,
) -> None:
    """Launch the fused kernel with a given tiling (the benchmark tries several)."""
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
    asm = _asm_for(rows, codebook)
    _linear4_kernel[(tiles_n, splits, tiles_m)](
        rows, weight, absmax, absmax if asm else _codes_tensor(codebook, rows.device), bias if bias is not None else rows, out,
        scratch.partials if scratch is not None else absmax, scratch.counters if scratch is not None else absmax,
        num_rows, num_outputs, in_features, rows.stride(0), num_groups, groups_each,
        ASM=asm, HAS_BIAS=bias is not None, SPLIT=splits > 1, SCALE_SUMS=scale_sums or rows.element_size() == 4,
        EVEN_N=num_outputs % block_n == 0, PADDED=in_features % GROUP != 0, BLOCK_M=block_m, BLOCK_N=block_n,
        PRECISION=precision(rows), num_warps=num_warps, num_stages=num_stages,
    )


def dequantize_4bit(weight: Tensor, absmax: Tensor, codebook: Codebook, out: Tensor) -> None:
    """Unpack `weight` [N, P/2] into `out` [N, K]."""
    num_rows, in_features = out.shape
    num_groups = weight.shape[1] // BLOCK
    block_n = 32
    # Codes are looked up as float32 here: a weight is then rounded once, as bitsandbytes does it.
    _dequantize_kernel[(num_groups, triton.cdiv(num_rows, block_n))](
        weight, absmax, _codes_tensor(codebook, weight.device), out, num_rows, in_features, num_groups,
        ASM="", BLOCK_N=block_n, num_warps=4,
    )


def _linear_unpacked(
    rows: Tensor, weight: Tensor, absmax: Tensor, codebook: Codebook, bias: Tensor | None, out: Tensor, scratch: Scratch | None
) -> None:
    """Unpack as many output rows as scratch memory holds (all of them without one), multiply, go on."""
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
