"""Computes where every tensor of a model lies in its one weights image, from names, shapes and layers.

The image is in layer order, so that it can be brought in front to back. Siblings that a fused layer reads as one matrix (q, k, v; gate, up) are
placed end to end, and the joined matrix is a plain view over them.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 256  # bytes; what vector loads and the copy engine like, and more than any dtype needs


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be placed. `layer` orders it: -1 before the first decoder layer, the number of layers or more after the last."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Join:
    """Tensors that also want to be seen as one, end to end along their first dimension."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """A view of the image: `size_bytes` from `offset`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """One model's image.

    Attributes:
        tensors: everything that is filled, in image order; they do not overlap.
        joined: views over neighbours.
        group_ends: byte offsets at which a group of layers ends, ascending; the last is `size_bytes`.
        layer_groups: layer i is complete once group `layer_groups[i + 1]` is in (entry 0: what comes before the layers; the last entry: the rest).
    """

    tensors: tuple[Placed, ...]
    joined: tuple[Placed, ...]
    group_ends: tuple[int, ...]
    layer_groups: tuple[int, ...]
    size_bytes: int

    def digest(self) -> str:
        """Return a digest that two images share if their bytes mean the same."""
        text = "\n".join(f"{t.name} {t.shape} {t.dtype} {t.offset}" for t in self.tensors)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def lay_out(specs: Sequence[TensorSpec], joins: Sequence[Join], num_layers: int, min_group_bytes: int) -> WeightLayout:
    """Place `specs` in layer order and close a group of whole layers whenever it holds `min_group_bytes`.

    Raises ValueError if a join's members differ in anything but their first dimension, or lie in different layers.
    """
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) != len(specs):
        raise ValueError("a tensor is placed twice")
    join_of = {name: join for join in joins for name in join.members}
    for join in joins:
        first = by_name[join.members[0]]
        if any(
            (s.shape[1:], s.dtype, s.layer) != (first.shape[1:], first.dtype, first.layer)
            for s in map(by_name.__getitem__, join.members)
        ):
            raise ValueError(f"{join.name}: its members cannot be seen as one matrix")

    buckets: list[list[TensorSpec]] = [[] for _ in range(num_layers + 2)]
    for spec in specs:
        buckets[min(max(spec.layer, -1), num_layers) + 1].append(spec)

    tensors: list[Placed] = []
    joined: list[Placed] = []
    group_ends: list[int] = []
    layer_groups: list[int] = []
    done: set[str] = set()
    offset = 0
    for bucket in buckets:
        for spec in bucket:
            if spec.name in done:
                continue
            offset = _aligned(offset)
            members = join_of[spec.name].members if spec.name in join_of else (spec.name,)
            start = offset
            for member in map(by_name.__getitem__, members):
                tensors.append(Placed(member.name, member.shape, member.dtype, offset))
                offset += member.size_bytes
                done.add(member.name)
            if spec.name in join_of:
                rows = sum(by_name[name].shape[0] for name in members)
                joined.append(Placed(join_of[spec.name].name, (rows, *spec.shape[1:]), spec.dtype, start))
        layer_groups.append(len(group_ends))
        if offset - (group_ends[-1] if group_ends else 0) >= min_group_bytes:
            offset = _aligned(offset)
            group_ends.append(offset)
    offset = _aligned(offset)
    if not group_ends or group_ends[-1] < offset:
        group_ends.append(offset)
    layer_groups = [min(group, len(group_ends) - 1) for group in layer_groups]
    return WeightLayout(tuple(tensors), tuple(joined), tuple(group_ends), tuple(layer_groups), offset)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
