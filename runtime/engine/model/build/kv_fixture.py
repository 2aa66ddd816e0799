"""Provides a minimal paged KV cache for testing a forward pass: a few rows whose blocks are assigned in order."""

from collections.abc import Sequence

import torch

from runtime.engine.model.run.step import KvPlanes, StepContext


def trial_planes(
    num_layers: int, token_stride: int, block_tokens: int, num_blocks: int, dtype: torch.dtype
) -> list[KvPlanes]:
    """Return CPU planes of `num_blocks` blocks whose page ids are 0, 1, …"""
    unit = block_tokens * token_stride
    planes = torch.zeros(num_layers, 2, num_blocks * unit, dtype=dtype)
    return [KvPlanes(planes[layer, 0], planes[layer, 1], unit) for layer in range(num_layers)]


class KvFixture:
    """Rows that grow step by step. `pages` are the free page ids, used in order."""

    def __init__(
        self,
        planes: Sequence[KvPlanes],
        token_stride: int,
        block_tokens: int,
        pages: Sequence[int],
        max_rows: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self._planes = planes
        self._stride = token_stride
        self._block_tokens = block_tokens
        self._free = list(pages)
        self._device = device
        self._table = torch.zeros((max_rows, max_blocks), dtype=torch.int32)
        self._held = [0] * max_rows

    def step(self, chunks: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, StepContext]:
        """Plan a step over chunks of (row, first position, number of tokens).

        Returns the tokens' positions [T] and the step's context.
        """
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for row, first, count in chunks:
            while self._held[row] * self._block_tokens < first + count:
                self._table[row, self._held[row]] = self._free.pop(0)
                self._held[row] += 1
            for position in range(first, first + count):
                block, inside = divmod(position, self._block_tokens)
                positions.append(position)
                slots.append(int(self._table[row, block]) * self._planes[0].page_unit + inside * self._stride)
            starts.append(starts[-1] + count)

        def upload(values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        context = StepContext(
            planes=self._planes,
            page_table=self._table.to(self._device),
            row_slots=upload([row for row, _, _ in chunks], torch.int32),
            query_starts=upload(starts, torch.int32),
            context_lens=upload([first + count for _, first, count in chunks], torch.int32),
            slots=upload(slots, torch.int64),
            block_tokens=self._block_tokens,
            max_query_len=max(count for _, _, count in chunks),
            max_context_len=max(first + count for _, first, count in chunks),
        )
        return upload(positions, torch.int64), context
