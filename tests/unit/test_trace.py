"""A small trace in virtual time: every request is answered, the same way each time, and ahead of one vLLM that sleeps and wakes."""

from pathlib import Path

import pytest

from bench.trace_bounds import belady_hit_rate, known_counts_hit_rate
from bench.trace_device import choose_budgets, write_checkpoints
from bench.trace_outcome import Outcome, Served, byte_hits, first_tokens_row, longest_waits
from bench.trace_simulated import SimulatedEngine, serve_as_vllm
from bench.trace_workload import Request, TraceLine, make_models, make_trace, make_warm_up, parse_lines
from common.model_state import Tier
from common.units import GIB, MIB

# The tests of the scheduler and of residency measure what the simulation uses of them.
pytestmark = pytest.mark.no_cover

MODELS = make_models(12)
TRACE = make_trace(list(MODELS), seconds=20.0, rate=2.0, alpha=0.9, cv=4.0)
BUDGETS = (24 * GIB, 48 * GIB)


def serve(trace: list[Request], device_bytes: int = BUDGETS[0], host_bytes: int = BUDGETS[1]) -> Outcome:
    return SimulatedEngine(MODELS, device_bytes, host_bytes).serve(trace)


def test_trace_is_served_whole_and_the_same_each_time() -> None:
    first, again = (serve(TRACE) for _ in range(2))
    assert [one.end_s for one in first.served] == [one.end_s for one in again.served]
    assert max(one.ttft_s for one in first.served) < 30.0
    assert {one.tier for one in first.served} >= {Tier.DEVICE, Tier.HOST}


def test_trace_copies_little_more_than_belady() -> None:
    """Requests that wait for one copy together need no copies of their own."""
    outcome = serve(TRACE)
    best = belady_hit_rate(MODELS, TRACE, BUDGETS[0], outcome.resident_at_start)
    assert byte_hits(MODELS, outcome).not_copied > 0.9 * best


def test_engine_answers_twice_as_many_in_time_as_one_vllm() -> None:
    engine, peer = serve(TRACE), serve_as_vllm(MODELS, TRACE)
    assert sum(one.is_good() for one in engine.served) >= 2 * sum(one.is_good() for one in peer.served)


def test_simulated_engine_keeps_its_residents_for_the_next_trace() -> None:
    engine = SimulatedEngine(MODELS, *BUDGETS)
    engine.serve(make_warm_up(["m11", "m09"], gap_s=2.0))
    later = engine.serve([Request(0.0, "m09", 64, 4), Request(0.1, "m08", 64, 4)])
    assert "m09" in later.resident_at_start
    assert [one.tier is Tier.DEVICE for one in later.served] == [True, False]
    assert later.copied_bytes == MODELS["m08"].weight_bytes


def test_bounds_of_a_trace_that_is_known() -> None:
    """Room for two of three equal models: Belady's algorithm keeps the one that comes next, known counts the one that comes most."""
    models = make_models(3, ["1B/nf4"])
    size = models["m00"].weight_bytes
    trace = [Request(float(at), f"m0{which}", 64, 4) for at, which in enumerate((0, 1, 2, 1, 0, 0, 0))]
    assert belady_hit_rate(models, trace, 2 * size) == pytest.approx(3 / 7)
    assert known_counts_hit_rate(models, trace, 2 * size) == pytest.approx(3 / 7)
    assert belady_hit_rate(models, trace, 3 * size) == pytest.approx(4 / 7)
    assert known_counts_hit_rate(models, trace, 2 * size, frozenset({"m00", "m01"})) == pytest.approx(5 / 7)


@pytest.mark.parametrize("alpha", [0.5, 1.3])
def test_belady_finds_more_than_known_counts(alpha: float) -> None:
    trace = make_trace(list(MODELS), 100.0, 2.0, alpha, 1.0)
    assert belady_hit_rate(MODELS, trace, BUDGETS[0]) > known_counts_hit_rate(MODELS, trace, BUDGETS[0])


def test_hot_model_returns_to_the_host_tier() -> None:
    """The host tier has room for some models only. A model that was loaded first and is used most ends up in it or on the device."""
    trace = [one for one in make_trace(list(MODELS), 30.0, 1.0, 0.5, 1.0) if one.model_id != "m00"]
    hot = [Request(float(at), "m00", 64, 4) for at in range(10, 30)]
    outcome = serve(sorted([*trace, *hot], key=lambda one: one.at_s), 20 * GIB, 24 * GIB)
    later = [one.tier for one in outcome.served if one.request.model_id == "m00"][5:]
    assert Tier.DISK not in later


def test_report_counts_goodput_tiers_and_failures() -> None:
    asked = [Request(0.0, "m00", 64, 11), Request(1.0, "m01", 64, 11), Request(2.0, "m01", 64, 11)]
    served = [
        Served(asked[0], Tier.DEVICE, 0.5, 1.5),
        Served(asked[1], Tier.DISK, 3.0, 4.0),
        Served(asked[2], Tier.DISK, error="it waited too long"),
    ]
    outcome = Outcome(served, copied_bytes=MODELS["m01"].weight_bytes, span_s=4.0)
    assert [outcome.goodput(limit) for limit in (1.0, 3.0)] == [0.25, 0.5]
    sizes = [MODELS[one.model_id].weight_bytes for one in asked]
    hits = byte_hits(MODELS, outcome)
    assert hits.found == pytest.approx(sizes[0] / sum(sizes))
    assert hits.not_copied == pytest.approx((sizes[0] + sizes[1]) / sum(sizes))
    row = first_tokens_row("0.9/4/2", "engine", outcome)
    assert [cell.strip() for cell in row.split("|")][-6:-1] == [
        "0.50 / 0.50 / 0.50 s", "-", "2.00 / 2.00 / 2.00 s", "2.0 s", "1",
    ]  # fmt: skip
    assert "m01 (1B/bf16) 2.0 s, m00 (8B/bf16) 0.5 s" in longest_waits(MODELS, outcome)
    assert longest_waits(MODELS, outcome).endswith("models with a failed request: m01")


def test_lines_are_parsed() -> None:
    assert parse_lines("0.5/1/2,1.3/4/4") == [TraceLine(0.5, 1.0, 2.0), TraceLine(1.3, 4.0, 4.0)]


def test_models_of_one_kind_share_files_under_paths_of_their_own(tmp_path: Path) -> None:
    """The engine keeps one host image for equal paths, so two models must not have one."""
    written = write_checkpoints(make_models(3, ["tiny/bf16"]), tmp_path, "cpu")
    files = [Path(checkpoint.weight_files[0]) for checkpoint in written.values()]
    assert len(set(files)) == 3
    assert len({file.resolve() for file in files}) == 1
    assert all(Path(checkpoint.model_dir, "config.json").exists() for checkpoint in written.values())


def test_host_budget_is_what_is_asked() -> None:
    assert choose_budgets("cuda", 60, 20).host_bytes == 20 * GIB
    assert choose_budgets("cpu", 0.5, 0).slab_bytes == MIB
