"""Simulates a large mesh under two policies: `python -m bench.simulate [--pods 1000] [--models 1000000] [--seconds 60] [--plot FILE.svg]`.

1,000 pods of 20 places, a million models by a power law, loads of 5 s and 2.5 s more to pull the files, a pod that dies and one that joins every 2 s. Repertory runs its own
`plan`, `plan_eviction`, `choose`, `plan_copies` and records on a virtual clock; ModelMesh follows the rules of its source. `--four-pods` takes the steady
case of bench.placement instead, on a machine without delays, and adds a policy that knows the popularity of each model.
"""

import argparse
import random
import statistics
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
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
_SEEDS = range(3)


def popular(num_models: int, exponent: float, seed: int) -> Iterator[int]:
    """Yield models by a power law, the most popular one is 0."""
    rng = random.Random(seed)
    totals = list(accumulate((rank + 1) ** -exponent for rank in range(num_models)))
    while True:
        yield bisect(totals, rng.random() * totals[-1])


def row(name: str, figures: Figures, shape: Shape) -> tuple[str, ...]:
    total = max(1, figures.requests)
    waits_s = sorted(figures.waits_s)
    percentiles = statistics.quantiles(waits_s, n=100)
    missed = figures.refused + sum(wait_s > shape.slo_s for wait_s in waits_s)
    return (
        name,
        f"{100 * figures.refused / total:.2f} %",
        f"{100 * figures.hits / total:.2f} %",
        f"{figures.loads / total:.4f}",
        f"{figures.moves / max(1, figures.failures):.1f}",
        f"{100 * missed / total:.2f} %",
        f"{percentiles[98]:.1f} s",
        f"{figures.record_bytes / shape.seconds / 1e3:.0f} kB/s",
    )


def compare_four_pods() -> None:
    """Print the mean share of requests that waited for a load, and the mean number of loads."""
    print("policy | refused | waited for a load | loads")
    for name, policy in {**_POLICIES, "knows each popularity": KnowingPolicy}.items():
        late, loads, refused = 0.0, 0, 0
        for seed in _SEEDS:
            shape = replace(_FOUR_PODS, seed=seed)
            figures = SimMesh(shape, policy).run(popular(shape.num_models, shape.exponent, seed))
            late += sum(wait_s >= _LATE_S for wait_s in figures.waits_s) / figures.requests / len(_SEEDS)
            loads += figures.loads
            refused += figures.refused
        share = 100 * refused / len(_SEEDS) / (shape.rate * shape.seconds)
        print(f"{name} | {share:.1f} % | {100 * late:.1f} % | {loads / len(_SEEDS):.0f}")


def main() -> None:
    shape = Shape()
    parser = argparse.ArgumentParser(prog="python -m bench.simulate")
    parser.add_argument("--pods", type=int, default=shape.num_pods)
    parser.add_argument("--models", type=int, default=shape.num_models)
    parser.add_argument("--seconds", type=float, default=shape.seconds)
    parser.add_argument("--rate", type=float, default=shape.rate)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--four-pods", action="store_true")
    asked = parser.parse_args()
    if asked.four_pods:
        compare_four_pods()
        return
    shape = Shape(num_pods=asked.pods, num_models=asked.models, seconds=asked.seconds, rate=asked.rate)
    print("policy | refused | hits | loads per request | moves per failure | SLO missed | p99 wait | records written")
    series = []
    for name, policy in _POLICIES.items():
        begun_s = time.monotonic()
        figures = SimMesh(shape, policy).run(popular(shape.num_models, shape.exponent, shape.seed))
        print(" | ".join(row(name, figures, shape)), f"({time.monotonic() - begun_s:.0f} s)", flush=True)
        series.append(Series(name, figures.tail(shape.slo_s)))
    if asked.plot is not None:
        asked.plot.write_text(line_chart(series, "seconds", "requests that waited longer, %"))


if __name__ == "__main__":
    main()
