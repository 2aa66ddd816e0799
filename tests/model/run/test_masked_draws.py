"""Masks that arrive after the forward pass constrain exactly the draws of their rows."""

import math
import random

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from runtime.engine.interfaces import RowSetup, StepPlan
from runtime.errors import EngineFault
from runtime.types import LogprobParams, SamplingParams
from tests.support.driving import Ask, Driver, hooked
from tests.support.families import VOCAB, family
from tests.support.graphs import capture_all, launch_forward
from tests.support.masks import allowed_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GREEDY = SamplingParams(temperature=0.0)


def half(said: list[int]) -> list[int]:
    return allowed_tokens("half", said, VOCAB)


def constrained_greedy(
    model: PreTrainedModel, prompt: list[int], max_new: int, bias: dict[int, float], never: dict[int, tuple[int, ...]]
) -> list[int]:
    """The best allowed token at each position by transformers' own logits. `never`: ids that are excluded at a position, if others are left."""
    said: list[int] = []
    for position in range(max_new):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said], device=model.device)).logits[0, -1].float().cpu().clone()
        for token, value in bias.items():
            logits[token] += value
        allowed = half(said)
        left = [token for token in allowed if token not in never.get(position, ())] or allowed
        said.append(max(left, key=lambda token: logits[token].item()))
    return said


@pytest.mark.parametrize("device", DEVICES)
def test_masked_greedy_text_equals_constrained_transformers_text(device: str) -> None:
    model = family("llama").to(device)
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice((1, 16, 33)))] for _ in range(6)]
    bias, suppressed = {5: 4.0, 9: -100.0}, tuple(range(0, VOCAB, 3))
    biased = SamplingParams(temperature=0.0, logit_bias=tuple(bias.items()))
    asks = [Ask(prompt, 16, allowed=half) for prompt in prompts[:4]]
    asks.append(Ask(prompts[4], 16, biased, min_tokens=5, suppressed=suppressed, allowed=half))
    never = dict.fromkeys(range(5), suppressed)
    expected = [constrained_greedy(model, ask.prompt, 16, {}, {}) for ask in asks[:4]]
    expected.append(constrained_greedy(model, asks[4].prompt, 16, bias, never))
    plain = [Ask(prompts[5], 16), Ask(prompts[5], 16, SamplingParams(temperature=0.9, top_p=0.9, seed=4))]
    alone = [Driver(*hooked(model, device=device), chaos=False).run([ask])[0].tokens for ask in plain]
    driver = Driver(*hooked(model, device=device), seed=9, max_rows=5, max_tokens=48)
    answers = [answer.tokens for answer in driver.run([*asks, *plain])]
    assert answers[:5] == expected
    assert answers[5:] == alone
    assert driver.preemptions > 0
    assert any(0 < len(plan.masked) < sum(plan.samples) for plan in driver.plans), "no step mixed the two kinds of rows"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "rules",
    [
        SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0.8, top_k=7, seed=2),
        SamplingParams(temperature=1.2, top_p=0.8, frequency_penalty=0.6, seed=3),
    ],
)  # fmt: skip
def test_masked_draw_with_a_constant_mask_equals_allowed_ids(rules: SamplingParams, device: str) -> None:
    """Two mechanisms with one meaning: the same tokens and the same log-probabilities."""
    ids = tuple(range(1, VOCAB, 4))
    limited = SamplingParams(
        **{name: getattr(rules, name) for name in rules.__struct_fields__} | {"allowed_token_ids": ids}
    )
    prompt = [7, 8, 9]
    asks = [
        Ask(prompt, 20, limited, LogprobParams(generated=2)),
        Ask(prompt, 20, rules, LogprobParams(generated=2), allowed=lambda said: list(ids)),
    ]
    by_ids, by_mask = Driver(*hooked(family("llama").to(device), device=device), seed=2, max_rows=4).run(asks)
    assert by_mask.tokens == by_ids.tokens
    assert set(by_mask.tokens) <= set(ids)
    for one, other in zip(by_mask.logprobs, by_ids.logprobs, strict=True):
        assert one is not None
        assert other is not None
        assert math.isclose(one.logprob, other.logprob, abs_tol=1e-4)


@pytest.mark.parametrize("by", ["suppressed", "allowed"])
def test_masked_draw_prefers_the_mask_where_nothing_else_is_left(by: str) -> None:
    rules = SamplingParams(temperature=0.0, allowed_token_ids=(3, 4) if by == "allowed" else ())
    only_eos = Ask([5, 6], 1, rules, min_tokens=4, suppressed=(11,), allowed=lambda said: [11])
    assert Driver(*hooked(family("llama")), chaos=False).run([only_eos])[0].tokens == [11]


def test_draws_need_a_forward_pass_and_one_mask_per_masked_row() -> None:
    driver = Driver(*hooked(family("llama")), chaos=False)
    with pytest.raises(EngineFault, match="1 masks were given, the launched forward pass needs 0"):
        driver.runner.launch_draws(np.zeros((1, 7), np.int32))
    driver.runner.open_row(RowSetup(0, GREEDY, LogprobParams(), [1, 2], 2, masked=True))
    driver.runner.launch_forward(StepPlan([0], [0], [2], [False], [1], [1, 2], [(0, 0, 0)], masked=[0]))
    with pytest.raises(EngineFault, match="2 masks were given, the launched forward pass needs 1"):
        driver.runner.launch_draws(np.zeros((2, 7), np.int32))


@pytest.mark.gpu
def test_masked_step_never_waits_for_the_device() -> None:
    """Eager and as a CUDA graph; the masked row's id comes from the host, as the scheduler gives it."""
    built, pages = hooked(family("llama").cuda(), device="cuda")
    driver = Driver(built, pages, max_rows=4)
    masks = np.full((1, -(-VOCAB // 32)), -2, np.int32)

    def steps(mode: str) -> list[list[int]]:
        runner = driver.runner
        runner.open_row(RowSetup(0, GREEDY, LogprobParams(), [1, 2], 2, masked=True))
        runner.open_row(RowSetup(1, GREEDY, LogprobParams(), [1, 2], 2))
        blocks = [(row, 0, pages.ids[row]) for row in (0, 1)]
        plans = [StepPlan([0, 1], [0, 0], [2, 2], [False] * 2, [1] * 2, [1, 2, 1, 2], blocks, masked=[0])]
        plans += [StepPlan([1, 0], [2 + i] * 2, [1, 1], [True, False], [1] * 2, [7], masked=[0]) for i in range(4)]
        launched = []
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for plan in plans:
                launch_forward(runner, plan)
                launched.append(runner.launch_draws(masks))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        tokens = [step.collect().tokens for step in launched]
        for row in (0, 1):
            runner.close_row(row)
        return tokens

    first = steps("default")  # compiles kernels, fills torch's pinned memory
    for _ in range(3):
        assert steps("error") == first
        capture_all(driver.state.graphs, {"tiny": driver.runner})


@pytest.mark.parametrize("device", DEVICES)
def test_mask_lines_keep_their_memory_until_they_grow(device: str) -> None:
    runner = Driver(*hooked(family("llama").to(device), device=device), chaos=False).runner
    two = runner.mask_lines(2)
    assert two.shape == (2, -(-VOCAB // 32))
    assert np.shares_memory(two, runner.mask_lines(5))
    assert torch.from_numpy(two).is_pinned() == (device == "cuda")
    many = runner.mask_lines(100)
    assert many.shape == (100, -(-VOCAB // 32))
    assert not np.shares_memory(two, many)
