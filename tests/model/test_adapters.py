"""Adapters over real tiny models: greedy text and log-probabilities are those of PEFT's own forward pass, whatever the batch and the base's format."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from common.model_key import Quantization
from runtime.errors import LoadFailed
from runtime.puller.adapter.files import inspect_adapter
from runtime.puller.adapter.packing import pack_adapter
from runtime.puller.pack.quantize import quantize
from runtime.puller.progress import PullJob
from runtime.types import Checkpoint, GenerationRequest, LogprobParams, SamplingParams, StopParams
from tests.model.build.test_quantized import model_of, pack, quantized_linears, with_bitsandbytes
from tests.support.adapters import peft_model, save_adapter
from tests.support.oracle import prompts, reference
from tests.support.real_engine import RealEngine
from tests.support.steps import packed, save
from tests.support.tiny_models import tiny

MAX_NEW = 12
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# how PEFT names the modules of each family, and options that leave other traces in the file
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, all seven": ("llama", {"r": 8, "lora_alpha": 16}),
    "llama, rank and alpha patterns": ("llama", {"r": 4, "rank_pattern": {"q_proj": 20, "down_proj": 2}, "alpha_pattern": {"v_proj": 16}}),
    "llama, rslora": ("llama", {"r": 8, "use_rslora": True}),
    "llama, all-linear": ("llama", {"r": 8, "target_modules": "all-linear"}),
    "llama, one layer": ("llama", {"r": 8, "layers_to_transform": [1]}),
    "llama, regex": ("llama", {"r": 8, "target_modules": r".*\.[02]\.(self_attn\.q_proj|mlp\.up_proj)"}),
    "qwen3": ("qwen3", {"r": 8}),
    "gemma3": ("gemma3", {"r": 8}),
    "granite": ("granite", {"r": 8}),
    "phi3, fused qkv and gate-up": ("phi3", {"r": 8, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "neox, unfused": ("neox", {"r": 8, "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}),
    "mixtral, attention of an unfused mixture of experts": ("mixtral", {"r": 8, "target_modules": ATTENTION}),
}  # fmt: skip


def packed_adapter(folder: Path, out: Path, dtype: str = "float32") -> Checkpoint:
    """The adapter in `folder` as the puller hands it over."""
    out.mkdir(parents=True)
    pack_adapter(inspect_adapter(folder, 256), dtype, out, PullJob(lambda progress: None))
    return Checkpoint(str(out), packed_file=str(out / "packed.safetensors"), dtype=dtype)


def greedy(prompt: list[int], max_new: int = MAX_NEW) -> GenerationRequest:
    stop = StopParams(max_new, ignore_eos=True)
    return GenerationRequest(prompt=tuple(prompt), sampling=SamplingParams(temperature=0.0), stop=stop)


@pytest.fixture
def engine() -> Iterator[RealEngine]:
    made = RealEngine()
    yield made
    made.close()


def tuned(name: str, folder: Path, seed: int, **options: Any) -> tuple[PeftModel, Checkpoint]:
    """A PEFT model over a fresh copy of the family, and its packed adapter."""
    wrapped = peft_model(tiny(name), seed=seed, **options)
    return wrapped, packed_adapter(save_adapter(wrapped, folder / f"peft-{seed}"), folder / f"packed-{seed}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_text_is_that_of_pefts_forward(case: tuple[str, dict[str, Any]], tmp_path: Path, engine: RealEngine) -> None:
    """Two adapters and the base in one batch; prompts are cut into chunks by the token budget."""
    name, options = case
    base = tiny(name)
    engine.load("base", save(base, tmp_path / "base"))
    oracles: dict[str, PreTrainedModel | PeftModel] = {"base": base}
    for seed in (1, 2):
        oracles[f"a{seed}"], checkpoint = tuned(name, tmp_path, seed, **options)
        engine.load(f"a{seed}", checkpoint, "base")
    asks = [(model_id, prompt) for prompt in prompts(3, 4) for model_id in oracles]
    random.Random(0).shuffle(asks)
    found = engine.texts([(model_id, greedy(prompt)) for model_id, prompt in asks])
    assert found == [reference(oracles[model_id], prompt, MAX_NEW) for model_id, prompt in asks]
    assert len({tuple(text) for text in found}) > len(found) // 2


def test_text_survives_preemption_prefix_hits_and_eviction(tmp_path: Path) -> None:
    """Memory for a few rows only, one slot of adapters fewer than adapters, and prompts that share beginnings.

    How many rows run beside each other while adapters are swapped in depends on the machine's load. Only the long rows of the base, which follow,
    need more memory than there is in any case.
    """
    engine = RealEngine(slab_bytes=1 << 16, device_budget_bytes=14 << 16, max_adapters=2, max_rows=8)
    base = tiny("llama")
    engine.load("base", save(base, tmp_path / "base"))
    oracles: dict[str, PreTrainedModel | PeftModel] = {"base": base}
    for seed in (1, 2, 3):
        oracles[f"a{seed}"], checkpoint = tuned("llama", tmp_path, seed, r=8)
        engine.load(f"a{seed}", checkpoint, "base")
    rng = random.Random(5)
    stem = [rng.randrange(190) for _ in range(60)]
    asks = [(rng.choice(sorted(oracles)), [*stem[: rng.choice((17, 40, 60))], rng.randrange(190)]) for _ in range(16)]
    requests = [(model_id, greedy(prompt, 40)) for model_id, prompt in asks]
    expected = [reference(oracles[model_id], prompt, 40) for model_id, prompt in asks]
    for _ in range(2):
        assert engine.texts(requests) == expected
    long = [[rng.randrange(190) for _ in range(90)] for _ in range(8)]
    found = engine.texts([("base", greedy(prompt, 160)) for prompt in long])
    assert found == [reference(base, prompt, 160) for prompt in long]
    figures = {each.model_id: each for each in engine.loop.table.stats().models}
    assert sum(figures[f"a{seed}"].evictions_total for seed in (1, 2, 3)) > 0
    assert figures["base"].preemptions_total > 0
    assert figures["base"].prefix_hit_tokens_total > 0
    engine.close()


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.FP4, Quantization.INT8, Quantization.FP8])
def test_log_probabilities_over_a_quantised_base(
    kind: str, quantization: Quantization, tmp_path: Path, engine: RealEngine
) -> None:
    """Teacher-forced: PEFT wraps bitsandbytes' own layers, quantised by them, and for fp8 layers of the dequantised weights."""
    model = model_of(kind)
    checkpoint = save(model, tmp_path / "base")
    pack(model, tmp_path / "packed-base", quantization, kernel_layout=False)
    engine.load("base", packed(checkpoint, tmp_path / "packed-base", quantization))
    targets = ATTENTION if kind == "llama" else ["q_proj", "v_proj", "dense", "fc1", "fc2"]
    plain = peft_model(model_of(kind), r=8, target_modules=targets, spread=0.1)
    engine.load("tuned", packed_adapter(save_adapter(plain, tmp_path / "peft"), tmp_path / "packed"), "base")
    oracle = dequantised(kind) if quantization is Quantization.FP8 else with_bitsandbytes(model_of(kind), quantization)
    # In evaluation mode bitsandbytes computes in bfloat16 on a CPU. There is no dropout that training mode would switch on.
    with_adapter = PeftModel.from_pretrained(oracle, tmp_path / "peft").train()
    prompt = prompts(4, 1)[0] + list(range(40))
    found = scored(engine, "tuned", prompt)
    expected, without = log_probabilities(with_adapter, prompt), log_probabilities(model, prompt)
    tolerance = 0.1 if quantization is Quantization.INT8 else 1e-4  # theirs rounds activations through float16
    assert found == pytest.approx(expected, abs=tolerance)
    assert max(abs(a - b) for a, b in zip(without, expected, strict=True)) > 0.5


