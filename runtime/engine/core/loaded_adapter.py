"""Holds the engine core's state of a loaded adapter: its base, its place on the device and its counters."""

from dataclasses import dataclass, field
from typing import Protocol

from common.model_state import ModelFigures, Tier
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.scheduler.adapter_use import NO_ADAPTER, AdapterUse
from runtime.ipc.messages import Load
from runtime.types import ModelFacts


class AdapterStatus(Protocol):
    """The queries of interfaces.AdapterMemory. Planning reads them and changes nothing."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def swap_in_done(self) -> bool: ...

    def host_bytes(self) -> int: ...


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One adapter. The state changes through the methods only.

    Attributes:
        use: the adapter's state in the scheduler of its base.
        offset: where the adapter begins in its base's range, in bytes; None = it is not resident.
        swapping: the adapter is being copied to the device.
        draining: the adapter is to leave the device. Its sequences wait until it has left and come back, or stays.
        ready_since_s: since when its sequences may be admitted.
    """

    request: Load
    facts: ModelFacts
    memory: AdapterStatus
    base: LoadedModel
    use: AdapterUse
    last_used_s: float
    offset: int | None = None
    swapping: bool = False
    draining: bool = False
    resident_since_s: float = 0.0
    ready_since_s: float = 0.0
    evictions: int = 0
    swap_ins: int = 0
    swap_seconds: dict[Tier, float] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        return self.request.model_id

    @property
    def size_bytes(self) -> int:
        return self.memory.size_bytes

    @property
    def resident(self) -> bool:
        return self.offset is not None

    @property
    def evictable(self) -> bool:
        """Whether no sequence needs the adapter where it is."""
        return self.resident and not self.swapping and not self.use.running and (self.draining or not self.use.live)

    def touch(self, now: float) -> None:
        self.last_used_s = now

    def begin_swap_in(self, slot: int, offset: int, now: float) -> None:
        self.use.slot, self.offset = slot, offset
        self.swapping, self.resident_since_s = True, now
        self.swap_ins += 1

    def finish_swap_in(self, now: float) -> None:
        """Record that the last byte has arrived, so that steps may use the adapter."""
        self.swapping = False
        self.use.ready, self.ready_since_s = True, now
        self.swap_seconds[self._lower_tier] = now - self.resident_since_s
        self.base.scheduler.waiting.unblock(self.use)

    def drain(self) -> None:
        """Admit no more sequences until the adapter has left the device and come back."""
        self.draining = True
        self.use.ready = False
        self.base.scheduler.waiting.block(self.use)

    def stop_draining(self, now: float) -> None:
        """Admit sequences again: the adapter stays."""
        self.draining = False
        self.use.ready, self.ready_since_s = True, now
        self.base.scheduler.waiting.unblock(self.use)

    def leave_device(self) -> tuple[int, int]:
        """Record that the adapter was evicted. Returns the slot and the offset that it had."""
        assert self.offset is not None
        place = self.use.slot, self.offset
        self.use.ready = False
        self.base.scheduler.waiting.block(self.use)
        self.use.slot, self.offset = NO_ADAPTER, None
        self.swapping = self.draining = False
        self.evictions += 1
        return place

    @property
    def _lower_tier(self) -> Tier:
        return Tier.HOST if self.memory.host_bytes() else Tier.DISK

    def stats(self) -> ModelFigures:
        use, totals = self.use, self.use.totals
        live = [s for s in self.base.scheduler.sequences() if s.adapter is use]
        return ModelFigures(
            model_id=self.model_id,
            tier=Tier.DEVICE if self.resident else self._lower_tier,
            weight_bytes=self.size_bytes,
            device_bytes=self.size_bytes if self.resident else 0,
            running=use.running,
            waiting=use.live - use.running,
            swap_in_s=0.0 if self.resident else self.swap_seconds.get(self._lower_tier, 0.0),
            prompt_tokens_total=totals.prompt_tokens,
            generated_tokens_total=totals.generated_tokens + sum(s.num_output_tokens for s in live),
            prefix_hit_tokens_total=totals.prefix_hit_tokens,
            preemptions_total=totals.preemptions,
            evictions_total=self.evictions,
            swap_ins_total=self.swap_ins,
        )
