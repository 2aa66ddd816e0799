"""Runs a Llama-shaped decoder with nine kernel calls per layer, from a StackSpec and named views of the weights image.

The residual is passed from layer to layer, so that each norm also adds it. Only the requested tokens' logits are computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.model_key import Quantization
from runtime.engine.kernels.norm import add_rms_norm, rms_norm
from runtime.engine.memory.weight_readiness import WeightReadiness
from runtime.engine.model.run.attention import attend, rope_write
from runtime.engine.model.run.fused_spec import LayerSpec, StackSpec
from runtime.engine.model.run.linear import AllReduce, Linear, gated, make_linear, summed
from runtime.engine.model.run.rope import RotaryTable
from runtime.engine.model.run.step import StepContext


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's spec and weights. `group` is the group of weights that must be loaded before the layer runs."""

    spec: LayerSpec
    group: int
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    input_norm: Tensor
    mlp_norm: Tensor
    after_attention_norm: Tensor | None
    after_mlp_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


class FusedStack:
    """Implements CausalForward.

    Args:
        views: every tensor of the image by name, including the joined ones.
        tables: rotary tables by layer type.
        layer_groups: as in WeightLayout.
        all_reduce: sums over the ranks of a tensor-parallel group; None = one rank.
    """

    def __init__(
        self,
        spec: StackSpec,
        views: Mapping[str, Tensor],
        tables: Mapping[str, RotaryTable],
        quantization: Quantization,
        arrival: WeightReadiness,
        layer_groups: Sequence[int],
        all_reduce: AllReduce | None = None,
    ) -> None:
        self._spec = spec
        self._tables = dict(tables)
        self._arrival = arrival
        self._embed = views[f"{spec.embed}.weight"]
        self._norm = views[f"{spec.norm}.weight"]
        self._dtype = self._norm.dtype
        # Rounded to the dtype, as in the embedding module.
        self._embed_scale = float(torch.tensor(spec.embed_scale).to(self._dtype))
        linears = dict(views)
        self._lm_head = make_linear(spec.lm_head, linears, quantization)
        self._first_group, self._last_group = layer_groups[0], layer_groups[-1]

        def weight(name: str | None) -> Tensor | None:
            return None if name is None else views[f"{name}.weight"]

        self._layers = [
            _Layer(
                spec=layer,
                group=layer_groups[index + 1],
                qkv=make_linear(layer.qkv.name, linears, quantization),
                out=summed(make_linear(layer.out.name, linears, quantization), all_reduce),
                gate_up=make_linear(layer.gate_up.name, linears, quantization),
                down=summed(make_linear(layer.down.name, linears, quantization), all_reduce),
                input_norm=views[f"{layer.input_norm}.weight"],
                mlp_norm=views[f"{layer.mlp_norm}.weight"],
                after_attention_norm=weight(layer.after_attention_norm),
                after_mlp_norm=weight(layer.after_mlp_norm),
                q_norm=weight(layer.q_norm),
                k_norm=weight(layer.k_norm),
            )
            for index, layer in enumerate(spec.layers)
        ]

    def __call__(self, input_ids: Tensor, positions: Tensor, logits_at: Tensor, step: StepContext) -> Tensor:
        spec, eps, plus_one = self._spec, self._spec.norm_eps, self._spec.norm_plus_one
        arriving = self._arrival.pending
        if arriving:
            self._arrival.wait(self._first_group)
        residual = functional.embedding(input_ids, self._embed)
        if spec.embed_scale != 1.0:
            residual.mul_(self._embed_scale)
        turns = {key: table(positions, self._dtype) for key, table in self._tables.items()}

        branch: Tensor | None = None
        for index, layer in enumerate(self._layers):
            if arriving:
                self._arrival.wait(layer.group)
            if branch is None:
                hidden = rms_norm(residual, layer.input_norm, eps, plus_one)
            else:
                hidden, residual = add_rms_norm(branch, residual, layer.input_norm, eps, plus_one)
            cos, sin = turns[layer.spec.rope_key]
            q = rope_write(
                step,
                layer.spec.attention,
                layer.spec.rope,
                layer.qkv(hidden, step.scratch),
                cos,
                sin,
                layer.q_norm,
                layer.k_norm,
            )
            mixed = attend(step, layer.spec.attention, q).flatten(1)
            if index == len(self._layers) - 1 and not step.each_samples:
                # After the last attention, tokens are independent, so only the requested ones continue.
                mixed, residual = mixed.index_select(0, logits_at), residual.index_select(0, logits_at)
            branch = self._scaled(layer.out(mixed, step.scratch), layer.after_attention_norm)
            hidden, residual = add_rms_norm(branch, residual, layer.mlp_norm, eps, plus_one)
            inner = gated(layer.gate_up, hidden, spec.activation, step.scratch)
            branch = self._scaled(layer.down(inner, step.scratch), layer.after_mlp_norm)

        if arriving:
            self._arrival.wait(self._last_group)
        assert branch is not None, "a stack has layers"
        hidden, _ = add_rms_norm(branch, residual, self._norm, eps, plus_one)
        if step.keeps_hidden:
            step.hidden = hidden
        logits = self._lm_head(hidden, step.scratch)
        if spec.logits_divisor != 1.0:
            logits.div_(spec.logits_divisor)
        if spec.logits_softcap:
            logits.div_(spec.logits_softcap).tanh_().mul_(spec.logits_softcap)
        return logits

    def _scaled(self, branch: Tensor, norm: Tensor | None) -> Tensor:
        """Apply the norm and the scale that a branch's output needs before it is added to the residual."""
        if norm is not None:
            branch = rms_norm(branch, norm, self._spec.norm_eps, self._spec.norm_plus_one)
        if self._spec.residual_scale != 1.0:
            branch = branch * self._spec.residual_scale
        return branch
