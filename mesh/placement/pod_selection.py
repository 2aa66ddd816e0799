"""Which pod should load a model: the one where it is least disruptive. Pure; after ModelMesh's placement order."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that takes work, as it tells of itself."""

    instance_id: str
    local: bool
    capacity_bytes: int
    free_bytes: int
    lru_ms: int
    num_models: int = 0
    num_loading: int = 0


def choose_pod(pods: Sequence[Pod], size_bytes: int) -> Pod | None:
    """None: no pod is large enough. The local pod wins a tie: it costs no hop.

    With room before without; with room: fewer loads under way, then more free bytes; without: the one whose oldest model is oldest.
    """
    able = [pod for pod in pods if pod.capacity_bytes >= size_bytes]
    return min(able, key=lambda pod: _order(pod, size_bytes), default=None)


def _order(pod: Pod, size_bytes: int) -> tuple[bool, float, float, int, bool, str]:
    fits = pod.free_bytes >= size_bytes
    if fits:
        # a local pod with room is as good as any: the copy is where it is asked for
        return (
            False,
            float(pod.num_loading),
            0.0 if pod.local else 1.0,
            -pod.free_bytes,
            not pod.local,
            pod.instance_id,
        )
    return (True, float(pod.lru_ms), float(pod.num_loading), 0, not pod.local, pod.instance_id)
