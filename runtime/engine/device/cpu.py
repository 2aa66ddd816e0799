"""A CPU as the engine's device: slabs of ordinary memory, without a host tier or background work."""

import os
import platform
import threading
from functools import cached_property

import psutil
import torch

from common.errors import ConfigError
from common.units import MIB
from runtime.checkpoint.packed import Layout4Bit
from runtime.config.schema import EngineConfig
from runtime.engine.adapters.bank import Extent
from runtime.engine.adapters.memory import ExtentWeights
from runtime.engine.device.device import TakenMemory
from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.cpu import CpuMemory
from runtime.engine.memory.cpu_model import CpuModelMemory, CpuWeights
from runtime.engine.memory.device import DeviceMemory
from runtime.engine.memory.free_memory import free_bytes
from runtime.engine.memory.kv_range import KvRange
from runtime.engine.memory.weight_buffer import Filler
from runtime.engine.model.cpu.onednn_layout import OneDnnLayout

_SLAB_BYTES = 4 * MIB
_GROUP_BYTES = 32 * MIB
_READ_THREADS = 8


class CpuDevice:
    """Implements Device."""

    def __init__(self, config: EngineConfig) -> None:
        num_sharers = max(config.tensor_parallel, config.host_sharers)
        if config.num_threads or num_sharers > 1:
            own_share = max(1, (os.cpu_count() or 1) // num_sharers)
            torch.set_num_threads(config.num_threads or own_share)
        slab_bytes = config.slab_bytes or _SLAB_BYTES
        budget = config.device_budget_bytes or free_bytes() // (2 * num_sharers)
        check_budget(budget, slab_bytes, psutil.virtual_memory().total)
        self.device = torch.device("cpu")
        self.name = platform.processor() or platform.machine()
        self.memory: DeviceMemory = CpuMemory(slab_bytes, budget // slab_bytes, 0 if config.shares_device else None)
        self.host_total_bytes = 0
        self.host_kv_bytes = config.host_kv_bytes or 0
        self.num_read_threads = min(_READ_THREADS, os.cpu_count() or 1)
        self.min_group_bytes = _GROUP_BYTES
        self.layout_4bit: Layout4Bit = "bitsandbytes"

    @cached_property
    def host_order(self) -> OneDnnLayout | None:
        # Determined by the first load, because the check takes 0.1 s that would delay the engine's start.
        return OneDnnLayout.create()

    def host_free_bytes(self) -> int:
        return 0

    def take(
        self, filler: Filler, identity: str, weight_slabs: int, kv: KvGeometry, cancelled: threading.Event
    ) -> TakenMemory:
        del identity, cancelled
        weights = self.memory.reserve(weight_slabs)
        kv_range = KvRange(self.memory.reserve(kv.max_slabs))
        return CpuModelMemory(weights, kv_range, kv, filler, self.memory.slab_bytes)

    def take_adapter(self, filler: Filler, identity: str, extent: Extent, cancelled: threading.Event) -> ExtentWeights:
        del identity, cancelled
        return CpuWeights(extent, filler)

    def synchronize(self) -> None:
        """Return at once: a CPU launches nothing asynchronously."""

    def idle(self) -> bool:
        return False

    def close(self) -> None:
        self.memory.close()


def check_budget(budget: int, slab_bytes: int, memory_bytes: int) -> None:
    """Raise ConfigError for a budget that holds no slab, or that exceeds the machine's memory."""
    if budget < slab_bytes:
        raise ConfigError(
            f"the device budget of {budget} bytes is less than one slab of {slab_bytes} bytes: give at least that, and room for a model"
        )
    if budget > memory_bytes:
        raise ConfigError(
            f"the device budget of {budget} bytes exceeds this machine's memory of {memory_bytes} bytes: give less, or no budget"
        )
