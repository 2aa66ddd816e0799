"""Describes a fused decoder stack as data: which named weights play which role, and the numbers that differ between
model families.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from runtime.checkpoint.quantized_shapes import SCALE_NAMES
from runtime.checkpoint.weight_layout import Join, TensorSpec
from runtime.engine.kernels.activation import Activation
from runtime.engine.model.run.step import AttentionSpec, RopeSpec

_SUFFIXES = ("weight", *SCALE_NAMES, "bias")


@dataclass(frozen=True, slots=True)
class LinearRef:
    """A matrix, by its module path. Several `members` are sibling modules that are stored end to end under `name`."""

    name: str
    members: tuple[str, ...]

    @classmethod
    def single(cls, name: str) -> "LinearRef":
        return cls(name, (name,))

    def joins(self, stored: Mapping[str, TensorSpec | Tensor]) -> list[Join]:
        """Return the tensors that must be stored end to end, given all stored tensors by name.

        None if the members are stored in different formats, as in some GGUF files.
        """
        if len(self.members) == 1:
            return []
        found = []
        for suffix in _SUFFIXES:
            names = tuple(f"{member}.{suffix}" for member in self.members)
            specs = [stored.get(name) for name in names]
            if len({None if spec is None else (spec.dtype, spec.shape[1:]) for spec in specs}) > 1:
                return []
            if specs[0] is not None:
                found.append(Join(f"{self.name}.{suffix}", names))
        return found


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. Norms are module paths.

    The two `after_…` norms are Gemma's: they apply to a branch's output before it is added to the residual.
    """

    attention: AttentionSpec
    rope: RopeSpec
    rope_key: str
    qkv: LinearRef
    out: LinearRef
    gate_up: LinearRef
    down: LinearRef
    input_norm: str
    mlp_norm: str
    after_attention_norm: str | None = None
    after_mlp_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True, slots=True)
class HeadPart:
    """The tokens whose logits one rank computes: `length` of them from `start` on, of `size` in the vocabulary."""

    start: int
    length: int
    size: int


@dataclass(frozen=True, slots=True)
class StackSpec:
    """A whole stack: embed · embed_scale → layers → norm → lm_head / logits_divisor → softcap.

    Branches are scaled by `residual_scale` before they are added to the residual.
    """

    embed: str
    norm: str
    lm_head: str
    rotary: str
    layers: tuple[LayerSpec, ...]
    activation: Activation
    norm_eps: float
    norm_plus_one: bool
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0

    def linears(self) -> list[str]:
        """Return the module paths of the layers' matrices, those that are stored end to end as neighbours."""
        return [
            member
            for layer in self.layers
            for ref in (layer.qkv, layer.out, layer.gate_up, layer.down)
            for member in ref.members
        ]

    def joins(self, stored: Mapping[str, TensorSpec | Tensor]) -> list[Join]:
        """Return the joins of all layers, given all stored tensors by name."""
        return [join for layer in self.layers for ref in (layer.qkv, layer.gate_up) for join in ref.joins(stored)]
