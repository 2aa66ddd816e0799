"""Runs a Llama-shaped decoder with nine kernel calls per layer, from a StackSpec and named views of the weights image.

The residual is passed from layer to layer, so that each norm also adds it. Only the requested tokens' logits are computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from common.model_key import Quantization
from runtime.checkpoint.adapter_layout import AdapterTarget
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.norm import rms_norm
from runtime.engine.kernels.quantized_rows import QuantizedRows
from runtime.engine.memory.weight_readiness import WeightReadiness
from runtime.engine.model.run.adapters import AdapterSite, StepAdapters
from runtime.engine.model.run.attention import attend, rope_write
from runtime.engine.model.run.collectives import Collectives
from runtime.engine.model.run.fused_spec import HeadPart, LayerSpec, LinearRef, StackSpec
from runtime.engine.model.run.layer_inputs import gated, input_codes, normed, product
from runtime.engine.model.run.linear import Linear, SplitLinear, make_linear
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
    sites: "_Sites | None"


@dataclass(frozen=True, slots=True)
class _Sites:
    """Where adapters change a layer."""

    qkv: AdapterSite
    out: AdapterSite
    gate_up: AdapterSite
    down: AdapterSite


class FusedStack:
    """Implements CausalForward.

    Args:
        views: every tensor of the image by name, including the joined ones.
        tables: rotary tables by layer type.
        layer_groups: as in WeightLayout.
        ranks: joins what the ranks of a tensor-parallel group compute; None = one rank.
        targets: the layers' linear modules, as adapters number them; empty = the stack takes no adapters.
        head: this rank's part of the output projection; None = all of it.
    """

    def __init__(
        self,
        spec: StackSpec,
        views: Mapping[str, Tensor],
        tables: Mapping[str, RotaryTable],
        quantization: Quantization,
        arrival: WeightReadiness,
        layer_groups: Sequence[int],
        ranks: Collectives | None = None,
        targets: Sequence[AdapterTarget] = (),
        head: HeadPart | None = None,
    ) -> None:
        self._spec = spec
        self._tables = dict(tables)
        self._arrival = arrival
        self._ranks = ranks
        self._embed = views[f"{spec.embed}.weight"]
        self._norm = views[f"{spec.norm}.weight"]
        self._dtype = self._norm.dtype
        # Rounded to the dtype, as in the embedding module.
        self._embed_scale = float(torch.tensor(spec.embed_scale).to(self._dtype))
        self._head = head
        linears = {**views, **_head_rows(spec, views, head)}
        self._lm_head = make_linear(spec.lm_head, linears, quantization)
        self._first_group, self._last_group = layer_groups[0], layer_groups[-1]

        def weight(name: str | None) -> Tensor | None:
            return None if name is None else views[f"{name}.weight"]

        def linear(ref: LinearRef) -> Linear:
            if f"{ref.name}.weight" in linears:
                return make_linear(ref.name, linears, quantization)
            return SplitLinear(tuple(make_linear(member, linears, quantization) for member in ref.members))

        self._layers = [
            _Layer(
                spec=layer,
                group=layer_groups[index + 1],
                qkv=linear(layer.qkv),
                out=linear(layer.out),
                gate_up=linear(layer.gate_up),
                down=linear(layer.down),
                input_norm=views[f"{layer.input_norm}.weight"],
                mlp_norm=views[f"{layer.mlp_norm}.weight"],
                after_attention_norm=weight(layer.after_attention_norm),
                after_mlp_norm=weight(layer.after_mlp_norm),
                q_norm=weight(layer.q_norm),
                k_norm=weight(layer.k_norm),
                sites=_sites(layer, targets) if targets else None,
            )
            for index, layer in enumerate(spec.layers)
        ]

    def __call__(self, input_ids: Tensor, positions: Tensor, logits_at: Tensor, step: StepContext) -> Tensor:
        spec = self._spec
        arriving = self._arrival.pending
        if arriving:
            self._arrival.wait(self._first_group)
        residual = functional.embedding(input_ids, self._embed)
        if spec.embed_scale != 1.0:
            residual.mul_(self._embed_scale)
        turns = {key: table(positions, self._dtype) for key, table in self._tables.items()}

        adapters = step.adapters
        part: Tensor | None = None  # this rank's part of the last output, which is not in the residual yet
        after: Tensor | None = None  # the norm of the sum of all parts
        are_selected = step.each_samples
        for index, layer in enumerate(self._layers):
            if arriving:
                self._arrival.wait(layer.group)
            # Adapters read what the layers read, before it is quantised.
            qkv_codes, gate_up_codes, down_codes = (
                None if adapters is not None else input_codes(linear)
                for linear in (layer.qkv, layer.gate_up, layer.down)
            )
            hidden, residual = self._added(part, after, residual, layer.input_norm, qkv_codes)
            cos, sin = turns[layer.spec.rope_key]
            q = rope_write(
                step,
                layer.spec.attention,
                layer.spec.rope,
                _product(step, adapters, layer.qkv, layer.sites, "qkv", hidden),
                cos,
                sin,
                layer.q_norm,
                layer.k_norm,
            )
            mixed = attend(step, layer.spec.attention, q).flatten(1)
            may_select = adapters is None or adapters.of_samples is not None
            if index == len(self._layers) - 1 and not step.each_samples and may_select:
                # After the last attention, tokens are independent, so only the requested ones continue.
                mixed, residual = mixed.index_select(0, logits_at), residual.index_select(0, logits_at)
                adapters = None if adapters is None else adapters.of_samples
                are_selected = True
            out = _product(step, adapters, layer.out, layer.sites, "out", mixed)
            hidden, residual = self._added(out, layer.after_attention_norm, residual, layer.mlp_norm, gate_up_codes)
            inner = _gated(step, adapters, layer, hidden, spec.activation, down_codes)
            part = _product(step, adapters, layer.down, layer.sites, "down", inner)
            after = layer.after_mlp_norm

        if arriving:
            self._arrival.wait(self._last_group)
        assert part is not None, "a stack has layers"
        if not are_selected:
            part, residual = part.index_select(0, logits_at), residual.index_select(0, logits_at)
        last, _ = self._added(part, after, residual, self._norm, None)
        assert isinstance(last, Tensor), "it is not quantised"
        if step.num_hidden:
            last, step.hidden = last.tensor_split((len(last) - step.num_hidden,))
        logits = self._of_all_tokens(self._lm_head(last, step.scratch))
        if spec.logits_divisor != 1.0:
            logits.div_(spec.logits_divisor)
        if spec.logits_softcap:
            logits.div_(spec.logits_softcap).tanh_().mul_(spec.logits_softcap)
        return logits

    def _added(
        self,
        part: Tensor | None,
        after: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        codes: torch.dtype | None,
    ) -> tuple[Tensor | QuantizedRows, Tensor]:
        """Add a branch's output, of which each rank has a part, to `residual` in place, and normalise the sum. Returns (normed, residual).

        `after`: the norm of the branch's output before it is added. `codes`: as in `normed`.
        """
        eps, plus_one = self._spec.norm_eps, self._spec.norm_plus_one
        if part is None:
            return normed(None, residual, weight, eps, plus_one, codes)
        if self._ranks is None:
            return normed(self._scaled(part, after), residual, weight, eps, plus_one, codes)
        if after is None and self._spec.residual_scale == 1.0 and codes is None:
            return self._ranks.add_rms_norm(part, residual, weight, eps, plus_one)
        return normed(self._scaled(self._ranks.all_reduce(part), after), residual, weight, eps, plus_one, codes)

    def _of_all_tokens(self, part: Tensor) -> Tensor:
        """Return the logits of all tokens from those that this rank computes. They are the same bits on all ranks, so that each draws the same tokens."""
        if self._head is None:
            return part
        if self._ranks is None:  # a warmup, which runs on one rank alone
            return functional.pad(part, (self._head.start, self._head.size - self._head.start - self._head.length))
        return self._ranks.gather(part, self._head.size)

    def _scaled(self, branch: Tensor, norm: Tensor | None) -> Tensor:
        """Apply the norm and the scale that a branch's output needs before it is added to the residual."""
        if norm is not None:
            branch = rms_norm(branch, norm, self._spec.norm_eps, self._spec.norm_plus_one)
        if self._spec.residual_scale != 1.0:
            branch = branch * self._spec.residual_scale
        return branch


