"""Describes pods to `plan`, as their records and the model's record show them."""

from collections.abc import Set
from dataclasses import replace

from mesh.placement.plan import PodView
from mesh.placement.usage import Usage
from mesh.registry.records import CAPACITY_UNIT_BYTES, InstanceRecord, ModelRecord


def view_of(pod_id: str, pod: InstanceRecord, record: ModelRecord, num_preferred: int, zones: Set[str]) -> PodView:
    """Return the view of a pod. `zones`: those with a copy of the model."""
    capacity_bytes, used_bytes = pod.capacity_units * CAPACITY_UNIT_BYTES, pod.used_units * CAPACITY_UNIT_BYTES
    return PodView(
        pod_id,
        False,
        capacity_bytes,
        max(0, capacity_bytes - used_bytes),
        victim_use=pod.victim_use,
        num_loading=pod.loads_in_progress,
        loading_threads=pod.loading_threads,
        load_failures=pod.load_failures,
        num_preferred=num_preferred,
        has_files=pod_id in record.files_in,
        has_copy_in_zone=pod.zone in zones,
    )


def own_view(view: PodView, usage: Usage, num_loading: int, load_failures: int) -> PodView:
    """Return this pod's own view with what it knows better than its record."""
    return replace(
        view,
        local=True,
        capacity_bytes=usage.capacity_bytes,
        free_bytes=usage.free_bytes,
        victim_use=usage.victim_use,
        num_loading=num_loading,
        load_failures=load_failures,
    )


def of_adapter(base: ModelRecord | None, view: PodView) -> PodView:
    """Return a pod's view for an adapter of `base`. On a pod without the base, the base's size and files are counted."""
    if base is None:
        return view
    if view.instance_id in base.instance_ids:
        return replace(view, has_base=True)
    return replace(view, base_bytes=base.weight_bytes, has_files=view.instance_id in base.files_in)
