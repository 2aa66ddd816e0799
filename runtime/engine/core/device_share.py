"""The engine's share of devices that other engines use too: the slabs that it lacks, and those that it has to give back.

The runtime's front moves slabs between the engines of a device by Resize commands, and learns from the engine's figures what it lacks. An engine that has
its devices to itself holds its whole budget, lacks nothing and is never resized.
"""

import math
from dataclasses import dataclass

from runtime.engine.memory.slab_pool import SlabPool
from runtime.ipc.messages import DeviceShareFigures, Resize

_SPARE_PARTS = 16  # an engine asks for one part in so many beyond its need, for the KV cache that comes after


@dataclass(frozen=True, slots=True)
class Lack:
    """`needed`: slabs without which a request cannot run, for which idle models may be evicted. `since_s`: when the oldest such request came; inf = all
    run already.

    `wanted`: slabs that would be used, those that are needed included.
    """

    needed: int = 0
    wanted: int = 0
    since_s: float = 0.0


class DeviceShare:
    """Plain state: what is lacking is noted during each turn and published at its end."""

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self._noted = Lack()
        self._resize: Resize | None = None
        self._num_completed = 0
        self.lack = Lack()
        self.num_changes = 0  # grows when other figures are to be reported

    @property
    def can_grow(self) -> bool:
        """Whether other engines may hold memory that this one could have."""
        return self._pool.committed < self._pool.total

    @property
    def spare_slabs(self) -> int:
        """Free slabs with which an engine lacks none."""
        return max(1, self._pool.total // _SPARE_PARTS)

    @property
    def surplus(self) -> int:
        """Slabs that are still to be given back."""
        return 0 if self._resize is None else max(0, self._pool.committed - self._resize.num_slabs)

    @property
    def drains(self) -> bool:
        """Whether busy models have to make room for other engines."""
        return self._resize is not None and self._resize.drain

    def begin_turn(self) -> None:
        self._noted = Lack()

    def need(self, slabs: int, since_s: float = math.inf) -> None:
        """Note that a request lacks slabs beyond the free and reclaimable ones.

        `since_s`: when it came, or inf if rows that run need them. Busy models of other engines are not drained for such rows.
        """
        noted = self._noted
        oldest_s = min(noted.since_s, since_s) if noted.needed else since_s
        wanted = max(noted.wanted, slabs + self.spare_slabs)
        self._noted = Lack(max(noted.needed, slabs), wanted, oldest_s)

    def want(self, slabs: int) -> None:
        """Note that slabs would be used if no model has to leave for them."""
        noted = self._noted
        self._noted = Lack(noted.needed, max(noted.wanted, slabs), noted.since_s)

    def begin(self, resize: Resize) -> None:
        """Aim at another number of slabs. The end of the turn that reaches it reports the command as completed."""
        self._resize = resize

    def settle_for(self, num_slabs: int) -> None:
        """Aim at what was reached: the rest is in use."""
        if self._resize is not None:
            self._resize = Resize(self._resize.number, num_slabs)

    def end_turn(self) -> None:
        """Publish what this turn noted. Operations were applied, so what was given back is with the driver."""
        most = self._pool.total - self._pool.committed
        lack = Lack(min(self._noted.needed, most), min(self._noted.wanted, most), self._noted.since_s)
        if lack != self.lack:
            self.lack = lack
            self.num_changes += 1
        if self._resize is not None and not self.surplus:
            self._num_completed = self._resize.number
            self._resize = None
            self.num_changes += 1

    def figures(self, free_slabs: int, idle_slabs: int) -> DeviceShareFigures:
        """`free_slabs`: those that no row of a resident model is expected to need. `idle_slabs`: slabs of cached prefixes and of adapters without sequences."""
        pool, lack = self._pool, self.lack
        return DeviceShareFigures(
            committed_slabs=pool.committed,
            free_slabs=free_slabs,
            idle_slabs=idle_slabs,
            spare_slabs=self.spare_slabs,
            needed_slabs=lack.needed,
            wanted_slabs=lack.wanted,
            since_s=lack.since_s,
            last_resize=self._num_completed,
        )
