"""Packs a step plan into the words that the device reads (kernels/inputs.py), and sends them through pinned buffers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runtime.engine.interfaces import StepPlan
from runtime.engine.kernels import inputs as layout
from runtime.engine.kernels.adapters import SMALL_CHUNK, chunk_tokens, sample_chunk_tokens
from runtime.engine.model.run.adapter_chunks import group_by_adapter
from runtime.errors import EngineFault

RING_LINES = 8
_NOTHING: npt.NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step's sizes, and arrays that the host uses again after packing. S counts draws: a row with drafts has several.

    Attributes:
        sample_at: [S] index into the plan's rows of the row of each draw.
        sample_rows: [S] its row slot.
        sample_positions: [S] the position that the drawn token will have.
        firsts: [B + 1] first token of each row in the batch.
        num_chunks: chunks of tokens with the same adapter or none; 0 if no row has one.
    """

    num_tokens: int
    num_rows: int
    num_samples: int
    max_query_len: int
    max_context_len: int
    sample_at: npt.NDArray[np.int64]
    sample_rows: npt.NDArray[np.int64]
    sample_positions: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int64]
    num_chunks: int = 0


def pack(
    plan: StepPlan, line: int, words: npt.NDArray[np.int32], max_blocks: int, *, on_gpu: bool = False
) -> tuple[StepShape, int]:
    """Write `plan`, with at most `max_blocks` of its new blocks, into `words`. Returns its shape and the number of words.

    `line`: the line of the result ring for its draws. `on_gpu`: cut chunks for the kernels of a GPU.
    """
    num_rows = len(plan.rows)
    rows = np.array(plan.rows, np.int64)
    starts = np.array(plan.starts, np.int64)
    counts = np.array(plan.counts, np.int64)
    firsts = np.zeros(num_rows + 1, np.int64)
    np.cumsum(counts, out=firsts[1:])
    num_tokens = int(firsts[-1])
    given = ~np.array(plan.from_device, np.bool_)
    ids_at = np.full(num_rows, -1, np.int64)
    if plan.tokens:
        given_counts = np.where(given, counts, 0)
        ids_at[given] = (np.cumsum(given_counts) - given_counts)[given]
    samples = np.array(plan.samples, np.int64)
    sample_at = np.flatnonzero(samples)
    num_samples = int(samples.sum())
    before_end: int | npt.NDArray[np.int64] = 1  # from the token after which a token is drawn to its row's end
    if num_samples > len(sample_at):
        sample_at = np.repeat(sample_at, samples[sample_at])
        before_end = np.cumsum(samples)[sample_at] - np.arange(num_samples)
    ends = starts + counts
    blocks = plan.new_blocks[:max_blocks] if len(plan.new_blocks) > max_blocks else plan.new_blocks
    chunks = order = sampled = sampled_order = _NOTHING
    if plan.adapters:
        chunks, order = group_by_adapter(plan.adapters, firsts, chunk_tokens(num_tokens, on_gpu=on_gpu))
        if num_samples and (num_samples < num_tokens or num_tokens > num_rows):
            size = sample_chunk_tokens(num_samples, on_gpu=on_gpu)
            of_samples = [plan.adapters[row] for row in sample_at.tolist()]
            sampled, sampled_order = group_by_adapter(of_samples, np.arange(num_samples + 1), size)
    shape = StepShape(
        num_tokens,
        num_rows,
        num_samples,
        int(counts.max()),
        int(ends.max()),
        sample_at,
        rows[sample_at],
        ends[sample_at] - before_end + 1,
        firsts,
        len(chunks),
    )
    sections: list[tuple[int, Sequence[int] | npt.NDArray[np.int64]]] = [
        (layout.AT_SLOT, rows),
        (layout.AT_START, starts),
        (layout.AT_FIRST, firsts),
        (layout.AT_IDS, ids_at),
        (layout.AT_SAMPLE, firsts[1:][sample_at] - before_end),
        (layout.AT_SAMPLE_ROW, shape.sample_rows),
        (layout.AT_BLOCKS, np.array(blocks, np.int64).ravel()),
        (layout.AT_TOKENS, plan.tokens),
        (layout.AT_CHUNKS, chunks.ravel()),
        (layout.AT_ORDER, order),
        (layout.AT_SAMPLE_CHUNKS, sampled.ravel()),
        (layout.AT_SAMPLE_ORDER, sampled_order),
    ]
    words[layout.NUM_ROWS], words[layout.NUM_TOKENS] = num_rows, num_tokens
    words[layout.NUM_SAMPLES], words[layout.NUM_BLOCKS] = num_samples, len(blocks)
    words[layout.RING_LINE], words[layout.NUM_CHUNKS] = line, len(chunks)
    words[layout.NUM_SAMPLE_CHUNKS] = len(sampled)
    at = layout.HEADER_WORDS
    for name, values in sections:
        words[name] = at
        words[at : at + len(values)] = values
        at += len(values)
    return shape, at


class InputRing:
    """Host buffers that take turns, and the device buffer that they are copied to. There is one device buffer, because CUDA graphs read it.

    Args:
        staged: pack into separate host buffers, even where the device is a CPU, which needs none. For tests of the GPU's order.

    Attributes:
        max_blocks: new blocks for which a step's words have room. More come with many long prefix hits at once; they are sent separately.
    """

    def __init__(
        self, device: torch.device, max_tokens: int, max_rows: int, max_blocks: int, *, staged: bool = False
    ) -> None:
        self.max_blocks = max_blocks
        self._max_tokens = max_tokens
        self._max_rows = max_rows
        # Tokens come as ids and in the order of their adapters, and samples, of which there are no more than rows, in that order. There are no more
        # chunks than rows and full chunks, and no more chunks of samples than samples.
        num_chunks = 2 * max_rows + max_tokens // SMALL_CHUNK
        num_words = layout.HEADER_WORDS + 8 * max_rows + 2 * max_tokens + 3 * (max_blocks + num_chunks) + 1
        on_gpu = device.type == "cuda"
        self._on_gpu = on_gpu
        self.device_words = torch.zeros(num_words, dtype=torch.int32, device=device)
        staged = staged or on_gpu
        lines = RING_LINES if staged else 1
        self._host = [
            torch.zeros(num_words, dtype=torch.int32, pin_memory=on_gpu) if staged else self.device_words
            for _ in range(lines)
        ]
        self._words = [host.numpy() for host in self._host]
        self._sent = [torch.cuda.Event() for _ in range(lines)] if staged else []
        self._turn = 0
        self._num_words = 0

    def pack(self, plan: StepPlan, line: int) -> StepShape:
        """Pack `plan` on the host. Waits for the device only if it is RING_LINES steps behind. Raises EngineFault if the plan is too large."""
        num_samples = sum(plan.samples)
        if plan.num_tokens > self._max_tokens or max(len(plan.rows), num_samples) > self._max_rows:
            raise EngineFault(
                f"a step of {plan.num_tokens} tokens and {num_samples} draws in {len(plan.rows)} rows exceeds "
                f"{self._max_tokens} tokens, {self._max_rows} rows and draws"
            )
        if self._sent:
            self._sent[self._turn].synchronize()
        shape, self._num_words = pack(plan, line, self._words[self._turn], self.max_blocks, on_gpu=self._on_gpu)
        return shape

    def send(self) -> None:
        """Start to copy the plan that was packed last."""
        if self._sent:
            turn, size = self._turn, self._num_words
            self.device_words[:size].copy_(self._host[turn][:size], non_blocking=True)
            self._sent[turn].record()
            self._turn = (turn + 1) % len(self._host)

    def blank(self) -> None:
        """Make the device's words a step without rows, over which graphs are captured."""
        self.device_words.zero_()
