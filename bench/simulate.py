"""Simulates a large mesh under two policies: `python -m bench.simulate [--pods 1000] [--models 1000000] [--seconds 60] [--seeds 3]`.

1,000 pods of 20 places, a million models by a power law, loads of 5 s and 2.5 s more to pull the files, a pod that dies and one that joins every 2 s. Repertory runs its own
`plan`, `plan_eviction`, `choose`, `plan_copies` and records on a virtual clock; ModelMesh follows the rules of its source. `--four-pods` takes both
cases of bench.placement instead, on a machine without delays, and adds a policy that knows the popularity of each model.
"""

import argparse
import random
import statistics
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from bench.simulated_mesh import Figures, Policy, Shape, SimMesh
from bench.simulated_policies import KnowingPolicy, ModelMeshPolicy, RepertoryPolicy
from bench.svg import Series, line_chart

_POLICIES: Mapping[str, Callable[[SimMesh], Policy]] = {
    "Repertory": RepertoryPolicy,
    "ModelMesh's rules": ModelMeshPolicy,
}


_FOUR_PODS = Shape(
    num_pods=4,
    places=12,
    num_models=100,
    exponent=0.9,
    rate=70.0,
    prepare_s=0.5,
    load_s=0.0,
    pull_s=0.0,
    service_s=0.005,
    warmup_s=0.0,
    seconds=60.0,
    failure_every_s=1e9,
    is_filled=False,
)
_LATE_S = 0.3
_SEEDS = range(10)
_SHUFFLED_S = 20.0


def popular(num_models: int, exponent: float, seed: int) -> Iterator[int]:
    """Yield models by a power law, the most popular one is 0."""
    rng = random.Random(seed)
    totals = list(accumulate((rank + 1) ** -exponent for rank in range(num_models)))
    while True:
        yield bisect(totals, rng.random() * totals[-1])


@dataclass(frozen=True, slots=True)
class _Column:
    """One figure of the table. `text` formats a value."""

    name: str
    text: str
    value: Callable[[Figures, Shape], float]


def _missed(figures: Figures, shape: Shape) -> int:
    return figures.refused + sum(wait_s > shape.slo_s for wait_s in figures.waits_s)


_COLUMNS = (
    _Column("refused", "{:.2f} %", lambda figures, _: 100 * figures.refused / max(1, figures.requests)),
    _Column("hits", "{:.1f} %", lambda figures, _: 100 * figures.hits / max(1, figures.requests)),
    _Column("loads per request", "{:.4f}", lambda figures, _: figures.loads / max(1, figures.requests)),
    _Column("moves per failure", "{:.1f}", lambda figures, _: figures.moves / max(1, figures.failures)),
    _Column("SLO missed", "{:.2f} %", lambda figures, shape: 100 * _missed(figures, shape) / max(1, figures.requests)),
    _Column("p99 wait", "{:.1f} s", lambda figures, _: statistics.quantiles(figures.waits_s, n=100)[98]),
    _Column("records written", "{:.0f} kB/s", lambda figures, shape: figures.record_bytes / shape.seconds / 1e3),
)


def row(name: str, shape: Shape, traces: Sequence[Figures]) -> tuple[str, ...]:
    """Return the mean of each figure over the traces, and its range if they differ."""
    cells = [name]
    for column in _COLUMNS:
        values = [column.value(figures, shape) for figures in traces]
        mean, least, most = (column.text.format(value) for value in (statistics.mean(values), min(values), max(values)))
        cells.append(mean if least == most else f"{mean} ({least.split()[0]} to {most.split()[0]})")
    return tuple(cells)


def shuffled(models: Iterator[int], num_models: int, num_calls: int, seed: int) -> Iterator[int]:
    """Yield models whose names change places at random after each `num_calls` calls."""
    rng = random.Random(seed)
    names = list(range(num_models))
    for number, model in enumerate(models):
        if number and not number % num_calls:
            rng.shuffle(names)
        yield names[model]


def compare_four_pods() -> None:
    """Print the share of requests that waited for a load and the number of loads, as means of several traces, for both cases."""
    print("case | policy | refused | waited for a load | loads")
    for case, num_calls in (("steady", 0), ("shuffled", round(_SHUFFLED_S * _FOUR_PODS.rate))):
        policies = {**_POLICIES, "knows each popularity": KnowingPolicy} if case == "steady" else _POLICIES
        for name, policy in policies.items():
            print(case, name, *_mean_of_traces(policy, num_calls), sep=" | ")


def _mean_of_traces(policy: Callable[[SimMesh], Policy], num_calls: int) -> tuple[str, ...]:
    """Return the columns of one policy. `num_calls`: as in `shuffled`; 0 for steady popularity."""
    late, loads, refused = 0.0, 0, 0
    for seed in _SEEDS:
        shape = replace(_FOUR_PODS, seed=seed)
        models = popular(shape.num_models, shape.exponent, seed)
        figures = SimMesh(shape, policy).run(
            shuffled(models, shape.num_models, num_calls, seed) if num_calls else models
        )
        late += sum(wait_s >= _LATE_S for wait_s in figures.waits_s) / figures.requests / len(_SEEDS)
        loads += figures.loads
        refused += figures.refused
    share = 100 * refused / len(_SEEDS) / (_FOUR_PODS.rate * _FOUR_PODS.seconds)
    return f"{share:.1f} %", f"{100 * late:.1f} %", f"{loads / len(_SEEDS):.0f}"


def main() -> None:
    shape = Shape()
    parser = argparse.ArgumentParser(prog="python -m bench.simulate")
    parser.add_argument("--pods", type=int, default=shape.num_pods)
    parser.add_argument("--models", type=int, default=shape.num_models)
    parser.add_argument("--seconds", type=float, default=shape.seconds)
    parser.add_argument("--rate", type=float, default=shape.rate)
    parser.add_argument("--warmup", type=float, default=shape.warmup_s, help="seconds before the measured ones")
    parser.add_argument("--failure-every", type=float, default=shape.failure_every_s, help="seconds between lost pods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--four-pods", action="store_true")
    asked = parser.parse_args()
    if asked.four_pods:
        compare_four_pods()
        return
    shape = Shape(
        num_pods=asked.pods,
        num_models=asked.models,
        seconds=asked.seconds,
        rate=asked.rate,
        warmup_s=asked.warmup,
        failure_every_s=asked.failure_every,
    )
    print("policy", *(column.name for column in _COLUMNS), sep=" | ")
    series = []
    for name, policy in _POLICIES.items():
        begun_s = time.monotonic()
        traces = []
        for seed in range(asked.seeds):
            models = popular(shape.num_models, shape.exponent, seed)
            traces.append(SimMesh(replace(shape, seed=seed), policy).run(models))
        print(" | ".join(row(name, shape, traces)), f"({time.monotonic() - begun_s:.0f} s)", flush=True)
        series.append(Series(name, traces[0].tail(shape.slo_s)))
    if asked.plot is not None:
        asked.plot.write_text(line_chart(series, "seconds", "requests that waited longer, %"))


if __name__ == "__main__":
    main()
