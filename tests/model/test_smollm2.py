"""A real model, SmolLM2-135M-Instruct: fp32 text equal to transformers' `generate`, quantised log-probabilities beside transformers with bitsandbytes.

The engine runs as a process; both sides read the weights that the packer made of the GGUF file.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from common.model_key import ModelSettings, Quantization
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.types import Checkpoint, ModelSource
from tests.support.engine_process import Engine, engine
from tests.support.packing import pack_here
from tests.support.smollm2 import gguf_path
from tests.support.sources import OPEN

PROMPTS = (
    "What is the capital of France? Answer in one short sentence.",
    "Write a short poem about a theatre that plays a different piece every night.",
    "Explain, step by step, how to boil an egg.",
)
NEW_TOKENS = 24
# The tests of the packer, of the kernels and of tiny models compare int8 and FP4, which differs from NF4 in a table, with bitsandbytes, too.
QUANTISED = (
    Quantization.NF4,
    *(pytest.param(name, marks=pytest.mark.long) for name in (Quantization.INT8, Quantization.FP4)),
)

pytestmark = pytest.mark.slow

# Teacher-forced differences of the tokens' log-probabilities, in nats.
# The largest, against fp32 arithmetic on the numbers that bitsandbytes dequantises to: ours is fp32 too (int8's activations stay unrounded on a CPU).
EPSILON = 2e-3
# The median, against bitsandbytes' own CPU layers, which round inside (4 bit: 2e-3 a layer; int8 without outliers apart: activations, by far the most).
EPSILON_BITSANDBYTES = {Quantization.INT8: 0.3, Quantization.NF4: 0.02, Quantization.FP4: 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def packed(folder: Path) -> Callable[[Quantization], Checkpoint]:
    """Packs the model as `repertory register` would have it, once for each quantisation."""
    cache = Cache(folder / "cache", 4 << 30)

    async def prepare(settings: ModelSettings) -> Checkpoint:
        preparation = CheckpointPreparer(OPEN, cache, pack_here)
        prepared = await preparation.prepare(ModelSource(str(gguf_path())), settings, "cpu", lambda progress: None)
        preparation.close()
        return prepared.checkpoint

    return lambda quantization: asyncio.run(prepare(ModelSettings(quantize=quantization, max_model_len=1024)))


@pytest.fixture(scope="module")
def running() -> Iterator[Engine]:
    with engine({"device": "cpu", "device_budget_bytes": 2 << 30, "debug_checks": True}) as process:
        yield process


@pytest.fixture(scope="module")
def oracle(packed: Callable[[Quantization], Checkpoint], folder: Path) -> Path:
    """The same fp32 weights as a Hugging Face folder."""
    checkpoint = packed(Quantization.NONE)
    assert checkpoint.packed_file is not None
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.model_dir), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(load_file(checkpoint.packed_file), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    model.save_pretrained(folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def prompts(packed: Callable[[Quantization], Checkpoint]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(f"{packed(Quantization.NONE).model_dir}/tokenizer.json")
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in PROMPTS]
    return [tokenizer.encode(chat, add_special_tokens=False).ids for chat in chats]


def test_fp32_text_is_transformers_own(
    running: Engine, packed: Callable[[Quantization], Checkpoint], oracle: Path, prompts: list[list[int]]
) -> None:
    running.load("smol", packed(Quantization.NONE), max_model_len=1024)
    ours = running.texts([("smol", np.array(ids, np.int32)) for ids in prompts], NEW_TOKENS)
    running.unload("smol")
    model = AutoModelForCausalLM.from_pretrained(oracle, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for ids, text in zip(prompts, ours, strict=True):
        batch = torch.tensor([ids])
        with torch.inference_mode():
            expected = model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )
        assert text == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("quantization", QUANTISED)
def test_quantised_log_probabilities_are_bitsandbytes(
    running: Engine,
    packed: Callable[[Quantization], Checkpoint],
    oracle: Path,
    prompts: list[list[int]],
    quantization: Quantization,
) -> None:
    if quantization is Quantization.INT8:
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization.value, bnb_4bit_compute_dtype=torch.float32
        )
    theirs = AutoModelForCausalLM.from_pretrained(
        oracle, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    exact = AutoModelForCausalLM.from_pretrained(oracle, dtype=torch.float32)
    for name, layer in theirs.named_modules():
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            exact.get_submodule(name).weight.data = dequantised(layer)
    running.load("smol", packed(quantization), max_model_len=1024)
    ours = running.prompt_logprobs([("smol", np.array(ids, np.int32)) for ids in prompts])
    running.unload("smol")
    for ids, scores in zip(prompts, ours, strict=True):
        assert differences(exact, ids, scores).max() < EPSILON
        assert differences(theirs, ids, scores).median() < EPSILON_BITSANDBYTES[quantization]


def dequantised(layer: Any) -> torch.Tensor:
    """What bitsandbytes' codes stand for, in fp32."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        values: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return values.to(torch.float32)
    scale: torch.Tensor = weight.SCB if weight.SCB is not None else layer.state.SCB
    codes: torch.Tensor = weight.data
    return codes.to(torch.float32) * (scale.to(torch.float32) / 127)[:, None]


def differences(model: torch.nn.Module, ids: list[int], scores: list[float]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].float()
    expected: torch.Tensor = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return (torch.tensor(scores) - expected).abs()
