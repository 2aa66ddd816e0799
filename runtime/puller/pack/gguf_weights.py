"""Reads a GGUF file as a transformers configuration and its weights by the module's names, dequantised or as the blocks that kernels read.

transformers' own loader logs what it skips and fills gaps with random numbers, and it builds the table of tensor names once per module. Its
conversions of single tensors are used here, under a check that every tensor of the file has a name in the module.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.checkpoint.layout_4bit import kernel_layout_gguf
from runtime.checkpoint.meta_model import tied_names
from runtime.checkpoint.quantized_shapes import KEPT_BLOCKS, kept_shapes
from runtime.errors import LoadFailed
from runtime.puller.gguf_index import GgufIndex
from runtime.puller.pack.gguf_rope import scaled_rope
from runtime.puller.pack.gguf_rules import check_index
from runtime.puller.pack.quantize import Matrix
from runtime.puller.pack.tensors import quantizable

_ROPE_DIVISORS = "rope_freqs.weight"
_SHOWN_NAMES = 5
# The scale of attention that these models were trained with is known by their size only.
_ATTENTION_SCALE_BY_LAYERS = {("gemma2", 46), ("gemma3", 62)}


def read_gguf_config(reader: Any, index: GgufIndex, path: Path) -> Any:
    """Return transformers' configuration of the file, once every metadata key is covered. Raises LoadFailed naming the key."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    config: Any = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    by_architecture = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    names = [config.model_type, config.model_type.removesuffix("_text"), index.architecture]
    mapped: dict[str, str | None] = next((by_architecture[name] for name in names if name in by_architecture), {})
    if config.model_type == "mistral" and f"{index.architecture}.attention.sliding_window" not in index.metadata:
        config.sliding_window = None
    check_index(index, config, mapped)
    if (index.architecture, config.num_hidden_layers) in _ATTENTION_SCALE_BY_LAYERS:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict):
        divisors = next((tensor for tensor in reader.tensors if tensor.name == _ROPE_DIVISORS), None)
        values = None if divisors is None else [float(value) for value in divisors.data]
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        nested = parameters.get("full_attention")
        if isinstance(nested, dict):
            config.rope_parameters = {**parameters, "full_attention": scaled_rope(index, nested, head_dim, values)}
        else:
            config.rope_parameters = scaled_rope(index, parameters, head_dim, values)
    return config


def read_gguf_weights(
    reader: Any, model: nn.Module, architecture: str, dtype: torch.dtype, *, keep_blocks: bool
) -> dict[str, Tensor | Matrix]:
    """Return all tensors by the module's names, which `check_gguf_names` has checked. Raises LoadFailed for two that should be equal.

    With `keep_blocks`, the linear layers' weights whose block type the kernels read are returned as they are stored.
    """
    from gguf import dequantize

    processor = _processor(model, architecture)
    mapping = _names(model, architecture, processor)
    keeping = {f"{module}.weight" for module in quantizable(model)} if keep_blocks else set()
    kept: dict[str, Tensor | Matrix] = {}
    parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
    for stored in reader.tensors:
        if stored.name == _ROPE_DIVISORS:
            continue
        target = mapping.get(stored.name, "")
        if target in keeping and (matrix := _kept_blocks(stored, processor, mapping)) is not None:
            kept[target] = matrix
            continue
        weights = dequantize(stored.data, stored.tensor_type)
        made = processor.process(
            weights=weights, name=stored.name, tensor_key_mapping=mapping, parsed_parameters=parsed
        )
        if made.name is not None:
            parsed["tensors"][mapping[made.name]] = torch.from_numpy(np.copy(made.weights)).to(dtype)
    tensors = parsed["tensors"]
    for alias, owner in tied_names(model).items():
        if alias in tensors and owner in tensors and not torch.equal(tensors[alias], tensors[owner]):
            raise LoadFailed(f"the GGUF file has different weights for {alias} and {owner}, which the model shares")
        if alias in tensors:
            tensors.setdefault(owner, tensors[alias])
    return {**tensors, **kept}


