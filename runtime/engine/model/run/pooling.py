"""Reduces the hidden states of rows that answer with a vector instead of tokens."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runtime.engine.interfaces import Reduction, StepPlan
from runtime.engine.model.run.input_buffers import StepShape
from runtime.engine.model.run.row_state import to_host


@dataclass(frozen=True, slots=True)
class PooledRows:
    """A step's results, whose copy to the host is queued. `rows` has the row of each of `vectors` [N, hidden size], float32 on the host."""

    rows: list[int]
    vectors: torch.Tensor

    def by_row(self) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for row, vector in zip(self.rows, self.vectors.numpy(), strict=True):
            found[row] = found.get(row, b"") + vector.tobytes()
        return found


def pooled_tokens(plan: StepPlan, shape: StepShape) -> npt.NDArray[np.int64]:
    """Return the tokens of the batch whose hidden states are pooled, in the order of `plan.pooled`."""
    places = {row: index for index, row in enumerate(plan.rows)}
    found = [np.zeros(0, np.int64)]
    for row, start, end, _ in plan.pooled:
        index = places[row]
        first = int(shape.firsts[index]) - plan.starts[index]
        found.append(np.arange(first + start, first + end))
    return np.concatenate(found)


def pool(plan: StepPlan, hidden: torch.Tensor) -> PooledRows:
    """Reduce `hidden` [tokens of `pooled_tokens`, hidden size] in float32, and queue the copy to the host."""
    parts = hidden.split([end - start for _, start, end, _ in plan.pooled])
    results = [_reduced(part, start, kind) for part, (_, start, _, kind) in zip(parts, plan.pooled, strict=True)]
    return PooledRows([row for row, _, _, _ in plan.pooled], to_host(torch.stack(results)))


def _reduced(states: torch.Tensor, start: int, reduction: Reduction) -> torch.Tensor:
    """Reduce the states [N, hidden size] of the positions from `start` on to one vector, float32."""
    match reduction:
        case "sum":
            return states.sum(0, dtype=torch.float32)
        case "max":
            return states.amax(0).float()
        case "weighted":
            weights = torch.arange(start + 1, start + 1 + len(states), dtype=torch.float32, device=states.device)
            return weights @ states.float()
