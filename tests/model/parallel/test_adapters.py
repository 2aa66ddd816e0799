"""LoRA adapters over a base that several ranks on a CPU share give the text of PEFT's forward pass."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from common.model_key import Quantization
from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.types import Checkpoint
from tests.model.test_adapters import packed_adapter
from tests.support.adapters import peft_model, save_adapter
from tests.support.engine_process import Engine, engine
from tests.support.llama_checkpoints import tiny_llama
from tests.support.oracle import prompts, reference
from tests.support.steps import save
from tests.support.tiny_models import tiny

MAX_NEW = 12
# Room for two adapters on the device, so that a third one evicts another.
CONFIG = {
    "device": "cpu", "max_rows": 16, "max_batch_tokens": 64, "slab_bytes": 1 << 18, "device_budget_bytes": 256 << 18, "num_threads": 1,
    "max_adapters": 2,
}  # fmt: skip
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Engine]:
    """Two ranks, which several tests load their models on."""
    with engine({**CONFIG, "tensor_parallel": 2}) as running:
        yield running


@contextmanager
def loaded(running: Engine, base: Checkpoint, adapters: dict[str, Checkpoint]) -> Iterator[None]:
    running.load("base", base)
    for name, checkpoint in adapters.items():
        running.load(name, checkpoint, adapter_of="base")
    yield
    for name in (*adapters, "base"):
        running.unload(name)


def texts(running: Engine, asks: list[tuple[str, list[int]]]) -> list[list[int]]:
    return running.texts([(model_id, np.array(prompt, np.int32)) for model_id, prompt in asks], MAX_NEW)


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        ("llama", 2, {"r": 8}),
        ("llama", 2, {"r": 4, "rank_pattern": {"o_proj": 20, "down_proj": 2}, "layers_to_transform": [1]}),
        pytest.param("qwen3", 4, {"r": 8}, id="one KV head on four ranks"),
        pytest.param("phi3", 2, {"r": 8, "target_modules": FUSED}, id="fused qkv and gate-up"),
    ],
)
def test_text_of_several_ranks_is_pefts(
    name: str, ranks: int, options: dict[str, Any], pair: Engine, tmp_path: Path
) -> None:
    """Three adapters and their base in one batch, again after all were evicted in turn."""
    base = tiny(name)
    oracles: dict[str, PreTrainedModel | PeftModel] = {"base": base}
    packed = {}
    for seed in (1, 2, 3):
        oracles[f"a{seed}"] = wrapped = peft_model(tiny(name), seed=seed, **options)
        packed[f"a{seed}"] = packed_adapter(
            save_adapter(wrapped, tmp_path / f"peft-{seed}"), tmp_path / f"packed-{seed}"
        )
    asks = [(model_id, prompt) for prompt in prompts(3, 4) for model_id in oracles]
    random.Random(0).shuffle(asks)
    expected = [reference(oracles[model_id], prompt, MAX_NEW) for model_id, prompt in asks]
    with ExitStack() as stack:
        running = pair if ranks == 2 else stack.enter_context(engine({**CONFIG, "tensor_parallel": ranks}))
        stack.enter_context(loaded(running, save(base, tmp_path / "base"), packed))
        for _ in range(2):
            assert texts(running, asks) == expected


@pytest.fixture(scope="module")
def single() -> Iterator[Engine]:
    """One rank, whose texts are those that several must give."""
    with engine(CONFIG) as running:
        yield running


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4, Quantization.FP8])
def test_adapters_over_quantised_weights_on_two_ranks_give_the_text_of_one(
    quantization: Quantization, single: Engine, pair: Engine, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "m", hidden=256)
    (tmp_path / "out").mkdir()
    files = tuple(map(str, (tmp_path / "m").glob("*.safetensors")))
    pack(
        PackRequest("safetensors", str(tmp_path / "m"), files, str(tmp_path / "out"), "test", quantization),
        lambda _: None,
    )
    packed = str(tmp_path / "out" / PACKED_NAME)
    checkpoint = Checkpoint(str(tmp_path / "out"), (), packed, quantization, "float32")
    wrapped = peft_model(model, r=8, spread=0.1)
    adapter = packed_adapter(save_adapter(wrapped, tmp_path / "peft"), tmp_path / "adapter")
    found = []
    for running in (single, pair):
        with loaded(running, checkpoint, {"tuned": adapter}):
            found.append(texts(running, [(name, prompt) for prompt in prompts(5, 3) for name in ("base", "tuned")]))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_adapter_that_does_not_fit_fails_on_all_ranks_and_leaves_the_engine_running(
    pair: Engine, tmp_path: Path
) -> None:
    wrapped = peft_model(tiny("llama"), seed=1, r=8)
    good = packed_adapter(save_adapter(wrapped, tmp_path / "peft"), tmp_path / "packed")
    other = packed_adapter(save_adapter(peft_model(tiny("qwen3"), r=8), tmp_path / "other"), tmp_path / "packed-other")
    prompt = prompts(3, 1)[0]
    with loaded(pair, save(tiny("llama"), tmp_path / "base"), {"right": good}):
        with pytest.raises(RuntimeError, match="it was trained on another base"):
            pair.load("wrong", other, adapter_of="base")
        assert texts(pair, [("right", prompt)]) == [reference(wrapped, prompt, MAX_NEW)]
