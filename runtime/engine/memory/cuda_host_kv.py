"""Copies of KV blocks between a GPU and the host arena, on a stream of their own.

Weights that are being copied to the device can take hundreds of milliseconds; KV does not queue behind them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.cuda import CudaMemory, CudaRange
from runtime.engine.memory.host_tier import HostTier
from runtime.engine.memory.kv_runs import Run, plane_layout, runs_of


class CudaHostKv:
    """Implements interfaces.HostKvMemory. Use it from the engine thread.

    Args:
        stream: carries the copies of all models in both directions, in their order.
        kv_range: the model's KV range.
    """

    def __init__(
        self, memory: CudaMemory, stream: torch.cuda.Stream, arena: HostTier, kv_range: CudaRange, kv: KvGeometry
    ) -> None:
        self._memory = memory
        self._stream = stream
        self._arena = arena
        self._kv_range = kv_range
        self._kv = kv
        self._layout = plane_layout(kv, memory.slab_bytes)
        self._chunks: dict[int, tuple[int | None, Tensor]] = {}
        self._copied: torch.cuda.Event | None = None  # after the last copy

    def map(self, index: int) -> None:
        number = self._arena.take_chunk()
        # Another rank's arena may have less room than that of rank 0, which decided. Ordinary memory is slower and serves as well.
        memory = (
            torch.empty(self._arena.chunk_bytes, dtype=torch.uint8) if number is None else self._arena.chunk(number)
        )
        self._chunks[index] = number, memory

    def unmap(self, index: int) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        number, _ = self._chunks.pop(index)
        if number is not None:
            self._arena.give_chunk(number)

    def save(self, blocks: Sequence[tuple[int, int]]) -> None:
        self._stream.wait_stream(self._memory.compute_stream)
        runs = runs_of(blocks, self._kv)
        for run in runs:
            self._copy(run, to_host=True)
        self._kv_range.read_until([run.slab for run in runs], self._record())

    def restore(self, blocks: Sequence[tuple[int, int]]) -> None:
        self._stream.wait_stream(self._memory.compute_stream)  # a slab's last user may still be at work
        for run in runs_of(blocks, self._kv):
            self._copy(run, to_host=False)
        self._memory.compute_stream.wait_event(self._record())

    def close(self) -> None:
        for index in list(self._chunks):
            self.unmap(index)

    def _record(self) -> torch.cuda.Event:
        self._copied = torch.cuda.Event()
        self._copied.record(self._stream)
        return self._copied

    def _copy(self, run: Run, *, to_host: bool) -> None:
        """Queue the copy of a run: one row per plane."""
        layout = self._layout
        base = self._kv_range.bytes_view.data_ptr() + run.slab * self._memory.slab_bytes
        device_address = base + run.first * layout.block_bytes
        host_address = self._chunks[run.chunk][1].data_ptr() + run.host_first * layout.block_bytes
        self._memory.driver.copy_rows(
            device_address,
            host_address,
            to_host=to_host,
            row_bytes=run.count * layout.block_bytes,
            num_rows=layout.num_planes,
            pitch_bytes=layout.plane_bytes,
            stream=self._stream,
        )
