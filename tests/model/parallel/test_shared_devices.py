"""Two ranks that share their devices with other engines: slabs come and go on both, and a model that left returns with the same text."""

from pathlib import Path

import numpy as np
import pytest

from runtime.ipc.messages import DeviceShareFigures, Resize
from runtime.types import Checkpoint
from tests.support.engine_process import Engine, engine
from tests.support.families import family
from tests.support.oracle import prompts, reference

pytestmark = pytest.mark.slow

CONFIG = {
    "device": "cpu", "max_rows": 16, "max_batch_tokens": 64, "slab_bytes": 1 << 20, "num_threads": 1, "tensor_parallel": 2,
    "device_budget_bytes": 32 << 20, "shares_device": True, "debug_checks": True,
}  # fmt: skip


def resized(running: Engine, number: int, num_slabs: int, *evict: str) -> DeviceShareFigures:
    """Send a Resize and wait until it is complete."""
    running.send(Resize(number, num_slabs, evict))
    while True:
        running.wait_idle(0.05)
        if running.stats is not None and running.stats.share is not None and running.stats.share.last_resize == number:
            return running.stats.share


def test_slabs_of_two_ranks_come_and_go_together(tmp_path: Path) -> None:
    checkpoints, expected = {}, {}
    asked = [np.array(one, np.int32) for one in prompts(3, 3)]
    for seed, name in enumerate("ab"):
        model = family("llama", seed)
        model.save_pretrained(tmp_path / name)
        files = tuple(map(str, (tmp_path / name).glob("*.safetensors")))
        checkpoints[name] = Checkpoint(str(tmp_path / name), files, dtype="float32")
        expected[name] = [reference(model, one.tolist(), 16) for one in asked]
    with engine(CONFIG) as running:
        for name, checkpoint in checkpoints.items():
            running.load(name, checkpoint)
        assert resized(running, 1, 32).committed_slabs == 32
        number = 1
        for _ in range(2):
            for name in "ab":
                assert running.texts([(name, one) for one in asked], 16) == expected[name]
                number += 1
                # Its prefixes and free slabs go as well.
                assert resized(running, number, 0, "a", "b").committed_slabs == 0
                number += 1
                assert resized(running, number, 6).committed_slabs == 6
