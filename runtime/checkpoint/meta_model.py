"""Builds a Hugging Face model without its weights: large parameters on the meta device, small computed buffers (rotary frequencies, scales) real."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.checkpoint.weight_layout import TensorSpec

_LARGE_ELEMENTS = 1 << 22
_RANDOM = frozenset({"normal_", "uniform_", "trunc_normal_"})


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` makes shapes only, and so does a large `zeros` or `ones`.

    Layers allocate their weights with them, while buffers are computed by other functions; those stay real, unlike under
    torch.set_default_device. What has no numbers is not filled with random ones either. Touches no other thread.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        filled = args[0] if args else kwargs.get("tensor")
        # The numbers are never used, and drawing them on the meta device would import torch's compiler.
        if getattr(func, "__name__", "") in _RANDOM and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        if func is torch.empty or (func in (torch.zeros, torch.ones) and _num_elements(args) > _LARGE_ELEMENTS):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _num_elements(sizes: tuple[Any, ...]) -> int:
    shape = sizes[0] if sizes and isinstance(sizes[0], (tuple, list, torch.Size)) else sizes
    return math.prod(int(size) for size in shape)


def build_skeleton(model_class: Any, config: Any, attention: str) -> nn.Module:
    """Make an instance of `model_class` for inference with `attention` as its attention implementation. `config` is not changed."""
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    with _EmptyOnMeta():
        model: nn.Module = model_class(config)
    return model.eval().requires_grad_(requires_grad=False)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the names of tied parameters: alias → the name that the weight is stored under."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            aliases[name] = owner
    return aliases


def untie(model: nn.Module, alias: str) -> None:
    """Give `alias` a parameter of its own."""
    parent, leaf = parent_of(model, alias)
    parent._parameters[leaf] = nn.Parameter(torch.empty_like(getattr(parent, leaf), device="meta"), requires_grad=False)


def stored_specs(model: nn.Module, dtype: torch.dtype, num_layers: int) -> list[TensorSpec]:
    """Everything that a checkpoint must bring, in the model's order; floating tensors in `dtype`, but for what the class keeps in float32."""
    aliases = tied_names(model)
    keep: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    layer_prefix = _layer_prefix(model, num_layers)
    specs = []
    seen_layers = False
    for name, tensor in model.state_dict().items():
        if name in aliases:
            continue
        stored = tensor.dtype
        if stored.is_floating_point:
            stored = torch.float32 if any(part in keep for part in name.split(".")) else dtype
        if name.startswith(layer_prefix):
            layer, seen_layers = int(name[len(layer_prefix) :].split(".", 1)[0]), True
        else:
            layer = num_layers if seen_layers else -1
        specs.append(TensorSpec(name, tuple(tensor.shape), stored, layer))
    return specs


def _layer_prefix(model: nn.Module, num_layers: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return f"{name}."
    return "\0"  # matches nothing: the model is one group


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter or submodule, and its name in there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
