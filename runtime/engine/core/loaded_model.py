"""Holds the engine core's state of a loaded model: its requests, its caches and the tier of its weights.

The state changes through the methods only; what changes on the device is an operation (runtime.engine.operations).
"""

from dataclasses import dataclass, field
from typing import Protocol

from common.decayed_uses import DecayedUses
from common.model_state import ModelFigures, Tier
from runtime.engine.interfaces import KvGeometry
from runtime.engine.kvcache.host_blocks import HostBlocks
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.memory.residency import Holder
from runtime.engine.scheduler.cost_model import CostModel
from runtime.engine.scheduler.scheduler import Scheduler
from runtime.ipc.messages import Load
from runtime.types import ModelFacts

# bytes per second, assumed until a swap-in of the tier was measured
_GUESSED_BYTES_PER_S = {Tier.HOST: 40e9, Tier.DISK: 1.5e9}


class WeightsStatus(Protocol):
    """The queries of interfaces.ModelMemory. Planning reads them and changes nothing."""

    @property
    def weight_slabs(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def kv(self) -> KvGeometry: ...

    def swap_in_done(self) -> bool: ...

    def host_bytes(self) -> int: ...


@dataclass(slots=True, eq=False)
class LoadedModel:
    """One model and its counters.

    Attributes:
        weight_slabs: the slabs under the weights; None = not resident.
        swapping: the weights are being copied to the device.
        draining_since_s: since when the model admits no request, until it is evicted.
        faults: steps that failed in a row.
        swap_seconds: how long the last swap-in took, per tier that the weights came from.
        uses: the uses of all models of the engine.
        host_blocks: its KV blocks in host memory; None = nothing is saved.
    """

    request: Load
    facts: ModelFacts
    memory: WeightsStatus
    cache: PrefixCache
    scheduler: Scheduler
    cost: CostModel
    max_waiting: int
    last_used_s: float
    weight_slabs: list[int] | None = None
    swapping: bool = False
    resident_since_s: float = 0.0
    draining_since_s: float | None = None
    faults: int = 0
    evictions: int = 0
    swap_ins: int = 0
    swap_seconds: dict[Tier, float] = field(default_factory=dict)
    uses: DecayedUses = field(default_factory=DecayedUses)
    host_blocks: HostBlocks | None = None

    @property
    def model_id(self) -> str:
        return self.request.model_id

    @property
    def weights_owner(self) -> str:
        return f"{self.model_id}/weights"

    @property
    def resident(self) -> bool:
        return self.weight_slabs is not None

    @property
    def draining(self) -> bool:
        return self.draining_since_s is not None

    @property
    def use(self) -> float:
        """The model's decayed uses."""
        return self.uses.of(self.model_id)

    def touch(self, now: float) -> None:
        """Note that the model is used."""
        self.last_used_s = now

    def begin_swap_in(self, slabs: list[int], now: float) -> None:
        """Record that the weights are being copied to `slabs`."""
        self.weight_slabs = slabs
        self.resident_since_s = now
        self.swapping = True
        self.swap_ins += 1

    def finish_swap_in(self, now: float) -> None:
        """Record that the last byte of the weights has arrived."""
        self.swapping = False
        self.swap_seconds[self.lower_tier] = now - self.resident_since_s

    def leave_device(self) -> list[int]:
        """Record that the weights were evicted. Returns the slabs that they had."""
        slabs, self.weight_slabs = self.weight_slabs or [], None
        self.swapping = False
        self.draining_since_s = None
        self.evictions += 1
        return slabs

    def drain(self, now: float) -> None:
        """Admit no more requests until the model is evicted."""
        self.draining_since_s = now

    def stop_draining(self) -> None:
        self.draining_since_s = None

    def record_fault(self) -> int:
        """Count a step that failed. Returns how many failed in a row."""
        self.faults += 1
        return self.faults

    def clear_faults(self) -> None:
        self.faults = 0

    @property
    def lower_tier(self) -> Tier:
        """The tier of the weights while they are not on the device."""
        return Tier.HOST if self.memory.host_bytes() else Tier.DISK

    @property
    def return_cost_s(self) -> float:
        tier = self.lower_tier
        return self.swap_seconds.get(tier, self.memory.weight_bytes / _GUESSED_BYTES_PER_S[tier])

    def has_work(self) -> bool:
        """Whether a step could be planned for the model if it were resident."""
        return bool(self.scheduler.running) or (len(self.scheduler.waiting) > 0 and not self.draining)

    def holder(self, yields_to: tuple[int, int] | None = None) -> Holder:
        """Return the facts that residency.py decides on. Waiting requests that come after the order `yields_to` do not count."""
        # those that wait for their adapters included
        yields = yields_to is not None and all(s.order > yields_to for s in self.scheduler.sequences())
        return Holder(
            self.model_id,
            self.memory.weight_slabs,
            self.last_used_s,
            self.resident_since_s,
            self.return_cost_s,
            self.swapping,
            self.scheduler.running,
            0 if yields else len(self.scheduler.waiting),
            self.draining,
            self.use,
        )

    def stats(self, slab_bytes: int, kv_blocks: int, busy_s: float) -> ModelFigures:
        """`kv_blocks`: blocks of KV that the model could have now without a preemption. `busy_s`: see ModelFigures."""
        blocks, totals = self.cache.blocks, self.scheduler.totals
        kv_bytes = blocks.slabs * slab_bytes
        saved = self.host_blocks
        return ModelFigures(
            model_id=self.model_id,
            tier=Tier.DEVICE if self.resident else self.lower_tier,
            weight_bytes=self.memory.weight_bytes,
            device_bytes=kv_bytes + len(self.weight_slabs or ()) * slab_bytes,
            kv_bytes=kv_bytes,
            kv_used_tokens=blocks.used_blocks * blocks.geometry.block_tokens,
            kv_cached_tokens=blocks.idle_blocks * blocks.geometry.block_tokens,
            kv_usage=min(1.0, blocks.used_blocks / max(1, kv_blocks)),
            running=self.scheduler.running,
            waiting=len(self.scheduler.waiting),
            busy_s=busy_s,
            swap_in_s=0.0 if self.resident else self.return_cost_s,
            prompt_tokens_total=totals.prompt_tokens,
            generated_tokens_total=totals.generated_tokens,
            prefix_hit_tokens_total=totals.prefix_hit_tokens,
            preemptions_total=totals.preemptions,
            steps_total=totals.steps,
            step_seconds_total=totals.step_seconds,
            evictions_total=self.evictions,
            swap_ins_total=self.swap_ins,
            kv_host_bytes=0 if saved is None else saved.cache.blocks.slabs * slab_bytes,
            kv_saved_blocks_total=0 if saved is None else saved.num_saved,
            kv_restored_blocks_total=0 if saved is None else saved.num_restored,
            kv_dropped_blocks_total=0 if saved is None else saved.num_dropped,
        )

    def stranded_bytes(self) -> int:
        """Return the bytes of free blocks inside slabs that the model holds."""
        geometry = self.cache.blocks.geometry
        return self.cache.blocks.free_blocks * geometry.block_tokens * geometry.bytes_per_token
