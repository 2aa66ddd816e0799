"""Hugging Face's own forward pass as a CausalForward: for every model whose structure we have no fused form of.

Its attention calls reach our hook; its linear layers may be quantised twins. Knows the module's call; nothing of its insides.
"""

from typing import Any

from torch import Tensor, nn

from runtime.engine.memory.weight_readiness import WeightReadiness
from runtime.engine.model.run.step import StepContext


class UnfusedForward:
    """Implements CausalForward over a …ForCausalLM bound to its weights. `last_group`: the weights group that completes the model."""

    def __init__(self, model: nn.Module, arrival: WeightReadiness, last_group: int) -> None:
        self._model: Any = model
        self._arrival = arrival
        self._last_group = last_group

    def __call__(self, input_ids: Tensor, positions: Tensor, logits_at: Tensor, step: StepContext) -> Tensor:
        if self._arrival.pending:
            self._arrival.wait(self._last_group)
        out = self._model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logits_at,
            step=step,
        )
        logits: Tensor = out.logits[0]
        return logits
