"""Whether a model fits a device budget, and the context that it then has."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoint.device_fit import (
    MIN_KV_TOKENS,
    DeviceBudget,
    ModelLayout,
    cut_text,
    fit_adapter,
    fit_device,
    layout_of,
)

_budgets = st.builds(DeviceBudget, st.integers(0, 60), st.sampled_from([4096, 1 << 20]))
_layouts = st.builds(
    ModelLayout, st.integers(0, 60), st.integers(0, 9), st.sampled_from([4, 16]), st.none() | st.integers(1, 40)
)


@given(_budgets, _layouts, st.integers(1, 5000))
def test_fit_device_holds_the_context_that_it_promises(budget: DeviceBudget, layout: ModelLayout, wanted: int) -> None:
    fit = fit_device(budget, layout, wanted)
    if fit.refusal:
        assert fit.max_model_len == 0
        return
    assert min(wanted, MIN_KV_TOKENS) <= fit.max_model_len <= wanted
    blocks = -(-fit.max_model_len // layout.block_tokens)
    kv_slabs = -(-blocks // layout.blocks_per_slab)
    assert layout.weight_slabs + kv_slabs <= budget.total_slabs
    assert layout.max_kv_slabs is None or kv_slabs <= layout.max_kv_slabs


@given(_budgets, _layouts, st.integers(1, 5000))
def test_fit_device_gives_no_less_for_a_larger_budget(budget: DeviceBudget, layout: ModelLayout, wanted: int) -> None:
    larger = DeviceBudget(budget.total_slabs + 1, budget.slab_bytes)
    assert fit_device(larger, layout, wanted).max_model_len >= fit_device(budget, layout, wanted).max_model_len


def test_fit_device_names_the_sizes_that_exceed_the_budget() -> None:
    refusal = fit_device(DeviceBudget(10, 4096), layout_of(9 * 4096, 64, 16, 4096), 1000).refusal
    for size in (9 * 4096, 4 * 4096, 256, 10 * 4096):
        assert str(size) in refusal
    assert "exceeds a slab of 4096 bytes" in fit_device(DeviceBudget(10, 4096), layout_of(1, 1024, 16, 4096), 9).refusal


def test_cut_text_names_both_lengths() -> None:
    assert cut_text(4096, 4096) == ""
    assert "1680 instead of 4096 tokens" in cut_text(1680, 4096)


@given(st.integers(1, 200), st.integers(1, 10 << 20), st.integers(0, 100), st.integers(1, 5000))
def test_fit_adapter_leaves_a_slab_of_kv_beside_base_and_adapter(
    total: int, size_bytes: int, base_slabs: int, wanted: int
) -> None:
    budget, base = DeviceBudget(total, 1 << 20), ModelLayout(base_slabs, 4, 16)
    fit = fit_adapter(budget, size_bytes, base, wanted)
    most_slabs = -(-size_bytes // (1 << 20)) + 1  # it may begin within a slab
    left = total - base_slabs - most_slabs
    assert bool(fit.refusal) == (left < 1)
    assert fit.max_model_len == (0 if left < 1 else min(wanted, left * 64))
    if fit.refusal:
        assert f"its {size_bytes} bytes" in fit.refusal
