"""Saved KV over real tiny models on a CPU: a conversation that returns to an evicted model continues with transformers' greedy text."""

from pathlib import Path

import pytest

from runtime.types import GenerationRequest, SamplingParams, StopParams
from tests.support.families import VOCAB, family
from tests.support.oracle import reference
from tests.support.real_engine import RealEngine
from tests.support.steps import save

SLAB = 1 << 18
PROMPT = [7 * number % VOCAB for number in range(150)]


def greedy(prompt: list[int], max_new: int) -> GenerationRequest:
    stop = StopParams(max_new, ignore_eos=True)
    return GenerationRequest(prompt=tuple(prompt), sampling=SamplingParams(temperature=0.0), stop=stop)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("block_tokens", [4, 16])
def test_returning_conversation_continues_with_the_same_text(tmp_path: Path, block_tokens: int, kv_dtype: str) -> None:
    models = {name: family("llama", seed) for seed, name in enumerate(("one", "two"))}
    engine = RealEngine(
        slab_bytes=SLAB,
        device_budget_bytes=4 * SLAB,
        host_kv_bytes=8 * SLAB,
        block_tokens=block_tokens,
        kv_dtype=kv_dtype,
        oversubscribe="disk",
    )
    for name, model in models.items():
        engine.load(name, save(model, tmp_path / name))
    history = dict.fromkeys(models, PROMPT)
    for turn in range(3):
        for name, model in models.items():
            (rows,) = engine.run([(name, greedy(history[name], 20))])
            text = [token for row in rows for token in row.tokens]
            if kv_dtype == "auto":
                assert text == reference(model, history[name], 20)
            # All blocks that the turn before filled; its last two tokens fill none.
            known = len(history[name]) - 3 - 2 if turn else 0
            assert rows[0].cached_tokens == known // block_tokens * block_tokens
            history[name] = [*history[name], *text, 1, 2, 3]
    figures = engine.loop.table.stats().models
    assert all(model.evictions_total >= 2 for model in figures)
    assert all(model.kv_restored_blocks_total > 0 for model in figures)
    assert all(0 < model.kv_host_bytes <= 8 * SLAB for model in figures)
    engine.close()
