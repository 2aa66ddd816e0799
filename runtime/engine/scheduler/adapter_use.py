"""Describes a LoRA adapter to the scheduler of its base."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.engine.scheduler.totals import Totals

NO_ADAPTER = -1  # the slot of rows without one


def count_adapters(slots: Iterable[int]) -> int:
    """Return the number of different adapters of rows, given the slots of the rows."""
    different = set(slots)
    return len(different) - (NO_ADAPTER in different)


@dataclass(slots=True, eq=False)
class AdapterUse:
    """One adapter's slot in steps, and its sequences. The scheduler counts sequences; the adapter manager alone sets the rest.

    Attributes:
        prefix_root: begins the hashes of the adapter's KV blocks, so that KV is shared between sequences of equal adapters only.
        slot: where steps find the adapter; NO_ADAPTER = it is not on the device.
        ready: its sequences may be admitted.
        live: sequences that wait or run.
        running: sequences that have a row.
    """

    adapter_id: str
    prefix_root: bytes
    slot: int = NO_ADAPTER
    ready: bool = False
    live: int = 0
    running: int = 0
    totals: Totals = field(default_factory=Totals)
