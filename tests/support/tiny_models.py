"""Tiny models of the families that `tests.support.families` does not have, and the comparison of their tensors."""

import torch
from transformers import (
    Gemma2Config,
    GlmConfig,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.support.families import VOCAB, family

COMMON = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": VOCAB,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(**COMMON, sliding_window=9),
    "qwen2": Qwen2Config(**COMMON),
    "gemma2": Gemma2Config(
        **COMMON, **NO_TOKENS, head_dim=12, query_pre_attn_scalar=12, sliding_window=9, final_logit_softcapping=5.0
    ),
    "phi3": Phi3Config(**COMMON, **NO_TOKENS),
    "glm": GlmConfig(**COMMON, **NO_TOKENS, head_dim=12),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4),
    "gpt_oss": GptOssConfig(**COMMON, **NO_TOKENS, head_dim=12, num_local_experts=4, sliding_window=9),
    "smollm3": SmolLM3Config(**COMMON, **NO_TOKENS, no_rope_layers=[1, 1, 0]),
}


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model of a family with random weights, in evaluation mode."""
    if name not in CONFIGS:
        return family(name, seed)
    torch.manual_seed(seed)
    config = CONFIGS[name]
    # The eager implementation has soft caps and sinks; the default one leaves them out or refuses.
    config._attn_implementation = "eager"
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.6 / parameter.shape[-1] ** 0.5)
    return model.eval()


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    """Assert that tensors agree within `tolerance`, relative to the largest wanted value if that exceeds 1."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(b.abs().max()))
        assert float((a - b).abs().max()) <= tolerance * scale
