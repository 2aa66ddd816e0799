"""Checks that every key of a GGUF file's metadata is used, irrelevant, or equal to what the model would compute anyway.

Whatever else a file states could change the computation, so the file is refused by the name of the key.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import LoadFailed
from runtime.puller.gguf_index import GgufIndex, Value

_TOKENIZER_USED = {
    "ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges", "ggml.bos_token_id", "ggml.eos_token_id",
    "ggml.eot_token_id", "ggml.eom_token_id", "ggml.unknown_token_id", "ggml.padding_token_id", "ggml.add_space_prefix",
    "ggml.add_bos_token", "ggml.add_eos_token", "chat_template",
}  # fmt: skip
# They serve infilling, classification and other programs.
_TOKENIZER_IRRELEVANT = {
    "ggml.seperator_token_id", "ggml.cls_token_id", "ggml.mask_token_id", "ggml.prefix_token_id", "ggml.suffix_token_id",
    "ggml.middle_token_id", "ggml.fim_pre_token_id", "ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.fim_pad_token_id",
    "ggml.fim_rep_token_id", "ggml.fim_sep_token_id", "ggml.token_type_count", "ggml.added_tokens", "huggingface.json",
    "chat_templates",
}  # fmt: skip
_TOKENIZER_NEUTRAL: dict[str, Value] = {
    "ggml.remove_extra_whitespaces": False, "ggml.add_sep_token": False, "ggml.escape_whitespaces": True,
}  # fmt: skip
_IRRELEVANT = {"tensor_data_layout", "rope.scaling.finetuned"}
_NEUTRAL: dict[str, Value] = {
    "attention.causal": True, "attention.sliding_window": 0, "attention.max_alibi_bias": 0, "attention.clamp_kqv": 0,
    "expert_count": 0, "expert_used_count": 0, "pooling_type": 0, "logit_scale": 1, "embedding_scale": 1, "residual_scale": 1,
}  # fmt: skip
_COMPUTING_PREFIXES = ("adapter.", "clip.", "training.", "control_vector.")
_ROPE_SCALING = ("rope.scaling.", "rope.scale_linear")


def check_index(index: GgufIndex, config: Any, mapped: Mapping[str, str | None]) -> None:
    """Check all metadata against `config`. `mapped` has the architecture's keys that were read into it, None for keys that were dropped.

    Raises LoadFailed naming the first key that is not covered and its value.
    """
    kind = index.metadata.get("general.type", "model")
    if kind != "model":
        raise LoadFailed(f"the GGUF file's general.type is {kind!r}; only whole models can be loaded")
    prefix = f"{index.architecture}."
    for key, value in index.metadata.items():
        if key.startswith(prefix):
            covered = _architecture_key(key.removeprefix(prefix), value, index, config, mapped)
        elif key.startswith("tokenizer."):
            covered = _tokenizer_key(key.removeprefix("tokenizer."), value)
        else:
            # general.* describes the file, split.* was checked, and other prefixes belong to the tool that wrote them.
            covered = not key.startswith(_COMPUTING_PREFIXES)
        if not covered:
            raise LoadFailed(
                f"the GGUF file sets {key} = {_shown(value)}, which is not supported and would change the answers; "
                "use the safetensors version of this model"
            )


def _tokenizer_key(key: str, value: Value) -> bool:
    if key in _TOKENIZER_USED or key in _TOKENIZER_IRRELEVANT or key.startswith("chat_template."):
        return True
    return key in _TOKENIZER_NEUTRAL and value == _TOKENIZER_NEUTRAL[key]


def _architecture_key(key: str, value: Value, index: GgufIndex, config: Any, mapped: Mapping[str, str | None]) -> bool:
    if key in _IRRELEVANT or key.startswith(_ROPE_SCALING):
        return True  # The scaling of rotary embeddings is checked where it is read.
    if isinstance(value, tuple) and len(set(value)) == 1:
        value = value[0]
    if key in _EXPECTED:
        try:
            expected = _EXPECTED[key](config)
        except AttributeError:
            expected = None
        if expected is not None:
            return isinstance(value, int | float) and math.isclose(value, expected, rel_tol=1e-6)
    if mapped.get(key) is not None:
        return isinstance(value, int | float | str)
    if key == "attention.sliding_window" and isinstance(value, int):
        return value == 0 or value >= (index.number(f"{index.architecture}.context_length") or 0)
    return key in _NEUTRAL and value == _NEUTRAL[key]


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = config.rope_parameters or {}
    nested = parameters.get("full_attention")
    return nested if isinstance(nested, dict) else parameters


def _rotary_dim(config: Any) -> int:
    part = _rope(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(_head_dim(config) * part)


_EXPECTED: dict[str, Callable[[Any], float | int | bool | None]] = {
    "attention.key_length": _head_dim,
    "attention.value_length": _head_dim,
    "rope.dimension_count": _rotary_dim,
    "rope.freq_base": lambda config: _rope(config).get("rope_theta"),
    "vocab_size": lambda config: config.vocab_size,
    "attn_logit_softcapping": lambda config: config.attn_logit_softcapping,
    "final_logit_softcapping": lambda config: config.final_logit_softcapping,
    "attention.sliding_window": lambda config: config.sliding_window,
    "use_parallel_residual": lambda config: config.use_parallel_residual,
    "expert_feed_forward_length": lambda config: config.moe_intermediate_size,
    "expert_shared_feed_forward_length": lambda config: config.shared_expert_intermediate_size,
}


def _shown(value: Value) -> str:
    return "an array" if value is None else repr(value)[:100]
