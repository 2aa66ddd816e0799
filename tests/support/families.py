"""Tiny random models of several families, sharp enough that the best two logits are rarely close."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 193
# what each has that the others haven't: experts, capped scores, norms behind the layers, interleaved rotation, sinks
FURTHER: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 16},
    "olmo2": {},
    "cohere2": {"sliding_window": 20},
    "starcoder2": {"sliding_window": 24, "use_bias": True},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "deepseek_v2": {
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4,
    },
}  # fmt: skip


def family(name: str, seed: int = 0) -> PreTrainedModel:
    """A model in fp32 with the family's own attention, in eval mode."""
    common = {
        "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: PreTrainedModel
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=96, num_key_value_heads=2, head_dim=12))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=96, num_key_value_heads=1, head_dim=16))
    elif name == "gemma3":
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(
            **common, intermediate_size=96, num_key_value_heads=2, head_dim=16, sliding_window=24, layer_types=types, query_pre_attn_scalar=16,
        ))  # fmt: skip
    elif name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
    elif name == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**common, intermediate_size=96))
    elif name == "phi":
        model = PhiForCausalLM(PhiConfig(**common, intermediate_size=96, partial_rotary_factor=0.5))
    elif name == "granite":
        model = GraniteForCausalLM(GraniteConfig(
            **common, intermediate_size=96, num_key_value_heads=2, attention_multiplier=0.2, residual_multiplier=0.5, embedding_multiplier=3.0,
            logits_scaling=2.0,
        ))  # fmt: skip
    else:
        grouped = {**common, "intermediate_size": 96, "num_key_value_heads": 2}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(name, **{**grouped, **FURTHER[name]}), dtype=torch.float32
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()
