"""Sums the hidden states of rows that answer with a vector instead of tokens."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runtime.engine.interfaces import StepPlan
from runtime.engine.model.run.input_buffers import StepShape
from runtime.engine.model.run.row_state import to_host


@dataclass(frozen=True, slots=True)
class PooledRows:
    """A step's sums, whose copy to the host is queued. `vectors`: [len(rows), hidden size] float32 on the host."""

    rows: list[int]
    vectors: torch.Tensor

    def by_row(self) -> dict[int, bytes]:
        return {row: vector.tobytes() for row, vector in zip(self.rows, self.vectors.numpy(), strict=True)}


def pooled_tokens(plan: StepPlan, shape: StepShape) -> npt.NDArray[np.int64]:
    """Return the tokens of the batch whose hidden states are pooled, in the order of `plan.pooled`."""
    places = {row: index for index, row in enumerate(plan.rows)}
    found = [np.zeros(0, np.int64)]
    for row, start, end in plan.pooled:
        index = places[row]
        first = int(shape.firsts[index]) - plan.starts[index]
        found.append(np.arange(first + start, first + end))
    return np.concatenate(found)


def pool(plan: StepPlan, hidden: torch.Tensor) -> PooledRows:
    """Sum `hidden` [tokens of `pooled_tokens`, hidden size] by row in float32, and queue the copy to the host."""
    parts = hidden.split([end - start for _, start, end in plan.pooled])
    sums = torch.stack([part.sum(0, dtype=torch.float32) for part in parts])
    return PooledRows([row for row, _, _ in plan.pooled], to_host(sums))
