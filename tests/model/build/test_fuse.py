"""The fused form is taken only where numbers agree: a class that looks the same and computes something else keeps its own code, or is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaMLP, eager_attention_forward

from runtime.checkpoint.meta_model import build_skeleton
from runtime.checkpoint.model_config import longrope_limit
from runtime.engine.model.build.equivalence_check import EquivalenceChecker
from runtime.engine.model.build.fuse import NoMatchError, match_stack
from runtime.engine.model.build.tiny_model import random_model, shrink
from runtime.engine.model.run.rope import fix_frequencies, rotary_tables

CONFIG = LlamaConfig(
    num_hidden_layers=12,
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


class Doubled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * super().forward(x)
        return result


class LookAlike(LlamaForCausalLM):
    """Structure of a Llama, other arithmetic."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.__class__ = Doubled


class Leaning(LlamaForCausalLM):
    """Adds a bias to scores in eager attention only: nothing that the hook could know of."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(self._lean, with_kwargs=True)

    @staticmethod
    def _lean(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs["attention_mask"]
        if mask is not None:
            kwargs["attention_mask"] = mask + torch.linspace(0, 2, mask.shape[-1])
        return args, kwargs


class ExtraWeight(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[1].self_attn.extra = nn.Linear(4, 4)


class Particular(LlamaForCausalLM):
    """Cannot be made in another width than this."""

    def __init__(self, config: LlamaConfig) -> None:
        if config.hidden_size % 96:
            raise ValueError(f"{config.hidden_size} is not a supported width")
        super().__init__(config)


class ParticularLookAlike(Particular):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.__class__ = Doubled


def test_proof_tries_a_class_without_miniatures_in_its_own_size() -> None:
    config = LlamaConfig(
        num_hidden_layers=12,
        hidden_size=192,
        num_attention_heads=6,
        intermediate_size=100,
        vocab_size=5000,
        pad_token_id=4999,
    )
    assert EquivalenceChecker(fuse=True).verdict(Particular, config).fused
    verdict = EquivalenceChecker(fuse=True).verdict(ParticularLookAlike, config)
    assert not verdict.fused
    assert not verdict.refused
    assert "differ by" in verdict.reason


def test_proof_refuses_a_class_that_cannot_be_tried() -> None:
    odd = LlamaConfig(
        num_hidden_layers=12, hidden_size=200, num_attention_heads=5, intermediate_size=100, vocab_size=5000
    )
    verdict = EquivalenceChecker(fuse=True).verdict(Particular, odd)
    assert verdict.refused
    assert "cannot be tested" in verdict.reason
    assert "200 is not a supported width" in verdict.reason
    large = LlamaConfig(
        num_hidden_layers=120, hidden_size=192 * 128, num_attention_heads=192, intermediate_size=65536, vocab_size=5000
    )
    verdict = EquivalenceChecker(fuse=True).verdict(Particular, large)
    assert verdict.refused
    assert "exceed the limit of 536870912" in verdict.reason


def test_fuse_matches_a_llama() -> None:
    verdict = EquivalenceChecker(fuse=True).verdict(LlamaForCausalLM, CONFIG)
    assert verdict.fused
    assert not verdict.refused


def test_fuse_leaves_a_look_alike() -> None:
    verdict = EquivalenceChecker(fuse=True).verdict(LookAlike, CONFIG)
    assert not verdict.fused
    assert not verdict.refused
    assert "logits of a tiny model differ by" in verdict.reason


def test_proof_refuses_attention_that_the_hook_cannot_carry() -> None:
    assert eager_attention_forward is not None
    verdict = EquivalenceChecker(fuse=True).verdict(Leaning, CONFIG)
    assert verdict.refused
    assert "does more than the attention hook carries" in verdict.reason


def test_unknown_weights_are_never_left_out() -> None:
    verdict = EquivalenceChecker(fuse=True).verdict(ExtraWeight, CONFIG)
    assert not verdict.fused
    assert "also has extra" in verdict.reason


def test_verdicts_are_kept_by_class_and_flags() -> None:
    checker = EquivalenceChecker(fuse=True)
    verdict = checker.verdict(LlamaForCausalLM, CONFIG)
    bigger = LlamaConfig(
        **{**CONFIG.to_dict(), "num_hidden_layers": 80, "vocab_size": 32000, "intermediate_size": 28672}
    )
    assert checker.verdict(LlamaForCausalLM, bigger) is verdict
    biased = LlamaConfig(**{**CONFIG.to_dict(), "attention_bias": True})
    assert checker.verdict(LlamaForCausalLM, biased) is not verdict


def test_miniature_keeps_every_kind_of_layer() -> None:
    config = Gemma3TextConfig(num_hidden_layers=26, sliding_window=512)
    small = shrink(config)
    assert set(small.layer_types) == set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.num_hidden_layers == len(small.layer_types) == 2
    assert small.sliding_window < 20
    assert small.head_dim == config.head_dim
    assert config.num_hidden_layers == 26
    model = random_model(MODEL_FOR_CAUSAL_LM_MAPPING[Gemma3TextConfig], small, "eager")
    again = random_model(MODEL_FOR_CAUSAL_LM_MAPPING[Gemma3TextConfig], small, "eager")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_skeleton_takes_no_memory_and_draws_no_global_randomness() -> None:
    model = build_skeleton(LlamaForCausalLM, CONFIG, "eager")
    large = [name for name, parameter in model.named_parameters() if not parameter.is_meta and parameter.numel() > 4096]
    assert large == []
    assert all(not buffer.is_meta for buffer in model.buffers())
    spec = match_stack(model, interleaved=False)
    assert len(spec.layers) == 12
    assert spec.layers[3].attention.num_kv_heads == 8
    assert spec.layers[3].attention.head_dim == 128


def test_fuse_says_what_differs_without_a_match() -> None:
    with pytest.raises(NoMatchError, match="Linear has no model"):
        match_stack(nn.Linear(2, 2), interleaved=False)


def test_longrope_is_decided_by_the_context_limit() -> None:
    config = Phi3Config(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=99, pad_token_id=0,
        max_position_embeddings=4096, original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    assert longrope_limit(config.rope_parameters) == 64
    positions = torch.arange(6)
    tables = {}
    for limit in (64, 4096):
        model: Any = build_skeleton(Phi3ForCausalLM, config, "eager")
        fix_frequencies(model, limit)
        (tables[limit],) = rotary_tables(model.model.rotary_emb, torch.device("cpu")).values()
        cos, sin = tables[limit](positions, torch.float32)
        # Hugging Face's module, frozen the same way, agrees
        theirs = model.model.rotary_emb(torch.zeros(1), positions[None])
        torch.testing.assert_close(torch.cat((cos, cos), -1), theirs[0][0])
        torch.testing.assert_close(torch.cat((sin, sin), -1), theirs[1][0])
    torch.testing.assert_close(tables[64].inv_freq, 4 * tables[4096].inv_freq)
    assert EquivalenceChecker(fuse=True).verdict(Phi3ForCausalLM, config).fused
