"""Computes the capacity that the runtime reports to a mesh, and the size that one model takes of it, in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.engine_client.engine_group import EngineGroup
from runtime.types import ModelFacts

_MODELMESH_UNIT_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Capacity:
    """`mode` says where loaded models may wait for the device: none, host or disk.

    `capacity_bytes` is the limit of all loaded models on all devices. A model that several devices share counts with what it takes on each.
    """

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

    def charge(self, weight_bytes: int, kv_bytes_per_token: int, max_model_len: int, num_devices: int = 1) -> int:
        """Return the size of a model: its weights and, if loaded models must be resident, the least KV, both in whole slabs.

        The sizes are those on each of `num_devices`.
        """
        if self.mode != "none":
            return max(weight_bytes * num_devices, 1)
        kv_bytes = kv_bytes_per_token * min(max_model_len, self.min_kv_tokens)
        on_each = _round_up(weight_bytes, self.slab_bytes) + _round_up(kv_bytes, self.slab_bytes)
        return max(on_each * num_devices, 1)

    def charge_of(self, facts: ModelFacts) -> int:
        return self.charge(facts.weight_bytes, facts.kv_bytes_per_token, facts.max_model_len, facts.num_devices)


def capacity_of(oversubscribe: str, groups: Sequence[EngineGroup], cache_budget_bytes: int) -> Capacity:
    """Add up the groups' devices. `oversubscribe` as configured; "auto" means host if the engines have a host tier, else none."""
    hello = groups[0].hello
    mode = oversubscribe
    if mode == "auto":
        mode = "host" if hello.host_budget_bytes else "none"
    if mode == "host" and not hello.host_budget_bytes:
        mode = "none"  # on a CPU the host tier is the device tier
    budget = {
        "none": sum(group.size * group.hello.device_budget_bytes for group in groups if not group.is_shared),
        "host": sum(group.size * group.hello.host_budget_bytes for group in groups),
        "disk": cache_budget_bytes,
    }[mode]
    return Capacity(mode, budget, hello.slab_bytes, hello.min_kv_tokens)


def budgets_of(groups: Sequence[EngineGroup]) -> dict[int, int]:
    """Return the largest budget in bytes of each device, by the size of its group."""
    budgets: dict[int, int] = {}
    for group in groups:
        budgets[group.size] = max(budgets.get(group.size, 0), group.hello.device_budget_bytes)
    return budgets


def _round_up(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes
