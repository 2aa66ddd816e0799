"""Writes random LoRA adapters of all linear layers of a Llama, packed as the puller packs them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import Shape
from runtime.puller.adapter.packing import FORMAT
from runtime.puller.pack.request import PACKED_NAME
from runtime.puller.pack.writer import Entry, PackedWriter
from runtime.types import Checkpoint

_BLOCK_VALUES = 1 << 22
_NUM_THREADS = 8

Bits = np.ndarray[Any, np.dtype[np.uint16]]


def num_parameters(shape: Shape, rank: int) -> int:
    """Return the values of an adapter of this rank."""
    return shape.layers * sum(rank * (inputs + outputs) for _, inputs, outputs in _linears(shape))


def write_adapters(shape: Shape, rank: int, count: int, folder: Path) -> list[Checkpoint]:
    """Write `count` adapters with random bf16 values below `folder`, unless they exist. `rank`: a power of two, as a packed rank is.

    All take their values from one random block, each from places of its own: drawing 42 million values for each of 200 adapters would take minutes.
    """
    rng = np.random.default_rng(0)
    largest = rank * max(max(inputs, outputs) for _, inputs, outputs in _linears(shape))
    values = rng.standard_normal(_BLOCK_VALUES + largest, dtype=np.float32) * np.float32(0.02)
    block = (values.view(np.uint32) >> 16).astype(np.uint16)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return list(threads.map(lambda number: _write(shape, rank, number, folder, block), range(count)))


def _write(shape: Shape, rank: int, number: int, folder: Path, block: Bits) -> Checkpoint:
    out = folder / f"{shape.name}-lora-{rank}-{number}"
    packed = out / PACKED_NAME
    if not packed.exists():
        out.mkdir(parents=True, exist_ok=True)
        matrices = list(_matrices(shape, rank))
        entries = [Entry(name, "BF16", size, 2 * size[0] * size[1]) for name, size in matrices]
        part = out / "part"
        writer = PackedWriter(part, entries, {"format": FORMAT, "dtype": "bfloat16", "source": out.name})
        rng = np.random.default_rng(number)
        try:
            for name, size in matrices:
                start = int(rng.integers(_BLOCK_VALUES))
                writer.write(name, block[start : start + size[0] * size[1]].data.cast("B"))
            writer.finish()
        finally:
            writer.close()
        part.rename(packed)
    return Checkpoint(str(out), packed_file=str(packed), dtype="bfloat16", weight_bytes=packed.stat().st_size)


def _matrices(shape: Shape, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in range(shape.layers):
        for name, inputs, outputs in _linears(shape):
            yield f"model.layers.{layer}.{name}.lora_A", (rank, inputs)
            yield f"model.layers.{layer}.{name}.lora_B", (outputs, rank)


def _linears(shape: Shape) -> tuple[tuple[str, int, int], ...]:
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return (
        ("self_attn.q_proj", shape.hidden, wide),
        ("self_attn.k_proj", shape.hidden, narrow),
        ("self_attn.v_proj", shape.hidden, narrow),
        ("self_attn.o_proj", wide, shape.hidden),
        ("mlp.gate_proj", shape.hidden, shape.intermediate),
        ("mlp.up_proj", shape.hidden, shape.intermediate),
        ("mlp.down_proj", shape.intermediate, shape.hidden),
    )
