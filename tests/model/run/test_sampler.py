"""Sampling: the right distribution, the same text whatever the batch, edits as transformers and OpenAI make them."""

import math
import random

import msgspec
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from runtime.engine.interfaces import RowSetup, StepPlan
from runtime.engine.kernels import sample
from runtime.engine.model.run.input_buffers import StepShape
from runtime.engine.model.run.logits_processors import LogitsProcessors
from runtime.engine.model.run.row_state import RowState
from runtime.engine.model.run.sampler import Sampler
from runtime.types import LogprobParams, SamplingParams
from tests.support.driving import Ask, Driver, hooked
from tests.support.families import VOCAB, family

CPU = torch.device("cpu")


def setup(
    row: int,
    rules: SamplingParams,
    prompt: list[int] | None = None,
    min_tokens: int = 0,
    suppressed: tuple[int, ...] = (),
) -> RowSetup:
    prompt = prompt or [0]
    return RowSetup(row, rules, LogprobParams(), prompt, len(prompt), min_tokens, suppressed)


def shape(rows: list[int], positions: list[int]) -> StepShape:
    n = len(rows)
    return StepShape(n, n, n, 1, 1, np.arange(n), np.array(rows), np.array(positions), np.arange(n + 1))


NO_PLAN = StepPlan([], [], [], [], [], [])


def p_value(statistic: float, degrees: int) -> float:
    """Of a chi-square statistic, by Wilson and Hilferty's approximation."""
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize(
    "rules",
    [
        SamplingParams(temperature=1.0), SamplingParams(temperature=0.5), SamplingParams(temperature=1.0, top_k=9),
        SamplingParams(temperature=1.2, top_p=0.8), SamplingParams(temperature=1.0, min_p=0.1), SamplingParams(temperature=1.0, typical_p=0.7),
    ],
)  # fmt: skip
def test_draws_follow_the_filtered_distribution(rules: SamplingParams) -> None:
    torch.manual_seed(0)
    num_draws, vocab = 60_000, 40
    logits = torch.randn(vocab) * 1.5
    tables = RowState(CPU, 1)
    tables.write_rules([0], [replace_seed(rules, 99)])
    words = tables.rules
    expected = sample.filtered(sample.scaled(logits[None], words), words, None).softmax(1)[0]
    drawn = torch.zeros(num_draws, dtype=torch.int64)
    index = torch.arange(num_draws)
    sample.draw_torch(logits.expand(num_draws, -1), index, index, torch.zeros_like(index), index, words, drawn, True)
    counts = torch.bincount(drawn, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    likely = expected * num_draws >= 5
    statistic = ((counts - expected * num_draws)[likely] ** 2 / (expected * num_draws)[likely]).sum().item()
    assert p_value(statistic, int(likely.sum()) - 1) > 1e-3
    wrong = (expected * 0.97 + 0.03 * expected.flip(0)).clamp_min(1e-9)  # the test sees an error of three in a hundred
    wrong_statistic = ((counts - wrong * num_draws)[likely] ** 2 / (wrong * num_draws)[likely]).sum().item()
    assert p_value(wrong_statistic, int(likely.sum()) - 1) < 1e-3


def replace_seed(rules: SamplingParams, seed: int) -> SamplingParams:
    return msgspec.structs.replace(rules, seed=seed)


MIXED = [
    SamplingParams(temperature=0.9, seed=1), SamplingParams(temperature=0.0), SamplingParams(temperature=1.1, top_k=20, seed=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.3), SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.5, seed=3),
    SamplingParams(temperature=0.8, presence_penalty=0.7, min_p=0.02, seed=4), SamplingParams(temperature=0.0, logit_bias=((5, 4.0), (9, -100.0))),
    SamplingParams(temperature=1.0, typical_p=0.8, seed=5), SamplingParams(temperature=0.9, seed=1),
]  # fmt: skip


def test_text_does_not_depend_on_the_batch() -> None:
    rng = random.Random(2)
    prompt = [rng.randrange(VOCAB) for _ in range(21)]
    asks = [Ask(prompt, 20, rules, min_tokens=6, suppressed=(3, 4)) for rules in MIXED]
    alone = [Driver(*hooked(family("llama")), seed=1, chaos=False).run([ask])[0].tokens for ask in asks]
    driver = Driver(*hooked(family("llama")), seed=5, max_rows=6, max_tokens=64)
    together = [answer.tokens for answer in driver.run(asks)]
    assert together == alone
    assert driver.preemptions > 0
    assert together[0] == together[-1]
    assert len({tuple(tokens) for tokens in together}) == len(asks) - 1
    assert not any(token in (3, 4) for tokens in together for token in tokens[:6])


