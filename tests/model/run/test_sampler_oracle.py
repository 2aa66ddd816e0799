"""The filters against transformers' own, drawn at random: which tokens are left, and with what probability."""

import math

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import example, given, settings
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from runtime.engine.kernels import sample
from runtime.engine.model.run.row_state import RowState
from runtime.types import SamplingParams

CPU = torch.device("cpu")
# the filters are thresholds on sums: where rounding may decide, either answer is right
_CLEAR = 1e-5

RULES = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.one_of(st.just(0), st.integers(1, 80)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
)


def warped(logits: torch.Tensor, rules: SamplingParams) -> torch.Tensor:
    """By transformers, in the order in which `generate` has them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(rules.temperature)])
    if rules.top_k:
        warpers.append(TopKLogitsWarper(min(rules.top_k, logits.shape[1])))
    if rules.top_p < 1:
        warpers.append(TopPLogitsWarper(rules.top_p))
    if rules.min_p:
        warpers.append(MinPLogitsWarper(rules.min_p))
    if rules.typical_p < 1:
        warpers.append(TypicalLogitsWarper(rules.typical_p))
    result: torch.Tensor = warpers(torch.zeros((logits.shape[0], 1), dtype=torch.int64), logits)
    return result


def words_of(rules: SamplingParams) -> torch.Tensor:
    tables = RowState(CPU, 1)
    tables.write_rules([0], [rules])
    return tables.rules


def near_the_edge(logits: torch.Tensor, rules: SamplingParams) -> bool:
    """Whether a little more or less of some rule would keep other tokens."""
    kept = set()
    for nudge in (-_CLEAR, 0.0, _CLEAR):
        moved = SamplingParams(
            rules.temperature, rules.top_k, min(1.0, max(1e-6, rules.top_p + nudge * (rules.top_p < 1))),
            min(1.0, max(0.0, rules.min_p * (1 + nudge))), rules.typical_p + nudge * (rules.typical_p < 1),
        )  # fmt: skip
        kept.add(tuple(warped(logits, moved).isfinite()[0].tolist()))
    return len(kept) > 1


@settings(max_examples=300, deadline=None)
@example(SamplingParams(top_p=0.97), 1, 1500, 0.3)  # more is kept than the candidates
@example(SamplingParams(min_p=0.01), 2, 1500, 0.3)
@given(RULES, st.integers(0, 2**32 - 1), st.sampled_from([2, 17, 60, 1500]), st.floats(0.3, 6.0))
def test_sampler_keeps_the_tokens_that_transformers_keeps(
    rules: SamplingParams, seed: int, vocab: int, spread: float
) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0.0, spread, (1, vocab)).astype(np.float32))
    expected = warped(logits, rules)
    if near_the_edge(logits, rules):
        return
    words = words_of(rules)
    scores = sample.scaled(logits, words)
    kept = sample.filtered(scores, words, None)
    torch.testing.assert_close(kept.softmax(1), expected.softmax(1))
    # and so it is where only the best candidates are looked at, if those say that they can decide
    top, ids = scores.topk(min(sample._CANDIDATES, vocab), dim=1)
    total = (scores - top[:, :1]).exp().sum(1, keepdim=True)
    if vocab > sample._CANDIDATES and not bool(sample.undecided(top, total, words)[0]):
        among = torch.full_like(scores, -math.inf).scatter_(1, ids, sample.filtered(top, words, total))
        torch.testing.assert_close(among.softmax(1), expected.softmax(1))


@settings(max_examples=60, deadline=None)
@given(RULES, st.integers(0, 2**31))
def test_sampler_never_draws_a_token_that_was_cut(rules: SamplingParams, seed: int) -> None:
    vocab, num = 1500, 64
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0.0, 2.0, (1, vocab)).astype(np.float32))
    if near_the_edge(logits, rules):
        return
    left = warped(logits, rules).isfinite()[0]
    drawn, index = torch.zeros(num, dtype=torch.int64), torch.arange(num)
    sorts = rules.top_k > 0 or rules.top_p < 1 or rules.typical_p < 1
    sample.draw_torch(
        logits.expand(num, -1), index, index, torch.zeros_like(index), index, words_of(rules), drawn, sorts
    )
    assert bool(left[drawn].all())
