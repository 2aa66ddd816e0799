"""A packed file's tensors as a model's: quantised weights beside their scales, under the module's own names, in the layout that the device reads.

4-bit codes lie as our GPU kernels want them, or as the CPU does: in bitsandbytes' layout, or in GGUF's own if they are of its blocks. A file of the
other kind is rearranged on the way in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.checkpoint.layout_4bit import bitsandbytes_layout_4bit, gguf_layout, kernel_layout_4bit
from runtime.checkpoint.name_mapping import Conversion, Resolution
from runtime.checkpoint.quantized_shapes import BLOCK, GGUF_BLOCK, KEPT_BLOCKS, padded_width
from runtime.checkpoint.safetensors_index import StoredTensor
from runtime.checkpoint.weight_layout import TensorSpec
from runtime.errors import LoadFailed

Layout4Bit = Literal["kernel", "bitsandbytes"]
KERNEL_LAYOUT: Layout4Bit = "kernel"  # the file's metadata "layout_4bit"; without it codes lie as bitsandbytes has them


class PackedTensors:
    """What a packed file holds of a model. `specs` are what its class wants, unquantised."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        index: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
        wanted: Layout4Bit,
    ) -> None:
        self._index = index
        self._rearranged: list[tuple[TensorSpec, str, str]] = []  # wanted, names of codes and scales
        self.specs: list[TensorSpec] = []
        self._wanted = wanted
        as_it_lies = (metadata.get("layout_4bit") == KERNEL_LAYOUT) == (wanted == KERNEL_LAYOUT)
        for spec in specs:
            module, _, leaf = spec.name.rpartition(".")
            absmax, scale = f"{module}.absmax", f"{module}.scale"
            kept = next((name for kind in KEPT_BLOCKS.values() if (name := f"{module}.{kind}") in index), None)
            if leaf != "weight" or spec.name not in index:
                self.specs.append(spec)
            elif absmax in index and len(spec.shape) == 2 and not as_it_lies and spec.shape[1] % BLOCK == 0:
                rows, width = spec.shape
                if wanted == KERNEL_LAYOUT:
                    width = padded_width(width)
                self.specs.append(TensorSpec(spec.name, (rows, width // 2), torch.uint8, spec.layer))
                self.specs.append(TensorSpec(absmax, (rows, width // BLOCK), torch.float32, spec.layer))
                self._rearranged.append((spec, spec.name, absmax))
            elif kept is not None and wanted != KERNEL_LAYOUT:
                rows, width = spec.shape
                self.specs.append(TensorSpec(spec.name, (rows, width // 2), torch.uint8, spec.layer))
                self.specs.append(TensorSpec(kept, (rows, width // GGUF_BLOCK), torch.float16, spec.layer))
                self._rearranged.append((spec, spec.name, kept))
            elif kept is not None or absmax in index or scale in index:
                names = (spec.name, kept or (absmax if absmax in index else scale))
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
                raise LoadFailed(
                    f"tensor {spec.name} has shape {list(tensor.shape)} in the packed file, the model wants {list(spec.shape)}"
                )
            if spec.dtype.is_floating_point != tensor.dtype.is_floating_point:
                raise LoadFailed(
                    f"tensor {spec.name} is {tensor.dtype} in the packed file, the model wants {spec.dtype}"
                )
            direct[spec.name] = tensor
        conversions = [
            Conversion(
                codes,
                (codes, scales),
                _Rearrange(codes, scales, spec.shape, self._wanted),
                [("codes", self._index[codes]), ("scales", self._index[scales])],
            )
            for spec, codes, scales in self._rearranged
        ]
        return Resolution(direct, conversions)


class _Rearrange:
    """One layout → the other, in the form of transformers' converters."""

    def __init__(self, codes: str, scales: str, shape: tuple[int, ...], wanted: Layout4Bit) -> None:
        self._names = (codes, scales)
        self._shape = shape
        self._wanted = wanted
        self._parts: dict[str, Callable[[], Tensor]] = {}

    def add_tensor(self, target: str, source: str, pattern: str, read: Callable[[], Tensor]) -> None:
        del target, source
        self._parts[pattern] = read

    def convert(self, target: str, *, model: Any, config: Any) -> dict[str, Tensor]:
        del target, model, config
        rows, columns = self._shape
        codes, scales = self._parts["codes"](), self._parts["scales"]()
        if scales.dtype is torch.float16:
            made = gguf_layout(codes, scales, columns)
        elif self._wanted == KERNEL_LAYOUT:
            made = kernel_layout_4bit(codes, scales, rows, columns)
        else:
            codes, scales = bitsandbytes_layout_4bit(codes, scales, columns)
            made = codes.view(rows, columns // 2), scales.view(rows, columns // BLOCK)
        return dict(zip(self._names, made, strict=True))
