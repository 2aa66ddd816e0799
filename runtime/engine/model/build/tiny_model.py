"""Creates a small random model of the same class and flags as a real one, with parameters that would expose a
computation error.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from runtime.checkpoint.meta_model import build_skeleton, tied_names

_HEADS = 4
_VOCAB = 96
_WINDOW = 8
_MAX_LAYERS = 4
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def shrink(config: Any) -> Any:
    """Return a copy of `config` with few layers, heads and channels.

    Head size and all flags stay. One layer of each distinct kind is kept.
    """
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    sizes = {
        "hidden_size": _HEADS * head_dim,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    small = _with_few_layers(config)
    for name, size in sizes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, size)
    for name in _TOKEN_IDS:
        try:
            setattr(small, name, None)
        except Exception:  # A configuration that validates its fields may require a number.
            _clamp_token(small, name)
    return small


def cut(config: Any) -> Any:
    """Return a copy of `config` with few layers and a small vocabulary, for classes whose sizes depend on each other."""
    few = _with_few_layers(config)
    for name in _TOKEN_IDS:
        _clamp_token(few, name)
    return few


def _clamp_token(config: Any, name: str) -> None:
    if isinstance(token := getattr(config, name, None), int):
        setattr(config, name, min(token, _VOCAB - 1))


def _with_few_layers(config: Any) -> Any:
    few = copy.deepcopy(config)
    kept = _representative_layers(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers and config.num_hidden_layers > 1:
            setattr(few, name, [value[index] for index in kept])
    few.num_hidden_layers = len(kept)
    few.vocab_size = _VOCAB
    if getattr(few, "sliding_window", None):
        few.sliding_window = _WINDOW
    few._name_or_path = ""
    return few


def _representative_layers(config: Any) -> list[int]:
    """Return the indices of one layer per kind, and at least two.

    Kinds are what the per-layer lists of the configuration distinguish.
    """
    count = int(config.num_hidden_layers)
    lists = [value for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == count]
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(repr([value[index] for value in lists]), index)
    kept = sorted(kinds.values())[:_MAX_LAYERS]
    if len(kept) < 2 and count > 1:
        kept.append(count - 1 if kept[0] != count - 1 else 0)
    return sorted(kept)


def random_model(model_class: Any, config: Any, attention: str, seed: int = 0) -> nn.Module:
    """Return a float32 CPU model with random parameters.

    No parameter is left at one or zero, and branches are as large as the residual, so that every parameter affects the
    logits.
    """
    model = build_skeleton(model_class, config, attention)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    aliases = tied_names(model)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if name not in aliases:
            made[name] = _values(leaf, parameter, generator)
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(made[aliases.get(name, name)], requires_grad=False)
    return model


def _values(leaf: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() == 1:
        # Rounded because transformers may have drawn small numbers from the global generator.
        base: Tensor | float = parameter.detach().round() if not parameter.is_meta else float(leaf == "weight")
        return noise.mul(0.2).add(base)
    return noise.mul(float(parameter.shape[-1]) ** -0.5)
