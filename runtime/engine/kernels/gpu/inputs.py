"""Builds a step's inputs in Triton, and stores the drawn tokens for the next step and the host."""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.step_inputs import StepInputs

_BLOCK = 256


@triton.jit(do_not_specialize=["table_stride"])
def _blocks_kernel(upload_ptr, table_ptr, table_stride, BLOCK: tl.constexpr):
    count = tl.load(upload_ptr + 3)
    base = upload_ptr + tl.load(upload_ptr + 11)
    for begin in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < count
        row = tl.load(base + 3 * at, mask=mask, other=0).to(tl.int64)
        index = tl.load(base + 3 * at + 1, mask=mask, other=0)
        page = tl.load(base + 3 * at + 2, mask=mask, other=0)
        tl.store(table_ptr + row * table_stride + index, page, mask=mask)


@triton.jit(do_not_specialize=["table_stride", "page_unit", "num_tokens", "num_rows", "num_samples", "token_stride"])
def _rows_kernel(
    upload_ptr,
    table_ptr,
    last_token_ptr,
    ids_ptr,
    positions_ptr,
    slots_ptr,
    row_slots_ptr,
    starts_ptr,
    contexts_ptr,
    logits_at_ptr,
    sample_rows_ptr,
    table_stride,
    page_unit,
    num_tokens,
    num_rows,
    num_samples,
    token_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program b writes row b < num_rows and sample b < num_samples. The last program writes the padding of the tokens."""
    b = tl.program_id(0)
    rows = tl.load(upload_ptr + 0)
    tokens = tl.load(upload_ptr + 1)
    samples = tl.load(upload_ptr + 2)
    if b == tl.num_programs(0) - 1:
        for begin in range(tokens, num_tokens, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            mask = at < num_tokens
            zero = tl.zeros((BLOCK,), tl.int64)
            tl.store(ids_ptr + at, zero, mask=mask)
            tl.store(positions_ptr + at, zero, mask=mask)
            tl.store(slots_ptr + at, zero - 1, mask=mask)
        tl.store(starts_ptr + num_rows, tokens)
    else:
        if b < num_samples:
            sampled = b < samples
            at_sample = tl.load(upload_ptr + 9)
            at_sample_row = tl.load(upload_ptr + 10)
            where = tl.load(upload_ptr + at_sample + b, mask=sampled, other=0)
            sample_row = tl.load(upload_ptr + at_sample_row + b, mask=sampled, other=-1)
            tl.store(logits_at_ptr + b, where.to(tl.int64))
            tl.store(sample_rows_ptr + b, sample_row)
        if b < rows:
            slot = tl.load(upload_ptr + tl.load(upload_ptr + 5) + b)
            start = tl.load(upload_ptr + tl.load(upload_ptr + 6) + b)
            first_ptr = upload_ptr + tl.load(upload_ptr + 7) + b
            first = tl.load(first_ptr)
            count = tl.load(first_ptr + 1) - first
            ids_at = tl.load(upload_ptr + tl.load(upload_ptr + 8) + b)
            given_ptr = upload_ptr + tl.load(upload_ptr + 12) + ids_at
            tl.store(row_slots_ptr + b, slot)
            tl.store(starts_ptr + b, first)
            tl.store(contexts_ptr + b, start + count)
            drawn = tl.load(last_token_ptr + slot)
            row_table = table_ptr + slot.to(tl.int64) * table_stride
            for begin in range(0, count, BLOCK):
                offset = begin + tl.arange(0, BLOCK)
                mask = offset < count
                position = start + offset
                page = tl.load(row_table + position // BLOCK_TOKENS, mask=mask, other=0).to(tl.int64)
                given = tl.load(given_ptr + offset, mask=mask & (ids_at >= 0), other=0).to(tl.int64)
                tl.store(ids_ptr + first + offset, tl.where(ids_at >= 0, given, drawn), mask=mask)
                tl.store(positions_ptr + first + offset, position.to(tl.int64), mask=mask)
                tl.store(
                    slots_ptr + first + offset,
                    page * page_unit + (position % BLOCK_TOKENS).to(tl.int64) * token_stride,
                    mask=mask,
                )
        elif b < num_rows:
            tl.store(row_slots_ptr + b, 0)
            tl.store(starts_ptr + b, tokens)
            tl.store(contexts_ptr + b, 0)


@triton.jit(do_not_specialize=["ring_stride", "num_samples"])
def _commit_kernel(
    drawn_ptr, upload_ptr, sample_rows_ptr, last_token_ptr, ring_ptr, ring_stride, num_samples, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = tl.load(upload_ptr + 4).to(tl.int64)
    mask = (at < tl.load(upload_ptr + 2)) & (at < num_samples)
    row = tl.load(sample_rows_ptr + at, mask=mask, other=0)
    token = tl.load(drawn_ptr + at, mask=mask, other=0)
    tl.store(last_token_ptr + row, tl.maximum(token, 0), mask=mask)
    tl.store(ring_ptr + line * ring_stride + at, token, mask=mask)


def build_inputs(
    upload: Tensor,
    page_table: Tensor,
    last_token: Tensor,
    inputs: StepInputs,
    num_tokens: int,
    num_rows: int,
    num_samples: int,
    block_tokens: int,
    page_unit: int,
    token_stride: int,
) -> None:
    _blocks_kernel[(min(64, 1 + num_tokens // _BLOCK),)](
        upload, page_table, page_table.stride(0), BLOCK=_BLOCK, num_warps=4
    )
    _rows_kernel[(max(num_rows, num_samples) + 1,)](
        upload,
        page_table,
        last_token,
        inputs.input_ids,
        inputs.positions,
        inputs.slots,
        inputs.row_slots,
        inputs.query_starts,
        inputs.context_lens,
        inputs.logits_at,
        inputs.sample_rows,
        page_table.stride(0),
        page_unit,
        num_tokens,
        num_rows,
        num_samples,
        token_stride,
        BLOCK_TOKENS=block_tokens,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def commit_draws(
    drawn: Tensor, upload: Tensor, inputs: StepInputs, last_token: Tensor, ring: Tensor, num_samples: int
) -> None:
    _commit_kernel[(triton.cdiv(num_samples, _BLOCK),)](
        drawn, upload, inputs.sample_rows, last_token, ring, ring.stride(0), num_samples, BLOCK=_BLOCK, num_warps=4
    )
