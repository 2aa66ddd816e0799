"""Builds a step's inputs on the device, from tables that are already there and one small upload.

Layout of the upload, in int32 words:

    header[20]: num_rows, num_tokens, num_samples, num_blocks, ring line, then where each section begins, in the order below;
                a number of chunks stands before the place of the chunks
    per row:    slot · start (position of its first token in this step) · index of its first token in the batch (one
                more entry: num_tokens) · where its ids begin in `tokens`, or -1 if its one id is the row's last drawn
                token
    per sample: token whose logits are used · row slot
    blocks:     (row slot, index in its page table, page id) each
    tokens:     input ids
    chunks:     (adapter's slot, first place in the order, number of tokens) each, if rows have adapters; slot -1 = no adapter
    order:      all tokens, those of one adapter end to end
    sample chunks, sample order: the same of the samples, unless every token is one

Unused rows are padded with zero queries and unused tokens with slot -1, so that one CUDA graph serves every smaller
step.
"""

import torch
from torch import Tensor

from runtime.engine.kernels.step_inputs import StepInputs

HEADER_WORDS = 20
(
    NUM_ROWS,
    NUM_TOKENS,
    NUM_SAMPLES,
    NUM_BLOCKS,
    RING_LINE,
    AT_SLOT,
    AT_START,
    AT_FIRST,
    AT_IDS,
    AT_SAMPLE,
    AT_SAMPLE_ROW,
    AT_BLOCKS,
    AT_TOKENS,
    NUM_CHUNKS,
    AT_CHUNKS,
    AT_ORDER,
    NUM_SAMPLE_CHUNKS,
    AT_SAMPLE_CHUNKS,
    AT_SAMPLE_ORDER,
) = range(19)


def build_inputs(
    upload: Tensor,
    page_table: Tensor,
    last_token: Tensor,
    inputs: StepInputs,
    *,
    num_tokens: int,
    num_rows: int,
    num_samples: int,
    block_tokens: int,
    page_unit: int,
    token_stride: int,
) -> None:
    """Enter new blocks in `page_table` [R, W] and fill the first `num_tokens`, `num_rows` and `num_samples` of `inputs`.

    These counts are padded; the upload holds the true ones. The slot of a token is
    page id · `page_unit` + index in its block · `token_stride`.
    """
    arguments = (
        upload,
        page_table,
        last_token,
        inputs,
        num_tokens,
        num_rows,
        num_samples,
        block_tokens,
        page_unit,
        token_stride,
    )
    if upload.is_cuda:
        from runtime.engine.kernels.gpu import inputs as gpu

        gpu.build_inputs(*arguments)
    else:
        build_inputs_torch(*arguments)


def commit_draws(
    drawn: Tensor, upload: Tensor, inputs: StepInputs, last_token: Tensor, ring: Tensor, *, num_samples: int
) -> None:
    """Store `drawn` [S] int64 as the rows' last tokens and in the line of `ring` [lines, B] int64 that the upload names.

    Padded samples are skipped. The last token of a row that drew NO_TOKEN is 0, because a step that was launched before
    the host sees the draw still reads it.
    """
    arguments = (drawn, upload, inputs, last_token, ring, num_samples)
    if upload.is_cuda:
        from runtime.engine.kernels.gpu import inputs as gpu

        gpu.commit_draws(*arguments)
    else:
        commit_draws_torch(*arguments)


def build_inputs_torch(
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
    """Torch twin of the Triton launches."""
    head = upload[:HEADER_WORDS].tolist()
    rows, tokens, samples, blocks = head[NUM_ROWS], head[NUM_TOKENS], head[NUM_SAMPLES], head[NUM_BLOCKS]

    def section(where: int, size: int) -> Tensor:
        begin = head[where]
        return upload[begin : begin + size]

    if blocks:
        row, index, page = section(AT_BLOCKS, 3 * blocks).view(blocks, 3).long().unbind(1)
        page_table[row, index] = page.to(page_table.dtype)
    slot, start, first, ids_at = (section(where, rows) for where in (AT_SLOT, AT_START, AT_FIRST, AT_IDS))
    counts = section(AT_FIRST, rows + 1).diff()
    batch_row = torch.repeat_interleave(torch.arange(rows, device=upload.device), counts, output_size=tokens)
    offset = torch.arange(tokens, device=upload.device) - first.long()[batch_row]
    position = start.long()[batch_row] + offset
    at = ids_at.long()[batch_row]
    given = upload[(head[AT_TOKENS] + at + offset).clamp(0, upload.numel() - 1)].long()
    inputs.input_ids[:num_tokens] = 0
    inputs.input_ids[:tokens] = torch.where(at >= 0, given, last_token[slot.long()[batch_row]])
    inputs.positions[:num_tokens] = 0
    inputs.positions[:tokens] = position
    page = page_table[slot.long()[batch_row], position // block_tokens].long()
    inputs.slots[:num_tokens] = -1
    inputs.slots[:tokens] = page * page_unit + position % block_tokens * token_stride
    inputs.row_slots[:num_rows] = 0
    inputs.row_slots[:rows] = slot
    inputs.query_starts[: num_rows + 1] = tokens
    inputs.query_starts[:rows] = first
    inputs.context_lens[:num_rows] = 0
    inputs.context_lens[:rows] = start + counts
    inputs.logits_at[:num_samples] = 0
    inputs.logits_at[:samples] = section(AT_SAMPLE, samples)
    inputs.sample_rows[:num_samples] = -1
    inputs.sample_rows[:samples] = section(AT_SAMPLE_ROW, samples)


def commit_draws_torch(
    drawn: Tensor, upload: Tensor, inputs: StepInputs, last_token: Tensor, ring: Tensor, num_samples: int
) -> None:
    """Torch twin of the Triton launch."""
    samples, line = int(upload[NUM_SAMPLES]), int(upload[RING_LINE])
    samples = min(samples, num_samples)
    last_token[inputs.sample_rows[:samples].long()] = drawn[:samples].clamp(min=0)
    ring[line, :samples] = drawn[:samples]