def _kept_blocks(stored: Any, processor: Any, mapping: dict[str, str]) -> Matrix | None:
    """Return a matrix in the kernels' layout; None if its block type is not kept, or if the model wants more than its rows in another order."""
    kind = KEPT_BLOCKS.get(stored.tensor_type.name)
    shape = tuple(int(size) for size in stored.shape[::-1])
    if kind is None or len(shape) != 2 or kept_shapes((shape[0], shape[1])) is None:
        return None
    order = _row_order(processor, stored.name, mapping, shape)
    if order is None:
        return None
    rows = torch.from_numpy(stored.data.reshape(shape[0], -1)[order])
    weight, scales = kernel_layout_gguf(rows)
    return Matrix(weight, kind, scales)


def _row_order(processor: Any, name: str, mapping: dict[str, str], shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the stored row of each row that the model wants; None if it wants anything but these rows.

    transformers' conversion of the tensor is applied to the numbers of its rows and to those of its columns.
    """
    made = []
    for axis, size in enumerate(shape):
        numbers = np.arange(size).reshape((-1, 1) if axis == 0 else (1, -1))
        probe = np.broadcast_to(numbers, shape)
        result = processor.process(
            weights=probe, name=name, tensor_key_mapping=mapping, parsed_parameters={"tensors": {}}
        )
        if result.name is None or mapping.get(result.name) != mapping[name] or result.weights.shape != shape:
            return None
        made.append(result.weights)
    rows, columns = made
    order: np.ndarray = rows[:, 0]
    is_order = np.array_equal(np.sort(order), np.arange(shape[0])) and np.array_equal(columns[0], np.arange(shape[1]))
    is_whole = np.array_equal(rows, np.broadcast_to(order[:, None], shape))
    if not is_order or not is_whole or not np.array_equal(columns, np.broadcast_to(columns[0], shape)):
        return None
    return order


def check_gguf_names(reader: Any, model: nn.Module, architecture: str) -> None:
    """Raise LoadFailed for tensors of the file that the module lacks. Reads no weights."""
    mapping = _names(model, architecture, _processor(model, architecture))
    names = [stored.name for stored in reader.tensors if stored.name != _ROPE_DIVISORS]
    unexpected = [name for name in names if name not in mapping and name.removesuffix(".weight") not in mapping]
    if unexpected:
        more = f" and {len(unexpected) - _SHOWN_NAMES} more" if len(unexpected) > _SHOWN_NAMES else ""
        raise LoadFailed(
            f"the GGUF file has unexpected tensors, which {type(model).__name__} does not compute with: "
            f"{', '.join(unexpected[:_SHOWN_NAMES])}{more}"
        )


def _processor(model: nn.Module, architecture: str) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    config: Any = model.config
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())


def _names(model: nn.Module, architecture: str, processor: Any) -> dict[str, str]:
    """Return the module's names by the file's. A name that the format lists without its outer modules is found without them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = model.config
    kind = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise LoadFailed(f"the GGUF file's architecture {architecture!r} is not supported")
    table = get_tensor_name_map(kind, config.num_hidden_layers)
    mapping: dict[str, str] = {}
    for full_name in model.state_dict():
        parts = full_name.split(".")
        for skipped in range(len(parts)):
            prefix = "".join(f"{part}." for part in parts[:skipped])
            name = processor.preprocess_name(".".join(parts[skipped:]))
            stem, dot, leaf = name.rpartition(".")
            stem, suffix = (stem, dot + leaf) if leaf in ("weight", "bias") else (name, "")
            found = table.get_name(stem)
            if found is not None:
                mapping.setdefault(found + suffix, full_name)
                break
            processor.perform_fallback_tensor_mapping(mapping, suffix, prefix, name)
    return mapping
