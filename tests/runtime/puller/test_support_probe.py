"""What the engine cannot run is refused by `fit` already, with the reason that a load would give; what it can run is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig, MambaConfig, T5Config

from common.model_key import ModelSettings
from runtime.engine import support_check
from runtime.errors import LoadFailed
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.puller.progress import PullJob
from runtime.puller.support_probe import SupportProbe
from runtime.types import ModelSource
from tests.support.gguf_files import write_llama
from tests.support.llama_checkpoints import tiny_llama
from tests.support.packing import pack_here
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
    assert "config.json cannot be used" in unknown


async def test_support_probe_runs_one_process_per_configuration(tmp_path: Path) -> None:
    asked: list[int | None] = []

    def ask(folder: Path, max_model_len: int | None, job: PullJob) -> str:
        asked.append(max_model_len)
        return support_check.refusal(folder, max_model_len)

    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30), probe=SupportProbe(ask))
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
    assert await preparation.refusal(look, settings) == first
    assert asked == [None]
    await preparation.refusal(look, ModelSettings(max_model_len=32))
    assert asked == [None, 32]
    # a configuration that does not even tell its sizes is refused for what it is, not for a missing word
    written(mamba, MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))
    with pytest.raises(LoadFailed, match="MambaForCausalLM is not supported"):
        await preparation.look(ModelSource(str(mamba), None, {}), settings, "cpu")
    preparation.close()


def clamped(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.attention.clamp_kqv", 5.0)


def biased(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"change": clamped}, "llama.attention.clamp_kqv = 5.0"),
        ({"change": biased}, "unexpected tensors, which LlamaForCausalLM does not compute with: blk.0.attn_q.bias"),
        ({"pre": "unheard-of"}, "tokenizer"),
    ],
)
async def test_refusal_of_a_gguf_file_is_that_of_its_load(
    tmp_path: Path, options: dict[str, Callable[[gguf.GGUFWriter], None]], reason: str
) -> None:
    def ask(folder: Path, max_model_len: int | None, job: PullJob) -> str:
        return support_check.refusal(folder, max_model_len)

    write_llama(tiny_llama(tmp_path / "model"), tmp_path / "m.gguf", **options)  # type: ignore[arg-type]
    source, settings = ModelSource(str(tmp_path / "m.gguf")), ModelSettings()
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30), pack_here, SupportProbe(ask))
    try:
        refusal = await preparation.refusal(await preparation.look(source, settings, "cpu"), settings)
        assert reason in refusal
        if not reason:
            assert not refusal
            return
        with pytest.raises(LoadFailed) as caught:
            await preparation.prepare(source, settings, "cpu", lambda progress: None)
        assert caught.value.detail == refusal
    finally:
        preparation.close()
