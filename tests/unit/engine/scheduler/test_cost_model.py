"""The cost model finds the line that steps lie on, follows it when it moves, and keeps steps within their quantum."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.scheduler.cost_model import CostModel


def learn(model: CostModel, a: float, b: float, c: float, steps: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        tokens, kv = rng.choice((1, 8, 64, 300, 2000)), rng.randrange(200_000)
        model.observe(tokens, kv, (a + b * tokens + c * kv) * rng.uniform(0.98, 1.02))


@given(st.floats(100, 10_000), st.floats(1, 50), st.floats(0, 0.05), st.integers(0, 5))
def test_cost_model_learns_any_line(a: float, b: float, c: float, seed: int) -> None:
    model = CostModel()
    learn(model, a, b, c, 150, seed)
    for tokens, kv in ((1, 0), (256, 100_000), (2000, 50_000)):
        truth = a + b * tokens + c * kv
        assert abs(model.predict_us(tokens, kv) - truth) < 0.1 * truth + 50


def test_cost_model_follows_a_change() -> None:
    model = CostModel()
    learn(model, 5000, 20, 0.01, 200)
    learn(model, 1000, 5, 0.01, 300)
    assert abs(model.predict_us(256, 0) - 2280) < 300


def test_cost_model_learns_little_from_one_outlier() -> None:
    model = CostModel()
    learn(model, 1000, 10, 0.0, 100)
    model.observe(64, 0, 5e6)
    assert model.predict_us(64, 0) < 2 * 1640


@given(st.floats(100, 5000), st.floats(1, 50), st.integers(0, 300))
def test_steps_fit_their_quantum(a: float, b: float, decoding: int) -> None:
    model = CostModel()
    learn(model, a, b, 0.002, 150)
    least = decoding + 64
    tokens = model.tokens_within(20_000, 1000, least)
    assert tokens >= least
    if tokens > least:
        assert a + b * tokens <= 20_000 * 1.15


def test_cost_model_stays_sane_after_a_thousand_equal_steps() -> None:
    model = CostModel()
    for _ in range(5000):
        model.observe(256, 70_000, 6000)
    assert abs(model.predict_us(256, 70_000) - 6000) < 60
    assert 1 <= model.tokens_within(20_000, 70_000, 1) < 1_000_000
    learn(model, 1000, 10, 0.01, 200)
    assert abs(model.predict_us(300, 0) - 4000) < 600


def test_cost_model_learns_a_slow_devices_token_from_one_step() -> None:
    model = CostModel(slowness=100.0)
    for _ in range(60):
        model.observe(1, 10, 4100.0)
    model.observe(64, 64, 100 + 4000.0 * 64)
    assert 120 <= model.tokens_within(500_000, 64, 1) <= 135
    assert model.largest_tokens == 64


@given(st.floats(500, 5000), st.floats(1, 20), st.floats(50, 1000), st.floats(5, 100), st.integers(0, 5))
def test_adapters_cost_their_launches_and_their_bytes(
    a: float, b: float, launches: float, each: float, seed: int
) -> None:
    """Steps with and without adapters alternate, as those of a base and of its adapters do."""
    model, rng = CostModel(), random.Random(seed)

    def took(tokens: int, adapters: int) -> float:
        return a + b * tokens + (launches + each * adapters if adapters else 0.0)

    for _ in range(300):
        tokens, adapters = rng.choice((1, 8, 64, 300)), rng.choice((0, 0, 1, 8, 32))
        model.observe(tokens, 0, took(tokens, adapters) * rng.uniform(0.98, 1.02), adapters)
    for tokens, adapters in ((8, 0), (8, 1), (64, 32), (300, 8)):
        truth = took(tokens, adapters)
        assert abs(model.predict_us(tokens, 0, adapters) - truth) < 0.1 * truth + 50
    plain, adapted = (model.tokens_within(20_000, 0, 1, adapters) for adapters in (0, 32))
    assert plain - adapted == pytest.approx((launches + 32 * each) / b, rel=0.25, abs=0.1 * plain)


def test_models_without_adapters_learn_as_before() -> None:
    """An unknown cost of adapters does not disturb what is known of plain steps."""
    plain, other = CostModel(), CostModel()
    for model in (plain, other):
        learn(model, 2000, 10, 0.01, 100)
    other.observe(64, 0, 6000, 4)
    assert other.predict_us(64, 0, 4) > 1.5 * other.predict_us(64, 0)
    for tokens in (1, 64, 300):
        assert other.predict_us(tokens, 1000) == pytest.approx(plain.predict_us(tokens, 1000), rel=0.1)
