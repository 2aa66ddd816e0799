"""Predicts what a model will count once it is loaded: always a positive number of bytes, within a time limit.

ModelMesh fails a load whose predicted size is 0, and never calls the method again if it is not implemented.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from common.model_key import ModelSettings
from common.units import GIB
from runtime.errors import RepertoryError
from runtime.models.capacity import Capacity
from runtime.models.model_key import fingerprint
from runtime.puller.inspection import ModelInspector
from runtime.types import ModelSource

_NUM_KEPT = 1024
_DEFAULT_BYTES = GIB  # while neither the files nor the engine's capacity are known
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt")


@dataclass(frozen=True, slots=True)
class Sizing:
    """What sizes depend on: the kind of device, the capacity, and the budget of each device by the size of its group."""

    device: str
    capacity: Capacity
    budgets: Mapping[int, int]


class SizePredictor:
    """Starts one inspection per source and settings, shared by all callers that ask meanwhile, and keeps its result.

    `sizing` waits for the engines.
    """

    def __init__(self, inspector: ModelInspector, sizing: Callable[[], Awaitable[Sizing]]) -> None:
        self._inspector = inspector
        self._sizing = sizing
        self._last_capacity: Capacity | None = None
        self._running: dict[bytes, asyncio.Task[int | None]] = {}
        self._known: LRUCache[bytes, int] = LRUCache(_NUM_KEPT)

    async def predict(self, source: ModelSource, settings: ModelSettings, timeout_s: float) -> int:
        """Return the bytes that loading will count: exact if an index of the files is here, else an estimate.

        An inspection that takes longer than `timeout_s` continues, and its result serves the next call.
        """
        key = fingerprint(source, settings)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._inspect(source, settings), name="predict size")
            self._running[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        done, _ = await asyncio.wait((task,), timeout=timeout_s)
        size_bytes: int = (task.result() if done else self._known.get(key)) or 0
        return size_bytes or await asyncio.to_thread(self._estimate, source)

    def _ended(self, key: bytes, task: "asyncio.Task[int | None]") -> None:
        self._running.pop(key, None)
        if not task.cancelled() and (size_bytes := task.result()):
            self._known[key] = size_bytes

    async def _inspect(self, source: ModelSource, settings: ModelSettings) -> int | None:
        """Return None if the files cannot be inspected here; loadModel will say why."""
        sizing = await self._sizing()
        capacity = self._last_capacity = sizing.capacity
        wanted = settings.tensor_parallel
        sizes = sorted(sizing.budgets) if wanted == "auto" else [wanted]
        try:
            look = await self._inspector.look(source, settings, sizing.device, group_sizes=sizes, local_only=True)
        except RepertoryError:
            return None
        fitting = (size for size in sizes if look.needs_on(size).weight_bytes <= sizing.budgets.get(size, 0))
        size = next(fitting, sizes[-1])
        needs = look.needs_on(size)
        return capacity.charge(needs.weight_bytes, needs.kv_bytes_per_token, needs.max_model_len, size)

    def _estimate(self, source: ModelSource) -> int:
        """Return the size of local weight files, else the default size that the mesh assumes."""
        size_bytes = _local_weight_bytes(source.uri)
        if size_bytes:
            return size_bytes
        return self._last_capacity.default_size_bytes if self._last_capacity is not None else _DEFAULT_BYTES


def _local_weight_bytes(path: str) -> int:
    place = Path(path.removeprefix("file://"))
    if not place.is_absolute():
        return 0
    try:
        if place.is_file():
            return place.stat().st_size
        with os.scandir(place) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.name.endswith(_WEIGHT_SUFFIXES))
    except OSError:
        return 0
