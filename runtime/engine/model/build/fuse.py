"""Recognises a Llama-shaped decoder stack in a Hugging Face module by its structure alone: names of children, shapes
and attributes.

A match is a conjecture that `equivalence_check` tests with numbers. Whatever does not fit raises NoMatchError with
the reason, and the model then runs with its own code. No class is recognised by name.
"""

import copy
from typing import Any

import torch
from torch import nn

from runtime.engine.kernels.activation import Activation
from runtime.engine.model.run.fused_spec import LayerSpec, LinearRef, StackSpec
from runtime.engine.model.run.step import AttentionSpec, RopeSpec

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


class NoMatchError(Exception):
    """The module is not a Llama-shaped stack. The message says what differs."""


def match_stack(model: nn.Module, interleaved: bool) -> StackSpec:
    """Describe `model` (a …ForCausalLM, on any device, meta included) as a fused stack. Raises NoMatchError.

    `interleaved` is a guess at the order of rotary pairs, which the structure does not show.
    """
    prefix = str(getattr(model, "base_model_prefix", "model"))
    body = _child(model, prefix)
    layers = _child(body, "layers")
    if not isinstance(layers, nn.ModuleList):
        raise NoMatchError("its layers are not a ModuleList")
    _only(model, {prefix, "lm_head"})
    _only(body, {"embed_tokens", "layers", "norm", "rotary_emb"})
    config = model.config
    norm = _child(body, "norm")
    matched = tuple(
        _match_layer(layer, f"{prefix}.layers.{i}", i, body, config, interleaved) for i, layer in enumerate(layers)
    )
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name not in _ACTIVATIONS:
        raise NoMatchError(f"activation {name} has no fused form")
    embed = _child(body, "embed_tokens")
    return StackSpec(
        embed=f"{prefix}.embed_tokens",
        norm=f"{prefix}.norm",
        lm_head="lm_head",
        rotary=f"{prefix}.rotary_emb",
        layers=matched,
        activation=_ACTIVATIONS[name],
        norm_eps=_eps(norm),
        norm_plus_one=_is_plus_one(norm),
        embed_scale=float(getattr(embed, "scalar_embed_scale", 1.0))
        * float(getattr(body, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(layers[0], "residual_multiplier", 1.0)),
        logits_divisor=float(getattr(config, "logits_scaling", 1.0) or 1.0),
        logits_softcap=float(getattr(config, "final_logit_softcapping", 0.0) or 0.0),
    )


def _match_layer(layer: nn.Module, path: str, index: int, body: nn.Module, config: Any, interleaved: bool) -> LayerSpec:
    attention: Any = _child(layer, "self_attn")
    mlp = _child(layer, "mlp")
    norms = [
        name for name, child in layer.named_children() if list(child.parameters()) and name not in ("self_attn", "mlp")
    ]
    if set(norms) == {"input_layernorm", "post_attention_layernorm"}:
        mlp_norm, after_attention, after_mlp = "post_attention_layernorm", None, None
    elif set(norms) == {
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    }:
        mlp_norm, after_attention, after_mlp = (
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        )
    else:
        raise NoMatchError(f"layer {index} has the norms {', '.join(norms) or 'none'}")
    _only(layer, {"self_attn", "mlp", *norms})

    if hasattr(attention, "qkv_proj"):
        qkv, split = LinearRef.single(f"{path}.self_attn.qkv_proj"), {"qkv_proj"}
    else:
        split = {"q_proj", "k_proj", "v_proj"}
        qkv = _siblings(attention, f"{path}.self_attn", "qkv", ("q_proj", "k_proj", "v_proj"))
    if hasattr(mlp, "gate_up_proj"):
        gate_up, halves = LinearRef.single(f"{path}.mlp.gate_up_proj"), {"gate_up_proj"}
    else:
        gate_up, halves = _siblings(mlp, f"{path}.mlp", "gate_up", ("gate_proj", "up_proj")), {"gate_proj", "up_proj"}
    head_norms = {name for name in ("q_norm", "k_norm") if hasattr(attention, name)}
    _only(attention, {*split, "o_proj", *head_norms})
    _only(mlp, {*halves, "down_proj"})

    head_dim = int(attention.head_dim)
    out = _linear(attention, "o_proj")
    num_q_heads, rest = divmod(out.in_features, head_dim)
    rows = sum(_linear(attention, name).out_features for name in split)
    num_kv_heads, odd = divmod(rows // head_dim - num_q_heads, 2)
    if rest or odd or rows % head_dim or num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise NoMatchError(
            f"layer {index} has heads of {head_dim} in a QKV of {rows} rows and an output of {out.in_features}"
        )
    norm_eps, plus_one = 0.0, False
    if head_norms:
        q_norm = _child(attention, "q_norm")
        if head_norms != {"q_norm", "k_norm"} or any(
            tuple(p.shape) != (head_dim,) for n in head_norms for p in _child(attention, n).parameters()
        ):
            raise NoMatchError(f"layer {index} normalises queries and keys, but not head by head")
        norm_eps, plus_one = _eps(q_norm), _is_plus_one(q_norm)
    rope_key = _rope_key(body, config, index)
    return LayerSpec(
        attention=AttentionSpec(
            layer=index,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=float(attention.scaling),
            sliding_window=sliding_window(attention, config, index),
            softcap=float(getattr(attention, "attn_logit_softcapping", 0.0) or 0.0),
        ),
        rope=RopeSpec(
            rotary_dim=2
            * int(getattr(_child(body, "rotary_emb"), f"{rope_key}_inv_freq" if rope_key else "inv_freq").shape[0]),
            interleaved=interleaved,
            norm_eps=norm_eps,
            norm_plus_one=plus_one,
        ),
        rope_key=rope_key,
        qkv=qkv,
        out=LinearRef.single(f"{path}.self_attn.o_proj"),
        gate_up=gate_up,
        down=LinearRef.single(f"{path}.mlp.down_proj"),
        input_norm=f"{path}.input_layernorm",
        mlp_norm=f"{path}.{mlp_norm}",
        after_attention_norm=after_attention and f"{path}.{after_attention}",
        after_mlp_norm=after_mlp and f"{path}.{after_mlp}",
        q_norm=f"{path}.self_attn.q_norm" if head_norms else None,
        k_norm=f"{path}.self_attn.k_norm" if head_norms else None,
    )


def sliding_window(attention: Any, config: Any, index: int) -> int:
    """Return the number of tokens that layer `index` sees, or 0 for all.

    The attention module's own attribute wins over the layer's type, and that over the model's configuration.
    """
    if hasattr(attention, "sliding_window"):
        return int(attention.sliding_window or 0)
    window = int(getattr(config, "sliding_window", None) or 0)
    types = getattr(config, "layer_types", None)
    if types and any(kind != types[0] for kind in types):
        return window if types[index] == "sliding_attention" else 0
    return window


def _rope_key(body: nn.Module, config: Any, index: int) -> str:
    if hasattr(_child(body, "rotary_emb"), "inv_freq"):
        return ""
    types = getattr(config, "layer_types", None)
    if not types or not hasattr(_child(body, "rotary_emb"), f"{types[index]}_inv_freq"):
        raise NoMatchError(f"layer {index} has no rotary frequencies")
    return str(types[index])


def _siblings(parent: nn.Module, path: str, name: str, children: tuple[str, ...]) -> LinearRef:
    linears = [_linear(parent, child) for child in children]
    if len({linear.bias is None for linear in linears}) != 1 or len({linear.in_features for linear in linears}) != 1:
        raise NoMatchError(f"{', '.join(children)} cannot be joined to one matrix")
    return LinearRef(f"{path}.{name}", tuple(f"{path}.{child}" for child in children))


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise NoMatchError(f"{type(module).__name__} has no {name}")
    return child


def _linear(module: nn.Module, name: str) -> nn.Linear:
    child = _child(module, name)
    if type(child) is not nn.Linear:
        raise NoMatchError(f"{name} is a {type(child).__name__}, not a Linear")
    return child


def _only(module: nn.Module, known: set[str]) -> None:
    """Raise NoMatchError if the module has weights beyond the known children, which would be ignored."""
    unknown = [name for name, child in module.named_children() if name not in known and list(child.parameters())]
    unknown += [name for name, _ in module.named_parameters(recurse=False)]
    if unknown:
        raise NoMatchError(f"{type(module).__name__} also has {', '.join(unknown)}")


def _eps(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return float(getattr(norm, name))
    raise NoMatchError(f"{type(norm).__name__} has no epsilon")


def _is_plus_one(norm: nn.Module) -> bool:
    """Return whether the norm multiplies by 1 + weight. Raises NoMatchError if it is not an RMSNorm of one weight."""
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        raise NoMatchError(f"{type(norm).__name__} is not an RMSNorm")
    probe: Any = copy.deepcopy(norm)
    size = probe.weight.shape[0]
    probe.weight = nn.Parameter(torch.zeros(size), requires_grad=False)
    x = torch.linspace(-1.0, 2.0, size)[None]
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _eps(norm))
    with torch.inference_mode():
        given = probe(x)
    if torch.equal(given, torch.zeros_like(given)):
        return False
    if torch.allclose(given, normal, atol=1e-5):
        return True
    raise NoMatchError(f"{type(norm).__name__} is not an RMSNorm")
