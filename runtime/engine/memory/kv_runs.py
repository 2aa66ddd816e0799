"""Computes where KV blocks lie in a slab or a chunk of host memory, and which of them one copy can move."""

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.engine.interfaces import KvGeometry


@dataclass(frozen=True, slots=True)
class Run:
    """`count` adjacent blocks: from block `first` of slab place `slab` on the device, and from `host_first` of chunk place `chunk`."""

    slab: int
    first: int
    chunk: int
    host_first: int
    count: int


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """The planes of a slab: K and V of every layer, each with `block_bytes` of every block end to end."""

    num_planes: int
    plane_bytes: int
    block_bytes: int


def plane_layout(kv: KvGeometry, slab_bytes: int) -> PlaneLayout:
    """Return the layout that model.run.kv_geometry gives a slab."""
    block_bytes = kv.pages_per_block * (slab_bytes // kv.pages_per_slab)
    return PlaneLayout(
        kv.block_tokens * kv.bytes_per_token // block_bytes, kv.blocks_per_slab * block_bytes, block_bytes
    )


def runs_of(blocks: Iterable[tuple[int, int]], kv: KvGeometry) -> list[Run]:
    """Group consecutive blocks (page, host page) that are adjacent in both places."""
    runs: list[Run] = []
    for page, host_page in blocks:
        slab, first = divmod(page, kv.pages_per_slab)
        chunk, host_first = divmod(host_page, kv.pages_per_slab)
        first //= kv.pages_per_block
        host_first //= kv.pages_per_block
        last = runs[-1] if runs else None
        if (
            last is not None
            and (last.slab, last.first + last.count) == (slab, first)
            and (last.chunk, last.host_first + last.count) == (chunk, host_first)
        ):
            runs[-1] = Run(last.slab, last.first, last.chunk, last.host_first, last.count + 1)
        else:
            runs.append(Run(slab, first, chunk, host_first, 1))
    return runs
