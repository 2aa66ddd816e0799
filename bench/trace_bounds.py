"""Computes byte hit rates that a policy can be compared with, from the order of requests alone."""

from collections.abc import Mapping, Sequence

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
    resident = set(resident_at_start)
    hit = total = 0
    for request in trace:
        uses[request.model_id].pop()
        size = models[request.model_id].weight_bytes
        total += size
        if request.model_id in resident:
            hit += size
            continue
        resident.add(request.model_id)
        while sum(models[name].weight_bytes for name in resident) > capacity_bytes:
            others = resident - {request.model_id}
            resident.discard(max(others, key=lambda name: uses[name][-1] if uses.get(name) else len(trace)))
    return hit / total
