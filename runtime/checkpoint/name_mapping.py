"""Maps a checkpoint's tensor names to a module's: transformers' renames and conversions, prefixes, tied names. Reads headers only."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from runtime.checkpoint.safetensors_index import StoredTensor
from runtime.checkpoint.weight_layout import TensorSpec
from runtime.errors import LoadFailed

_MAX_NAMES_SHOWN = 5
# Constants that older versions of transformers stored with the weights.
_OLD_CONSTANTS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.masked_bias)$")


@dataclass(slots=True)
class Conversion:
    """Tensors that an operation of transformers produces (stacking experts, splitting a fused matrix).

    `sources` are (pattern, tensor) in the order that the operation expects, `targets` the module's names that it produces.
    """

    first_target: str
    targets: tuple[str, ...]
    converter: Any
    sources: list[tuple[str, StoredTensor]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Resolution:
    """The source of each tensor of a module."""

    direct: Mapping[str, StoredTensor]
    conversions: Sequence[Conversion]


def resolve(
    model: Any, specs: Sequence[TensorSpec], index: Mapping[str, StoredTensor], aliases: Mapping[str, str]
) -> Resolution:
    """Find the source of every spec by a checkpoint's own names. Raises LoadFailed naming what is missing, unexpected or of another shape."""
    names = _ModuleNames(model)
    direct: dict[str, StoredTensor] = {}
    conversions: dict[str, Conversion] = {}
    unexpected = []
    for key in sorted(index, key=_natural_order):
        name, pattern = names.target(key)
        if name not in names.known:
            if not names.is_ignored(name, key):
                unexpected.append(key)
        elif pattern is not None:
            if name not in conversions:
                conversions[name] = names.conversion(name, pattern)
            conversions[name].sources.append((pattern, index[key]))
        elif name in aliases:
            # The file may name a tied tensor by either of its names, or by both.
            direct.setdefault(aliases[name], index[key])
        else:
            direct[name] = index[key]
    converted = {target for conversion in conversions.values() for target in conversion.targets}
    missing = [spec.name for spec in specs if spec.name not in direct and spec.name not in converted]
    _check_complete(missing, unexpected)
    _check_shapes(direct, {spec.name: spec.shape for spec in specs})
    return Resolution(direct, list(conversions.values()))


class _ModuleNames:
    """The names of a module's tensors and transformers' rules that lead to them."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self.known = model.state_dict()
        self._prefix = model.base_model_prefix
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }
        self._computed = {buffer for buffer, _ in model.named_buffers()}
        self._unneeded: set[str] = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())

    def target(self, key: str) -> tuple[str, str | None]:
        """Return the module's name for a checkpoint's key, and the pattern of the conversion that the tensor needs."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.known)
        if name not in self.known and key in self.known:
            name, pattern = rename_source_key(key, [], [], self._prefix, self.known)
        return name, pattern

    def conversion(self, name: str, pattern: str) -> Conversion:
        converter = deepcopy(self._by_pattern[pattern])
        first, *others = converter.target_patterns
        return Conversion(name, (name, *(name.replace(first, other) for other in others)), converter)

    def is_ignored(self, name: str, key: str) -> bool:
        """Return whether a checkpoint may carry this tensor: what the class lists, and computed buffers that older files stored."""
        return (
            name in self._computed or is_old_constant(key) or any(re.search(pattern, key) for pattern in self._unneeded)
        )


def is_old_constant(key: str) -> bool:
    """Return whether older versions of transformers stored this tensor, which is computed from the configuration."""
    return _OLD_CONSTANTS.search(key) is not None


def _check_complete(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    problems = [
        f"{what} {_shown(names)}" for what, names in (("is missing", missing), ("has unexpected", unexpected)) if names
    ]
    if problems:
        raise LoadFailed(f"the checkpoint {' and '.join(problems)}")


def _check_shapes(direct: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in direct.items():
        if tensor.shape != shapes[name]:
            raise LoadFailed(
                f"tensor {name} has shape {list(tensor.shape)} in the checkpoint, the model needs {list(shapes[name])}"
            )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + more


def _natural_order(key: str) -> list[tuple[int, int | str]]:
    """Order numbers in names by value, so that expert 10 comes after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
