"""The loop through random lives on the fake backend: texts must not change, nothing may leak, every request must end."""

import random

import pytest

from runtime.engine.interfaces import KvGeometry
from runtime.types import FinishReason
from tests.support.engine_stage import Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec
from tests.support.random_life import run_life, seeds_of_long_runs


# 32: models without KV room once preempted each other in turns
@pytest.mark.parametrize("seed", [*range(8), 32, *seeds_of_long_runs(8, 16)])
def test_loop_random_life(seed: int) -> None:
    stage = run_life(seed, 500)
    stage.check_all()
    ended = [answer.finish for answer in stage.answers.values()]
    assert ended.count(FinishReason.LENGTH) > 10
    stage.close()


@pytest.mark.parametrize(("seed", "host_kv_slabs"), [(1, 3), (2, 12), (4, 3), (8, 1), (9, 40)])
def test_loop_random_life_with_saved_kv(seed: int, host_kv_slabs: int) -> None:
    """Adapters, faults, and host memory for one slab of KV or for all of it. A block that is restored wrongly shows as a wrong text."""
    stage = run_life(seed, 500, host_kv_slabs=host_kv_slabs, adapters=seed % 2 == 0)
    stage.check_all()
    assert sum(memory.host_kv.saved for memory in stage.backend.memories) > 100
    assert sum(memory.host_kv.restored for memory in stage.backend.memories) > 0
    stage.close()
    assert stage.backend.host_kv_used == 0


@pytest.mark.parametrize("seed", [*range(6), *seeds_of_long_runs(6, 12)])
def test_loop_does_not_launch_model_evicted_in_same_turn(seed: int) -> None:
    """Room for the weights of one or two of three, and prompts that want nearly all the KV there is."""
    rng = random.Random(seed)
    names = ("ada", "bob", "cyd")
    geometry = KvGeometry(4, 1, 3, 2, 64, 64)
    made = {
        name: FakeSpec(rng.randint(2, 6), vocab=40, kv=geometry, max_model_len=60, load_polls=1, swap_polls=2)
        for name in names
    }
    total = max(spec.weight_slabs for spec in made.values()) + rng.randint(16, 22)
    stage = Stage(FakeBackend(made, total_slabs=total, max_rows=4, max_batch_tokens=16), turn_s=0.02, quantum_us=2000)
    for name in names:
        stage.load(name)
    stage.turn(20)
    for _ in range(250):
        if rng.random() < 0.4:
            length = 48 if rng.random() < 0.2 else rng.randint(1, 10)
            stage.add(rng.choice(names), [rng.randrange(40) for _ in range(length)], 10, ignore_eos=True)
        stage.turn()
    stage.until_quiet()
    stage.check_all()
    assert not any(answer.finish is FinishReason.ERROR for answer in stage.answers.values())
    stage.close()
