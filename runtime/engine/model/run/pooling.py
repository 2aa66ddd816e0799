"""Hidden states of rows that answer with a vector instead of tokens."""

from dataclasses import dataclass

import torch

from runtime.engine.interfaces import StepPlan
from runtime.engine.model.run.input_buffers import StepShape
from runtime.engine.model.run.row_state import to_host


@dataclass(frozen=True, slots=True)
class PooledRows:
    """A step's vectors, whose copy to the host is queued. `vectors`: [len(rows), hidden size] float32 on the host."""

    rows: list[int]
    vectors: torch.Tensor

    def by_row(self) -> dict[int, bytes]:
        return {row: vector.tobytes() for row, vector in zip(self.rows, self.vectors.numpy(), strict=True)}


def pooled_positions(plan: StepPlan, shape: StepShape) -> list[int]:
    """The last token of each pooled row in the batch."""
    return [int(shape.firsts[plan.rows.index(row) + 1]) - 1 for row in plan.pooled]


def pool(plan: StepPlan, hidden: torch.Tensor) -> PooledRows:
    """Queue the copy of `hidden` [len(plan.pooled), hidden size] to the host."""
    return PooledRows(plan.pooled, to_host(hidden.float()))
