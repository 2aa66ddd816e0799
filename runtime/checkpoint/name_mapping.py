"""Maps a checkpoint's tensor names to a module's, by transformers' renamings and conversions, prefixes and ties. Reports missing and unexpected names."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from runtime.checkpoint.safetensors_index import StoredTensor
from runtime.checkpoint.weight_layout import TensorSpec
from runtime.errors import LoadFailed

_LISTED = 5  # names in an error message


@dataclass(slots=True)
class Conversion:
    """Tensors that only come about by an operation of transformers' (stacking experts, splitting a fused matrix, …).

    `sources`: (pattern, tensor) in the order that the operation wants. `targets`: the module's names that it brings.
    """

    first_target: str
    targets: tuple[str, ...]
    converter: Any
    sources: list[tuple[str, StoredTensor]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where each tensor of a module comes from."""

    direct: Mapping[str, StoredTensor]
    conversions: Sequence[Conversion]


def resolve(
    model: Any, specs: Sequence[TensorSpec], index: Mapping[str, StoredTensor], aliases: Mapping[str, str]
) -> Resolution:
    """Find every spec's source among a checkpoint's own names. Raises LoadFailed naming what is missing, unexpected or of another shape."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    shapes = {spec.name: spec.shape for spec in specs}
    known = model.state_dict()

    direct: dict[str, StoredTensor] = {}
    conversions: dict[str, Conversion] = {}
    unexpected = []
    for key in sorted(index, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name not in known:
            if not _ignored(name, key, model):
                unexpected.append(key)
        elif pattern is not None:
            if name not in conversions:
                converter = deepcopy(by_pattern[pattern])
                first, *others = converter.target_patterns
                targets = (name, *(name.replace(first, other) for other in others))
                conversions[name] = Conversion(name, targets, converter)
            conversions[name].sources.append((pattern, index[key]))
        elif name in aliases:
            direct.setdefault(
                aliases[name], index[key]
            )  # the file may name a tied tensor by either of its names, or by both
        else:
            direct[name] = index[key]

    converted = {target for conversion in conversions.values() for target in conversion.targets}
    missing = [name for name in shapes if name not in direct and name not in converted]
    if missing or unexpected:
        problems = [
            f"{what} {_some(names)}"
            for what, names in (("is missing", missing), ("has unexpected", unexpected))
            if names
        ]
        raise LoadFailed(f"the checkpoint {' and '.join(problems)}")
    for name, tensor in direct.items():
        if tensor.shape != shapes[name]:
            raise LoadFailed(
                f"tensor {name} has shape {list(tensor.shape)} in the checkpoint, the model wants {list(shapes[name])}"
            )
    return Resolution(direct, list(conversions.values()))


def _ignored(name: str, key: str, model: nn.Module) -> bool:
    """Tensors that checkpoints carry without need: what the class says, and computed buffers that older files stored."""
    patterns: set[str] = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    computed = {buffer for buffer, _ in model.named_buffers()}
    return name in computed or "rotary_emb.inv_freq" in key or any(re.search(pattern, key) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Numbers in names by value, so that expert 10 comes after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
