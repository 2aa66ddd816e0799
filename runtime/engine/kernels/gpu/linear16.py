"""The 16-bit linear of few rows in Triton. It computes W · xᵀ, so that the weights are the long operand of the matrix
unit. Up to 16 rows, `linear16_cuda.py` is tried first.
"""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.activation import GATE_CODES, Activation
from runtime.engine.kernels.gpu import linear16_cuda, pdl
from runtime.engine.kernels.gpu.activation import activated
from runtime.engine.kernels.gpu.dot import dot_add, precision
from runtime.engine.kernels.scratch import Scratch


@triton.jit
def _summed(acc, base, cells, num_splits, CELLS: tl.constexpr):
    """Return the sum of all parts, in their order. Only the last program of a tile to finish calls this."""
    total = tl.zeros_like(acc)
    for _ in range(num_splits):
        total += tl.load(base + cells, cache_modifier=".cg")
        base += CELLS
    return total


@triton.jit(do_not_specialize=["M", "steps_each"])
def _linear16_kernel(
    x_ptr,
    weight_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pdl.begin(PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if PRECISION == "widen" else DTYPE
    split = tl.program_id(1)
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows_n < N
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows_m < M
    first = split * steps_each * BLOCK_K
    safe_n = (rows_n if EVEN_N else tl.where(mask_n, rows_n, 0)).to(tl.int64)
    cols = first + tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + safe_n[:, None] * K + cols[None, :]
    u_ptrs = w_ptrs
    if KIND > 0:
        u_ptrs = w_ptrs + N.to(tl.int64) * K
    if EARLY:
        # Fetch the first weights before the kernels that compute x have ended.
        w_early = tl.load(w_ptrs, eviction_policy="evict_first")
        if KIND > 0:
            u_early = tl.load(u_ptrs, eviction_policy="evict_first")
    pdl.wait(PDL)
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * x_stride + cols[:, None]
    num_steps = tl.minimum(steps_each, K // BLOCK_K - split * steps_each)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if EARLY:
        x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0).to(WORK)
        acc = dot_add(w_early.to(WORK), x, acc, PRECISION)
        if KIND > 0:
            up = dot_add(u_early.to(WORK), x, up, PRECISION)
            u_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        num_steps -= 1
    if KIND > 0:
        for _ in range(num_steps):
            x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0).to(WORK)
            w = tl.load(w_ptrs, eviction_policy="evict_first")
            u = tl.load(u_ptrs, eviction_policy="evict_first")
            acc = dot_add(w.to(WORK), x, acc, PRECISION)
            up = dot_add(u.to(WORK), x, up, PRECISION)
            w_ptrs += BLOCK_K
            u_ptrs += BLOCK_K
            x_ptrs += BLOCK_K
    else:
        for _ in range(num_steps):
            x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0).to(WORK)
            w = tl.load(w_ptrs, eviction_policy="evict_first")
            acc = dot_add(w.to(WORK), x, acc, PRECISION)
            w_ptrs += BLOCK_K
            x_ptrs += BLOCK_K
    if SPLIT:
        num_splits = tl.num_programs(1)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        CELLS: tl.constexpr = BLOCK_N * BLOCK_M * (2 if KIND > 0 else 1)
        cells = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        base = partials_ptr + tile.to(tl.int64) * num_splits * CELLS
        tl.store(base + split * CELLS + cells, acc)
        if KIND > 0:
            tl.store(base + split * CELLS + BLOCK_N * BLOCK_M + cells, up)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < num_splits - 1:
            return
        acc = _summed(acc, base, cells, num_splits, CELLS)
        if KIND > 0:
            up = _summed(up, base + BLOCK_N * BLOCK_M, cells, num_splits, CELLS)
        tl.store(counters_ptr + tile, 0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        if KIND > 0:
            up += tl.load(bias_ptr + N + rows_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if KIND > 0:
        # Round where the separate kernels would round.
        gate = activated(acc.to(DTYPE).to(tl.float32), KIND).to(DTYPE).to(tl.float32)
        acc = gate * up.to(DTYPE).to(tl.float32)
    place = rows_m.to(tl.int64)[None, :] * N + rows_n[:, None]
    tl.store(out_ptr + place, acc.to(DTYPE), mask=mask_n[:, None] & mask_m[None, :])


def linear_16bit(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Activation | None, out: Tensor, scratch: Scratch | None
) -> None:
    """See runtime.engine.kernels.linear16.linear_16bit."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0 or linear16_cuda.linear_16bit(rows, weight, bias, gate, out, scratch):
        return
    num_outputs = weight.shape[0] // (1 if gate is None else 2)
    launch(rows, weight, bias, gate, out, scratch, *tiling(rows.shape[0], num_outputs, rows.shape[1], gate is not None))


def tiling(num_rows: int, num_outputs: int, in_features: int, gated: bool) -> tuple[int, int, int, int, bool, int, int]:
    """Return (BLOCK_M, BLOCK_N, BLOCK_K, splits of K, early, warps, stages) from docs/benchmarks/engine.md.

    `early` fetches the first weights before the wait.
    """
    block_m = max(16, triton.next_power_of_2(num_rows))
    if gated:
        return (block_m, 64, 64, 1, False, 4, 6) if block_m == 64 else (block_m, 64, 128, 1, False, 4, 4)
    # At most two programs per multiprocessor, and a power of two so that parts have equal size.
    splits = 1
    while triton.cdiv(num_outputs, 64) * splits * 2 <= 4 * 80 and in_features // (splits * 2) >= 512:
        splits *= 2
    if block_m == 16 and min(num_outputs, in_features) >= 4096 and num_outputs < 16384:
        return block_m, 64, 128, splits, num_outputs <= in_features, 4, 3
    return block_m, 64, 128, splits, False, 4, 3 if block_m == 64 else 4


def launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
    block_m: int,
    block_n: int,
    block_k: int,
    splits: int,
    early: bool,
    num_warps: int,
    num_stages: int,
) -> None:
    """Launch with a given tiling."""
    num_rows, in_features = rows.shape
    num_outputs = weight.shape[0] // (1 if gate is None else 2)
    tiles_n, tiles_m = triton.cdiv(num_outputs, block_n), triton.cdiv(num_rows, block_m)
    num_steps = in_features // block_k
    steps_each = triton.cdiv(num_steps, splits)
    splits = triton.cdiv(num_steps, steps_each)
    partials = counters = weight
    if splits > 1:
        elements = tiles_n * tiles_m * splits * block_n * block_m * (1 if gate is None else 2)
        if scratch is None:
            scratch = Scratch.allocate(rows.device, partial_elements=elements, num_counters=tiles_n * tiles_m)
        if scratch.holds(elements, tiles_n * tiles_m):
            partials, counters = scratch.partials, scratch.counters
        else:
            steps_each, splits = num_steps, 1
    overlaps = pdl.overlaps(rows)
    _linear16_kernel[(tiles_n, splits, tiles_m)](
        rows,
        weight,
        bias if bias is not None else weight,
        out,
        partials,
        counters,
        num_rows,
        num_outputs,
        in_features,
        rows.stride(0),
        steps_each,
        KIND=GATE_CODES[gate],
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
        EVEN_N=num_outputs % block_n == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EARLY=early and overlaps,
        PDL=overlaps,
        PRECISION=precision(rows),
        num_warps=num_warps,
        num_stages=num_stages,
        **pdl.options(rows),
    )
