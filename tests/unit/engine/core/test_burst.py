"""Many requests that come one by one, as a front's do: how many steps they make and how long each waits for its first token, by policy alone.

A simulated device: a step of 8B on an H200 takes the time to read the weights or to compute its padded tokens, whichever is more; two are in flight.
"""

import math

import pytest

from runtime.engine.model.run.buckets import bucket_of
from tests.unit.engine.scheduler.test_scheduler import Bench

WEIGHTS_S = 4.2e-3
TOKEN_S = 23e-6
LAUNCH_S = 1.5e-3  # of a graph, with planning and the messages
EAGER_S = 20e-3  # Python, layer by layer


def step_s(tokens: int, rows: int, longest: int) -> tuple[float, float]:
    """(host, device) seconds."""
    bucket = bucket_of(tokens, rows, rows, longest, 600)
    computed = tokens if bucket is None else bucket.num_tokens
    return (EAGER_S if bucket is None else LAUNCH_S), max(WEIGHTS_S, computed * TOKEN_S)


@pytest.mark.parametrize(("streams", "over_s"), [(256, 0.150), (256, 0.0), (64, 0.050), (256, 0.400)])
def test_scheduler_burst_waits_little_in_few_steps(streams: int, over_s: float) -> None:
    bench = Bench(slabs=3000, rows=512, eos=())
    arrivals = [over_s * i / streams for i in range(streams)]
    arrived: dict[int, float] = {}
    first: dict[int, float] = {}
    flying: list[tuple[float, object]] = []
    now, device_free, mixed = 0.0, 0.0, 0
    while len(first) < streams:
        while arrivals and arrivals[0] <= now:
            arrived[bench.add([3 + len(arrived)] * 16, 60).request_id] = arrivals.pop(0)
        bench.now = now
        step = bench.plan(8192, admit=512) if len(flying) < 2 else None
        if step is not None:
            tokens = step.plan.num_tokens
            host, device = step_s(tokens, len(step.plan.rows), max(step.plan.counts))
            mixed += max(step.plan.counts) > 1
            now += host
            device_free = max(device_free, now) + device
            flying.append((device_free, step))
        if flying and (len(flying) == 2 or step is None):
            done_s, landed = flying.pop(0)
            now = max(now, done_s)
            for request_id in bench.settle(landed):  # type: ignore[arg-type]
                first.setdefault(request_id, now)
        elif step is None:
            now = max(now, arrivals[0] if arrivals else now)
    waits = sorted(first[request_id] - arrived[request_id] for request_id in first)
    assert waits[len(waits) // 2] <= 0.15
    assert waits[-1] <= 0.25
    # a step takes all requests that have arrived meanwhile, and none is shorter than the weights take
    assert mixed <= 2 + math.ceil(over_s / WEIGHTS_S)
