"""A group of devices as its engine reports it, and the figures of single devices, which several engines may share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from runtime.engine_client.lifecycle import EngineState
from runtime.engine_client.placement import DeviceRoom, ResidentBytes
from runtime.ipc.messages import EngineStats, Hello


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """A group of devices. Sizes in `hello` and `stats` are those of each device, but models' figures are those of all together.

    Attributes:
        is_shared: it consists of devices that are groups of their own, and its engine starts when a model needs it. Before, `hello` is what is expected.
        neighbours: the groups that have devices in common with it.
    """

    devices: tuple[str, ...]
    hello: Hello
    stats: EngineStats | None
    state: EngineState
    models: frozenset[str]
    is_shared: bool = False
    neighbours: tuple["EngineGroup", ...] = ()

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def used_bytes(self) -> int:
        """Bytes that its own models use on each device."""
        return self.stats.device_used_bytes if self.stats is not None else 0

    def rooms(self, last_used_s: Mapping[str, float], leave_out: str = "") -> tuple[DeviceRoom, ...]:
        """Return what is free on each of its devices, and the models there, those of neighbours included."""
        rooms = []
        for device in self.devices:
            groups = [group for group in (self, *self.neighbours) if device in group.devices]
            free_bytes = self.hello.device_budget_bytes - sum(group.used_bytes for group in groups)
            residents = tuple(one for group in groups for one in group._residents(last_used_s, leave_out))
            rooms.append(DeviceRoom(free_bytes, residents))
        return tuple(rooms)

    def _residents(self, last_used_s: Mapping[str, float], leave_out: str) -> list[ResidentBytes]:
        return [
            ResidentBytes(
                model.model_id,
                model.device_bytes // self.size,
                model.running + model.waiting > 0,
                last_used_s.get(model.model_id, 0.0),
            )
            for model in (self.stats.models if self.stats is not None else ())
            if model.device_bytes and model.model_id != leave_out
        ]


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """One device. `group`: the first device of the group that it always belongs to; `num_engines`: those that run on it."""

    name: str
    group: str
    state: EngineState
    num_engines: int
    budget_bytes: int
    used_bytes: int
    host_budget_bytes: int
    host_used_bytes: int
    stranded_bytes: int


def device_figures(groups: Sequence[EngineGroup]) -> list[DeviceFigures]:
    """Add up the engines of each device, in the order of the groups that are not shared."""
    figures = []
    for home in groups:
        for name in () if home.is_shared else home.devices:
            reports = [group.stats for group in groups if name in group.devices and group.stats is not None]
            figures.append(
                DeviceFigures(
                    name,
                    home.devices[0],
                    home.state,
                    max(len(reports), 1),
                    home.hello.device_budget_bytes,
                    sum(stats.device_used_bytes for stats in reports),
                    sum(group.hello.host_budget_bytes for group in groups if name in group.devices),
                    sum(stats.host_used_bytes for stats in reports),
                    sum(stats.stranded_bytes for stats in reports),
                )
            )
    return figures


def neighbours_of(group: EngineGroup, groups: Sequence[EngineGroup]) -> tuple[EngineGroup, ...]:
    """Return the other groups that have devices in common with one."""
    devices = set(group.devices)
    return tuple(other for other in groups if other is not group and not devices.isdisjoint(other.devices))


def in_all(stats: EngineStats, size: int) -> EngineStats:
    """Return an engine's report with its models' figures multiplied to those of all its devices."""
    if size == 1:
        return stats
    models = tuple(
        msgspec.structs.replace(
            model,
            weight_bytes=model.weight_bytes * size,
            device_bytes=model.device_bytes * size,
            kv_bytes=model.kv_bytes * size,
            kv_host_bytes=model.kv_host_bytes * size,
        )
        for model in stats.models
    )
    return msgspec.structs.replace(stats, models=models)
