"""Draws: the Triton kernel and its twin choose the same tokens; the filters are transformers' own; the noise is uniform enough."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from runtime.engine.interfaces import NO_TOKEN
from runtime.engine.kernels import sample
from runtime.engine.kernels.gpu import sample as gpu
from runtime.engine.model.run.row_state import RowState
from runtime.types import SamplingParams

RULES = [
    SamplingParams(temperature=0.0, min_p=0.5),
    SamplingParams(temperature=1.0, seed=5),
    SamplingParams(temperature=0.3, seed=6),
    SamplingParams(temperature=1.5, min_p=0.05, seed=7),
    SamplingParams(temperature=1.0, top_k=1, seed=8),
    SamplingParams(temperature=2.0, top_k=7, seed=2**63 + 9),
    SamplingParams(temperature=1.3, top_p=0.4, seed=-3),
    SamplingParams(temperature=2.5, top_p=0.95, top_k=40, seed=11),
    SamplingParams(temperature=1.0, typical_p=0.3, seed=12),
    SamplingParams(temperature=1.2, top_p=0.8, min_p=0.02, typical_p=0.6, top_k=60, seed=13),
    SamplingParams(temperature=1.0, top_p=1e-6, seed=14),
]
SORTED_BAD = (("one", float("inf")), ("one", float("-inf")), ("all", float("-inf")))


def tables(rules: list[SamplingParams], device: torch.device) -> RowState:
    made = RowState(device, len(rules))
    made.write_rules(list(range(len(rules))), rules)
    return made


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        (130, torch.float32),
        (5003, torch.bfloat16),
        pytest.param(130, torch.bfloat16, marks=pytest.mark.long),
        pytest.param(5003, torch.float32, marks=pytest.mark.long),
    ],
)
def test_kernel_equals_twin(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    made = tables(RULES, device)
    n = len(RULES)
    torch.manual_seed(vocab)
    # spread evenly: no two scores tie, and no threshold falls between scores that differ by less than rounding does
    logits = torch.stack([torch.linspace(-6, 6, vocab)[torch.randperm(vocab)] for _ in range(n)]).to(device, dtype)
    logits[2, :50] = float("-inf")
    index = torch.arange(n, device=device)
    source, target = index.flip(0), index.roll(3)
    positions = index * 1000 + 3
    found = []
    for draw in (sample.draw_torch, gpu.draw):
        drawn = torch.full((n,), -1, device=device)
        draw(logits, source, target, index, positions, made.rules, drawn, True)
        found.append(drawn.tolist())
    assert found[0] == found[1]
    assert min(found[0]) >= 0
    plain = torch.tensor([0, 1, 2, 3], device=device)
    for draw in (sample.draw_torch, gpu.draw):
        drawn = torch.full((n,), -1, device=device)
        draw(logits, source[plain], target[plain], plain, positions[plain], made.rules, drawn, False)
        assert drawn[target[plain]].tolist() == [found[0][t] for t in target[plain].tolist()]


@pytest.mark.parametrize(
    ("where", "bad", "sorts"),
    [
        # The maximum is looked at before anything is sorted, so a few kinds of bad rows do where that takes long.
        pytest.param(where, bad, sorts, marks=pytest.mark.long if sorts and (where, bad) not in SORTED_BAD else ())
        for where in ("one", "all")
        for bad in (float("nan"), float("inf"), float("-inf"))
        for sorts in (False, True)
    ],
)
def test_row_without_a_finite_maximum_draws_no_token(bad: float, sorts: bool, where: str, device: torch.device) -> None:
    rules = RULES[5:10] if sorts else RULES[:4]
    made, n = tables(rules, device), len(rules)
    logits = torch.stack([torch.linspace(-6, 6, 3001)[torch.randperm(3001)] for _ in range(n)]).to(device)
    spoilt = logits.clone()
    spoilt[::2, 7 if where == "one" else slice(None)] = bad
    if where == "one" and bad == float("-inf"):
        spoilt[::2, torch.arange(3001) != 7] = bad
        spoilt[::2, 7] = float("nan")
    index = torch.arange(n, device=device)
    for draw in (sample.draw_torch, gpu.draw):
        whole, drawn = (torch.full((n,), -9, device=device) for _ in range(2))
        draw(logits, index, index, index, index, made.rules, whole, sorts)
        draw(spoilt, index, index, index, index, made.rules, drawn, sorts)
        assert drawn[::2].tolist() == [NO_TOKEN] * len(drawn[::2])
        assert drawn[1::2].tolist() == whole[1::2].tolist()


def test_noise_is_the_same_in_kernel_and_twin_and_has_gumbels_moments() -> None:
    words = torch.zeros((40, 12), dtype=torch.int32)
    words[:, sample.SEED_LOW] = torch.arange(40)
    noise = sample.gumbel(words, torch.arange(40), torch.arange(5000, dtype=torch.int32)[None])
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - 1.6449) < 0.02
    flat = noise - noise.mean()
    for other in (flat.roll(1, 0), flat.roll(1, 1)):  # neighbouring seeds and ids have nothing in common
        assert abs((flat * other).mean().item() / noise.var().item()) < 0.01


@pytest.mark.parametrize("rules", [r for r in RULES if r.temperature > 0])
def test_filters_are_transformers(rules: SamplingParams) -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, 400) * 2
    warpers = [TemperatureLogitsWarper(rules.temperature)]
    if rules.top_k:
        warpers.append(TopKLogitsWarper(rules.top_k))
    if rules.top_p < 1:
        warpers.append(TopPLogitsWarper(rules.top_p))
    if rules.min_p:
        warpers.append(MinPLogitsWarper(rules.min_p))
    if rules.typical_p < 1:
        warpers.append(TypicalLogitsWarper(rules.typical_p))
    expected = logits
    for warper in warpers:
        expected = warper(torch.zeros((6, 0), dtype=torch.long), expected)
    words = tables([rules], torch.device("cpu")).rules.expand(6, -1)
    found = sample.filtered(sample.scaled(logits, words), words, None)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rules", [r for r in RULES if r.temperature > 0])
def test_candidates_decide_as_all_tokens_do(rules: SamplingParams) -> None:
    torch.manual_seed(4)
    logits = torch.randn(8, 3000) * 3
    logits[4:] *= 0.1  # flat: a thousand candidates cannot decide
    words = tables([rules] * 8, torch.device("cpu")).rules
    index, positions = torch.arange(8), torch.arange(8) * 7
    drawn = torch.zeros(8, dtype=torch.int64)
    sample.draw_torch(logits, index, index, index, positions, words, drawn, True)
    kept = sample.filtered(sample.scaled(logits, words), words, None)
    noise = sample.gumbel(words, positions, torch.arange(3000, dtype=torch.int32)[None])
    assert drawn.tolist() == (kept + noise).argmax(1).tolist()
