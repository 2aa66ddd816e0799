"""Orders the pods that may load a model while the store is away, so that all pods ask the same one without seeing each other's loads.

The order is that of weighted rendezvous hashing: a pod's share of the models is its share of the capacity, and a pod that leaves or joins moves no
model between the others.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutageView:
    """A pod that may load the model, as the last records describe it. `has_base`, `has_files`: as in PodView."""

    instance_id: str
    capacity_bytes: int
    has_base: bool = False
    has_files: bool = False


def order_pods(pods: Iterable[OutageView], model_id: str) -> tuple[str, ...]:
    """Return the ids of the pods, the first one to ask first: those with the base or the files of the model, then by the hash."""
    ordered = sorted(
        pods,
        key=lambda pod: (not pod.has_base, not pod.has_files, -_score(pod, model_id), pod.instance_id),
    )
    return tuple(pod.instance_id for pod in ordered)


def _score(pod: OutageView, model_id: str) -> float:
    digest = hashlib.sha1(f"{model_id}\n{pod.instance_id}".encode(errors="surrogateescape"), usedforsecurity=False)
    fraction = (int.from_bytes(digest.digest()[:8]) + 0.5) / 2**64  # never 0 nor 1
    return -max(1, pod.capacity_bytes) / math.log(fraction)
