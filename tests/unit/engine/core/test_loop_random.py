"""An hour's worth of everything at once, on the fake backend: texts must not change, nothing may leak, every request must end."""

import random

import pytest

from runtime.engine.interfaces import KvGeometry
from runtime.types import FinishReason, LogprobParams, SamplingParams
from tests.support.engine_stage import GREEDY, Stage
from tests.support.fake_backend import FakeBackend, FakeSpec

PENALTY = SamplingParams(temperature=0.0, repetition_penalty=1.1)


def specs(rng: random.Random) -> dict[str, FakeSpec]:
    made = {}
    for name in ("ada", "bob", "cyd", "dan"):
        block_tokens = rng.choice((2, 4, 8))
        blocks_per_slab = rng.choice((1, 3, 8))
        geometry = KvGeometry(block_tokens, blocks_per_slab, blocks_per_slab * 2 + 1, 2, 64, 64)
        made[name] = FakeSpec(
            weight_slabs=rng.randint(1, 9),
            vocab=rng.choice((7, 40, 400)),
            kv=geometry,
            max_model_len=rng.randint(20, 90),
            load_polls=rng.randint(0, 5),
            swap_polls=rng.randint(0, 8),
            latency_polls=rng.choice((0, 1, 50)),
        )
    return made


def one_life(seed: int, turns: int) -> Stage:
    rng = random.Random(seed)
    backend = FakeBackend(
        specs(rng),
        total_slabs=rng.randint(40, 70),
        max_rows=rng.choice((3, 8, 24)),
        max_batch_tokens=rng.choice((8, 32, 128)),
    )
    stage = Stage(backend, turn_s=rng.choice((0.001, 0.05, 0.4)), quantum_us=rng.choice((200, 2000)))
    names = list(backend.specs)
    stems = [[rng.randrange(40) for _ in range(rng.randint(4, 40))] for _ in range(4)]
    for name in names[:3]:
        stage.load(name)
    for _ in range(turns):
        dice = rng.random()
        name = rng.choice(names)
        if dice < 0.25:
            for _ in range(rng.choice((1, 1, 2, 12))):
                stem = rng.choice(stems)
                longest = backend.specs[name].max_model_len
                prompt = (stem[: rng.randint(0, len(stem))] + [rng.randrange(40) for _ in range(rng.randint(1, 8))])[
                    :longest
                ]
                wants = rng.random()
                logprobs = LogprobParams(0 if wants < 0.1 else None, 0 if wants > 0.93 else None)
                stage.add(
                    name,
                    prompt,
                    rng.choice((0, 1, 3, 20, 200)),
                    sampling=rng.choice((GREEDY, GREEDY, PENALTY)),
                    logprobs=logprobs,
                    priority=rng.choice((0, 0, 0, 1)),
                    min_tokens=rng.choice((0, 0, 4)),
                    ignore_eos=rng.random() < 0.3,
                    stop_token_ids=tuple(rng.sample(range(backend.specs[name].vocab), rng.choice((0, 0, 2)))),
                )
        elif dice < 0.29 and stage.answers:
            stage.abort(*rng.sample(sorted(stage.answers), min(3, len(stage.answers))))
        elif dice < 0.31:
            stage.load(name)
        elif dice < 0.317:
            stage.unload(name)
        elif dice < 0.322:
            backend.faults[name] = rng.choice(("launch", "collect"))
        elif dice < 0.324:
            backend.broken_swap_ins[name] = True
        stage.turn(rng.choice((0, 1, 1, 4)))
    stage.until_quiet()
    return stage


# 32: models that starved of KV took turns at turning each other out
@pytest.mark.parametrize("seed", [*range(16), 32])
def test_a_life(seed: int) -> None:
    stage = one_life(seed, 500)
    stage.check_all()
    ended = [answer.finish for answer in stage.answers.values()]
    assert ended.count(FinishReason.LENGTH) > 10
    stage.close()


def test_who_is_evicted_for_a_starved_one_is_not_launched_in_the_same_turn() -> None:
    """Room for the weights of one or two of three, and prompts that want nearly all the KV there is."""
    for seed in range(12):
        rng = random.Random(seed)
        names = ("ada", "bob", "cyd")
        geometry = KvGeometry(4, 1, 3, 2, 64, 64)
        made = {
            name: FakeSpec(rng.randint(2, 6), vocab=40, kv=geometry, max_model_len=60, load_polls=1, swap_polls=2)
            for name in names
        }
        total = max(spec.weight_slabs for spec in made.values()) + rng.randint(16, 22)
        stage = Stage(
            FakeBackend(made, total_slabs=total, max_rows=4, max_batch_tokens=16), turn_s=0.02, quantum_us=2000
        )
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
