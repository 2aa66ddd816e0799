"""Reads a packed LoRA adapter against the linear layers of its base: what fits where, and why an adapter does not fit. Reads headers only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.checkpoint.safetensors_index import StoredTensor, read_index, read_metadata
from runtime.errors import LoadFailed

_FORMAT = "repertory-adapter-1"
_PADDING = "_padding."
_MAX_NAMES_SHOWN = 4
# Each expert sees some of a step's tokens only, so its inputs cannot be matched with the tokens' adapters.
_ROUTED = "experts"


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """A linear layer of a base that adapters may change, by its module path."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """A packed adapter as it will lie in memory: `size_bytes` of its file, from `offset` on.

    Attributes:
        places: [targets, 3] int64: the elements, from the image's beginning, at which A and B begin, and the rank; 0 = the target is left alone.
        digest: equal for adapters of equal content.
        rank: the largest before padding, or with it in a file that does not say.
    """

    path: str
    offset: int
    size_bytes: int
    places: Tensor
    digest: str
    rank: int
    num_parameters: int


def adapter_targets(model: Any, first: Sequence[str] = ()) -> tuple[AdapterTarget, ...]:
    """Return the linear layers that adapters may change, those named in `first` first, in that order.

    The output projection is none: a packed step computes it for some tokens only.
    """
    head = model.get_output_embeddings()
    linears = {
        name: AdapterTarget(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and _ROUTED not in name.split(".")
    }
    names = [*first, *(name for name in linears if name not in set(first))]
    return tuple(linears[name] for name in names)


def read_adapter(path: str, targets: Sequence[AdapterTarget], dtype: torch.dtype, max_rank: int) -> AdapterImage:
    """Find the place of every tensor of a packed adapter. Raises LoadFailed naming the tensor that does not fit the base."""
    metadata = read_metadata(path)
    if metadata.get("format") != _FORMAT:
        raise LoadFailed(f"{path} is not a packed adapter of this version")
    index = read_index((path,))
    stored = {name: tensor for name, tensor in index.items() if not name.startswith(_PADDING)}
    if not stored:
        raise LoadFailed(f"{path} has no tensors")
    start = min(tensor.offset for tensor in index.values())
    numbers = {target.name: number for number, target in enumerate(targets)}
    places = torch.zeros((len(targets), 3), dtype=torch.int64)
    rank = 0
    for module in {name.rpartition(".")[0]: None for name in stored}:
        number = numbers.get(module)
        if number is None:
            raise LoadFailed(_unknown(module, targets))
        target = targets[number]
        a, b = stored.get(f"{module}.lora_A"), stored.get(f"{module}.lora_B")
        if a is None or b is None:
            raise LoadFailed(f"{path} is damaged: module {module} has one matrix of two")
        own_rank = a.shape[0]
        if a.shape != (own_rank, target.in_features) or b.shape != (target.out_features, own_rank):
            raise LoadFailed(
                f"the adapter has matrices of {a.shape[1]} inputs and {b.shape[0]} outputs for {module}; "
                f"the base has {target.in_features} and {target.out_features}: it was trained on another base"
            )
        if own_rank > max_rank:
            raise LoadFailed(f"{module} has rank {own_rank}, the limit is {max_rank}", limit=max_rank, value=own_rank)
        places[number] = torch.tensor((_element(a, start, dtype), _element(b, start, dtype), own_rank))
        rank = max(rank, own_rank)
    end = max(tensor.offset + tensor.size_bytes for tensor in index.values())
    num_parameters = sum(tensor.shape[0] * tensor.shape[1] for tensor in stored.values())
    rank = int(metadata.get("rank", rank))
    return AdapterImage(path, start, end - start, places, metadata.get("content_blake2b", ""), rank, num_parameters)


def _element(tensor: StoredTensor, start: int, dtype: torch.dtype) -> int:
    if tensor.dtype is not dtype:
        raise LoadFailed(f"tensor {tensor.name} is {tensor.dtype} in the packed adapter, the base computes in {dtype}")
    element, rest = divmod(tensor.offset - start, 256)
    if rest:
        raise LoadFailed(f"{tensor.path} is damaged: tensor {tensor.name} does not begin at a multiple of 256 bytes")
    return element * 256 // dtype.itemsize


def _unknown(module: str, targets: Sequence[AdapterTarget]) -> str:
    if module.endswith(("lm_head", "embed_out")):
        return f"the adapter changes {module}, the output projection, which is not supported"
    shown = ", ".join(target.name for target in targets[:_MAX_NAMES_SHOWN])
    return f"the adapter changes {module}, which is not a linear layer of the base that adapters may change; those begin with {shown}"
