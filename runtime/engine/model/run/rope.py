"""Computes the cosines and sines of a step's positions from the frequencies of Hugging Face's rotary modules.

Two of Hugging Face's schemes change their frequencies with the longest sequence of the batch. Rows of one step are unrelated, so the frequencies
are fixed once by the model's context limit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """The rotary frequencies of a layer type. `inv_freq` is [R/2] float32 on the engine's device; `scaling` multiplies cos and sin."""

    inv_freq: Tensor
    scaling: float

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[0]

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, R/2] of `positions` [T], in `dtype`."""
        angles = positions[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return cos.to(dtype), sin.to(dtype)


def fix_frequencies(module: nn.Module, max_model_len: int) -> None:
    """Fix the frequencies of every rotary module below `module` by the context limit, in tokens.

    LongRoPE uses its long frequencies if the limit exceeds the original length. Dynamic NTK uses the unscaled ones, because its limit is the
    original length.
    """
    rotary: Any
    for rotary in module.modules():
        if not hasattr(rotary, "rope_type") or not hasattr(rotary, "config"):
            continue
        if isinstance(rotary.rope_type, dict):
            for layer_type, kind in list(rotary.rope_type.items()):
                parameters = rotary.config.rope_parameters[layer_type]
                rotary.rope_type[layer_type] = _fixed(
                    rotary, kind, parameters, f"{layer_type}_", layer_type, max_model_len
                )
        else:
            rotary.rope_type = _fixed(rotary, rotary.rope_type, rotary.config.rope_parameters, "", None, max_model_len)


def rotary_tables(rotary: nn.Module, device: torch.device) -> dict[str, RotaryTable]:
    """Return the tables of a rotary module with fixed frequencies, keyed by layer type ("" if all layers share one table)."""
    tables = {}
    for name, inv_freq in rotary.named_buffers(recurse=False):
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            prefix = name.removesuffix("inv_freq")
            scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
            tables[prefix.removesuffix("_")] = RotaryTable(inv_freq.to(device=device, dtype=torch.float32), scaling)
    return tables


def _fixed(
    rotary: Any, kind: str, parameters: dict[str, Any], prefix: str, layer_type: str | None, max_model_len: int
) -> str:
    if kind == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        if max_model_len > original:
            kwargs = {} if layer_type is None else {"layer_type": layer_type}
            long, _ = ROPE_INIT_FUNCTIONS[kind](rotary.config, torch.device("cpu"), seq_len=original + 1, **kwargs)
            getattr(rotary, f"{prefix}inv_freq").copy_(long)
        return "default"
    return "default" if "dynamic" in kind else kind
