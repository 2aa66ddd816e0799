"""Interface of a device type (CPU, GPU): slabs, an optional host tier, and the memory of a loaded model."""

import threading
from typing import Protocol

import torch
from torch import Tensor

from runtime.checkpoint.packed import Layout4Bit
from runtime.engine.adapters.bank import Extent
from runtime.engine.adapters.memory import ExtentWeights
from runtime.engine.interfaces import KvGeometry, ModelMemory
from runtime.engine.memory.device import DeviceMemory
from runtime.engine.memory.weight_buffer import Filler
from runtime.engine.memory.weight_readiness import WeightReadiness
from runtime.engine.model.cpu.onednn_layout import OneDnnLayout


class TakenMemory(ModelMemory, WeightReadiness, Protocol):
    """The memory of one loaded model, with the bytes that its tensors view."""

    @property
    def weights_view(self) -> Tensor: ...

    @property
    def kv_view(self) -> Tensor: ...


class Device(Protocol):
    """One device.

    Attributes:
        host_kv_bytes: the most host memory that saved KV may take.
        num_read_threads: threads that read a checkpoint.
        min_group_bytes: weights come in groups of at least this size.
        layout_4bit: the layout of 4-bit codes that its kernels read.
        host_order: the order that matrices are converted to; None = they stay in rows.
    """

    device: torch.device
    name: str
    memory: DeviceMemory
    host_total_bytes: int
    host_kv_bytes: int
    num_read_threads: int
    min_group_bytes: int
    layout_4bit: Layout4Bit

    @property
    def host_order(self) -> OneDnnLayout | None: ...

    def host_free_bytes(self) -> int: ...

    def take(
        self, filler: Filler, identity: str, weight_slabs: int, kv: KvGeometry, cancelled: threading.Event
    ) -> TakenMemory:
        """Reserve ranges for a model and bring its weights into the host tier if there is one. Runs in a loading thread; raises Cancelled or LoadFailed."""

    def take_adapter(self, filler: Filler, identity: str, extent: Extent, cancelled: threading.Event) -> ExtentWeights:
        """Bring the matrices of an adapter into the host tier if there is one. Runs in a loading thread; raises Cancelled or LoadFailed."""

    def synchronize(self) -> None: ...

    def idle(self) -> bool:
        """Do one piece of background work. Returns whether there was one."""

    def close(self) -> None: ...
