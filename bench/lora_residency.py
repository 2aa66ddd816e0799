"""Measures how much later first tokens come because more LoRA adapters are registered than fit on the device; run by `bench.lora --residency`.

The same requests arrive twice, at the same times: once for the adapters that fit, all of them resident, and once for all adapters, of which the others
must be copied to the device first. Arrivals are a Poisson process, and adapter k is called with a weight of (k + 1) to the power of minus --exponent.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.checkpoints import Shape
from runtime.types import GenerationRequest, SamplingParams, StopParams
from tests.support.engine_process import Engine

INPUT_TOKENS, OUTPUT_TOKENS = 256, 64
ASKED_S = 0.020  # by which the 99th percentile may come later
_WARM_UP = 32  # requests that are not counted
_STATS_S = 1.5  # within which the engine sends its figures


@dataclass(frozen=True, slots=True)
class Traffic:
    """`registered` adapters of which `resident` fit on the device, `rate` requests a second for `seconds`."""

    registered: int = 200
    resident: int = 64
    rate: float = 30.0
    seconds: float = 20.0
    exponent: float = 1.0


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    adapter: int


def arrivals(traffic: Traffic, seed: int = 0) -> list[Arrival]:
    """Draw the requests of one run, earliest first."""
    rng = np.random.default_rng(seed)
    count = max(1, round(traffic.rate * traffic.seconds))
    times = np.cumsum(rng.exponential(1 / traffic.rate, count))
    weights = np.arange(1, traffic.registered + 1, dtype=np.float64) ** -traffic.exponent
    called = rng.choice(traffic.registered, count, p=weights / weights.sum())
    return [Arrival(float(at), int(adapter)) for at, adapter in zip(times, called, strict=True)]


def measure_residency(running: Engine, shape: Shape, names: Sequence[str], traffic: Traffic) -> bool:
    """Print both runs, and return whether the 99th percentiles differ by no more than asked. `names`: the loaded adapters.

    Raises RuntimeError if a run did not do what it stands for: no copy in the first, at least one in the second.
    """
    drawn = arrivals(traffic)
    rng = np.random.default_rng(1)
    requests = [_request(rng.integers(100, shape.vocab, INPUT_TOKENS)) for _ in drawn]
    near = list(names[: traffic.resident])
    warm_up = [(0.0, name, request) for name, request in zip(near, requests * len(near), strict=False)]
    running.run_paced(warm_up)
    running.wait_idle(_STATS_S)
    print(
        f"residency: {traffic.rate:g} requests/s for {traffic.seconds:g} s, {INPUT_TOKENS} + {OUTPUT_TOKENS} tokens, "
        f"adapters called with weights k^-{traffic.exponent:g}\n"
        f"{'adapters':>10} {'on device':>10} {'requests':>9} {'copies':>7} {'TTFT p50':>9} {'p95':>9} {'p99':>9}"
    )
    late: list[float] = []
    for all_names in (near, list(names)):
        before = _copies(running, names)
        waits = running.run_paced(
            [
                (arrival.at_s, all_names[arrival.adapter % len(all_names)], request)
                for arrival, request in zip(drawn, requests, strict=True)
            ]
        )
        running.wait_idle(_STATS_S)
        copies = _copies(running, names) - before
        if (copies > 0) != (len(all_names) > traffic.resident):
            raise RuntimeError(
                f"{copies} adapters were copied in a run over {len(all_names)} of which {traffic.resident} fit"
            )
        counted = sorted(waits[_WARM_UP:] or waits)
        late.append(_percentile(counted, 0.99))
        print(
            f"{len(all_names):>10} {traffic.resident:>10} {len(counted):>9} {copies:>7} {statistics.median(counted) * 1e3:>7.1f}ms "
            f"{_percentile(counted, 0.95) * 1e3:>7.1f}ms {late[-1] * 1e3:>7.1f}ms",
            flush=True,
        )
    is_met = late[1] - late[0] <= ASKED_S
    print(
        f"p99 is {(late[1] - late[0]) * 1e3:+.1f} ms; asked: at most +{ASKED_S * 1e3:g} ms: {'yes' if is_met else 'no'}"
    )
    return is_met


def _copies(running: Engine, names: Sequence[str]) -> int:
    if running.stats is None:
        raise RuntimeError("the engine has sent no figures")
    known = {figures.model_id: figures.swap_ins_total for figures in running.stats.models}
    return sum(known[name] for name in names)


def _request(ids: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> GenerationRequest:
    stop = StopParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    return GenerationRequest(prompt=tuple(ids.tolist()), sampling=SamplingParams(temperature=0.0), stop=stop)


def _percentile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(len(ascending) * share))]
