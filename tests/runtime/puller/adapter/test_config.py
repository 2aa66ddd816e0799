"""adapter_config.json: what PEFT writes is read as PEFT reads it, and what would change the computation is refused by name."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from runtime.errors import LoadFailed
from runtime.puller.adapter.config import parse_adapter_config

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 32}


def test_parse_adapter_config_scales_by_alpha_over_rank() -> None:
    assert parse_adapter_config(PLAIN).scaling_of("model.layers.0.self_attn.q_proj") == 4.0


def test_parse_adapter_config_stabilised_rank_scales_by_its_root() -> None:
    assert parse_adapter_config({**PLAIN, "use_rslora": True}).scaling_of("q_proj") == 32 / math.sqrt(8)


@given(
    st.dictionaries(st.sampled_from(["q_proj", "layers.1.self_attn.q_proj", r"layers.\d.mlp.up_proj", "proj"]), st.integers(1, 64)),
    st.sampled_from(["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.1.proj", "x_proj"]),
)  # fmt: skip
def test_patterns_match_as_pefts(patterns: dict[str, int], module: str) -> None:
    config = parse_adapter_config({**PLAIN, "rank_pattern": patterns, "alpha_pattern": patterns})
    key = get_pattern_key(list(patterns), module)
    assert config.rank_of(module) == patterns.get(key, 8)
    assert config.scaling_of(module) == patterns.get(key, 32) / patterns.get(key, 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights 'mica'"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"use_something_new": True}, "use_something_new, which this version does not know"),
        ({"r": 0}, "r is '0'"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
        ({"rank_pattern": [1]}, "rank_pattern is list"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\.q_proj is '-1'"),
        ({"alpha_pattern": {"(": 1}}, "is not valid"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "may take too long"),
        ({"alpha_pattern": {".*.*.*x": 1}}, "may take too long"),
        ({"alpha_pattern": {"a" * 513: 1}}, "may take too long"),
    ],
)
def test_parse_adapter_config_refuses_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LoadFailed, match=named):
        parse_adapter_config({**PLAIN, **changes})


def test_parse_adapter_config_ignores_options_of_the_training() -> None:
    written = json.loads(
        '{"lora_dropout": 0.1, "target_modules": "all-linear", "layers_to_transform": [1], "init_lora_weights": "gaussian"}'
    )
    assert parse_adapter_config({**PLAIN, **written}).rank == 8
