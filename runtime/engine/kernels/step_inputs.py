"""Defines the device buffers that hold one step's inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Buffers of a step's inputs, as large as the largest step.

    `model/run/step.py` describes their meaning. T: tokens of the largest step, B: rows of the largest step.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    row_slots: Tensor  # [B] int32
    query_starts: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32
    logits_at: Tensor  # [B] int64
    sample_rows: Tensor  # [B] int32, -1 = no sample

    @staticmethod
    def allocate(device: torch.device, max_tokens: int, max_rows: int) -> "StepInputs":
        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return StepInputs(
            zeros(max_tokens, torch.int64),
            zeros(max_tokens, torch.int64),
            zeros(max_tokens, torch.int64),
            zeros(max_rows, torch.int32),
            zeros(max_rows + 1, torch.int32),
            zeros(max_rows, torch.int32),
            zeros(max_rows, torch.int64),
            zeros(max_rows, torch.int32),
        )