def _head_rows(spec: StackSpec, views: Mapping[str, Tensor], head: HeadPart | None) -> dict[str, Tensor]:
    """Return this rank's rows of an output projection that is stored whole, because it is tied to the embeddings."""
    if head is None or len(views[f"{spec.lm_head}.weight"]) == head.length:
        return {}
    names = [name for name in (f"{spec.lm_head}.weight", f"{spec.lm_head}.bias") if name in views]
    return {name: views[name].narrow(0, head.start, head.length) for name in names}


def _product(
    step: StepContext,
    adapters: StepAdapters | None,
    linear: Linear,
    sites: _Sites | None,
    group: Literal["qkv", "out", "down"],
    x: Tensor | QuantizedRows,
) -> Tensor:
    """Return the output of one group of a layer, with that of the step's adapters."""
    if adapters is None:
        return product(linear, x, step.scratch)
    assert sites is not None, "the stack was built without adapters"
    assert isinstance(x, Tensor), "adapters take activations that are not quantised"
    return adapters.around(getattr(sites, group), x, lambda: linear(x, step.scratch), step.scratch)


def _gated(
    step: StepContext,
    adapters: StepAdapters | None,
    layer: _Layer,
    x: Tensor | QuantizedRows,
    activation: Activation,
    codes: torch.dtype | None,
) -> Tensor | QuantizedRows:
    """Return act(gate) × up of a layer, with the outputs of the step's adapters. `codes`: as in `gated`."""
    if adapters is None:
        return gated(layer.gate_up, x, activation, codes, step.scratch)
    assert layer.sites is not None, "the stack was built without adapters"
    assert isinstance(x, Tensor), "adapters take activations that are not quantised"
    return adapters.around_gated(
        layer.sites.gate_up, x, lambda: layer.gate_up(x, step.scratch), activation, step.scratch
    )


def _sites(layer: LayerSpec, targets: Sequence[AdapterTarget]) -> _Sites:
    numbers = {target.name: number for number, target in enumerate(targets)}

    def site(ref: LinearRef) -> AdapterSite:
        first = numbers[ref.members[0]]
        members = targets[first : first + len(ref.members)]
        assert tuple(target.name for target in members) == ref.members, "members are neighbours"
        return AdapterSite(first, tuple(target.out_features for target in members))

    return _Sites(site(layer.qkv), site(layer.out), site(layer.gate_up), site(layer.down))
