"""What a kind of device brings: slabs, a host tier or none, and a loaded model's memory. The seam that keeps CPU and GPU apart; knows no model."""

import threading
from typing import Protocol

import torch
from torch import Tensor

from runtime.checkpoint.packed import Layout4Bit
from runtime.engine.interfaces import KvGeometry, ModelMemory
from runtime.engine.memory.device import DeviceMemory
from runtime.engine.memory.weight_buffer import Filler
from runtime.engine.memory.weight_readiness import WeightReadiness
from runtime.engine.model.cpu.onednn_layout import OneDnnLayout


class TakenMemory(ModelMemory, WeightReadiness, Protocol):
    """One loaded model's memory, with the addresses that its tensors view."""

    @property
    def weights_view(self) -> Tensor: ...

    @property
    def kv_view(self) -> Tensor: ...


class Device(Protocol):
    """One device.

    Attributes:
        num_read_threads: threads that read a checkpoint.
        min_group_bytes: weights come in groups of at least this size.
        layout_4bit: how it reads 4-bit codes.
        host_order: what its matrices are put in; None = they stay in rows.
    """

    device: torch.device
    name: str
    memory: DeviceMemory
    host_total_bytes: int
    num_read_threads: int
    min_group_bytes: int
    layout_4bit: Layout4Bit

    @property
    def host_order(self) -> OneDnnLayout | None: ...

    def host_free_bytes(self) -> int: ...

    def take(
        self, filler: Filler, identity: str, weight_slabs: int, kv: KvGeometry, cancelled: threading.Event
    ) -> TakenMemory:
        """Ranges for a model, and its weights in the host tier where there is one. Called from a loading thread; raises Cancelled or LoadFailed."""

    def synchronize(self) -> None: ...

    def idle(self) -> bool:
        """One piece of background work; True if there was one."""

    def close(self) -> None: ...
