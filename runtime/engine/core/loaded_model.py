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
from runtime.engine.memory.link_rate import LinkRate
from runtime.engine.memory.residency import Holder
from runtime.engine.scheduler.cost_model import CostModel
from runtime.engine.scheduler.scheduler import Scheduler
from runtime.ipc.messages import Load
from runtime.types import ModelFacts

_LAUNCH_S = 0.05  # at most from the decision to launch a step until its last kernel is queued
_GUESSED_DISK_BYTES_PER_S = 1.5e9  # until a swap-in from disk was measured


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
        swap_tier: the tier that the weights came from at the last swap-in.
        swap_seconds: how long the last swap-in took, per tier that the weights came from.
        is_awaited: a launched step waits for the weights that are being copied, or has waited for them.
        uses: the uses of all models of the engine.
        link: the link from host memory, of all models of the engine.
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
    swap_tier: Tier = Tier.HOST
    swap_seconds: dict[Tier, float] = field(default_factory=dict)
    is_awaited: bool = False
    uses: DecayedUses = field(default_factory=DecayedUses)
    link: LinkRate = field(default_factory=LinkRate)
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
        self.swap_tier = self.lower_tier  # a copy from disk passes through host memory and may stay there
        self.swapping = True
        self.is_awaited = False
        self.swap_ins += 1

    def finish_swap_in(self, now: float) -> None:
        """Record that the last byte of the weights has arrived."""
        self.swapping = False
        seconds = self.swap_seconds[self.swap_tier] = now - self.resident_since_s
        if self.swap_tier is Tier.HOST:
            self.link.observe(self.memory.weight_bytes, seconds)

    def arrives_in_s(self, now: float) -> float:
        """Return in how many seconds the last byte of the weights is expected on the device; 0 if it is there."""
        if not self.swapping:
            return 0.0
        from_host = self.swap_tier is Tier.HOST
        copy_s = self.memory.weight_bytes / self.link.bytes_per_s if from_host else self._return_s(Tier.DISK)
        return max(0.0, self.resident_since_s + copy_s - now)

    def may_launch(self, step_tokens: int, now: float) -> bool:
        """Whether a step may be launched: the weights are on the device, or arrive while a step of at most `step_tokens` computes.

        A step that waited for longer would gain nothing, and delay the steps of other models behind it.
        """
        if not self.swapping:
            return True
        tokens = min(self.scheduler.pending_tokens(), step_tokens)
        return self.arrives_in_s(now) <= self.cost.predict_us(tokens, 0) * 1e-6 + _LAUNCH_S

    def await_weights(self, now: float) -> float:
        """Note that a step is launched. Returns for how long it waits for the weights: only the first one after a swap-in does."""
        if not self.swapping or self.is_awaited:
            return 0.0
        self.is_awaited = True
        return self.arrives_in_s(now)

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
        return self._return_s(self.lower_tier)

    def _return_s(self, tier: Tier) -> float:
        guessed = self.link.bytes_per_s if tier is Tier.HOST else _GUESSED_DISK_BYTES_PER_S
        return self.swap_seconds.get(tier, self.memory.weight_bytes / guessed)

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
