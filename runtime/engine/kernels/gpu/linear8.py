"""The linear over int8 and e4m3 weights in Triton, which multiplies W · xᵀ in 8 bits.

Above MAX_ROWS rows torch's product of e4m3 matrices is faster (docs/benchmarks/linear.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.activation import GATE_CODES, Activation, act_mul
from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.activation import activated
from runtime.engine.kernels.linear8 import GATED_ROWS
from runtime.engine.kernels.quantized_rows import QuantizedRows
from runtime.engine.kernels.scratch import Scratch

MAX_ROWS = 128  # of e4m3 products in Triton
_MULTIPLE = 16  # of the sizes that torch's product of e4m3 matrices takes
_PROCESSORS = 132  # multiprocessors of the GPU that the tilings were measured on


@triton.jit
def _multiplied(w, x, acc, WIDEN: tl.constexpr):
    """Return acc + w · x."""
    if WIDEN:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(w, x, acc, out_dtype=acc.dtype)


@triton.jit(do_not_specialize=["M", "steps_each"])
def _linear8_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    x_stride,
    steps_each,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    split = tl.program_id(1)
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows_n < N
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows_m < M
    cols = split * steps_each * BLOCK_K + tl.arange(0, BLOCK_K)
    safe_n = (rows_n if EVEN_N else tl.where(mask_n, rows_n, 0)).to(tl.int64)
    w_ptrs = weight_ptr + safe_n[:, None] * K + cols[None, :]
    u_ptrs = w_ptrs
    if KIND > 0:
        u_ptrs = w_ptrs + N.to(tl.int64) * K
    pdl.wait(PDL)
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * x_stride + cols[:, None]
    num_steps = tl.minimum(steps_each, tl.cdiv(K, BLOCK_K) - split * steps_each)
    acc = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    up = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    for step in range(num_steps):
        if EVEN_K:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
        else:
            in_k = cols + step * BLOCK_K < K
            w = tl.load(w_ptrs, mask=in_k[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=in_k[:, None] & mask_m[None, :], other=0.0)
        acc = _multiplied(w, x, acc, WIDEN)
        if KIND > 0:
            u = tl.load(u_ptrs) if EVEN_K else tl.load(u_ptrs, mask=in_k[None, :], other=0.0)
            up = _multiplied(u, x, up, WIDEN)
            u_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    if SPLIT:
        num_splits = tl.num_programs(1)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        cells = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        base = partials_ptr + tile.to(tl.int64) * num_splits * (BLOCK_N * BLOCK_M)
        tl.store(base + split * (BLOCK_N * BLOCK_M) + cells, acc.to(tl.float32))
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < num_splits - 1:
            return
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for _ in range(num_splits):
            sums += tl.load(base + cells, cache_modifier=".cg")
            base += BLOCK_N * BLOCK_M
        tl.store(counters_ptr + tile, 0)
    else:
        sums = acc.to(tl.float32)
    x_scale = tl.load(x_scale_ptr + rows_m, mask=mask_m, other=0.0)[None, :]
    y = sums * (tl.load(scale_ptr + rows_n, mask=mask_n, other=0.0)[:, None] * x_scale)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if KIND > 0:
        factor = up.to(tl.float32) * (tl.load(scale_ptr + N + rows_n, mask=mask_n, other=0.0)[:, None] * x_scale)
        if HAS_BIAS:
            factor += tl.load(bias_ptr + N + rows_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        # Round where the separate kernels would round.
        gate = activated(y.to(DTYPE).to(tl.float32), KIND).to(DTYPE).to(tl.float32)
        y = gate * factor.to(DTYPE).to(tl.float32)
    place = rows_m.to(tl.int64)[None, :] * N + rows_n[:, None]
    tl.store(out_ptr + place, y.to(DTYPE), mask=mask_n[:, None] & mask_m[None, :])


def linear_8bit(
    x: QuantizedRows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
) -> None:
    """See runtime.engine.kernels.linear8.linear_8bit."""
    num_outputs, in_features = weight.shape
    num_rows = len(x.codes)
    if num_rows == 0:
        return
    if gate is not None and num_rows <= GATED_ROWS:
        launch(x, weight, scale, bias, gate, out, scratch, *gated_tiling(num_rows))
        return
    if gate is not None:
        gate_up = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=weight.device)
        linear_8bit(x, weight, scale, bias, None, gate_up, scratch)
        act_mul(gate_up, gate, out.view(num_rows, -1))
        return
    aligned = num_outputs % _MULTIPLE == 0 and in_features % _MULTIPLE == 0
    if weight.dtype is torch.int8:
        launch(x, weight, scale, bias, None, out, scratch, *tiling(num_rows, num_outputs, in_features))
    elif num_rows <= MAX_ROWS or x.dtype is not torch.bfloat16 or not aligned:
        launch(x, weight, scale, bias, None, out, scratch, *tiling(min(num_rows, 256), num_outputs, in_features))
    else:
        products = out.view(num_rows, num_outputs)
        torch._scaled_mm(
            x.codes, weight.t(), x.scale[:, None], scale[None], out_dtype=x.dtype, use_fast_accum=True, out=products
        )
        if bias is not None:
            products += bias


def gated_tiling(num_rows: int) -> tuple[int, int, int, int, int, int]:
    """Return (BLOCK_M, BLOCK_N, BLOCK_K, splits of K, warps, stages) of up to GATED_ROWS rows."""
    return max(16, triton.next_power_of_2(num_rows)), 64, 128, 1, 4, 6


def tiling(num_rows: int, num_outputs: int, in_features: int) -> tuple[int, int, int, int, int, int]:
    """Return (BLOCK_M, BLOCK_N, BLOCK_K, splits of K, warps, stages) from docs/benchmarks/linear.md."""
    block_m = min(256, max(16, triton.next_power_of_2(num_rows)))
    if block_m <= 32:
        block_n, block_k, num_warps, num_stages = 64, 256, 4, 6 if num_outputs < 16384 else 4
    elif block_m == 64 or (num_outputs < 16384 and num_rows <= 256):
        block_m, block_n, block_k, num_warps, num_stages = min(block_m, 128), 64, 256, 4, 3
    elif block_m == 128 or triton.cdiv(num_outputs, 128) * triton.cdiv(num_rows, 256) < _PROCESSORS:
        block_m, block_n, block_k, num_warps, num_stages = 128, 128, 128, 4, 3
    else:
        block_n, block_k, num_warps, num_stages = 128, 128, 8, 4
    num_tiles = triton.cdiv(num_outputs, block_n) * triton.cdiv(num_rows, block_m)
    splits = 2 if 2 * num_tiles <= _PROCESSORS and in_features >= 8 * block_k else 1
    return block_m, block_n, block_k, splits, num_warps, num_stages


def launch(
    x: QuantizedRows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
    block_m: int,
    block_n: int,
    block_k: int,
    splits: int,
    num_warps: int,
    num_stages: int,
) -> None:
    """Launch with a given tiling. With a gate, K is not split."""
    num_rows, in_features = x.codes.shape
    num_outputs = weight.shape[0] // (1 if gate is None else 2)
    tiles_n, tiles_m = triton.cdiv(num_outputs, block_n), triton.cdiv(num_rows, block_m)
    num_steps = triton.cdiv(in_features, block_k)
    steps_each = triton.cdiv(num_steps, splits)
    splits = triton.cdiv(num_steps, steps_each)
    partials = counters = scale
    if splits > 1:
        elements = tiles_n * tiles_m * splits * block_n * block_m
        if scratch is None:
            held = Scratch.allocate(weight.device, partial_elements=elements, num_counters=tiles_n * tiles_m)
            partials, counters = held.partials, held.counters
        elif scratch.holds(elements, tiles_n * tiles_m):
            partials, counters = scratch.partials, scratch.counters
        else:
            steps_each, splits = num_steps, 1
    _linear8_kernel[(tiles_n, splits, tiles_m)](
        x.codes,
        x.scale,
        weight,
        scale,
        bias if bias is not None else scale,
        out,
        partials,
        counters,
        num_rows,
        num_outputs,
        in_features,
        x.codes.stride(0),
        steps_each,
        KIND=GATE_CODES[gate],
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
        EVEN_N=num_outputs % block_n == 0,
        EVEN_K=in_features % block_k == 0,
        WIDEN=not weight.is_cuda and weight.dtype is not torch.int8,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PDL=pdl.overlaps(weight),
        num_warps=num_warps,
        num_stages=num_stages,
        **pdl.options(weight),
    )
