"""Computes byte hit rates that a policy can be compared with, from the order of requests alone: one request at a time, and no memory for KV."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from bench.simulated_device import SimulatedModel
from bench.trace_workload import Request


def belady_hit_rate(
    models: Mapping[str, SimulatedModel],
    trace: Sequence[Request],
    capacity_bytes: int,
    resident_at_start: frozenset[str] = frozenset(),
) -> float:
    """Return the share of requested bytes that are resident if the model whose next use is furthest goes first.

    For models of different sizes this is close to the best, not the best.
    """
    uses: dict[str, list[int]] = {}
    for index in range(len(trace) - 1, -1, -1):
        uses.setdefault(trace[index].model_id, []).append(index)

    def worth(model_id: str, at: int) -> float:
        later = uses.get(model_id, [])
        while later and later[-1] <= at:
            later.pop()
        return -later[-1] if later else -len(trace)

    return _hit_rate(models, trace, capacity_bytes, resident_at_start, worth)


def known_counts_hit_rate(
    models: Mapping[str, SimulatedModel],
    trace: Sequence[Request],
    capacity_bytes: int,
    resident_at_start: frozenset[str] = frozenset(),
) -> float:
    """Return the same if the model with the fewest requests in the whole trace goes first.

    Where requests are independent, a policy that does not know the order of future requests cannot expect more.
    """
    counts = Counter(request.model_id for request in trace)
    return _hit_rate(models, trace, capacity_bytes, resident_at_start, lambda model_id, at: counts[model_id])


def _hit_rate(
    models: Mapping[str, SimulatedModel],
    trace: Sequence[Request],
    capacity_bytes: int,
    resident_at_start: frozenset[str],
    worth: Callable[[str, int], float],
) -> float:
    """`worth`: of keeping a model after the request at an index; the least is evicted first."""
    resident = set(resident_at_start)
    hit = total = 0
    for at, request in enumerate(trace):
        size = models[request.model_id].weight_bytes
        total += size
        if request.model_id in resident:
            hit += size
            continue
        resident.add(request.model_id)
        while sum(models[name].weight_bytes for name in resident) > capacity_bytes:
            others = sorted(resident - {request.model_id})
            resident.discard(min(others, key=lambda name: worth(name, at)))
    return hit / total
