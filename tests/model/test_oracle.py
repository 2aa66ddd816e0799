"""Greedy text is transformers' own, whatever the batch, the chunks, the pages and the preemptions."""

import random

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.driving import Ask, Driver, hooked
from tests.support.families import VOCAB, family


def reference(model: PreTrainedModel, prompt: list[int], max_new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new, do_sample=False, pad_token_id=0)
    said: list[int] = out[0, len(prompt) :].tolist()
    return said


def prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 15, 16, 17, 40, 63, 90)))] for _ in range(count)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "neox", "phi", "granite"])
def test_greedy_text_equals_generate(name: str) -> None:
    model = family(name)
    asks = [Ask(prompt, 24) for prompt in prompts(1, 9)]
    expected = [reference(model, ask.prompt, ask.max_new) for ask in asks]
    driver = Driver(*hooked(model), seed=7, max_rows=6, max_tokens=64)
    assert [answer.tokens for answer in driver.run(asks)] == expected
    assert driver.preemptions > 0
    assert any(len(plan.rows) > 1 and max(plan.counts) > 1 and min(plan.counts) == 1 for plan in driver.plans)
