"""Argmax in Triton. At few rows several programs share a row; the last to finish compares their results and stores
the token.
"""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.kernels.step_inputs import StepInputs

_BLOCK = 2048
_MAX_PARTS = 64


@triton.jit(do_not_specialize=["logits_stride", "vocab", "ring_stride", "part_size"])
def _largest_kernel(
    logits_ptr,
    drawn_ptr,
    upload_ptr,
    sample_rows_ptr,
    last_token_ptr,
    ring_ptr,
    partials_ptr,
    counters_ptr,
    logits_stride,
    vocab,
    ring_stride,
    part_size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    pdl.wait(PDL)
    sample = tl.program_id(0)
    part = tl.program_id(1)
    row_ptr = logits_ptr + sample.to(tl.int64) * logits_stride
    first = part * part_size
    end = tl.minimum(first + part_size, vocab)
    cells = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32) + tl.minimum(first, vocab - 1)
    for begin in range(first, end, BLOCK):
        ids = begin + cells
        x = tl.load(row_ptr + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # a NaN makes the row's maximum infinite
        where = tl.where(x > largest, ids, where)
        largest = tl.maximum(largest, x)
    best = tl.max(largest, axis=0)
    token = tl.min(tl.where(largest == best, where, 2147483647), axis=0)
    if PARTS > 1:
        base = partials_ptr + sample * (2 * PARTS)
        tl.store(base + part, best)
        tl.store((base + PARTS + part).to(tl.pointer_type(tl.int32), bitcast=True), token)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + sample, 1, sem="acq_rel", scope="gpu")
        if arrived < PARTS - 1:
            return
        parts = tl.arange(0, PARTS)
        finds = tl.load(base + parts, cache_modifier=".cg")
        tokens = tl.load((base + PARTS + parts).to(tl.pointer_type(tl.int32), bitcast=True), cache_modifier=".cg")
        best = tl.max(finds, axis=0)
        token = tl.min(tl.where(finds == best, tokens, 2147483647), axis=0)
        tl.store(counters_ptr + sample, 0)
    token = tl.where(tl.abs(best) < float("inf"), token, -1).to(tl.int64)  # NO_TOKEN
    tl.store(drawn_ptr + sample, token)
    if sample < tl.load(upload_ptr + 2):
        tl.store(last_token_ptr + tl.load(sample_rows_ptr + sample), tl.maximum(token, 0))
        tl.store(ring_ptr + tl.load(upload_ptr + 4).to(tl.int64) * ring_stride + sample, token)


def draw_largest(
    logits: Tensor,
    drawn: Tensor,
    upload: Tensor,
    inputs: StepInputs,
    last_token: Tensor,
    ring: Tensor,
    num_samples: int,
    scratch: Scratch | None,
) -> None:
    """See runtime.engine.kernels.argmax.draw_largest."""
    vocab = logits.shape[1]
    parts = 1
    while parts < _MAX_PARTS and parts * num_samples < 264 and parts * _BLOCK < vocab:
        parts *= 2
    if parts > 1:
        if scratch is None:
            scratch = Scratch.allocate(
                logits.device, partial_elements=2 * parts * num_samples, num_counters=num_samples
            )
        elif not scratch.holds(2 * parts * num_samples, num_samples):
            parts = 1
    part_size = triton.cdiv(triton.cdiv(vocab, parts), _BLOCK) * _BLOCK
    _largest_kernel[(num_samples, parts)](
        logits,
        drawn,
        upload,
        inputs.sample_rows,
        last_token,
        ring,
        scratch.partials if scratch is not None else drawn,
        scratch.counters if scratch is not None else drawn,
        logits.stride(0),
        vocab,
        ring.stride(0),
        part_size,
        PARTS=parts,
        BLOCK=_BLOCK,
        PDL=pdl.overlaps(logits),
        num_warps=8,
        **pdl.options(logits),
    )