def dequantised(kind: str) -> PreTrainedModel:
    """The model with the values that its fp8 weights stand for."""
    model = model_of(kind)
    with torch.no_grad():
        for name in quantized_linears(model):
            weight = model.get_submodule(name).weight
            made = quantize(weight, Quantization.FP8, double_quant=False)
            weight.copy_(made.weight.float() * made.scale[:, None])
    return model


def scored(engine: RealEngine, model_id: str, prompt: list[int]) -> list[float]:
    """The engine's log-probability of each of the prompt's tokens but the first."""
    request = GenerationRequest(
        prompt=tuple(prompt), sampling=SamplingParams(temperature=0.0), stop=StopParams(1), logprobs=LogprobParams(prompt=0),
    )  # fmt: skip
    [rows] = engine.run([(model_id, request)])
    return [entry.logprob for row in rows for entry in row.prompt_logprobs or () if entry is not None]


def log_probabilities(model: PreTrainedModel | PeftModel, prompt: list[int]) -> list[float]:
    """An oracle's log-probability of each of the prompt's tokens but the first."""
    with torch.inference_mode():
        scores = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    return [float(scores[place - 1, token]) for place, token in enumerate(prompt) if place]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize(
    ("quantization", "tolerance"), [(Quantization.NONE, 0.04), (Quantization.INT8, 0.1), (Quantization.FP8, 0.2)]
)
def test_log_probabilities_over_a_base_on_a_gpu(
    kind: str, quantization: Quantization, tolerance: float, tmp_path: Path
) -> None:
    """Teacher-forced in bf16: the kernels of 8-bit weights quantise the activations, too."""
    model = model_of(kind)
    checkpoint = msgspec.structs.replace(save(model.to(torch.bfloat16), tmp_path / "base"), dtype="bfloat16")
    if quantization is not Quantization.NONE:
        pack(model, tmp_path / "packed-base", quantization, kernel_layout=False)
        checkpoint = packed(checkpoint, tmp_path / "packed-base", quantization)
    targets = ATTENTION if kind == "llama" else ["q_proj", "v_proj", "dense", "fc1", "fc2"]
    oracle = peft_model(model_of(kind), r=8, target_modules=targets, spread=0.1)
    adapter = packed_adapter(save_adapter(oracle, tmp_path / "peft"), tmp_path / "packed", "bfloat16")
    engine = RealEngine(device="cuda", slab_bytes=1 << 21, device_budget_bytes=128 << 20)
    try:
        engine.load("base", checkpoint)
        engine.load("tuned", adapter, "base")
        prompt = prompts(4, 1)[0] + list(range(40))
        found, plain = scored(engine, "tuned", prompt), scored(engine, "base", prompt)
    finally:
        engine.close()
    expected = log_probabilities(oracle, prompt)
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    effects = [abs(a - b) for a, b in zip(plain, expected, strict=True)]
    assert sum(differences) / len(differences) < tolerance
    assert sum(effects) / len(effects) > 0.4


