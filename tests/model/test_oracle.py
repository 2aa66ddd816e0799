"""Greedy text is transformers' own, whatever the batch, the chunks, the pages and the preemptions."""

import pytest
import torch

from runtime.types import LogprobParams
from tests.support.driving import Ask, Driver, hooked
from tests.support.families import family
from tests.support.oracle import prompts, reference


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "neox", "phi", "granite"])
def test_greedy_text_equals_generate(name: str, device: str) -> None:
    model = family(name).to(device)
    asks = [Ask(prompt, 24) for prompt in prompts(1, 9)]
    expected = [reference(model, ask.prompt, ask.max_new) for ask in asks]
    driver = Driver(*hooked(model, device=device), seed=7, max_rows=6, max_tokens=64)
    assert [answer.tokens for answer in driver.run(asks)] == expected
    assert driver.preemptions > 0
    assert any(len(plan.rows) > 1 and max(plan.counts) > 1 and min(plan.counts) == 1 for plan in driver.plans)


BF16_EPSILON = 0.15  # of logits whose standard deviation is about 3: bf16 keeps 8 bits, a few layers lose some of them


@pytest.mark.parametrize("name", ["llama", "gemma3", "neox"])
def test_bf16_logits_are_near_and_tokens_equal_where_the_choice_is_clear(name: str) -> None:
    """Teacher-forced: our text goes through transformers at once; each token is its own best, or as good as that within epsilon."""
    model = family(name).to(torch.bfloat16)
    asks = [Ask(prompt, 16, logprobs=LogprobParams(generated=5)) for prompt in prompts(2, 6)]
    answers = Driver(*hooked(family(name).to(torch.bfloat16)), seed=3, max_rows=5, max_tokens=64).run(asks)
    exact = 0
    for ask, answer in zip(asks, answers, strict=True):
        tokens = ask.prompt + answer.tokens
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, len(ask.prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1)
        for row, scores, token, entry in zip(expected, logits, answer.tokens, answer.logprobs, strict=True):
            assert entry is not None
            assert scores.max() - scores[token] <= BF16_EPSILON
            exact += int(scores.argmax()) == token
            for other, value in entry.top:
                assert value == pytest.approx(row[other].item(), abs=BF16_EPSILON)
    assert exact >= 0.9 * sum(ask.max_new for ask in asks)


def test_rows_of_two_models_share_the_tables() -> None:
    """Row slots are the engine's: models that take turns over the same slots do not see each other's state."""
    first, second = family("llama", seed=1), family("gpt2", seed=2)
    # All rows are closed after each step, so a prompt starts again until a step has room for all of it.
    asks = [Ask(prompt[:17], 12) for prompt in prompts(3, 4)]
    expected = [[reference(model, ask.prompt, ask.max_new) for ask in asks] for model in (first, second)]
    one = Driver(*hooked(first), seed=1, max_rows=4)
    two = Driver(*hooked(second), seed=2, max_rows=4, state=one.state)
    turns = [one.start(asks), two.start(asks)]
    while not all(turn.finished for turn in turns):
        for driver, turn in zip((one, two), turns, strict=True):
            driver.turn(turn, close_all=True)
    assert [[answer.tokens for answer in turn.answers()] for turn in turns] == expected
