"""Loads an adapter over a loaded base: checks it against the base's layers and brings its matrices into the host tier."""

import threading
from collections.abc import Callable

import msgspec

from runtime.checkpoint.packed_adapter import read_adapter
from runtime.engine.adapters.bank import AdapterBank, Extent
from runtime.engine.adapters.filler import AdapterFiller
from runtime.engine.adapters.memory import AdapterMemory, ExtentWeights
from runtime.engine.interfaces import AdapterResult
from runtime.engine.memory.weight_buffer import Filler
from runtime.errors import Cancelled, LoadFailed
from runtime.types import Checkpoint, ModelFacts

TakeWeights = Callable[[Filler, str, Extent, threading.Event], ExtentWeights]


def load_adapter(
    model_id: str,
    checkpoint: Checkpoint,
    base: ModelFacts,
    bank: AdapterBank,
    take: TakeWeights,
    cancelled: threading.Event,
) -> AdapterResult:
    """Load a packed adapter. `take` brings its bytes into the host tier. Raises LoadFailed naming what does not fit the base, or Cancelled."""
    if checkpoint.packed_file is None:
        raise LoadFailed(f"{checkpoint.model_dir} holds no packed adapter")
    image = read_adapter(checkpoint.packed_file, bank.targets, bank.dtype, bank.table.max_rank)
    if cancelled.is_set():
        raise Cancelled("loading was cancelled")
    extent = bank.extent(image.size_bytes)
    weights = take(AdapterFiller(image), f"adapter {image.digest}", extent, cancelled)
    facts = msgspec.structs.replace(
        base,
        model_id=model_id,
        path=f"adapter of rank {image.rank} over {base.model_id}",
        weight_bytes=image.size_bytes,
        kv_bytes_per_token=0,
        num_parameters=image.num_parameters,
        adapter_rank=image.rank,
    )
    return AdapterResult(facts, AdapterMemory(bank, image, extent, weights))
