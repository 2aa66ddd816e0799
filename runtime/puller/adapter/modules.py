"""Pairs the tensors of a PEFT adapter by the linear module that they adapt. Every tensor belongs to a pair, or the adapter is refused by name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import LoadFailed
from runtime.puller.adapter.config import AdapterConfig
from runtime.puller.sizing import TensorShape

# The matrix unit multiplies at least 16 × 16, so smaller ranks are padded with zeros.
LEAST_RANK = 16
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_NAME_LENGTH = 256
_MAX_FEATURES = 1 << 20  # a matrix is packed in memory, and no base has a layer as wide
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Endings of tensors that other kinds of adapters have, with what they are.
_KNOWN = (
    (".lora_magnitude_vector", "belongs to DoRA"),
    (".lora_magnitude_vector.weight", "belongs to DoRA"),
    (".lora_A.bias", "is a bias of lora_bias"),
    (".lora_B.bias", "is a bias of lora_bias"),
    (".lora_embedding_A", "adapts an embedding"),
    (".lora_embedding_B", "adapts an embedding"),
    (".base_layer.weight", "is a copy of a whole layer of the base (save_embedding_layers)"),
    (".trainable_tokens_delta", "changes token embeddings"),
    (".bias", "is a bias of the base"),
    (".weight", "is a whole weight of the base (modules_to_save)"),
)


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One linear module of the base and its pair: y += scaling · B · A · x, with A [rank, in_features] and B [out_features, rank].

    `a` and `b` are the names of the tensors in the file.
    """

    module: str
    rank: int
    in_features: int
    out_features: int
    scaling: float
    a: str
    b: str

    @property
    def padded_rank(self) -> int:
        """The rank as it is packed: a power of two from LEAST_RANK on."""
        return max(LEAST_RANK, 1 << (self.rank - 1).bit_length())


def pair_tensors(tensors: Sequence[TensorShape], config: AdapterConfig, max_rank: int) -> list[AdaptedModule]:
    """Return the adapted modules, in the order of their names, numbers by value. Raises LoadFailed naming the first tensor that does not fit."""
    sides: dict[str, dict[str, TensorShape]] = {}
    for tensor in tensors:
        module, side = _place(tensor.name)
        if tensor.dtype not in _FLOATS:
            raise LoadFailed(f"tensor {tensor.name} is of type {tensor.dtype}; one of {', '.join(_FLOATS)} is needed")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise LoadFailed(f"tensor {tensor.name} has shape {list(tensor.shape)}; a matrix is needed")
        if side in sides.setdefault(module, {}):
            raise LoadFailed(f"tensor {tensor.name} is a second lora_{side} of {module}")
        sides[module][side] = tensor
    if not sides:
        raise LoadFailed("the adapter has no tensors")
    return [_paired(module, sides[module], config, max_rank) for module in sorted(sides, key=_natural_order)]


def packed_bytes(modules: Sequence[AdaptedModule], dtype_bytes: int, alignment_bytes: int) -> int:
    """Return the size of the packed matrices, each of which begins at a multiple of `alignment_bytes`."""
    sizes = [
        module.padded_rank * features * dtype_bytes
        for module in modules
        for features in (module.in_features, module.out_features)
    ]
    return sum(-(-size // alignment_bytes) * alignment_bytes for size in sizes)


def _place(name: str) -> tuple[str, str]:
    """Return the module and the side, A or B, of a tensor."""
    if len(name) > _MAX_NAME_LENGTH:
        raise LoadFailed(f"tensor {name[:60]}… has a name of {len(name)} characters, the limit is {_MAX_NAME_LENGTH}")
    found = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
    if found is None:
        what = next((text for ending, text in _KNOWN if name.endswith(ending)), "is not a matrix of a LoRA")
        raise LoadFailed(f"tensor {name} {what}, which is not supported: every tensor of an adapter must be used")
    return found["module"], found["side"]


def _paired(module: str, sides: "dict[str, TensorShape]", config: AdapterConfig, max_rank: int) -> AdaptedModule:
    for side in ("A", "B"):
        if side not in sides:
            raise LoadFailed(f"module {module} has no lora_{side}")
    (rank, in_features), (out_features, columns) = sides["A"].shape, sides["B"].shape
    if rank != columns:
        raise LoadFailed(f"module {module} has a lora_A of rank {rank} and a lora_B of rank {columns}")
    if rank > max_rank:
        raise LoadFailed(
            f"module {module} has rank {rank}, the limit is {max_rank}; raise max_adapter_rank",
            limit=max_rank,
            value=rank,
        )
    if max(in_features, out_features) > _MAX_FEATURES:
        raise LoadFailed(
            f"module {module} has {in_features} inputs and {out_features} outputs, the limit is {_MAX_FEATURES}",
            limit=_MAX_FEATURES,
            value=max(in_features, out_features),
        )
    if rank != config.rank_of(module):
        raise LoadFailed(
            f"module {module} has rank {rank} in the file and {config.rank_of(module)} by adapter_config.json"
        )
    return AdaptedModule(
        module, rank, in_features, out_features, config.scaling_of(module), sides["A"].name, sides["B"].name
    )


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
