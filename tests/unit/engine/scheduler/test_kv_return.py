"""KV comes back from host memory only where that gives the next token earlier than computing does, in any case of weights, link and device."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.scheduler.cost_model import CostModel
from runtime.engine.scheduler.kv_return import KvReturn, restore_is_faster

SECONDS = st.floats(0, 10)
LINK_BYTES_PER_S = 55.5e9
KV_S_PER_TOKEN = 131_072 / LINK_BYTES_PER_S  # an 8B model's
WEIGHTS_S = {"bf16": 16.06e9 / LINK_BYTES_PER_S, "nf4": 6.05e9 / LINK_BYTES_PER_S}


def cost_of(us_per_token: float) -> CostModel:
    model = CostModel()
    for _ in range(60):
        for tokens in (1, 64, 1000, 8000):
            model.observe(tokens, 0, 4000 + us_per_token * tokens)
    return model


def returning(weights_s: float = 0.0, us_per_token: float = 27.0) -> KvReturn:
    return KvReturn(weights_s, KV_S_PER_TOKEN, cost_of(us_per_token), 8192)


@given(SECONDS, SECONDS, SECONDS)
def test_the_faster_way_is_chosen(weights_s: float, copy_s: float, compute_s: float) -> None:
    restored_s, computed_s = weights_s + copy_s, max(weights_s, compute_s)
    assert restore_is_faster(weights_s, copy_s, compute_s) == (restored_s < computed_s)


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_more_to_compute_or_less_to_copy_never_speaks_against_copying(
    weights_s: float, copy_s: float, compute_s: float, more_s: float
) -> None:
    if restore_is_faster(weights_s, copy_s + more_s, compute_s):
        assert restore_is_faster(weights_s, copy_s, compute_s)
        assert restore_is_faster(weights_s, copy_s, compute_s + more_s)


@given(SECONDS, SECONDS, SECONDS)
def test_what_hides_behind_the_weights_is_computed(weights_s: float, copy_s: float, share: float) -> None:
    assert not restore_is_faster(weights_s, copy_s, weights_s * share / 10)


@given(st.integers(0, 100), st.integers(1, 2000))
def test_resident_model_copies_kv_that_costs_less_than_computing(start: int, blocks: int) -> None:
    first, end = 16 * start, 16 * (start + blocks)
    assert returning().is_faster(first, end, end - first, 0)
    assert not returning(us_per_token=0.5).is_faster(first, first + 16 * 2000, 16 * 2000, 0)


def test_conversation_of_4000_tokens_is_computed_behind_the_weights_of_8b() -> None:
    for weights_s in WEIGHTS_S.values():
        assert not returning(weights_s).is_faster(0, 4000, 4000, 0)


def test_long_conversation_comes_back_behind_the_weights() -> None:
    assert returning(WEIGHTS_S["bf16"]).is_faster(0, 16_000, 16_000, 0)
    assert returning(WEIGHTS_S["nf4"]).is_faster(0, 8_000, 8_000, 0)


def test_conversation_behind_others_comes_back() -> None:
    """Three conversations of 4,000 tokens are computed no faster than one of 12,000."""
    costs = returning(WEIGHTS_S["bf16"])
    assert [costs.is_faster(0, 4000, 4000, 4000 * before) for before in range(3)] == [False, False, True]


def test_part_that_is_on_the_device_is_not_copied() -> None:
    costs = returning(0.0, us_per_token=2.0)
    assert not costs.is_faster(0, 4000, 8000, 0)
    assert costs.is_faster(0, 4000, 1000, 0)
