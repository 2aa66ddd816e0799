"""The simulated mesh of bench.simulate: its accounts under both policies, and that a better policy has better figures."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulate import popular, row, shuffled
from bench.simulated_mesh import Figures, Shape, SimMesh
from bench.simulated_policies import ModelMeshPolicy, RepertoryPolicy

SMALL = Shape(num_pods=20, places=10, num_models=5000, rate=60.0, load_s=1.0, pull_s=0.5, warmup_s=20.0, seconds=30.0)


def run(shape: Shape, policy: type[RepertoryPolicy] | type[ModelMeshPolicy]) -> Figures:
    return SimMesh(shape, policy).run(popular(shape.num_models, shape.exponent, shape.seed))


@pytest.mark.parametrize("policy", [RepertoryPolicy, ModelMeshPolicy])
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 1000))
def test_simulated_mesh_keeps_its_books(policy: type[RepertoryPolicy] | type[ModelMeshPolicy], seed: int) -> None:
    shape = Shape(num_pods=4, places=3, num_models=40, rate=10.0, warmup_s=2.0, seconds=10.0, seed=seed)
    mesh = SimMesh(shape, policy)
    figures = mesh.run(popular(shape.num_models, shape.exponent, seed))
    assert figures.requests == shape.rate * shape.seconds
    assert len(figures.waits_s) + figures.refused == figures.requests
    assert figures.hits <= len(figures.waits_s)
    held = [copy for pod in mesh.pods.values() for copy in pod.copies.values()]
    assert all(pod.num_placed <= shape.places for pod in mesh.pods.values())
    assert sorted(id(copy) for copies in mesh.holders.values() for copy in copies) == sorted(map(id, held))
    assert len(mesh.pods) == shape.num_pods
    assert figures.record_bytes > 0


def test_simulated_mesh_finds_all_models_loaded_where_there_is_room() -> None:
    roomy = Shape(num_pods=5, places=20, num_models=60, rate=20.0, warmup_s=1.0, seconds=10.0, failure_every_s=1e9)
    figures = run(roomy, RepertoryPolicy)
    assert (figures.loads, figures.hits, figures.refused) == (0, figures.requests, 0)


def test_simulated_mesh_shows_that_use_evicts_better_than_recency() -> None:
    ours, theirs = run(SMALL, RepertoryPolicy), run(SMALL, ModelMeshPolicy)
    assert ours.hits > theirs.hits
    assert ours.refused == 0
    curve = [share for _, share in ours.tail(SMALL.slo_s)]
    assert curve == sorted(curve, reverse=True)


def test_simulated_mesh_loads_less_where_victims_stay_until_the_files_are_there() -> None:
    prepared = replace(SMALL, prepare_s=3.0, failure_every_s=1e9)
    read = replace(prepared, prepare_s=0.0, load_s=prepared.load_s + 3.0)
    assert run(prepared, RepertoryPolicy).loads < run(read, RepertoryPolicy).loads


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 10))
def test_simulated_mesh_shuffles_names_only_between_periods(models: list[int], num_calls: int) -> None:
    names = list(shuffled(iter(models), 5, num_calls, seed=1))
    assert names[:num_calls] == models[:num_calls]
    for start in range(0, len(models), num_calls):
        pairs = set(zip(models[start : start + num_calls], names[start : start + num_calls], strict=True))
        assert len(pairs) == len({model for model, _ in pairs}) == len({name for _, name in pairs})


def test_simulated_mesh_prints_the_mean_and_the_range_of_traces() -> None:
    traces = [Figures(requests=10, hits=hits, loads=2, waits_s=[0.0] * 10) for hits in (4, 6)]
    cells = row("ours", SMALL, traces)
    assert cells[0] == "ours"
    assert "50.0 % (40.0 to 60.0)" in cells
    assert "0.2000" in cells
