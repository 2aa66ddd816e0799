"""A packed file's tensors as a model's: quantised weights beside their scales, under the module's own names, in the layout that kernels read.

A file whose 4-bit codes still lie as bitsandbytes has them is rearranged on the way in. Knows names and shapes; quantises nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.engine.kernels.layout import BLOCK, kernel_layout_4bit, padded_width
from runtime.engine.model.layout import TensorSpec
from runtime.engine.model.names import Conversion, Resolution
from runtime.engine.model.safetensors_index import StoredTensor
from runtime.errors import LoadFailed

KERNEL_LAYOUT = "kernel"                 # the file's metadata "layout_4bit" says so; without it codes lie as bitsandbytes has them


class PackedTensors:
    """What a packed file holds of a model. `specs` are what its class wants, unquantised."""

    def __init__(self, specs: Sequence[TensorSpec], index: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
        self._index = index
        self._rearranged: list[tuple[TensorSpec, str, str]] = []         # wanted, names of codes and scales
        self.specs: list[TensorSpec] = []
        as_it_lies = metadata.get("layout_4bit") == KERNEL_LAYOUT
        for spec in specs:
            module, _, leaf = spec.name.rpartition(".")
            absmax, scale = f"{module}.absmax", f"{module}.scale"
            if leaf != "weight" or spec.name not in index:
                self.specs.append(spec)
            elif absmax in index and len(spec.shape) == 2 and not as_it_lies and spec.shape[1] % BLOCK == 0:
                rows, width = spec.shape[0], padded_width(spec.shape[1])
                self.specs.append(TensorSpec(spec.name, (rows, width // 2), torch.uint8, spec.layer))
                self.specs.append(TensorSpec(absmax, (rows, width // BLOCK), torch.float32, spec.layer))
                self._rearranged.append((spec, spec.name, absmax))
            elif absmax in index or scale in index:
                names = (spec.name, absmax if absmax in index else scale)
                self.specs += [TensorSpec(name, index[name].shape, index[name].dtype, spec.layer) for name in names]
            else:
                self.specs.append(spec)

    def resolve(self, aliases: Mapping[str, str]) -> Resolution:
        """Find every spec. Raises LoadFailed naming what is missing, or of another shape or type."""
        direct: dict[str, StoredTensor] = {}
        made = {name for _, codes, scales in self._rearranged for name in (codes, scales)}
        by_owner = {owner: alias for alias, owner in aliases.items()}
        for spec in self.specs:
            if spec.name in made:
                continue
            tensor = self._index.get(spec.name) or self._index.get(by_owner.get(spec.name, ""))
            if tensor is None:
                raise LoadFailed(f"the packed file is missing {spec.name}")
            if tensor.shape != spec.shape:
                raise LoadFailed(f"tensor {spec.name} has shape {list(tensor.shape)} in the packed file, the model wants {list(spec.shape)}")
            if spec.dtype.is_floating_point != tensor.dtype.is_floating_point:
                raise LoadFailed(f"tensor {spec.name} is {tensor.dtype} in the packed file, the model wants {spec.dtype}")
            direct[spec.name] = tensor
        conversions = [
            Conversion(
                codes, (codes, scales), _Rearrange(codes, scales, spec.shape), [("codes", self._index[codes]), ("scales", self._index[scales])]
            )
            for spec, codes, scales in self._rearranged
        ]
        return Resolution(direct, conversions)


class _Rearrange:
    """bitsandbytes' layout → the kernels', in the form of transformers' converters."""

    def __init__(self, codes: str, scales: str, shape: tuple[int, ...]) -> None:
        self._names = (codes, scales)
        self._shape = shape
        self._parts: dict[str, Callable[[], Tensor]] = {}

    def add_tensor(self, target: str, source: str, pattern: str, read: Callable[[], Tensor]) -> None:
        del target, source
        self._parts[pattern] = read

    def convert(self, target: str, *, model: Any, config: Any) -> dict[str, Tensor]:
        del target, model, config
        codes, scales = kernel_layout_4bit(self._parts["codes"](), self._parts["scales"](), self._shape[0], self._shape[1])
        return dict(zip(self._names, (codes, scales), strict=True))