@pytest.mark.gpu
def test_log_probabilities_of_decoded_tokens_on_a_gpu(tmp_path: Path) -> None:
    """Teacher-forced in bf16: rows of two adapters and the base decode together, without graphs and with them."""
    model = model_of("llama")
    checkpoint = msgspec.structs.replace(save(model.to(torch.bfloat16), tmp_path / "base"), dtype="bfloat16")
    oracles: dict[str, PreTrainedModel | PeftModel] = {"base": model_of("llama")}
    engine = RealEngine(device="cuda", slab_bytes=1 << 21, device_budget_bytes=128 << 20)
    differences, effects = [], []
    try:
        engine.load("base", checkpoint)
        for seed in (1, 2):
            oracles[f"a{seed}"] = peft_model(model_of("llama"), r=8, seed=seed, spread=0.1)
            folder = save_adapter(oracles[f"a{seed}"], tmp_path / f"peft-{seed}")
            engine.load(f"a{seed}", packed_adapter(folder, tmp_path / f"packed-{seed}", "bfloat16"), "base")
        asks = [(model_id, prompt) for prompt in prompts(4, 2) for model_id in oracles]
        for _ in range(3):
            while engine.loop.idle():
                pass  # It captures graphs.
            request = [
                (
                    model_id,
                    GenerationRequest(
                        prompt=tuple(prompt),
                        sampling=SamplingParams(temperature=0.0),
                        stop=StopParams(MAX_NEW, ignore_eos=True),
                        logprobs=LogprobParams(generated=0),
                    ),
                )
                for model_id, prompt in asks
            ]
            for (model_id, prompt), rows in zip(asks, engine.run(request), strict=True):
                tokens = [token for row in rows for token in row.tokens]
                found = [entry.logprob for row in rows for entry in row.logprobs or ()]
                scores = log_probabilities(oracles[model_id], [*prompt, *tokens])[-len(tokens) :]
                plain = log_probabilities(oracles["base"], [*prompt, *tokens])[-len(tokens) :]
                differences += [abs(a - b) for a, b in zip(found, scores, strict=True)]
                effects += [abs(a - b) for a, b in zip(plain, scores, strict=True)] if model_id != "base" else []
    finally:
        engine.close()
    assert sum(differences) / len(differences) < 0.04
    assert sum(effects) / len(effects) > 0.4


