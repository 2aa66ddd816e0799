"""Runs Hugging Face's own forward pass as a CausalForward, for every model without a fused form.

Its attention calls reach the engine's hook, and its linear layers may be quantised twins.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from runtime.engine.memory.weight_readiness import WeightReadiness
from runtime.engine.model.run.adapters import StepPort
from runtime.engine.model.run.step import StepContext


class UnfusedForward:
    """Implements CausalForward over a …ForCausalLM bound to its weights. `last_group`: the weights group that completes the model."""

    def __init__(
        self, model: nn.Module, arrival: WeightReadiness, last_group: int, port: StepPort | None = None
    ) -> None:
        """`port`: where the model's linear layers find the step's adapters; None = they take none."""
        self._model: Any = model
        self._arrival = arrival
        self._last_group = last_group
        self._port = port

    def __call__(self, input_ids: Tensor, positions: Tensor, logits_at: Tensor, step: StepContext) -> Tensor:
        if self._arrival.pending:
            self._arrival.wait(self._last_group)
        head = self._model.get_output_embeddings() if step.num_hidden else None
        hook = None if head is None else head.register_forward_pre_hook(_keep_in(step))
        if self._port is not None:
            self._port.adapters = step.adapters
        try:
            out = self._model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=logits_at,
                step=step,
            )
        finally:
            if hook is not None:
                hook.remove()
            if self._port is not None:
                self._port.adapters = None
        logits: Tensor = out.logits[0]
        return logits


def _keep_in(step: StepContext) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that keeps the end of the input [1, S + num_hidden, hidden size] of the output embeddings, and passes the rest on."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        passed, kept = hidden.tensor_split((hidden.shape[1] - step.num_hidden,), dim=1)
        step.hidden = kept[0]
        return (passed, *others)

    return keep
