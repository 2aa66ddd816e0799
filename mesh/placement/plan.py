"""Plans which pods should load a model, the cheapest and least disruptive one first."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

_PULL_SHARE = 0.5  # of a load, if the pod has no files of the model
_EVICTION_SHARE = 0.2  # of a load, for any eviction
_USED_SHARE = 0.5  # of a load, for a pod that is full: models spread over the pods
_LOCAL_SHARE = 0.05  # gain of a copy on the pod that was called, which costs no hop
_QUEUE_SHARE = 0.1  # each load in progress slows the others
_MUCH_USED = 1.0  # decayed uses whose eviction costs half a load
_SPREAD_SHARE = 0.05  # models that are loaded at once go to different pods although those look alike
_FEW_FAILURES = 2


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod that may load the model, as its record describes it.

    Attributes:
        free_bytes: free without an eviction.
        victim_use: how much the least used models of the pod are used, in decayed uses; 0 for unused ones.
        num_loading: loads in progress and queued; `loading_threads` of them run at once.
        load_failures: loads that failed in a row, of any models.
        num_preferred: labels that the model's type prefers and the pod has.
        has_files: the pod has loaded the model before, so that its files may be on its disk or in its memory.
        has_base: the pod has the base of the adapter, or is loading it. An adapter costs little there, and the whole base elsewhere.
        base_bytes: the size of the base that the pod would load first, 0 if it has the base or the model is not an adapter.
        has_copy_in_zone: another copy of the model is in the pod's zone.
    """

    instance_id: str
    local: bool
    capacity_bytes: int
    free_bytes: int
    victim_use: float = 0.0
    num_loading: int = 0
    loading_threads: int = 1
    load_failures: int = 0
    num_preferred: int = 0
    has_files: bool = False
    has_base: bool = False
    base_bytes: int = 0
    has_copy_in_zone: bool = False


def plan(pods: Sequence[PodView], model_id: str, size_bytes: int, *, load_s: float) -> tuple[str, ...]:
    """Return the ids of the pods that are large enough, the best one first. `load_s`: the expected duration of a load.

    Pods whose loads keep failing are last. All pods compute the same order from the same records, but for the bonus of the local pod.
    """
    able = [pod for pod in pods if pod.capacity_bytes >= size_bytes + pod.base_bytes]
    return tuple(pod.instance_id for pod in sorted(able, key=lambda pod: _order(pod, model_id, size_bytes, load_s)))


def cost_s(pod: PodView, model_id: str, size_bytes: int, load_s: float) -> float:
    """Estimate the seconds until the model is loaded, and those that the load costs other models."""
    fits = pod.free_bytes >= size_bytes + pod.base_bytes
    threads = max(1, pod.loading_threads)
    queue = max(0, pod.num_loading + 1 - threads) / threads + _QUEUE_SHARE * pod.num_loading
    pull = 0.0 if pod.has_files else _PULL_SHARE
    victim = 0.0 if fits else _EVICTION_SHARE + pod.victim_use / (_MUCH_USED + pod.victim_use)
    used = _USED_SHARE * (1 - pod.free_bytes / pod.capacity_bytes) if pod.capacity_bytes else 0.0
    spread = (_LOCAL_SHARE / 2 if fits else _SPREAD_SHARE) * _fraction(model_id, pod.instance_id)
    return load_s * (queue + pull + victim + used + spread - (_LOCAL_SHARE if pod.local else 0.0))


def _order(pod: PodView, model_id: str, size_bytes: int, load_s: float) -> tuple[bool, int, bool, bool, float, str]:
    return (
        pod.load_failures >= _FEW_FAILURES,
        -pod.num_preferred,
        not pod.has_base,
        pod.has_copy_in_zone,
        cost_s(pod, model_id, size_bytes, load_s),
        pod.instance_id,
    )


def _fraction(model_id: str, instance_id: str) -> float:
    """Return a number from 0 to 1 that is the same on all pods."""
    digest = hashlib.blake2b(f"{model_id}\0{instance_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32
