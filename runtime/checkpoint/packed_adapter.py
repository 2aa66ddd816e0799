"""Reads a packed LoRA adapter against the linear layers of its base: what fits where, and why an adapter does not fit. Reads headers only."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.checkpoint.adapter_layout import AdapterTarget, Channels, ImageLayout, Span, cut_text
from runtime.checkpoint.safetensors_index import StoredTensor, read_index, read_metadata
from runtime.errors import LoadFailed

_FORMAT = "repertory-adapter-1"
_PADDING = "_padding."
_MAX_NAMES_SHOWN = 4
# Each expert sees some of a step's tokens only, so its inputs cannot be matched with the tokens' adapters.
_ROUTED = "experts"


ChannelsOf = Callable[[str, int, int], tuple[Channels, Channels]]
"""Returns the inputs and outputs that this device has of a linear layer, given its path and its whole numbers of inputs and outputs."""


def all_channels(name: str, inputs: int, outputs: int) -> tuple[Channels, Channels]:
    """Give this device every channel. A ChannelsOf."""
    del name
    return Channels.whole(inputs), Channels.whole(outputs)


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """A packed adapter as it will lie in memory, in `size_bytes`.

    Attributes:
        spans: the byte ranges to read from the file, and where they lie in the image.
        places: [targets, 3] int64: the elements, from the image's beginning, at which A and B begin, and the rank; 0 = the target is left alone.
        digest: equal for images of equal content.
        rank: the largest rank before padding; in older files, after padding.
    """

    path: str
    spans: tuple[Span, ...]
    size_bytes: int
    places: Tensor
    digest: str
    rank: int
    num_parameters: int


def adapter_targets(
    model: Any, first: Sequence[str] = (), channels_of: ChannelsOf = all_channels
) -> tuple[AdapterTarget, ...]:
    """Return the linear layers of a whole model that adapters may change, those named in `first` first, in that order.

    The output projection is none: a packed step computes it for some tokens only.
    """
    head = model.get_output_embeddings()
    linears = {
        name: AdapterTarget(name, *channels_of(name, module.in_features, module.out_features))
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
    stored = {name: tensor for name, tensor in read_index((path,)).items() if not name.startswith(_PADDING)}
    if not stored:
        raise LoadFailed(f"{path} has no tensors")
    numbers = {target.name: number for number, target in enumerate(targets)}
    places = torch.zeros((len(targets), 3), dtype=torch.int64)
    layout, rank = ImageLayout(), 0
    for module in {name.rpartition(".")[0]: None for name in stored}:
        number = numbers.get(module)
        if number is None:
            raise LoadFailed(_unknown(module, targets))
        a, b = stored.get(f"{module}.lora_A"), stored.get(f"{module}.lora_B")
        if a is None or b is None:
            raise LoadFailed(f"{path} is damaged: module {module} has one matrix of two")
        own_rank = _check_pair(module, a, b, targets[number], dtype, max_rank)
        a_at, b_at = layout.add_columns(a, targets[number].inputs), layout.add_rows(b, targets[number].outputs)
        places[number] = torch.tensor((a_at // dtype.itemsize, b_at // dtype.itemsize, own_rank))
        rank = max(rank, own_rank)
    return AdapterImage(
        path,
        tuple(layout.spans),
        layout.size_bytes,
        places,
        _digest(metadata, targets),
        int(metadata.get("rank", rank)),
        sum(tensor.shape[0] * tensor.shape[1] for tensor in stored.values()),
    )


def _check_pair(
    module: str, a: StoredTensor, b: StoredTensor, target: AdapterTarget, dtype: torch.dtype, max_rank: int
) -> int:
    """Return the rank of a module's matrices. Raises LoadFailed if they do not fit the base."""
    rank, inputs, outputs = a.shape[0], target.inputs.full, target.outputs.full
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise LoadFailed(
            f"the adapter has matrices of {a.shape[1]} inputs and {b.shape[0]} outputs for {module}; "
            f"the base has {inputs} and {outputs}: it was trained on another base"
        )
    if rank > max_rank:
        raise LoadFailed(f"{module} has rank {rank}, the limit is {max_rank}", limit=max_rank, value=rank)
    for tensor in (a, b):
        if tensor.dtype is not dtype:
            raise LoadFailed(
                f"tensor {tensor.name} is {tensor.dtype} in the packed adapter, the base computes in {dtype}"
            )
    return rank


def _digest(metadata: Mapping[str, str], targets: Sequence[AdapterTarget]) -> str:
    content, cut = metadata.get("content_blake2b", ""), cut_text(targets)
    return f"{content} {hashlib.blake2b(cut.encode(), digest_size=16).hexdigest()}" if cut else content


def _unknown(module: str, targets: Sequence[AdapterTarget]) -> str:
    if module.endswith(("lm_head", "embed_out")):
        return f"the adapter changes {module}, the output projection, which is not supported"
    shown = ", ".join(target.name for target in targets[:_MAX_NAMES_SHOWN])
    return f"the adapter changes {module}, which is not a linear layer of the base that adapters may change; those begin with {shown}"
