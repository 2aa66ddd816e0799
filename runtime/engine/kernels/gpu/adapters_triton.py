"""The Triton kernels of LoRA adapters: a shrink over (chunks, modules, parts of the columns), and expands over (lanes, blocks of outputs).

The chunks of a block of outputs are dealt out to its lanes. Programs of a graph that has more chunks than the step find a rank of 0 and end. All that
they read before they wait for the kernels before them (the upload, the table, the first matrix) was written before the step began.
"""

import triton
import triton.language as tl

from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.activation import activated
from runtime.engine.kernels.gpu.dot import dot_add


@triton.jit
def _chunk(c, upload_ptr, word, BLOCK_T: tl.constexpr):
    """Return a chunk's slot (-1 = no adapter), its first place in the order, the mask of its rows, and its tokens. `word`: see Chunks."""
    return _chunk_of(c, tl.load(upload_ptr + word), upload_ptr, word, BLOCK_T)


@triton.jit
def _chunk_of(c, num_chunks, upload_ptr, word, BLOCK_T: tl.constexpr):
    live = c < num_chunks
    chunk_ptr = upload_ptr + tl.load(upload_ptr + word + 1) + 3 * c
    slot = tl.load(chunk_ptr, mask=live, other=-1).to(tl.int64)
    first = tl.load(chunk_ptr + 1, mask=live, other=0)
    count = tl.load(chunk_ptr + 2, mask=live, other=0)
    rows = tl.arange(0, BLOCK_T)
    mask = rows < count
    tokens = tl.load(upload_ptr + tl.load(upload_ptr + word + 2) + first + rows, mask=mask, other=0).to(tl.int64)
    return slot, first, mask, tokens


@triton.jit
def _locate(slot, module, places_ptr, num_modules):
    """Return where the matrices of a module begin, and their rank, which is 0 without an adapter."""
    found = slot >= 0
    place_ptr = places_ptr + (slot * num_modules + module) * 3
    a_at = tl.multiple_of(tl.load(place_ptr, mask=found, other=0), 64)
    b_at = tl.multiple_of(tl.load(place_ptr + 1, mask=found, other=0), 64)
    rank = tl.multiple_of(tl.load(place_ptr + 2, mask=found, other=0).to(tl.int32), 16)
    return a_at, b_at, rank


