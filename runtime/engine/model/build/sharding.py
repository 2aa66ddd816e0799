"""Cuts the tensors of a checkpoint for one rank of a tensor-parallel group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint.adapter_layout import Channels
from runtime.checkpoint.name_mapping import Conversion, Resolution
from runtime.checkpoint.quantized_shapes import GROUP
from runtime.checkpoint.weight_layout import TensorSpec
from runtime.engine.model.run.fused_spec import StackSpec
from runtime.engine.parallel.shard import Shard
from runtime.errors import LoadFailed


@dataclass(frozen=True, slots=True)
class Cut:
    """Parts of a tensor along `dim`, as (start, length), end to end. `is_zero`: another rank has the tensor's values."""

    dim: int
    ranges: tuple[tuple[int, int], ...] = ()
    is_zero: bool = False

    def apply(self, tensor: Tensor) -> Tensor:
        if self.is_zero:
            return torch.zeros_like(tensor)
        return torch.cat([tensor.narrow(self.dim, start, length) for start, length in self.ranges], self.dim)

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the cut of a tensor of shape `full`."""
        if self.is_zero:
            return full
        return (*full[: self.dim], sum(length for _, length in self.ranges), *full[self.dim + 1 :])


class TensorCuts:
    """Decides how one rank cuts each tensor of a fused stack.

    `full` and `local` describe the same stack, undivided and for this rank.
    """

    def __init__(self, full: StackSpec, local: StackSpec, inner: tuple[int, int], shard: Shard) -> None:
        """`inner`: channels of the MLP, undivided and of this rank."""
        self._shard = shard
        self._head = full.lm_head
        self._outputs: dict[str, tuple[tuple[int, int], ...]] = {}
        self._inputs: dict[str, tuple[int, int]] = {}
        for whole, part in zip(full.layers, local.layers, strict=True):
            heads = [
                (a * whole.attention.head_dim, b * part.attention.head_dim)
                for a, b in (
                    (whole.attention.num_q_heads, part.attention.num_q_heads),
                    (whole.attention.num_kv_heads, part.attention.num_kv_heads),
                    (whole.attention.num_kv_heads, part.attention.num_kv_heads),
                )
            ]
            self._divide_outputs(whole.qkv.members, heads)
            self._divide_outputs(whole.gate_up.members, [inner, inner])
            self._inputs[whole.out.name] = heads[0]
            self._inputs[whole.down.name] = inner

    def cut(self, spec: TensorSpec, packed: bool) -> Cut | None:
        """Return the cut of a stored tensor, None if every rank has it whole. Raises LoadFailed if its blocks cannot be divided.

        `packed`: the tensor is a quantised weight or its scales.
        """
        module, _, leaf = spec.name.rpartition(".")
        if module == self._head:
            return None if packed else Cut(0, (self._shard.slice_of(spec.shape[0]),))
        if module in self._outputs:
            return Cut(0, self._ranges(self._outputs[module]))
        if module not in self._inputs:
            return None
        if leaf == "bias":
            return Cut(0, is_zero=True) if self._shard.rank else None
        if leaf == "scale":  # one per output
            return None
        full, local = self._inputs[module]
        width = spec.shape[1]
        if packed and width != full and local % GROUP:
            raise LoadFailed(
                f"{module} has {local} inputs per device, which blocks of {GROUP} 4-bit weights do not divide"
            )
        start, length = self._shard.part_of(full, local)
        return Cut(1, ((start * width // full, length * width // full),))

    def channels(self, module: str, inputs: int, outputs: int) -> tuple[Channels, Channels]:
        """Return the inputs and outputs that this rank has of a linear layer with `inputs` and `outputs` in total."""
        local_inputs, local_outputs = Channels.whole(inputs), Channels.whole(outputs)
        if module in self._outputs:
            local_outputs = Channels(outputs, self._ranges(self._outputs[module]))
        if module in self._inputs:
            local_inputs = Channels(inputs, (self._shard.part_of(*self._inputs[module]),))
        return local_inputs, local_outputs

    def _divide_outputs(self, members: tuple[str, ...], parts: list[tuple[int, int]]) -> None:
        """Divide the outputs of parts that share one module, or have one each."""
        if len(members) == 1:
            self._outputs[members[0]] = tuple(parts)
        else:
            self._outputs |= {name: (part,) for name, part in zip(members, parts, strict=True)}

    def _ranges(self, parts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        ranges, at = [], 0
        for full, local in parts:
            start, length = self._shard.part_of(full, local)
            ranges.append((at + start, length))
            at += full
        return tuple(ranges)


def cut_tensors(
    specs: Sequence[TensorSpec], resolution: Resolution, cuts: TensorCuts, quantised: set[str]
) -> tuple[list[TensorSpec], Resolution]:
    """Return the specs and sources of one rank's tensors. `quantised`: modules whose weights are stored quantised."""
    chosen = {spec.name: cuts.cut(spec, spec.name.rpartition(".")[0] in quantised) for spec in specs}
    made = {name: cut for name, cut in chosen.items() if cut is not None}
    local = [
        TensorSpec(spec.name, made[spec.name].shape(spec.shape), spec.dtype, spec.layer) if spec.name in made else spec
        for spec in specs
    ]
    direct = {name: stored for name, stored in resolution.direct.items() if name not in made}
    conversions = [
        Conversion(one.first_target, one.targets, _CutAfter(one.converter, made), one.sources)
        for one in resolution.conversions
    ]
    conversions += [
        Conversion(name, (name,), _CutWhole(made[name]), [("whole", stored)])
        for name, stored in resolution.direct.items()
        if name in made
    ]
    return local, Resolution(direct, conversions)


class _CutWhole:
    """Reads a tensor and cuts it, in the form of transformers' converters."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._read: Callable[[], Tensor] | None = None

    def add_tensor(self, target: str, source: str, pattern: str, read: Callable[[], Tensor]) -> None:
        del target, source, pattern
        self._read = read

    def convert(self, target: str, *, model: Any, config: Any) -> dict[str, Tensor]:
        del model, config
        assert self._read is not None, "a conversion has a source"
        return {target: self._cut.apply(self._read())}


class _CutAfter:
    """Cuts what another converter makes."""

    def __init__(self, inner: Any, cuts: Mapping[str, Cut]) -> None:
        self._inner = inner
        self._cuts = cuts

    def add_tensor(self, target: str, source: str, pattern: str, read: Callable[[], Tensor]) -> None:
        self._inner.add_tensor(target, source, pattern, read)

    def convert(self, target: str, *, model: Any, config: Any) -> dict[str, Tensor]:
        made: Mapping[str, Tensor | list[Tensor]] = self._inner.convert(target, model=model, config=config)
        whole = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {name: self._cuts[name].apply(value) if name in self._cuts else value for name, value in whole.items()}
