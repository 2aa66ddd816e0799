"""Decides which group of devices a model is loaded in. Sizes in bytes are those on each device of a group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Wanted = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class ResidentBytes:
    """A model that is in device memory."""

    model_id: str
    device_bytes: int
    busy: bool
    last_used_s: float


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """One device: free bytes, and the models that are there."""

    free_bytes: int
    residents: tuple[ResidentBytes, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupRoom:
    """A group of `size` devices. `free_bytes`: what is neither lent nor awaited by a load in progress; it may be negative."""

    size: int
    budget_bytes: int
    free_bytes: int
    residents: tuple[ResidentBytes, ...] = ()


def order_groups(groups: Sequence[GroupRoom], weight_bytes: int, wanted: Wanted) -> list[int]:
    """Return the indices of the groups to try for a model of `weight_bytes` in all, the best first.

    Smaller groups come first. Among groups of one size, the first is the one with the most free memory if the model has room there, else the one
    whose residents that must leave are worth the least. Groups that cannot hold the model's share are left out, unless that leaves none: then the
    largest one remains, whose engine states the sizes.
    """
    allowed = [number for number, group in enumerate(groups) if wanted in ("auto", group.size)]
    able = [number for number in allowed if _share(weight_bytes, groups[number]) <= groups[number].budget_bytes]
    if not able:
        return sorted(allowed, key=lambda number: _most(groups[number]))[:1]
    return sorted(able, key=lambda number: (groups[number].size, *_cost(groups[number], weight_bytes), number))


def refusal_of(sizes: Sequence[int], wanted: Wanted) -> str:
    """Return why no group has the size that a model asks for; empty if one has."""
    if wanted == "auto" or wanted in sizes:
        return ""
    offered = " or ".join(map(str, sorted(set(sizes))))
    return (
        f"its tensor_parallel is {wanted}, and the groups of devices here have sizes {', '.join(map(str, sizes))}: register it with "
        f"tensor_parallel {offered} or auto, or start the server with --gpu-groups that contain {wanted}"
    )


def victims(needed_bytes: int, free_bytes: int, residents: Sequence[ResidentBytes]) -> tuple[list[str], int]:
    """Return the idle models that would be evicted, least recently used first, and the bytes still missing after all of them."""
    chosen, missing = _chosen(needed_bytes, free_bytes, residents)
    return [resident.model_id for resident in chosen], missing


def _most(group: GroupRoom) -> tuple[int, int]:
    """Return what puts the largest group first, and of equal ones that with the most free memory."""
    return -group.size * group.budget_bytes, -group.free_bytes


def _cost(group: GroupRoom, weight_bytes: int) -> tuple[int, float, int]:
    """Return what orders groups of one size: bytes that busy models keep, the last use of the newest victim, and less free memory."""
    chosen, missing = _chosen(_share(weight_bytes, group), group.free_bytes, group.residents)
    newest_s = max((resident.last_used_s for resident in chosen), default=float("-inf"))
    return missing, newest_s, -group.free_bytes


def _chosen(needed_bytes: int, free_bytes: int, residents: Sequence[ResidentBytes]) -> tuple[list[ResidentBytes], int]:
    missing = needed_bytes - free_bytes
    chosen: list[ResidentBytes] = []
    for resident in sorted(residents, key=lambda one: one.last_used_s):
        if missing <= 0:
            break
        if not resident.busy:
            chosen.append(resident)
            missing -= resident.device_bytes
    return chosen, max(missing, 0)


def _share(weight_bytes: int, group: GroupRoom) -> int:
    """Return the least that each device of the group holds of a model."""
    return -(-weight_bytes // group.size)
