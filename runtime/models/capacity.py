"""Computes the capacity that the runtime reports to a mesh, and the size that one model takes of it, in bytes."""

from dataclasses import dataclass

from runtime.ipc.messages import Hello
from runtime.types import ModelFacts

_MODELMESH_UNIT_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Capacity:
    """`mode` says where loaded models may wait for the device: none, host or disk. `capacity_bytes` is the limit of all loaded models."""

    mode: str
    capacity_bytes: int
    slab_bytes: int
    min_kv_tokens: int

    @property
    def default_size_bytes(self) -> int:
        """Return the assumed size of a model of unknown size: a tenth, because ModelMesh checks at startup that ten of them fit.

        It is a multiple of ModelMesh's unit. ModelMesh rounds up, and ten sizes rounded up may exceed the capacity.
        """
        return max(self.capacity_bytes // 10 // _MODELMESH_UNIT_BYTES, 1) * _MODELMESH_UNIT_BYTES

    def charge(self, weight_bytes: int, kv_bytes_per_token: int, max_model_len: int) -> int:
        """Return the size of a model: its weights and, if loaded models must be resident, the least KV, both in whole slabs."""
        if self.mode != "none":
            return max(weight_bytes, 1)
        kv_bytes = kv_bytes_per_token * min(max_model_len, self.min_kv_tokens)
        return max(_round_up(weight_bytes, self.slab_bytes) + _round_up(kv_bytes, self.slab_bytes), 1)

    def charge_of(self, facts: ModelFacts) -> int:
        return self.charge(facts.weight_bytes, facts.kv_bytes_per_token, facts.max_model_len)


def capacity_of(oversubscribe: str, hello: Hello, cache_budget_bytes: int) -> Capacity:
    """`oversubscribe` as configured; "auto" means host if the engine has a host tier, else none."""
    mode = oversubscribe
    if mode == "auto":
        mode = "host" if hello.host_budget_bytes else "none"
    if mode == "host" and not hello.host_budget_bytes:
        mode = "none"  # on a CPU the host tier is the device tier
    budget = {"none": hello.device_budget_bytes, "host": hello.host_budget_bytes, "disk": cache_budget_bytes}[mode]
    return Capacity(mode, budget, hello.slab_bytes, hello.min_kv_tokens)


def _round_up(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes
