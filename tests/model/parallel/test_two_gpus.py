"""Two GPUs give the text of one: eager steps, CUDA graphs with their collective operations, and after eviction and return."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.types import Checkpoint
from tests.support.engine_process import Engine, engine
from tests.support.llama_checkpoints import tiny_llama
from tests.support.oracle import prompts

CONFIG = {
    "device": "cuda:0",
    "max_rows": 16,
    "max_batch_tokens": 64,
    "slab_bytes": 2 << 20,
    "host_budget_bytes": 256 << 20,
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def run(folder: Path, ranks: int, use: Callable[[Engine], list[list[int]]], slabs: int = 64) -> list[list[int]]:
    config = {**CONFIG, "tensor_parallel": ranks, "device_budget_bytes": slabs * (2 << 20)}
    with engine(config) as running:
        for name in ("a", "b"):
            files = tuple(map(str, (folder / name).glob("*.safetensors")))
            running.load(name, Checkpoint(str(folder / name), files, dtype="float32"))
        return use(running)


@pytest.mark.parametrize("slabs", [64, 6], ids=["both fit", "one fits"])
def test_text_of_two_gpus_equals_that_of_one(slabs: int, tmp_path: Path) -> None:
    """The second round replays the graphs that idle turns captured after the first. float32, so that sums in another order make no difference."""
    for seed, name in enumerate("ab"):
        tiny_llama(tmp_path / name, hidden=256, seed=seed)
    asked = [("ab"[at % 2], np.array(ids, np.int32)) for at, ids in enumerate(prompts(3, 8))]

    def texts(running: Engine) -> list[list[int]]:
        rounds = []
        for _ in range(3):
            rounds += running.texts(asked, 24)
            running.wait_idle(2.0)
        return rounds

    assert run(tmp_path, 2, texts, slabs) == run(tmp_path, 1, texts, slabs)
