"""Stands in for torch's CUDA graphs where there is no GPU: which captures into a shared pool torch takes, and what one that fails leaves behind.

As in torch's CUDAGraph.cpp: `capture_end` asks the driver first, so after a capture that the driver calls void the pool counts as being recorded to.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

Pool = tuple[int, int]


class Stream:
    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass
class TorchGraphs:
    """`void()` is what a kernel does that may not be captured."""

    recording: set[Pool] = field(default_factory=set)
    users: Counter[Pool] = field(default_factory=Counter)
    pools_made: int = 0
    free_bytes: int = 1 << 31
    reserved_bytes: int = 0  # by torch, `pooled_bytes` of them for the pool
    pooled_bytes: int = 0
    capturing: "Graph | None" = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, stand_in in {
            "CUDAGraph": lambda: Graph(self),
            "graph_pool_handle": self._handle,
            "current_stream": lambda *_: Stream(),
            "Stream": lambda *_: Stream(),
            "stream": lambda stream: stream,
            "mem_get_info": lambda *_: (self.free_bytes, 1 << 32),
            "memory_reserved": lambda *_: self.reserved_bytes,
            "memory_snapshot": lambda *_: [{"total_size": self.pooled_bytes}],
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_recording, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self._release, raising=False)
        as_tensor = torch.as_tensor

        def viewed(value: Any, **kwargs: Any) -> torch.Tensor:
            interface = getattr(value, "__cuda_array_interface__", None)
            return torch.zeros(interface["shape"], dtype=torch.uint8) if interface else as_tensor(value, **kwargs)

        monkeypatch.setattr(torch, "as_tensor", viewed)

    def allocate(self, num_bytes: int, *, pooled: int = 0) -> None:
        """Have torch take device memory, some of it for the pool."""
        self.free_bytes -= num_bytes
        self.reserved_bytes += num_bytes
        self.pooled_bytes += pooled

    def void(self) -> None:
        """Do what the driver forbids while a stream is captured."""
        if self.capturing is not None:
            self.capturing.valid = False
            raise RuntimeError("operation not permitted when stream is capturing")

    def _handle(self) -> Pool:
        self.pools_made += 1
        return (0, self.pools_made)

    def _end_recording(self, index: int, pool: Pool) -> None:
        del index
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _release(self, index: int, pool: Pool) -> None:
        del index
        self.users[pool] -= 1
        assert self.users[pool] >= 0, "released more often than used"


class Graph:
    def __init__(self, torch_: TorchGraphs) -> None:
        self._torch = torch_
        self.valid = True
        self.pool: Pool | None = None

    def capture_begin(self, pool: Pool, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local", "loading threads allocate meanwhile"
        assert pool not in self._torch.users or self._torch.users[pool] > 0, "a pool whose last user went is gone"
        self._torch.users[pool] += 1
        if pool in self._torch.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._torch.recording.add(pool)
        self._torch.capturing = self
        self._recorded = pool

    def capture_end(self) -> None:
        self._torch.capturing = None
        if not self.valid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._torch.recording.remove(self._recorded)
        self.pool = self._recorded

    def __del__(self) -> None:
        if self.pool is not None:
            self._torch.users[self.pool] -= 1
