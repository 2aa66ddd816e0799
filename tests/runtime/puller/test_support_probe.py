"""What the engine can't run is refused by `fit` already, with the reason that a load would give; what it can run isn't."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MambaConfig, T5Config

from common.model_key import ModelSettings
from runtime.engine import support_check
from runtime.errors import LoadFailed
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import OPEN

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def written(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str)
    )
    return folder


def test_refusal_names_the_reason(tmp_path: Path) -> None:
    assert support_check.refusal(written(tmp_path, LlamaConfig(**TINY, architectures=["LlamaForCausalLM"])), None) == ""
    assert "max_model_len 5000" in support_check.refusal(
        written(tmp_path, LlamaConfig(**TINY, max_position_embeddings=128)), 5000
    )
    assert "recurrent state" in support_check.refusal(
        written(tmp_path, MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)), None
    )
    assert "not a causal language model" in support_check.refusal(
        written(tmp_path, T5Config(d_model=32, num_layers=2)), None
    )
    unknown = support_check.refusal(
        written(tmp_path, {"model_type": "quux", "architectures": ["QuuxForCausalLM"]}), None
    )
    assert "config.json can't be used" in unknown
    (tmp_path / "no.gguf").write_bytes(b"GGUF and nothing more")
    assert "no.gguf can't be read" in support_check.refusal(tmp_path / "no.gguf", None)


async def test_support_probe_runs_one_process_per_configuration(tmp_path: Path) -> None:
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    settings = ModelSettings()
    mamba = tmp_path / "mamba"
    tiny_llama(mamba)
    written(
        mamba,
        {
            **TINY,
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "auto_map": {},
            "max_position_embeddings": 64,
        },
    )
    look = await preparation.look(ModelSource(str(mamba), None, {}), settings, "cpu")
    first = await preparation.refusal(look, settings)
    assert "MambaForCausalLM is not supported: it keeps a recurrent state" in first
    preparation._judge._answers[next(iter(preparation._judge._answers))] = "remembered"
    assert await preparation.refusal(look, settings) == "remembered"
    # a configuration that doesn't even tell its sizes is refused for what it is, not for a missing word
    written(mamba, MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))
    with pytest.raises(LoadFailed, match="MambaForCausalLM is not supported"):
        await preparation.look(ModelSource(str(mamba), None, {}), settings, "cpu")
    preparation.close()
