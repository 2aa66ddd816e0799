"""Derives the shape of a model's KV cache from its attention modules, and the position of its planes in slabs (see step.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.interfaces import KvGeometry
from runtime.engine.model.run.step import KvPlanes
from runtime.errors import LoadFailed


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """The KV shape that all layers share: `num_kv_heads` heads of `head_dim`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def token_stride(self) -> int:
        """The number of elements of one token's K (or V) in one layer."""
        return self.num_kv_heads * self.head_dim


def attention_geometry(model: Any) -> AttentionGeometry:
    """Read the shape from the attention modules. Raises LoadFailed if it differs between layers, or between K and V."""
    found: dict[int, tuple[int, int]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
            found[index] = _heads(module, model.config, name)
    shapes = set(found.values())
    if not found or set(found) != set(range(len(found))) or len(found) != model.config.num_hidden_layers:
        raise LoadFailed(
            f"{type(model).__name__} is not supported: {len(found)} attention layers in {model.config.num_hidden_layers} layers"
        )
    if len(shapes) > 1:
        raise LoadFailed(
            f"{type(model).__name__} is not supported: its layers have different KV shapes {sorted(shapes)}"
        )
    return AttentionGeometry(len(found), *shapes.pop())


def _heads(module: nn.Module, config: Any, name: str) -> tuple[int, int]:
    heads = int(config.num_attention_heads)
    head_dim = int(
        getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // heads
    )
    if (value_dim := getattr(module, "v_head_dim", head_dim)) != head_dim:
        raise LoadFailed(f"{name} has keys of {head_dim} and values of {value_dim} channels, which is not supported")
    if isinstance(k_proj := getattr(module, "k_proj", None), nn.Linear):
        return k_proj.out_features // head_dim, head_dim
    return int(getattr(config, "num_key_value_heads", None) or heads), head_dim


def kv_geometry(
    model_id: str, shape: AttentionGeometry, block_tokens: int, item_bytes: int, slab_bytes: int, max_slabs: int
) -> KvGeometry:
    """Compute how the model's blocks are placed in slabs. Raises LoadFailed if one block of all layers exceeds a slab."""
    block_bytes = block_tokens * shape.token_stride * item_bytes
    all_layers_bytes = 2 * shape.num_layers * block_bytes
    blocks_per_slab = slab_bytes // all_layers_bytes
    if blocks_per_slab == 0:
        raise LoadFailed(
            f"one KV block of {block_tokens} tokens takes {all_layers_bytes} bytes, slab_bytes is {slab_bytes}",
            model=model_id,
            limit=slab_bytes,
            value=all_layers_bytes,
        )
    page_bytes = math.gcd(slab_bytes, block_bytes)
    # Page ids are int32.
    max_slabs = min(max_slabs, (2**31 - 1) // (slab_bytes // page_bytes))
    return KvGeometry(
        block_tokens=block_tokens,
        blocks_per_slab=blocks_per_slab,
        pages_per_slab=slab_bytes // page_bytes,
        pages_per_block=block_bytes // page_bytes,
        bytes_per_token=2 * shape.num_layers * shape.token_stride * item_bytes,
        max_slabs=max_slabs,
    )


def kv_planes(memory: Tensor, kv: KvGeometry, shape: AttentionGeometry, dtype: torch.dtype) -> Sequence[KvPlanes]:
    """Return each layer's planes over a KV range (uint8), layer-major in a slab, K before V."""
    elements = memory.view(dtype)
    plane = kv.blocks_per_slab * kv.block_tokens * shape.token_stride
    unit = kv.block_tokens * shape.token_stride // kv.pages_per_block
    return [
        KvPlanes(elements[2 * layer * plane :], elements[(2 * layer + 1) * plane :], unit)
        for layer in range(shape.num_layers)
    ]