@triton.jit(do_not_specialize=["word", "first_module", "num_modules", "steps_each", "hidden_rows"])
def shrink_kernel(
    x_ptr,
    upload_ptr,
    places_ptr,
    memory_ptr,
    hidden_ptr,
    K,
    x_stride,
    word,
    first_module,
    num_modules,
    steps_each,
    hidden_rows,
    SLICES: tl.constexpr,
    EACH: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply a chunk's rows of x by the A of one module (EACH = 1) or of all SLICES modules (EACH = SLICES), over one part of the columns."""
    pdl.begin(PDL)
    WORK: tl.constexpr = tl.float32 if PRECISION == "widen" else x_ptr.dtype.element_ty
    LINES: tl.constexpr = BLOCK_R * (4 if EACH == 3 else EACH)
    split = tl.program_id(2)
    slot, first, mask, tokens = _chunk(tl.program_id(0), upload_ptr, word, BLOCK_T)
    module = tl.program_id(1)
    a_at, _, rank = _locate(slot, first_module + module, places_ptr, num_modules)
    lines = tl.arange(0, LINES)
    starts = tl.zeros((LINES,), tl.int64) + a_at
    ranks = tl.zeros((LINES,), tl.int32) + rank
    if EACH > 1:
        which = lines // BLOCK_R
        a1_at, _, rank1 = _locate(slot, first_module + 1, places_ptr, num_modules)
        starts = tl.where(which == 1, a1_at, starts)
        ranks = tl.where(which == 1, rank1, ranks)
        rank = tl.maximum(rank, rank1)
        if EACH > 2:
            a2_at, _, rank2 = _locate(slot, first_module + 2, places_ptr, num_modules)
            starts = tl.where(which == 2, a2_at, starts)
            ranks = tl.where(which == 2, rank2, tl.where(which == 3, 0, ranks))
            rank = tl.maximum(rank, rank2)
        module = which
    rows = tl.arange(0, BLOCK_T)
    begin = split * steps_each * BLOCK_K
    num_steps = tl.minimum(steps_each, tl.cdiv(K, BLOCK_K) - split * steps_each)
    cols = begin + tl.arange(0, BLOCK_K)
    inside = (cols < K)[None, :]
    a_first_ptrs = memory_ptr + starts[:, None] + (lines % BLOCK_R).to(tl.int64)[:, None] * K + cols[None, :]
    a_first = tl.load(a_first_ptrs, mask=inside & (ranks > 0)[:, None], other=0.0)
    pdl.wait(PDL)
    place = (split * hidden_rows + first + rows).to(tl.int64)[:, None] * SLICES + module
    out_ptrs = hidden_ptr + place * BLOCK_R + (lines % BLOCK_R)[None, :]
    rank_stride = hidden_rows.to(tl.int64) * tl.num_programs(2) * SLICES
    for r in range(0, rank, BLOCK_R):
        x_ptrs = x_ptr + tokens[:, None] * x_stride + cols[None, :]
        a_ptrs = a_first_ptrs + r * K
        there = (ranks > r)[:, None]
        x = tl.load(x_ptrs, mask=mask[:, None] & inside, other=0.0)
        a = a_first
        if r > 0:
            a = tl.load(a_ptrs, mask=inside & there, other=0.0)
        acc = tl.zeros((BLOCK_T, LINES), tl.float32)
        acc = dot_add(x.to(WORK), tl.trans(a.to(WORK)), acc, PRECISION)
        for step in range(1, num_steps):
            x_ptrs += BLOCK_K
            a_ptrs += BLOCK_K
            if EVEN_K:
                x = tl.load(x_ptrs, mask=mask[:, None], other=0.0)
                if EACH == 1:
                    a = tl.load(a_ptrs)
                else:
                    a = tl.load(a_ptrs, mask=there, other=0.0)
            else:
                further = (cols + step * BLOCK_K < K)[None, :]
                x = tl.load(x_ptrs, mask=mask[:, None] & further, other=0.0)
                a = tl.load(a_ptrs, mask=further & there, other=0.0)
            acc = dot_add(x.to(WORK), tl.trans(a.to(WORK)), acc, PRECISION)
        tl.store(out_ptrs + r * rank_stride, acc, mask=mask[:, None] & (ranks > r)[None, :])


@triton.jit
def _added(
    y,
    part_ptrs,
    rank_stride,
    mask_h,
    b_ptrs,
    b_first,
    mask_n,
    rank,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return y + B · h in y's type. `part_ptrs` [parts, rows, ranks] and `b_first` are those of the first BLOCK_R ranks."""
    DTYPE: tl.constexpr = y.dtype
    WORK: tl.constexpr = tl.float32 if PRECISION == "widen" else DTYPE
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for r in range(0, rank, BLOCK_R):
        # All parts at once: one after the other, each would wait for the memory.
        h = tl.sum(tl.load(part_ptrs + r * rank_stride, mask=mask_h, other=0.0), 0)
        b = b_first
        if r > 0:
            b = tl.load(b_ptrs + r, mask=mask_n[:, None], other=0.0)
        acc = dot_add(h.to(DTYPE).to(WORK), tl.trans(b.to(WORK)), acc, PRECISION)
    return (y.to(tl.float32) + acc).to(DTYPE)


@triton.jit(do_not_specialize=["word", "first_module", "num_modules", "num_splits", "hidden_rows"])
def expand_kernel(
    y_ptr,
    upload_ptr,
    places_ptr,
    memory_ptr,
    hidden_ptr,
    W0,
    W1,
    W2,
    y_stride,
    word,
    first_module,
    num_modules,
    num_splits,
    hidden_rows,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add B · h to a block of outputs of a lane's chunks, in place. Chunks without an adapter are left alone."""
    pdl.begin(PDL)
    # which module this block of outputs belongs to, and its first column
    block = tl.program_id(1)
    module = 0
    width = W0
    column = 0
    if SLICES > 1:
        blocks0 = tl.cdiv(W0, BLOCK_N)
        if block >= blocks0:
            module = 1
            block -= blocks0
            width = W1
            column = W0
            if SLICES > 2:
                blocks1 = tl.cdiv(W1, BLOCK_N)
                if block >= blocks1:
                    module = 2
                    block -= blocks1
                    width = W2
                    column = W0 + W1
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    parts = tl.arange(0, SPLITS)
    outs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = outs < width
    rank_stride = hidden_rows.to(tl.int64) * num_splits * SLICES
    part_stride = hidden_rows.to(tl.int64) * (SLICES * BLOCK_R)
    num_chunks = tl.load(upload_ptr + word)
    lanes = tl.num_programs(0)
    slot, first, mask, tokens = _chunk_of(tl.program_id(0), num_chunks, upload_ptr, word, BLOCK_T)
    _, b_at, rank = _locate(slot, first_module + module, places_ptr, num_modules)
    b_ptrs = memory_ptr + b_at + outs.to(tl.int64)[:, None] * rank + ranks[None, :]
    b = tl.load(b_ptrs, mask=mask_n[:, None] & (rank > 0), other=0.0)
    pdl.wait(PDL)
    for c in range(tl.program_id(0), num_chunks, lanes):
        h_ptr = hidden_ptr + (first.to(tl.int64) * SLICES + module) * BLOCK_R
        h_ptrs = h_ptr + rows[:, None] * (SLICES * BLOCK_R) + ranks[None, :]
        part_ptrs = h_ptrs[None, :, :] + parts[:, None, None] * part_stride
        mask_h = (parts < num_splits)[:, None, None] & mask[None, :, None]
        y_ptrs = y_ptr + tokens[:, None] * y_stride + (column + outs)[None, :]
        touched = mask[:, None] & mask_n[None, :] & (rank > 0)
        y = tl.load(y_ptrs, mask=touched, other=0.0)
        # What the lane's next chunk needs is fetched while this one is computed: each step of its way waits for the memory.
        next_slot, next_first, next_mask, next_tokens = _chunk_of(c + lanes, num_chunks, upload_ptr, word, BLOCK_T)
        y = _added(y, part_ptrs, rank_stride, mask_h, b_ptrs, b, mask_n, rank, BLOCK_T, BLOCK_N, BLOCK_R, PRECISION)
        _, b_at, rank = _locate(next_slot, first_module + module, places_ptr, num_modules)
        b_ptrs = memory_ptr + b_at + outs.to(tl.int64)[:, None] * rank + ranks[None, :]
        b = tl.load(b_ptrs, mask=mask_n[:, None] & (rank > 0), other=0.0)
        tl.store(y_ptrs, y, mask=touched)
        slot, first, mask, tokens = next_slot, next_first, next_mask, next_tokens


@triton.jit
def _gate_and_up(slot, module, places_ptr, num_modules, width, SLICES: tl.constexpr):
    """Return where the B of gate begins, its rank, and the same of up. SLICES = 1: both are one matrix."""
    _, gate_at, gate_rank = _locate(slot, module, places_ptr, num_modules)
    if SLICES == 2:
        _, up_at, up_rank = _locate(slot, module + 1, places_ptr, num_modules)
    else:
        up_at = gate_at + width.to(tl.int64) * gate_rank
        up_rank = gate_rank
    return gate_at, gate_rank, up_at, up_rank


@triton.jit(do_not_specialize=["word", "first_module", "num_modules", "num_splits", "hidden_rows"])
def gated_expand_kernel(
    out_ptr,
    y_ptr,
    upload_ptr,
    places_ptr,
    memory_ptr,
    hidden_ptr,
    width,
    y_stride,
    word,
    first_module,
    num_modules,
    num_splits,
    hidden_rows,
    KIND: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write act(gate) × up of a lane's chunks, where gate and up are y [T, 2 · width] with B · h added. SLICES = 1: both have one A."""
    pdl.begin(PDL)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    parts = tl.arange(0, SPLITS)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = outs < width
    rank_stride = hidden_rows.to(tl.int64) * num_splits * SLICES
    part_stride = hidden_rows.to(tl.int64) * (SLICES * BLOCK_R)
    num_chunks = tl.load(upload_ptr + word)
    lanes = tl.num_programs(0)
    lines = outs.to(tl.int64)[:, None]
    slot, first, mask, tokens = _chunk_of(tl.program_id(0), num_chunks, upload_ptr, word, BLOCK_T)
    gate_at, gate_rank, up_at, up_rank = _gate_and_up(slot, first_module, places_ptr, num_modules, width, SLICES)
    gate_b_ptrs = memory_ptr + gate_at + lines * gate_rank + ranks[None, :]
    up_b_ptrs = memory_ptr + up_at + lines * up_rank + ranks[None, :]
    gate_b = tl.load(gate_b_ptrs, mask=mask_n[:, None] & (gate_rank > 0), other=0.0)
    up_b = tl.load(up_b_ptrs, mask=mask_n[:, None] & (up_rank > 0), other=0.0)
    pdl.wait(PDL)
    for c in range(tl.program_id(0), num_chunks, lanes):
        h_ptrs = hidden_ptr + (first + rows).to(tl.int64)[:, None] * (SLICES * BLOCK_R) + ranks[None, :]
        part_ptrs = h_ptrs[None, :, :] + parts[:, None, None] * part_stride
        mask_h = (parts < num_splits)[:, None, None] & mask[None, :, None]
        touched = mask[:, None] & mask_n[None, :]
        y_ptrs = y_ptr + tokens[:, None] * y_stride + outs[None, :]
        gate = tl.load(y_ptrs, mask=touched, other=0.0)
        up = tl.load(y_ptrs + width, mask=touched, other=0.0)
        next_slot, next_first, next_mask, next_tokens = _chunk_of(c + lanes, num_chunks, upload_ptr, word, BLOCK_T)
        gate = _added(gate, part_ptrs, rank_stride, mask_h, gate_b_ptrs, gate_b, mask_n, gate_rank, BLOCK_T, BLOCK_N, BLOCK_R, PRECISION)  # fmt: skip
        if SLICES == 2:
            part_ptrs += BLOCK_R
        up = _added(
            up, part_ptrs, rank_stride, mask_h, up_b_ptrs, up_b, mask_n, up_rank, BLOCK_T, BLOCK_N, BLOCK_R, PRECISION
        )
        gate_at, gate_rank, up_at, up_rank = _gate_and_up(
            next_slot, first_module, places_ptr, num_modules, width, SLICES
        )
        gate_b_ptrs = memory_ptr + gate_at + lines * gate_rank + ranks[None, :]
        up_b_ptrs = memory_ptr + up_at + lines * up_rank + ranks[None, :]
        gate_b = tl.load(gate_b_ptrs, mask=mask_n[:, None] & (gate_rank > 0), other=0.0)
        up_b = tl.load(up_b_ptrs, mask=mask_n[:, None] & (up_rank > 0), other=0.0)
        out = activated(gate.to(tl.float32), KIND).to(DTYPE).to(tl.float32) * up.to(tl.float32)
        tl.store(out_ptr + tokens[:, None] * width + outs[None, :], out.to(DTYPE), mask=touched)
        slot, first, mask, tokens = next_slot, next_first, next_mask, next_tokens
