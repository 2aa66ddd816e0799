"""A loaded model as the loop holds it: its runner, its memory, its requests and its accounts. Plain state; decisions lie elsewhere."""

from dataclasses import dataclass, field

from runtime.engine.interfaces import ModelMemory, Runner
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.memory.residency import Holder
from runtime.engine.scheduler.cost_model import CostModel
from runtime.engine.scheduler.scheduler import Scheduler
from runtime.ipc.messages import Load, ModelStats
from runtime.types import ModelFacts, Tier

# until a swap-in was measured
_GUESSED_BYTES_PER_S = {Tier.HOST: 40e9, Tier.DISK: 1.5e9}


@dataclass(slots=True, eq=False)
class LoadedModel:
    """`weight_slabs` None = not resident. `faults`: steps that failed in a row. `draining_since_s`: takes no requests until it is evicted."""

    request: Load
    facts: ModelFacts
    runner: Runner
    memory: ModelMemory
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
    def lower_tier(self) -> Tier:
        """Where its weights are once they left the device."""
        return Tier.HOST if self.memory.host_bytes() else Tier.DISK

    @property
    def return_cost_s(self) -> float:
        tier = self.lower_tier
        return self.swap_seconds.get(tier, self.memory.weight_bytes / _GUESSED_BYTES_PER_S[tier])

    def has_work(self) -> bool:
        """Whether a step could be planned for it, were it resident."""
        return bool(self.scheduler.running) or (len(self.scheduler.waiting) > 0 and not self.draining)

    def holder(self, yields_to: tuple[int, int] | None = None) -> Holder:
        """`yields_to`: waiting requests that come after this order don't count."""
        foremost = self.scheduler.foremost() if yields_to is not None else None
        yields = foremost is not None and yields_to is not None and foremost > yields_to
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
        )

    def stats(self, slab_bytes: int) -> ModelStats:
        blocks, totals = self.cache.blocks, self.scheduler.totals
        kv_bytes = blocks.slabs * slab_bytes
        return ModelStats(
            model_id=self.model_id,
            tier=Tier.DEVICE if self.resident else self.lower_tier,
            weight_bytes=self.memory.weight_bytes,
            device_bytes=kv_bytes + len(self.weight_slabs or ()) * slab_bytes,
            kv_bytes=kv_bytes,
            kv_used_tokens=blocks.used_blocks * blocks.geometry.block_tokens,
            kv_cached_tokens=blocks.idle_blocks * blocks.geometry.block_tokens,
            running=self.scheduler.running,
            waiting=len(self.scheduler.waiting),
            swap_in_s=0.0 if self.resident else self.return_cost_s,
            prompt_tokens_total=totals.prompt_tokens,
            generated_tokens_total=totals.generated_tokens,
            prefix_hit_tokens_total=totals.prefix_hit_tokens,
            preemptions_total=totals.preemptions,
            steps_total=totals.steps,
            step_seconds_total=totals.step_seconds,
            evictions_total=self.evictions,
            swap_ins_total=self.swap_ins,
        )

    def stranded_bytes(self) -> int:
        """Free blocks inside slabs that it holds."""
        geometry = self.cache.blocks.geometry
        return self.cache.blocks.free_blocks * geometry.block_tokens * geometry.bytes_per_token
