"""A packed file's tensors as a model's: quantised weights beside their scales, under the module's own names.

Knows names and shapes; reads no tensor and quantises nothing.
"""

from collections.abc import Mapping, Sequence

import torch

from runtime.engine.model.layout import TensorSpec
from runtime.engine.model.names import Resolution
from runtime.engine.model.safetensors_index import StoredTensor
from runtime.errors import LoadFailed

_SCALES = ("absmax", "scale")


def packed_specs(specs: Sequence[TensorSpec], index: Mapping[str, StoredTensor]) -> list[TensorSpec]:
    """`specs` with every weight that the file holds quantised replaced by what is stored: the codes and their scales."""
    found: list[TensorSpec] = []
    for spec in specs:
        module, _, leaf = spec.name.rpartition(".")
        scales = [f"{module}.{scale}" for scale in _SCALES if leaf == "weight" and f"{module}.{scale}" in index]
        if not scales or spec.name not in index:
            found.append(spec)
            continue
        found += [TensorSpec(name, index[name].shape, index[name].dtype, spec.layer) for name in (spec.name, *scales)]
    return found


def resolve_packed(specs: Sequence[TensorSpec], index: Mapping[str, StoredTensor], aliases: Mapping[str, str]) -> Resolution:
    """Find every spec by its own name. Raises LoadFailed naming what is missing or of another shape."""
    direct: dict[str, StoredTensor] = {}
    by_owner = {owner: alias for alias, owner in aliases.items()}
    for spec in specs:
        tensor = index.get(spec.name) or index.get(by_owner.get(spec.name, ""))
        if tensor is None:
            raise LoadFailed(f"the packed file is missing {spec.name}")
        if tensor.shape != spec.shape:
            raise LoadFailed(f"tensor {spec.name} has shape {list(tensor.shape)} in the packed file, the model wants {list(spec.shape)}")
        if not spec.dtype.is_floating_point and tensor.dtype is not spec.dtype and tensor.dtype is not torch.bool:
            raise LoadFailed(f"tensor {spec.name} is {tensor.dtype} in the packed file, the model wants {spec.dtype}")
        direct[spec.name] = tensor
    return Resolution(direct, [])
