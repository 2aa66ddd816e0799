"""The 4-bit linear and dequantisation in Triton.

The fused kernel computes W · xᵀ, so that weights, unpacked in registers, are the first operand of the matrix unit. A
tile of words [BLOCK_N, 16] yields eight operands [BLOCK_N, 16], four per block of 64 elements or two per block of 32. At
few rows the sums are scaled, at more rows the weights as they are unpacked.

Unpacking must cost less time than the smaller weights save, which leaves two or three integer instructions per weight.
`lookup_asm` uses byte permutes. A permute selects four bytes out of eight by four 3-bit indices. Two permutes, and a
third by each code's top bit, look up one byte of four codes at once. A bf16 or fp16 value is two such bytes.
"""

import functools
import struct

import torch
import triton
import triton.language as tl

from runtime.engine.kernels.codebooks import Codebook, codebook_values
from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.dot import dot, dot_add


@functools.cache
def lookup_tables(codebook: Codebook, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the 16 values in a 16-bit `dtype` as eight 32-bit words: four of low bytes, then four of high bytes."""
    halves = torch.tensor(codebook_values(codebook), dtype=torch.float32).to(dtype).view(torch.int16).tolist()
    return struct.unpack("<8I", bytes(half & 0xFF for half in halves) + bytes((half >> 8) & 0xFF for half in halves))


@functools.cache
def lookup_asm(codebook: Codebook, dtype: torch.dtype) -> str:
    """Return PTX that unpacks words $8 and $9 into $0..$7. Register j holds the values of code j of both words."""
    a, b = (lambda t: (t[:4], t[4:]))([f"0x{word:08x}" for word in lookup_tables(codebook, dtype)])
    lines = ["{", ".reg .b32 e, o, s, m, p, q, l, h, z, a0, a2, b0, b2;"]
    # A permute takes at most one constant. The assembler would copy a second one into a register before each use, unless
    # the value is hidden from it: z is 0, because a lane's mask has one bit.
    lines += ["mov.u32 z, %lanemask_eq;", "popc.b32 z, z;", "sub.u32 z, z, 1;"]
    lines += [f"or.b32 a0, z, {a[0]};", f"or.b32 a2, z, {a[2]};", f"or.b32 b0, z, {b[0]};", f"or.b32 b2, z, {b[2]};"]
    # Adjacent nibbles must hold the same code of the two words: even codes in e, odd codes in o.
    lines += [
        "shl.b32 p, $9, 4;",
        "lop3.b32 e, $8, p, 0x0f0f0f0f, 0xE4;",
        "shr.u32 p, $8, 4;",
        "lop3.b32 o, p, $9, 0x0f0f0f0f, 0xE4;",
    ]
    for pairs, outputs in (("e", (0, 2, 4, 6)), ("o", (1, 3, 5, 7))):
        lines += [
            f"and.b32 s, {pairs}, 0x77777777;",
            f"shr.u32 m, {pairs}, 1;",
            "lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;",
        ]
        for first, second in (outputs[:2], outputs[2:]):
            lines += [
                f"prmt.b32 p, a0, {a[1]}, s;",
                f"prmt.b32 q, a2, {a[3]}, s;",
                "prmt.b32 l, p, q, m;",
                f"prmt.b32 p, b0, {b[1]}, s;",
                f"prmt.b32 q, b2, {b[3]}, s;",
                "prmt.b32 h, p, q, m;",
                f"prmt.b32 ${first}, l, h, 0x5140;",
                f"prmt.b32 ${second}, l, h, 0x7362;",
            ]
            if first == outputs[0]:
                lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
    return "\n".join([*lines, "}"])


_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))


@triton.jit
def _code(words, codes_ptr, J: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(codes_ptr + ((words >> (4 * J)) & 15)).to(DTYPE)


@triton.jit
def _unpack(words, codes_ptr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Unpack int32 words to eight tensors of unscaled values. Tensor j holds code j of each word."""
    if ASM == "":
        c0 = _code(words, codes_ptr, 0, DTYPE)
        c1 = _code(words, codes_ptr, 1, DTYPE)
        c2 = _code(words, codes_ptr, 2, DTYPE)
        c3 = _code(words, codes_ptr, 3, DTYPE)
        c4 = _code(words, codes_ptr, 4, DTYPE)
        c5 = _code(words, codes_ptr, 5, DTYPE)
        c6 = _code(words, codes_ptr, 6, DTYPE)
        c7 = _code(words, codes_ptr, 7, DTYPE)
    elif tl.bfloat16 == DTYPE:  # Types are written out because a tuple of constexprs is not unwrapped.
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            ASM,
            _OPERANDS,
            [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            ASM,
            _OPERANDS,
            [words],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _load_x(x_ptrs, mask_m, k, K, J: tl.constexpr, PADDED: tl.constexpr):
    if PADDED:
        return tl.load(x_ptrs + 16 * J, mask=mask_m[None, :] & (k + 16 * J < K), other=0.0)
    return tl.load(x_ptrs + 16 * J, mask=mask_m[None, :], other=0.0)


@triton.jit(do_not_specialize=["M", "groups_each"])
def linear4_kernel(
    x_ptr,
    words_ptr,
    absmax_ptr,
    codes_ptr,
    bias_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    x_stride,
    num_groups,
    groups_each,
    ASM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    SCALES: tl.constexpr,
    EVEN_N: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if PRECISION == "widen" else DTYPE
    split = tl.program_id(1)
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows_n < N
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows_m < M
    group = split * groups_each
    last_group = tl.minimum(group + groups_each, num_groups)
    words_k = tl.arange(0, 16)
    safe_n = rows_n if EVEN_N else tl.where(mask_n, rows_n, 0)
    w_ptrs = words_ptr + safe_n.to(tl.int64)[:, None] * (num_groups * 16) + group * 16 + words_k[None, :]
    s_ptrs = absmax_ptr + safe_n.to(tl.int64) * (num_groups * SCALES) + group * SCALES
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * x_stride + group * 128 + words_k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    next_s0 = tl.load(s_ptrs)
    next_s1 = tl.load(s_ptrs + 1)
    if SCALES == 4:
        next_s2 = tl.load(s_ptrs + 2)
        next_s3 = tl.load(s_ptrs + 3)
    pdl.wait(PDL)
    for g in range(group, last_group):
        words = tl.load(w_ptrs)
        s0 = next_s0.to(tl.float32)[:, None]
        s1 = next_s1.to(tl.float32)[:, None]
        if SCALES == 4:
            s2 = next_s2.to(tl.float32)[:, None]
            s3 = next_s3.to(tl.float32)[:, None]
        # The compiler pipelines the operands of a product but not the scales, so these are fetched one iteration ahead.
        s_ptrs += SCALES
        next_s0 = tl.load(s_ptrs, mask=g + 1 < last_group, other=0.0)
        next_s1 = tl.load(s_ptrs + 1, mask=g + 1 < last_group, other=0.0)
        if SCALES == 4:
            next_s2 = tl.load(s_ptrs + 2, mask=g + 1 < last_group, other=0.0)
            next_s3 = tl.load(s_ptrs + 3, mask=g + 1 < last_group, other=0.0)
        k = g * 128
        x0 = _load_x(x_ptrs, mask_m, k, K, 0, PADDED)
        x1 = _load_x(x_ptrs, mask_m, k, K, 1, PADDED)
        x2 = _load_x(x_ptrs, mask_m, k, K, 2, PADDED)
        x3 = _load_x(x_ptrs, mask_m, k, K, 3, PADDED)
        x4 = _load_x(x_ptrs, mask_m, k, K, 4, PADDED)
        x5 = _load_x(x_ptrs, mask_m, k, K, 5, PADDED)
        x6 = _load_x(x_ptrs, mask_m, k, K, 6, PADDED)
        x7 = _load_x(x_ptrs, mask_m, k, K, 7, PADDED)
        c0, c1, c2, c3, c4, c5, c6, c7 = _unpack(words, codes_ptr, ASM, WORK)
        if SCALE_SUMS and SCALES == 4:
            acc += dot_add(c1, x1, dot(c0, x0, PRECISION), PRECISION) * s0
            acc += dot_add(c3, x3, dot(c2, x2, PRECISION), PRECISION) * s1
            acc += dot_add(c5, x5, dot(c4, x4, PRECISION), PRECISION) * s2
            acc += dot_add(c7, x7, dot(c6, x6, PRECISION), PRECISION) * s3
        elif SCALE_SUMS:
            low = dot(c0, x0, PRECISION)
            low = dot_add(c1, x1, low, PRECISION)
            low = dot_add(c2, x2, low, PRECISION)
            low = dot_add(c3, x3, low, PRECISION)
            high = dot(c4, x4, PRECISION)
            high = dot_add(c5, x5, high, PRECISION)
            high = dot_add(c6, x6, high, PRECISION)
            high = dot_add(c7, x7, high, PRECISION)
            acc += low * s0
            acc += high * s1
        else:
            # One scale for each two of the eight operands.
            if SCALES == 4:
                p0, p1, p2, p3 = s0.to(WORK), s1.to(WORK), s2.to(WORK), s3.to(WORK)
            else:
                p0, p1, p2, p3 = s0.to(WORK), s0.to(WORK), s1.to(WORK), s1.to(WORK)
            acc = dot_add(c0 * p0, x0, acc, PRECISION)
            acc = dot_add(c1 * p0, x1, acc, PRECISION)
            acc = dot_add(c2 * p1, x2, acc, PRECISION)
            acc = dot_add(c3 * p1, x3, acc, PRECISION)
            acc = dot_add(c4 * p2, x4, acc, PRECISION)
            acc = dot_add(c5 * p2, x5, acc, PRECISION)
            acc = dot_add(c6 * p3, x6, acc, PRECISION)
            acc = dot_add(c7 * p3, x7, acc, PRECISION)
        w_ptrs += 16
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
def _store_values(out_ptr, values, scale, rows, k, mask_n, K, DTYPE: tl.constexpr):
    mask = mask_n[:, None] & (k < K)[None, :]
    scaled = values.to(tl.float32) * scale.to(tl.float32)[:, None]
    tl.store(out_ptr + rows[:, None] * K + k[None, :], scaled.to(DTYPE), mask=mask)


@triton.jit
def dequantize_kernel(
    words_ptr,
    absmax_ptr,
    codes_ptr,
    out_ptr,
    num_rows,
    K,
    num_groups,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if WIDE else DTYPE
    group = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    rows = rows.to(tl.int64)
    cols = tl.arange(0, 16)
    words = tl.load(
        words_ptr + rows[:, None] * (num_groups * 16) + (group * 16 + cols)[None, :], mask=mask_n[:, None], other=0
    )
    s_ptrs = absmax_ptr + rows * (num_groups * SCALES) + group * SCALES
    s0 = tl.load(s_ptrs, mask=mask_n, other=0.0)
    s1 = tl.load(s_ptrs + SCALES // 4, mask=mask_n, other=0.0)
    s2 = tl.load(s_ptrs + SCALES // 2, mask=mask_n, other=0.0)
    s3 = tl.load(s_ptrs + SCALES - 1, mask=mask_n, other=0.0)
    c0, c1, c2, c3, c4, c5, c6, c7 = _unpack(words, codes_ptr, ASM, WORK)
    k = group * 128 + cols
    _store_values(out_ptr, c0, s0, rows, k, mask_n, K, DTYPE)
    _store_values(out_ptr, c1, s0, rows, k + 16, mask_n, K, DTYPE)
    _store_values(out_ptr, c2, s1, rows, k + 32, mask_n, K, DTYPE)
    _store_values(out_ptr, c3, s1, rows, k + 48, mask_n, K, DTYPE)
    _store_values(out_ptr, c4, s2, rows, k + 64, mask_n, K, DTYPE)
    _store_values(out_ptr, c5, s2, rows, k + 80, mask_n, K, DTYPE)
    _store_values(out_ptr, c6, s3, rows, k + 96, mask_n, K, DTYPE)
    _store_values(out_ptr, c7, s3, rows, k + 112, mask_n, K, DTYPE)
