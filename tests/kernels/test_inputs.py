"""A step's inputs: the Triton kernels against their twin, and the twin against plain Python, with padding and with blocks that come in the same step."""

import random

import numpy as np
import pytest
import torch

from runtime.engine.interfaces import NO_TOKEN, StepPlan
from runtime.engine.kernels import inputs as op
from runtime.engine.kernels.gpu import inputs as gpu
from runtime.engine.kernels.step_inputs import StepInputs
from runtime.engine.model.run.input_buffers import pack

BLOCK_TOKENS, PAGE_UNIT, STRIDE, MAX_ROWS, WIDTH = 16, 96, 24, 12, 32


def a_step(seed: int) -> tuple[StepPlan, torch.Tensor, torch.Tensor]:
    """A random plan, the page table before it (the new blocks' places hold rubbish), and last tokens."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    table = torch.randint(0, 1000, (MAX_ROWS, WIDTH), dtype=torch.int32)
    plan = StepPlan([], [], [], [], [], [])
    for row in rng.sample(range(MAX_ROWS), rng.randint(1, MAX_ROWS)):
        decodes = rng.random() < 0.5
        count = 1 if decodes else rng.randint(1, 300)
        start = rng.randint(1, WIDTH * BLOCK_TOKENS - count)
        plan.rows.append(row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.from_device.append(decodes)
        plan.samples.append(1 if decodes else rng.randrange(2))
        if not decodes:
            plan.tokens.extend(rng.randrange(5000) for _ in range(count))
        for index in range(start // BLOCK_TOKENS, (start + count - 1) // BLOCK_TOKENS + 1):
            if rng.random() < 0.7:
                plan.new_blocks.append((row, index, rng.randrange(100_000_000)))
    return plan, table, torch.randint(0, 5000, (MAX_ROWS,))


def expected(plan: StepPlan, table: torch.Tensor, last: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """(ids, positions, slots) by the book."""
    for row, index, page in plan.new_blocks:
        table[row, index] = page
    ids, positions, slots, at = [], [], [], 0
    for row, start, count, from_device in zip(plan.rows, plan.starts, plan.counts, plan.from_device, strict=True):
        for position in range(start, start + count):
            positions.append(position)
            slots.append(int(table[row, position // BLOCK_TOKENS]) * PAGE_UNIT + position % BLOCK_TOKENS * STRIDE)
        ids += [int(last[row])] if from_device else plan.tokens[at : at + count]
        at += 0 if from_device else count
    return ids, positions, slots


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("which", ["twin", "triton"])
def test_inputs(seed: int, padded: bool, which: str, device: torch.device) -> None:
    plan, table, last = a_step(seed)
    words = np.zeros(16 + 8 * MAX_ROWS + 4000 + 1000, np.int32)
    shape, size = pack(plan, 3, words, 1000)
    upload = torch.from_numpy(words)[:size].to(device)
    tokens, rows, samples = shape.num_tokens, shape.num_rows, shape.num_samples
    if padded:
        tokens, rows, samples = tokens + 37, MAX_ROWS, MAX_ROWS
    inputs = StepInputs.allocate(device, tokens + 5, MAX_ROWS)
    for tensor in (
        inputs.input_ids,
        inputs.positions,
        inputs.slots,
        inputs.row_slots,
        inputs.context_lens,
        inputs.logits_at,
        inputs.sample_rows,
    ):
        tensor.fill_(77)
    device_table, device_last = table.to(device), last.to(device)
    build = op.build_inputs_torch if which == "twin" else gpu.build_inputs
    build(upload, device_table, device_last, inputs, tokens, rows, samples, BLOCK_TOKENS, PAGE_UNIT, STRIDE)

    ids, positions, slots = expected(plan, table, last)
    more = tokens - shape.num_tokens
    assert torch.equal(device_table.cpu(), table)
    assert inputs.input_ids[:tokens].tolist() == ids + [0] * more
    assert inputs.positions[:tokens].tolist() == positions + [0] * more
    assert inputs.slots[:tokens].tolist() == slots + [-1] * more
    assert inputs.input_ids[tokens:].tolist() == [77] * 5
    firsts = np.cumsum([0, *plan.counts]).tolist()
    missing = rows - shape.num_rows
    assert inputs.row_slots[:rows].tolist() == plan.rows + [0] * missing
    assert inputs.query_starts[: rows + 1].tolist() == firsts + [firsts[-1]] * missing
    assert (
        inputs.context_lens[:rows].tolist()
        == [s + c for s, c in zip(plan.starts, plan.counts, strict=True)] + [0] * missing
    )
    sampling = [b for b, samples_here in enumerate(plan.samples) if samples_here]
    assert inputs.logits_at[:samples].tolist() == [firsts[b + 1] - 1 for b in sampling] + [0] * (
        samples - len(sampling)
    )
    assert inputs.sample_rows[:samples].tolist() == [plan.rows[b] for b in sampling] + [-1] * (samples - len(sampling))

    drawn = torch.randint(0, 5000, (MAX_ROWS,), device=device)
    drawn[1] = NO_TOKEN
    ring = torch.zeros((8, MAX_ROWS), dtype=torch.int64, device=device)
    commit = op.commit_draws_torch if which == "twin" else gpu.commit_draws
    if samples:
        commit(drawn, upload, inputs, device_last, ring, samples)
    after = last.clone()
    for i, b in enumerate(sampling):
        after[plan.rows[b]] = max(0, drawn[i].item())
    assert torch.equal(device_last.cpu(), after)
    assert ring[3, : len(sampling)].tolist() == drawn[: len(sampling)].tolist()
    assert ring.count_nonzero() == drawn[: len(sampling)].count_nonzero()


def test_inputs_of_a_blank_upload_are_padding(device: torch.device) -> None:
    inputs = StepInputs.allocate(device, 8, 4)
    gpu.build_inputs(
        torch.zeros(64, dtype=torch.int32, device=device), torch.zeros((4, 4), dtype=torch.int32, device=device),
        torch.zeros(4, dtype=torch.int64, device=device), inputs, 8, 4, 4, BLOCK_TOKENS, PAGE_UNIT, STRIDE,
    )  # fmt: skip
    assert inputs.slots.tolist() == [-1] * 8
    assert inputs.query_starts.tolist() == [0] * 5
    assert inputs.context_lens.tolist() == [0] * 4


def test_pack_places_the_draws_of_rows_with_drafts() -> None:
    plan = StepPlan([4, 2, 7], [9, 0, 30], [1, 5, 3], [True, False, False], [1, 0, 3], [1, 2, 3, 4, 5, 6, 7, 8])
    words = np.zeros(200, np.int32)
    shape, _ = pack(plan, 0, words, 0)
    assert shape.num_samples == 4
    assert shape.sample_rows.tolist() == [4, 7, 7, 7]
    assert shape.sample_positions.tolist() == [10, 31, 32, 33]
    at = words[op.AT_SAMPLE]
    assert words[at : at + 4].tolist() == [0, 6, 7, 8]


@pytest.mark.parametrize("which", ["twin", "triton"])
def test_build_inputs_writes_more_samples_than_rows(which: str, device: torch.device) -> None:
    plan = StepPlan([4, 7], [9, 30], [3, 3], [False, False], [3, 3], [1, 2, 3, 4, 5, 6])
    words = np.zeros(200, np.int32)
    shape, size = pack(plan, 0, words, 0)
    inputs = StepInputs.allocate(device, 8, MAX_ROWS)
    table = torch.zeros((MAX_ROWS, WIDTH), dtype=torch.int32, device=device)
    last = torch.zeros(MAX_ROWS, dtype=torch.int64, device=device)
    build = op.build_inputs_torch if which == "twin" else gpu.build_inputs
    upload = torch.from_numpy(words)[:size].to(device)
    build(upload, table, last, inputs, 8, shape.num_rows, shape.num_samples, BLOCK_TOKENS, PAGE_UNIT, STRIDE)
    assert inputs.logits_at[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert inputs.sample_rows[:6].tolist() == [4, 4, 4, 7, 7, 7]
    assert inputs.slots[6:8].tolist() == [-1, -1]
