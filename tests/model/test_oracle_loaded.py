"""Greedy text of models as the engine loads them (fused, quantised or not, evicted and brought back) is transformers' own."""

from pathlib import Path

import pytest
import torch

from runtime.config.schema import EngineConfig
from runtime.engine.device.backend import EngineBackend, make_backend
from runtime.engine.interfaces import LoadRequest, LoadResult
from runtime.errors import LoadFailed
from runtime.types import Checkpoint
from tests.support.driving import Ask, Pages, RunnerDriver, pages_of
from tests.support.families import family
from tests.support.oracle import prompts, reference

MAX_ROWS, MAX_TOKENS, KV_SLABS = 6, 64, 12


def load(backend: EngineBackend, folder: Path, dtype: str = "float32") -> LoadResult:
    files = tuple(str(file) for file in folder.glob("*.safetensors"))
    return backend.load(LoadRequest(folder.name, Checkpoint(str(folder), files, dtype=dtype), None)).result()


def bring_in(loaded: LoadResult, first_slab: int) -> Pages:
    """Weights and KV mapped on slabs from `first_slab` on; the weights may still be coming when this returns."""
    memory = loaded.memory
    memory.swap_in(range(first_slab, first_slab + memory.weight_slabs))
    for index in range(KV_SLABS):
        memory.map_kv(index, first_slab + memory.weight_slabs + index)
    return pages_of(memory.kv, KV_SLABS)


def send_away(loaded: LoadResult) -> None:
    for index in range(KV_SLABS):
        loaded.memory.unmap_kv(index)
    loaded.memory.evict()


@pytest.fixture
def backend() -> EngineBackend:
    return make_backend(
        EngineConfig(
            device="cpu",
            max_rows=MAX_ROWS,
            max_batch_tokens=MAX_TOKENS,
            slab_bytes=1 << 20,
            device_budget_bytes=256 << 20,
        )
    )


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "gemma3",
        "gpt2",
        "neox",
        "phi",
        "granite",
        "mixtral",
        "gemma2",
        "olmo2",
        "cohere2",
        "starcoder2",
        "gpt_oss",
    ],
)
def test_greedy_text_of_a_loaded_model_before_and_after_an_eviction(
    name: str, tmp_path: Path, backend: EngineBackend
) -> None:
    model = family(name)
    model.save_pretrained(tmp_path / name)
    asks = [Ask(prompt, 16) for prompt in prompts(5, 7)]
    expected = [reference(model, ask.prompt, ask.max_new) for ask in asks]
    loaded = load(backend, tmp_path / name)
    for first_slab, seed in ((0, 1), (100, 2)):
        pages = bring_in(loaded, first_slab)
        driver = RunnerDriver(loaded.runner, pages, seed=seed, chaos=True, max_rows=MAX_ROWS, max_tokens=MAX_TOKENS)
        assert [answer.tokens for answer in driver.run(asks)] == expected, loaded.runner.facts.path
        send_away(loaded)
    loaded.runner.close()
    loaded.memory.close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("falcon", "its code has no attention hook"), ("deepseek_v2", "keys of 8 and values of 16 channels")],
)
def test_load_refuses_a_family_that_cannot_run(name: str, reason: str, tmp_path: Path, backend: EngineBackend) -> None:
    family(name).save_pretrained(tmp_path / name)
    with pytest.raises(LoadFailed, match=rf"model {name}: \w+ForCausalLM is not supported: .*{reason}"):
        load(backend, tmp_path / name)


def test_loaded_models_take_turns(tmp_path: Path, backend: EngineBackend) -> None:
    """Each over the same row slots; one leaves and comes back while the other runs."""
    models = [family("llama", seed=1), family("gemma3", seed=2)]
    asks = [Ask(prompt, 10) for prompt in prompts(6, 4)]
    drivers = []
    for index, model in enumerate(models):
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        loaded = load(backend, folder)
        pages = bring_in(loaded, 100 * index)
        drivers.append(
            (
                loaded,
                RunnerDriver(loaded.runner, pages, seed=index, chaos=True, max_rows=MAX_ROWS, max_tokens=MAX_TOKENS),
            )
        )
    turns = [driver.start(asks) for _, driver in drivers]
    torch.manual_seed(0)
    while not all(turn.finished for turn in turns):
        for (_, driver), turn in zip(drivers, turns, strict=True):
            driver.turn(turn, close_all=True)
        if len(turns[0].rows[0].said) == 5:
            send_away(drivers[0][0])
            bring_in(drivers[0][0], 0)
    for model, turn in zip(models, turns, strict=True):
        assert [answer.tokens for answer in turn.answers()] == [
            reference(model, ask.prompt, ask.max_new) for ask in asks
        ]
