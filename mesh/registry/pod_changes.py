"""Describes what changed in a pod's record since the record was written, in a small fraction of the record's bytes.

A pod writes its changes, each over the one before it, under a key of its own. Readers add them to the record. A reader that missed some is right
again when the pod writes its record, which it does regularly.
"""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET, UnsetType, field

from common.model_state import ModelState
from mesh.registry.records import InstanceRecord, Record


class PodChange(Record, frozen=True, omit_defaults=True, kw_only=True):
    """The fields of an InstanceRecord that changed, and that routing and placement go by. ModelMesh has no such record.

    `start_time_ms`: the process that wrote the change. `number`: grows with each change of that process; a record says up to which change it is
    complete. A copy that is None is gone. The state of each of the other copies replaces the earlier one.
    """

    start_time_ms: int = field(default=0, name="startTime")
    number: int = field(default=0, name="n")
    used_units: int | UnsetType = field(default=UNSET, name="used")
    loads_in_progress: int | UnsetType = field(default=UNSET, name="lInProg")
    load_failures: int | UnsetType = field(default=UNSET, name="loadFailures")
    victim_use: float | UnsetType = field(default=UNSET, name="victimUse")
    copies: Mapping[str, ModelState | None] = field(default_factory=dict)


_FIGURES = ("used_units", "loads_in_progress", "load_failures", "victim_use")
# These are written with the record only. The count is that of the copies.
_LATER = (
    "count",
    "lru_time_ms",
    "requests_per_min",
    "device_used_bytes",
    "host_used_bytes",
    "kv_usage",
    "running",
    "waiting",
    "tokens_per_s",
    "used_ms",
)


def change_between(old: InstanceRecord, new: InstanceRecord, number: int) -> PodChange | None:
    """Return the change that turns the old record into the new one, but for figures that can wait; None if it needs the whole record."""
    carried = {name: getattr(new, name) for name in (*_FIGURES, *_LATER, "copies", "change_number")}
    if msgspec.structs.replace(old, **carried) != new:
        return None
    figures = {name: getattr(new, name) for name in _FIGURES if getattr(new, name) != getattr(old, name)}
    copies: dict[str, ModelState | None] = {
        model_id: new.copies.get(model_id)
        for model_id in sorted({*old.copies, *new.copies})
        if old.copies.get(model_id) != new.copies.get(model_id)
    }
    return PodChange(start_time_ms=new.start_time_ms, number=number, copies=copies, **figures)


def with_changes(record: InstanceRecord, changes: Sequence[PodChange]) -> InstanceRecord:
    """Return the record with the changes after it, which are in the order of their numbers. Those of another process are ignored."""
    for change in changes:
        if change.start_time_ms != record.start_time_ms or change.number <= record.change_number:
            continue
        figures = {name: value for name in _FIGURES if (value := getattr(change, name)) is not UNSET}
        known = {**record.copies, **change.copies}
        copies = {model_id: copy for model_id, copy in known.items() if copy is not None}
        record = msgspec.structs.replace(
            record, change_number=change.number, count=len(copies), copies=copies, **figures
        )
    return record
