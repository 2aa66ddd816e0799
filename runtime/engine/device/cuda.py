"""A GPU as the engine's device: slabs through CUDA's virtual memory, a pinned host arena, one copy stream."""

import logging
import os
import threading
from pathlib import Path

import torch

from common.errors import ConfigError
from common.units import MIB
from runtime.checkpoint.packed import Layout4Bit
from runtime.config.schema import EngineConfig
from runtime.engine.adapters.bank import Extent
from runtime.engine.adapters.memory import ExtentWeights
from runtime.engine.device.device import TakenMemory
from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.arena_index import ArenaIndex
from runtime.engine.memory.cuda import CudaMemory
from runtime.engine.memory.cuda_model import CudaModelMemory
from runtime.engine.memory.cuda_weights import CudaWeights
from runtime.engine.memory.device import DeviceMemory
from runtime.engine.memory.free_memory import free_bytes as free_memory_bytes
from runtime.engine.memory.host_tier import HostTier
from runtime.engine.memory.pinned import PinnedMemory, shared_memory_free_bytes
from runtime.engine.memory.weight_buffer import Filler
from runtime.errors import Cancelled

_LOG = logging.getLogger(__name__)

_SLAB_BYTES = 64 * MIB
_GROUP_BYTES = 32 * MIB
_READ_THREADS = 16
_INDEX_BYTES = MIB  # for the arena's index, a file beside the arena
_HOST_KV_SHARE = 4  # one part in four of the host tier


class CudaDevice:
    """Implements Device. Construct it in the engine thread: all work is ordered on the stream that is current there."""

    def __init__(self, device: torch.device, config: EngineConfig) -> None:
        torch.cuda.set_device(device)
        slab_bytes = config.slab_bytes or _SLAB_BYTES
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        budget = config.device_budget_bytes or max(0, free_bytes - config.device_reserve_bytes)
        if config.shares_device:
            free_bytes = total_bytes  # What other engines of the GPU hold comes when they give it back.
        if not slab_bytes <= budget <= free_bytes:
            raise ConfigError(
                f"the device budget of {budget} bytes is not between one slab of {slab_bytes} bytes and the {free_bytes} bytes that are free on "
                f"{device}: give a budget in between, or end what else uses the GPU"
            )
        self.device = device
        self.name = torch.cuda.get_device_name(device)
        self._compute_stream = torch.cuda.current_stream(device)
        self._copy_stream = torch.cuda.Stream(device)
        self._kv_stream = torch.cuda.Stream(device)
        committed = 0 if config.shares_device else None
        self._memory = CudaMemory(device, slab_bytes, budget // slab_bytes, self._compute_stream, committed)
        self.memory: DeviceMemory = self._memory
        arena_path, host_bytes = host_tier(config, slab_bytes)
        self._pinned = PinnedMemory(host_bytes, arena_path, device, slab_bytes)
        self._arena = HostTier(self._pinned.view, slab_bytes, ArenaIndex(arena_path))
        self._pinned.start_registering()
        self.host_total_bytes = self._arena.total_bytes
        self.host_kv_bytes = host_kv_budget(config, self._arena.total_bytes)
        self.num_read_threads = min(_READ_THREADS, os.cpu_count() or 1)
        self.min_group_bytes = _GROUP_BYTES
        self.layout_4bit: Layout4Bit = "kernel"
        self.host_order = None

    def host_free_bytes(self) -> int:
        return self._arena.free_bytes()

    def take(
        self, filler: Filler, identity: str, weight_slabs: int, kv: KvGeometry, cancelled: threading.Event
    ) -> TakenMemory:
        torch.cuda.set_device(self.device)
        weights = self._memory.reserve(weight_slabs)
        try:
            kv_range = self._memory.reserve(kv.max_slabs)
        except BaseException:
            weights.close()
            raise
        model = CudaModelMemory(
            self._memory, self._copy_stream, self._kv_stream, self._arena, weights, kv_range, kv, filler, identity
        )
        try:
            if cancelled.is_set():
                raise Cancelled("the load was cancelled")
            model.stage(cancelled)
        except BaseException:
            model.close()
            raise
        return model

    def take_adapter(self, filler: Filler, identity: str, extent: Extent, cancelled: threading.Event) -> ExtentWeights:
        torch.cuda.set_device(self.device)
        weights = CudaWeights(self._memory, self._copy_stream, self._arena, extent, filler, identity)
        try:
            weights.stage(cancelled)
        except BaseException:
            weights.close()
            raise
        return weights

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def idle(self) -> bool:
        return self._memory.tidy()

    def close(self) -> None:
        self.synchronize()
        self._memory.close()
        self._pinned.close()


def host_kv_budget(config: EngineConfig, host_bytes: int) -> int:
    """Return how many of `host_bytes` saved KV may take: as configured, else a quarter."""
    return min(host_bytes // _HOST_KV_SHARE if config.host_kv_bytes is None else config.host_kv_bytes, host_bytes)


def host_tier(config: EngineConfig, slab_bytes: int) -> tuple[str, int]:
    """Return the arena's path ("" = private memory) and its size: as configured, else as an earlier engine left it, else its part of half of free memory.

    The size is at most what the path's file system can hold. If that is less than half of the size (a container's 64 MiB, say), memory is private.
    """
    path = config.host_arena_path
    left_bytes = Path(path).stat().st_size if path and Path(path).exists() else 0
    wanted = config.host_budget_bytes or left_bytes or free_memory_bytes() // (2 * config.host_sharers)
    if path:
        room_bytes = shared_memory_free_bytes(path) - _INDEX_BYTES
        if room_bytes < max(wanted // 2, slab_bytes):
            _LOG.warning(
                "the host tier is private memory, and cold after a restart of the engine: %s has room for %d of the %d bytes wanted",
                Path(path).parent,
                max(0, room_bytes),
                wanted,
            )
            path = ""
        else:
            wanted = min(wanted, room_bytes)
    return path, max(wanted // slab_bytes, 1) * slab_bytes
