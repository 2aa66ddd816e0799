"""Random lives of several models on the fake backend: requests, aborts, loads, unloads, pressure on memory and faults, from one seed."""

import random
from collections.abc import Callable

import pytest

from runtime.engine.interfaces import Drafter, KvGeometry
from runtime.engine.operations import Operation
from runtime.types import LogprobParams, Pooling, SamplingParams
from tests.support.engine_stage import GREEDY, Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeAdapterSpec, FakeSpec

POOLINGS: tuple[tuple[Pooling, ...], ...] = (
    (),
    *((mode,) for mode in Pooling),
    (Pooling.FIRST, Pooling.LAST),
    tuple(Pooling),
)
PENALTY = SamplingParams(temperature=0.0, repetition_penalty=1.1)


def random_specs(rng: random.Random) -> dict[str, FakeSpec]:
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


def seeds_of_long_runs(first: int, end: int) -> list[object]:
    """Return the seeds of lives that run only with --long, from `first` up to `end`, as cases of a parametrised test."""
    return [pytest.param(seed, marks=pytest.mark.long) for seed in range(first, end)]


def run_life(
    seed: int,
    turns: int,
    *,
    faults: bool = True,
    varied: bool = False,
    adapters: bool = False,
    host_kv_slabs: int = 0,
    drafter: Drafter | None = None,
    record: Callable[[Operation], None] | None = None,
    on_turn: Callable[[FakeBackend], None] = lambda backend: None,
) -> Stage:
    """Run `turns` random actions, then turn until every request has ended. `faults`: steps and swap-ins may break. `varied`: some have grammars or ask for a vector.
    `adapters`: models have adapters that come and go, and most requests name one."""
    rng = random.Random(seed)
    grammars = random.Random(seed + 1000)
    backend = FakeBackend(
        random_specs(rng),
        total_slabs=rng.randint(40, 70),
        max_rows=rng.choice((3, 8, 24)),
        max_batch_tokens=rng.choice((8, 32, 128)),
        host_kv_slabs=host_kv_slabs,
    )
    stage = Stage(
        backend,
        turn_s=rng.choice((0.001, 0.05, 0.4)),
        quantum_us=rng.choice((200, 2000)),
        record=record,
        drafter=drafter,
        grammar_polls=grammars.choice((0, 0, 3)),
    )
    names = list(backend.specs)
    tuned = random.Random(seed + 2000)
    if adapters:
        backend.adapter_slots = tuned.choice((1, 2, 5))
        for number in range(8):
            size_bytes = tuned.randint(100, 3 * backend.slab_bytes)
            spec = backend.specs[names[number % 2]]
            room = (backend.total_slabs - spec.weight_slabs - 4) * spec.kv.blocks_per_slab * spec.kv.block_tokens
            spec.max_model_len = min(spec.max_model_len, room)  # no context is cut for an adapter
            backend.adapters[f"tuned-{number}"] = FakeAdapterSpec(names[number % 2], f"content {number}", size_bytes)
    stems = [[rng.randrange(40) for _ in range(rng.randint(4, 40))] for _ in range(4)]
    for name in names[:3]:
        stage.load(name)
    for _ in range(turns):
        dice = rng.random()
        name = rng.choice(names)
        if dice < 0.25:
            for _ in range(rng.choice((1, 1, 2, 12))):
                stem = rng.choice(stems)
                longest = (
                    min(spec.max_model_len for spec in backend.specs.values())
                    if adapters
                    else backend.specs[name].max_model_len
                )
                prompt = (stem[: rng.randint(0, len(stem))] + [rng.randrange(40) for _ in range(rng.randint(1, 8))])[
                    :longest
                ]
                wants = rng.random()
                logprobs = LogprobParams(0 if wants < 0.1 else None, 0 if wants > 0.93 else None)
                max_tokens = rng.choice((0, 1, 3, 20, 200))
                asked = tuned.choice(sorted(backend.adapters)) if adapters and tuned.random() < 0.7 else name
                stage.add(
                    asked,
                    prompt,
                    max_tokens,
                    sampling=rng.choice((GREEDY, GREEDY, PENALTY)),
                    logprobs=logprobs,
                    priority=rng.choice((0, 0, 0, 1)),
                    grammar=grammars.choice((None, None, None, "half", "half/6", "often")) if varied else None,
                    pooling=grammars.choice(POOLINGS) if varied and max_tokens == 0 else (),
                    min_tokens=rng.choice((0, 0, 4)),
                    ignore_eos=rng.random() < 0.3,
                    stop_token_ids=tuple(
                        rng.sample(range(7 if adapters else backend.specs[name].vocab), rng.choice((0, 0, 2)))
                    ),
                )
        elif dice < 0.29 and stage.answers:
            stage.abort(*rng.sample(sorted(stage.answers), min(3, len(stage.answers))))
        elif dice < 0.31:
            stage.load(name)
        elif adapters and dice < 0.4:
            _tune(stage, tuned)
        elif dice < 0.317:
            stage.unload(name)
        elif dice < 0.322 and faults:
            backend.faults[name] = rng.choice(("launch", "collect"))
        elif dice < 0.324 and faults:
            backend.broken_swap_ins[name] = True
        stage.turn(rng.choice((0, 1, 1, 4)))
        on_turn(backend)
    stage.until_quiet()
    return stage


def _tune(stage: Stage, rng: random.Random) -> None:
    """Load or unload an adapter."""
    adapter_id = rng.choice(sorted(stage.backend.adapters))
    if rng.random() < 0.85:
        stage.load_adapter(adapter_id)
    else:
        stage.unload(adapter_id)