def test_merged_weights_give_the_same_text(tmp_path: Path, engine: RealEngine) -> None:
    """PEFT's merge-and-unload is a second oracle."""
    engine.load("base", save(tiny("llama"), tmp_path / "base"))
    wrapped, checkpoint = tuned("llama", tmp_path, 1, r=8)
    engine.load("a1", checkpoint, "base")
    merged: Any = wrapped.merge_and_unload()
    asks = prompts(7, 5)
    assert engine.texts([("a1", greedy(prompt)) for prompt in asks]) == [reference(merged, p, MAX_NEW) for p in asks]


@pytest.mark.parametrize(
    ("base", "name", "options", "reason"),
    [
        ("qwen3", "llama", {"r": 8}, r"matrices of 48 inputs and 24 outputs for model\.layers\.0\.self_attn\.k_proj; the base has 48 and 16"),
        ("llama", "phi3", {"r": 8, "target_modules": ["qkv_proj"]}, r"changes model\.layers\.0\.self_attn\.qkv_proj, which is not a linear layer"),
        ("llama", "gemma3", {"r": 8, "target_modules": ["q_proj"]}, "it was trained on another base"),
    ],
)  # fmt: skip
def test_adapter_of_another_base_is_refused_by_name(
    base: str, name: str, options: dict[str, Any], reason: str, tmp_path: Path, engine: RealEngine
) -> None:
    engine.load("base", save(tiny(base), tmp_path / "base"))
    _, checkpoint = tuned(name, tmp_path, 1, **options)
    with pytest.raises(LoadFailed, match=reason):
        engine.load("a1", checkpoint, "base")
    assert engine.texts([("base", greedy([1, 2, 3]))]) == [reference(tiny(base), [1, 2, 3], MAX_NEW)]


def test_adapter_packed_in_another_type_is_refused(tmp_path: Path, engine: RealEngine) -> None:
    engine.load("base", save(tiny("llama"), tmp_path / "base"))
    wrapped = peft_model(tiny("llama"), r=8)
    checkpoint = packed_adapter(save_adapter(wrapped, tmp_path / "peft"), tmp_path / "packed", "bfloat16")
    with pytest.raises(
        LoadFailed, match=r"is torch\.bfloat16 in the packed adapter, the base computes in torch\.float32"
    ):
        engine.load("a1", checkpoint, "base")


def test_adapter_file_that_is_truncated_later_fails_its_requests_alone(tmp_path: Path) -> None:
    """It was whole when it was loaded; it is read again after an eviction."""
    engine = RealEngine(max_adapters=1)
    engine.load("base", save(tiny("llama"), tmp_path / "base"))
    for seed in (1, 2):
        _, checkpoint = tuned("llama", tmp_path, seed, r=8)
        engine.load(f"a{seed}", checkpoint, "base")
    engine.texts([("a1", greedy([1, 2]))])
    file = tmp_path / "packed-2" / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(AssertionError, match="is truncated"):
        engine.texts([("a2", greedy([1, 2]))])
    assert len(engine.texts([("a1", greedy([1, 2]))])[0]) == MAX_NEW
    engine.close()
