"""What this runtime can hold and what one model counts, in the bytes that a mesh keeps its books in. Pure."""

from dataclasses import dataclass

from common.units import MIB
from runtime.ipc.messages import Hello
from runtime.types import ModelFacts

# KV that a resident model must at least get beside its weights, where loaded means resident
_KV_FLOOR_TOKENS = 256
_SLAB_BYTES_CPU = 4 * MIB
_SLAB_BYTES_GPU = 64 * MIB


@dataclass(frozen=True, slots=True)
class Capacity:
    """Where loaded models may wait (`mode`: none | host | disk), and how many bytes of them."""

    mode: str
    capacity_bytes: int
    slab_bytes: int

    @property
    def default_size_bytes(self) -> int:
        """Assumed for a model of unknown size: a tenth, so that a mesh's own start-up check (ten default sizes fit) holds."""
        return max(self.capacity_bytes // 10, 8192)

    def charge(self, weight_bytes: int, kv_bytes_per_token: int, max_model_len: int) -> int:
        """What a model counts: its weights, and where it must be resident to be loaded also a little KV, both in whole slabs."""
        if self.mode != "none":
            return max(weight_bytes, 1)
        kv_bytes = kv_bytes_per_token * min(max_model_len, _KV_FLOOR_TOKENS)
        return max(_round_up(weight_bytes, self.slab_bytes) + _round_up(kv_bytes, self.slab_bytes), 1)

    def charge_of(self, facts: ModelFacts) -> int:
        return self.charge(facts.weight_bytes, facts.kv_bytes_per_token, facts.max_model_len)


def capacity_of(oversubscribe: str, hello: Hello, slab_bytes: int, cache_budget_bytes: int) -> Capacity:
    """`oversubscribe` as configured; "auto" is host where there is a host tier, else none. `slab_bytes` 0 = the engine's own choice."""
    mode = oversubscribe
    if mode == "auto":
        mode = "host" if hello.host_budget_bytes else "none"
    if mode == "host" and not hello.host_budget_bytes:
        mode = "none"  # on a CPU the host tier is the device tier
    budget = {"none": hello.device_budget_bytes, "host": hello.host_budget_bytes, "disk": cache_budget_bytes}[mode]
    return Capacity(mode, budget, slab_bytes or (_SLAB_BYTES_CPU if hello.device == "cpu" else _SLAB_BYTES_GPU))


def _round_up(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes
