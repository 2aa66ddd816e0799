"""The sources of the packer's tensors: safetensors files by way of transformers' names, or weights in memory."""

import copy
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runtime.checkpoint.name_mapping import Conversion, Resolution, resolve
from runtime.checkpoint.quantized_shapes import is_layer_matrix
from runtime.checkpoint.safetensors_index import StoredTensor, read_index
from runtime.checkpoint.weight_layout import TensorSpec
from runtime.errors import LoadFailed
from runtime.puller.pack.quantize import Matrix, Stored4Bit, stored_shape, unpack_4bit, unpack_fp8, unpack_int8
from runtime.puller.pack.writer import PADDING

_PART = re.compile(
    r"^(?P<weight>.+\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
# Of fp8 checkpoints: scales of the weights, and scales of activations and KV, which are computed again for every token.
_FP8_PART = re.compile(r"^(?P<module>.+)\.(?P<part>weight_scale|weight_scale_inv|input_scale|input_scale_ub)$")
_FP8_UNUSED = re.compile(r"^.+\.(?P<part>[kv]_scale)$")
_INT8_PART = re.compile(r"^(?P<module>.+)\.(SCB|weight_format)$")


class Tensors(Protocol):
    def take(self, spec: TensorSpec) -> Tensor | Matrix:
        """Return one tensor of the module, as a Matrix if it is stored quantised."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """Weights by the module's names."""

    state: Mapping[str, Tensor | Matrix]

    def take(self, spec: TensorSpec) -> Tensor | Matrix:
        tensor = self.state.get(spec.name)
        if tensor is None:
            raise LoadFailed(f"the checkpoint is missing {spec.name}")
        return tensor


class FromFiles:
    """safetensors files, read tensor by tensor from several threads. Conversions run one at a time, so that few results are held.

    `fp8_block`: rows and columns that share a scale in an fp8 checkpoint with scales per block.
    """

    def __init__(
        self,
        model: Any,
        specs: Sequence[TensorSpec],
        files: Sequence[str],
        aliases: Mapping[str, str],
        fp8_block: tuple[int, int] | None = None,
    ) -> None:
        self._model = model
        self._fp8_block = fp8_block
        self._files = _Files()
        index = read_index(files)
        self._parts: dict[str, dict[str, StoredTensor]] = {}
        plain: dict[str, StoredTensor] = {}
        for name, stored in index.items():
            if name.startswith(PADDING):
                continue
            if (match := _PART.match(name)) is not None:
                self._parts.setdefault(match["weight"], {})[match["part"]] = stored
            elif (match := _INT8_PART.match(name)) is not None:
                self._parts.setdefault(f"{match['module']}.weight", {})[name.rpartition(".")[2]] = stored
            elif (match := _FP8_PART.match(name)) is not None:
                self._parts.setdefault(f"{match['module']}.weight", {})[match["part"]] = stored
            elif _FP8_UNUSED.match(name) is not None:
                continue
            else:
                plain[name] = stored
        for name, parts in self._parts.items():
            # the model's names are found by shape too; a serialised 4-bit matrix says its own in its state
            state = next((part for key, part in parts.items() if key.startswith("quant_state.")), None)
            if state is not None and name in plain:
                plain[name] = replace(plain[name], shape=stored_shape(self._files.read(state)))
        self._index = index
        resolution: Resolution = resolve(model, specs, plain, aliases)
        self._direct = resolution.direct
        self._conversions = {
            target: conversion for conversion in resolution.conversions for target in conversion.targets
        }
        self._made: dict[str, Tensor] = {}
        self._converting = threading.Lock()

    @property
    def serialised(self) -> set[str]:
        """The module's names whose weights are stored quantised."""
        return {name for name, stored in self._direct.items() if stored.name in self._parts}

    def take(self, spec: TensorSpec) -> Tensor | Matrix:
        if spec.name in self._conversions:
            with self._converting:
                if spec.name not in self._made:
                    self._made.update(self._convert(self._conversions[spec.name]))
                return self._made.pop(spec.name)
        stored = self._index[self._direct[spec.name].name]
        tensor = self._files.read(stored)
        parts = {key: self._files.read(part) for key, part in self._parts.get(stored.name, {}).items()}
        if "SCB" in parts:
            return unpack_int8(tensor, parts["SCB"])
        if stored.dtype is torch.float8_e4m3fn:
            scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
            if scale is None:
                raise LoadFailed(f"tensor {stored.name} is fp8 and has no weight_scale")
            return unpack_fp8(tensor, scale, self._fp8_block, stored.name)
        if parts:
            return unpack_4bit(Stored4Bit(tensor, parts), stored.name)
        return tensor

    def _convert(self, work: Conversion) -> dict[str, Tensor]:
        converter = copy.deepcopy(work.converter)
        for pattern, stored in work.sources:
            converter.add_tensor(work.first_target, stored.name, pattern, _Later(self._files, stored))
        try:
            made = converter.convert(work.first_target, model=self._model, config=self._model.config)
        except LoadFailed:
            raise
        except Exception as error:
            raise LoadFailed(f"tensor {work.first_target} cannot be made from the checkpoint's: {error}") from error
        missing = [name for name in work.targets if name not in made]
        if missing:
            raise LoadFailed(f"tensor {missing[0]} did not come of converting {work.sources[0][1].name}")
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True, slots=True)
class _Later:
    files: "_Files"
    stored: StoredTensor

    def __call__(self) -> Tensor:
        return self.files.read(self.stored)


class _Files:
    """Whole tensors, read into memory of their own."""

    def read(self, stored: StoredTensor) -> Tensor:
        memory = torch.empty(stored.size_bytes, dtype=torch.uint8)
        bytes_of: Any = memory.numpy()
        view = memoryview(bytes_of)
        with open(stored.path, "rb", buffering=0) as file:  # noqa: PTH123 — Path.open has no way to read into memory either
            file.seek(stored.offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise LoadFailed(f"{stored.path} is truncated: tensor {stored.name} ends beyond the file's end")
                done += count
        return memory.view(stored.dtype).view(stored.shape)


def quantizable(model: nn.Module) -> set[str]:
    """Return the modules whose weights are quantised: linear layers of decoder layers, except tied ones and those that the class keeps.

    They are those that bitsandbytes' integration would quantise, without the few outside of numbered layers.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    spared = {name.rpartition(".")[0] for names in shared.values() if len(names) > 1 for name in names}
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    found = set()
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Linear)
            and is_layer_matrix(f"{name}.weight", tuple(module.weight.shape))
            and name not in spared
            and not keep & set(name.split("."))
        ):
            found.add(name)
    return {name for name in found if f"{name}.weight" in parameters}
