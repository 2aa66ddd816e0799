"""Selects the copy with the least expected wait, with a bonus for the copy that served the same prefix before."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from common.model_state import Tier

# Estimates in seconds, used where a copy reports no figure of its own. Mostly their order matters.
_SWAP_IN_S = {Tier.UNKNOWN: 0.0, Tier.DEVICE: 0.0, Tier.HOST: 0.5, Tier.DISK: 10.0, Tier.REMOTE: 60.0}
_RUNNING_S = 0.002  # each running sequence slows a step
_WAITING_S = 0.05  # each queued request
_HOP_S = 0.003
_KV_FULL = 0.9  # KV usage from which on preemption becomes likely
_KV_PRESSURE_S = 5.0  # added at a KV usage of 1
AFFINITY_S = 0.05  # the estimated gain of a cached prefix


@dataclass(frozen=True, slots=True)
class Candidate:
    """One copy.

    `in_flight`: this pod's own unfinished requests to the copy. `running` and `waiting`: what the copy last reported, which is older.
    `loading_s`: the seconds until it is loaded; 0 if it is loaded. `excess_s`: how much slower than the best copy it answered. `is_ejected`: its
    last requests failed, so it is chosen only if all copies are ejected.
    """

    instance_id: str
    local: bool
    tier: Tier = Tier.DEVICE
    loading_s: float = 0.0
    swap_in_s: float = 0.0
    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    kv_usage: float = 0.0
    excess_s: float = 0.0
    is_ejected: bool = False


def expected_wait_s(candidate: Candidate) -> float:
    """Estimate the seconds until a request could run on this copy."""
    swap_s = 0.0 if candidate.tier is Tier.DEVICE else candidate.swap_in_s or _SWAP_IN_S[candidate.tier]
    running = max(candidate.running, candidate.in_flight - candidate.waiting)
    kv_s = max(0.0, candidate.kv_usage - _KV_FULL) / (1 - _KV_FULL) * _KV_PRESSURE_S
    hop_s = 0.0 if candidate.local else _HOP_S
    return (
        candidate.loading_s
        + swap_s
        + candidate.excess_s
        + running * _RUNNING_S
        + candidate.waiting * _WAITING_S
        + kv_s
        + hop_s
    )


def choose(candidates: Sequence[Candidate], prefix_hash: str = "") -> Candidate | None:
    """Return the best candidate; None if there is none. Of equal waits the copy with fewer of this pod's own requests is taken."""
    if not candidates:
        return None
    affine_id = (
        max(candidates, key=lambda candidate: _rank(prefix_hash, candidate.instance_id)).instance_id
        if prefix_hash
        else ""
    )

    def cost(candidate: Candidate) -> tuple[bool, float, int, bool, str]:
        bonus_s = AFFINITY_S if candidate.instance_id == affine_id else 0.0
        return (
            candidate.is_ejected,
            expected_wait_s(candidate) - bonus_s,
            candidate.in_flight,
            not candidate.local,
            candidate.instance_id,
        )

    return min(candidates, key=cost)


def _rank(prefix_hash: str, instance_id: str) -> bytes:
    """Rank for rendezvous hashing: all pods prefer the same copy, and a pod that joins or leaves moves only its own share of prefixes."""
    return hashlib.blake2b(f"{prefix_hash}\0{instance_id}".encode(), digest_size=8).digest()
