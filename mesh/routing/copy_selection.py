"""Which copy answers a request: the one with the least expected wait, with a leaning to where the same prompt went before. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.types import Tier

# What each thing costs, in seconds, where the copies' own figures don't say. Only their order matters much.
_SWAP_IN_S = {Tier.DEVICE: 0.0, Tier.HOST: 0.5, Tier.DISK: 10.0, Tier.REMOTE: 60.0}
_RUNNING_S = 0.002  # one more row slows a step a little
_WAITING_S = 0.05  # one more request ahead in the queue
_HOP_S = 0.003
_KV_FULL = 0.9
_KV_PRESSURE_S = 5.0  # a full cache means preemption
AFFINITY_S = 0.05  # what a cached prefix is taken to be worth


@dataclass(frozen=True, slots=True)
class Candidate:
    """One copy. `in_flight`: requests that this pod has sent it and that haven't ended; `running` and `waiting` are its own, older account.

    `loading_s`: how long until it is loaded; 0 if it is.
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


def expected_wait_s(candidate: Candidate) -> float:
    swap_s = 0.0 if candidate.tier is Tier.DEVICE else candidate.swap_in_s or _SWAP_IN_S[candidate.tier]
    running = max(candidate.running, candidate.in_flight - candidate.waiting)
    kv_s = max(0.0, candidate.kv_usage - _KV_FULL) / (1 - _KV_FULL) * _KV_PRESSURE_S
    hop_s = 0.0 if candidate.local else _HOP_S
    return candidate.loading_s + swap_s + running * _RUNNING_S + candidate.waiting * _WAITING_S + kv_s + hop_s


def choose(candidates: Sequence[Candidate], prefix_hash: str = "") -> Candidate | None:
    """None: there is no copy. Equal waits go to the copy with fewer of our own requests."""
    if not candidates:
        return None
    home = (
        max(candidates, key=lambda candidate: _rank(prefix_hash, candidate.instance_id)).instance_id
        if prefix_hash
        else ""
    )

    def cost(candidate: Candidate) -> tuple[float, int, bool, str]:
        bonus_s = AFFINITY_S if candidate.instance_id == home else 0.0
        return expected_wait_s(candidate) - bonus_s, candidate.in_flight, not candidate.local, candidate.instance_id

    return min(candidates, key=cost)


def _rank(prefix_hash: str, instance_id: str) -> bytes:
    """Rendezvous hashing: every pod finds the same home, and a pod that comes or goes moves only its own share."""
    return hashlib.blake2b(f"{prefix_hash}\0{instance_id}".encode(), digest_size=8).digest()
