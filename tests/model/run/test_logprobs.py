"""Log-probabilities of drawn tokens and prompts equal transformers', through chunks, in mixed batches."""

import random

import pytest
import torch

from runtime.ipc.messages import TokenLogprobs
from runtime.types import LogprobParams, SamplingParams
from tests.support.driving import Ask, Driver, hooked
from tests.support.families import VOCAB, family


def check(entry: TokenLogprobs | None, logits: torch.Tensor, token: int, top: int) -> None:
    assert entry is not None
    expected = logits.log_softmax(-1)
    assert entry.logprob == pytest.approx(expected[token].item(), abs=2e-4)
    assert entry.rank == int((logits > logits[token]).sum()) + 1
    best = expected.topk(top)
    assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-4)


def test_generated_and_prompt_logprobs() -> None:
    reference = family("llama")
    rng = random.Random(0)
    drawing = SamplingParams(temperature=1.0, seed=3)
    greedy = SamplingParams(temperature=0.0)
    asks = [
        Ask([rng.randrange(VOCAB) for _ in range(size)], 7, rules, LogprobParams(generated=generated, prompt=prompt))
        for size, rules, generated, prompt in [
            (70, greedy, 3, 2), (1, drawing, 0, 1), (33, drawing, 5, None), (12, greedy, None, None), (50, greedy, None, 0), (20, drawing, 2, 4),
        ]
    ]  # fmt: skip
    driver = Driver(*hooked(family("llama")), seed=3, max_rows=5, max_tokens=40)
    answers = driver.run(asks)
    assert any(max(plan.counts) < 60 and plan.prompt_logprobs for plan in driver.plans)
    for ask, answer in zip(asks, answers, strict=True):
        tokens = ask.prompt + answer.tokens
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0]
        if ask.logprobs.generated is None:
            assert answer.logprobs == [None] * 7
        else:
            for i, entry in enumerate(answer.logprobs):
                check(entry, logits[len(ask.prompt) + i - 1], answer.tokens[i], ask.logprobs.generated)
        if ask.logprobs.prompt is None:
            assert answer.prompt_logprobs == []
        else:
            assert len(answer.prompt_logprobs) == len(ask.prompt)
            assert answer.prompt_logprobs[0] is None
            for position in range(1, len(ask.prompt)):
                check(answer.prompt_logprobs[position], logits[position - 1], ask.prompt[position], ask.logprobs.prompt)