def test_another_seed_says_something_else() -> None:
    asks = [Ask([1, 2, 3], 16, SamplingParams(temperature=1.0, seed=seed)) for seed in (7, 7 + 2**32, 8)]
    answers = Driver(*hooked(family("llama")), chaos=False).run(asks)
    assert len({tuple(answer.tokens) for answer in answers}) == 3


def test_edits_equal_their_definitions() -> None:
    torch.manual_seed(1)
    vocab, rng = 60, random.Random(4)
    prompt = [rng.randrange(vocab) for _ in range(12)]
    rules = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.7,
        frequency_penalty=0.4,
        presence_penalty=0.9,
        logit_bias=((3, 2.5), (7, -1.0), (10**6, 1.0)),
    )
    tables = RowState(CPU, 4)
    sampler, edits = Sampler(vocab, tables), LogitsProcessors(vocab, tables)
    row = setup(2, rules, prompt, min_tokens=3, suppressed=(1, 8))
    sampler.open(row)
    edits.open(row)
    sampler.begin(NO_PLAN)
    said: list[int] = []
    for turn in range(6):
        logits = torch.randn(2, vocab) * 3
        expected = logits[1].clone()
        expected[3] += 2.5
        expected[7] -= 1.0
        expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + said]), expected[None])[0]
        for token in set(said):
            expected[token] -= 0.4 * said.count(token) + 0.9
        if turn < 3:
            expected[[1, 8]] = float("-inf")
        position = len(prompt) + turn
        where = shape([0, 2], [5, position])
        edited = logits[1:].clone()
        edits.apply(edited, [2], [position])
        torch.testing.assert_close(edited[0], expected)
        drawn = logits.argmax(1)
        sampler.draw(logits, where, drawn, None)
        assert drawn.tolist() == [int(logits[0].argmax()), int(expected.argmax())]
        edits.note_drawn([2], [position], [1], drawn)
        said.append(int(drawn[1]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampler_draws_only_allowed_tokens(temperature: float) -> None:
    vocab, allowed = 60, (3, 41, 10**6)
    sampler = Sampler(vocab, RowState(CPU, 4))
    sampler.open(setup(1, SamplingParams(temperature=temperature, seed=3, allowed_token_ids=allowed)))
    sampler.begin(NO_PLAN)
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(2))
    logits[1, 3] = logits[1, 41] - 0.1
    drawn_ids: set[int] = set()
    for position in range(1, 40):
        drawn = logits.argmax(1)
        sampler.draw(logits, shape([0, 1], [5, position]), drawn, None)
        assert int(drawn[0]) == int(logits[0].argmax())
        drawn_ids.add(int(drawn[1]))
    assert drawn_ids == ({41} if temperature == 0.0 else {3, 41})


def test_end_tokens_that_are_no_tokens_touch_nobody() -> None:
    vocab = 10
    sampler = Sampler(vocab, RowState(CPU, 4))
    for row in (1, 2):
        sampler.open(setup(row, SamplingParams(temperature=0.0), min_tokens=3, suppressed=(-1, 4, 10**9)))
    logits = torch.arange(vocab).float().repeat(2, 1)  # the last id is the largest
    logits[:, 4] = 99.0
    where = shape([1, 2], [1, 1])
    drawn = torch.full((2,), 4)
    sampler.draw(logits, where, drawn, None)
    assert drawn.tolist() == [9, 9]


def test_sampler_counts_the_tokens_of_a_returning_row_once() -> None:
    vocab, rules = 30, SamplingParams(temperature=0.0, frequency_penalty=1.0)
    tables = RowState(CPU, 2)
    tables.write_rules([0], [rules])
    edits = LogitsProcessors(vocab, tables)

    def edited(position: int) -> torch.Tensor:
        scores = torch.zeros(1, vocab)
        edits.apply(scores, [0], [position])
        return scores[0]

    for prompt_given in ([1, 2], [1, 2, 9]):  # with and without the first generated id in the setup
        edits.open(RowSetup(0, rules, LogprobParams(), prompt_given, 2))
        edits.note_given(0, 0, [1, 2, 9])
        edits.note_given(0, 3, [9, 5])
        assert edited(5)[[1, 2, 9, 5]].tolist() == [0.0, 0.0, -2.0, -1.0]
        edits.note_drawn([0], [5], [0], torch.tensor([5]))
        edits.note_given(0, 5, [5])  # the drawn token, given back by the host
        assert edited(6)[5] == -2.0
        edits.close(0)


def test_rows_that_ask_for_nothing_stay_plain() -> None:
    sampler = Sampler(10, RowState(CPU, 4))
    sampler.open(setup(1, SamplingParams(temperature=0.0, seed=4)))
    assert sampler.all_plain(shape([1, 2], [3, 3]))
    sampler.open(setup(1, SamplingParams(temperature=0.5, seed=4)))
    assert not sampler.all_plain(shape([1, 2], [3, 3]))
    sampler.close(1)
    assert sampler.all_plain(shape([1, 2], [3, 3]))
