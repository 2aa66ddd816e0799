"""A checkpoint on disk as a built model on a CPU, and logits out of it step by step: what the engine does, without a scheduler or a runner."""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.model_key import Quantization
from runtime.config.schema import EngineConfig
from runtime.engine.device.cpu import CpuDevice
from runtime.engine.device.device import TakenMemory
from runtime.engine.model.build.builder import Blueprint, assemble, draw
from runtime.engine.model.build.equivalence_check import EquivalenceChecker
from runtime.engine.model.build.kv_fixture import KvFixture
from runtime.engine.model.run.kv_geometry import kv_geometry
from runtime.engine.model.run.step import BuiltModel
from runtime.types import Checkpoint

SLAB_BYTES = 64 * 1024
MIN_GROUP_BYTES = 16 * 1024


def save(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "1GB") -> Checkpoint:
    """`model` as a safetensors checkpoint in `folder`."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    files = tuple(str(path) for path in sorted(folder.glob("*.safetensors")))
    return Checkpoint(model_dir=str(folder), weight_files=files, dtype="float32")


def packed(checkpoint: Checkpoint, file: Path, quantization: Quantization) -> Checkpoint:
    """`checkpoint` as its packed file."""
    return Checkpoint(checkpoint.model_dir, (), str(file), quantization, checkpoint.dtype)


@dataclass(slots=True)
class Resident:
    """A model in CPU memory, its weights in, some KV slabs mapped."""

    blueprint: Blueprint
    hardware: CpuDevice
    memory: TakenMemory
    built: BuiltModel
    pages: list[int]

    def rows(self, max_rows: int = 4, max_blocks: int = 16, seed: int = 0) -> KvFixture:
        """Fresh rows over the mapped pages, in no order."""
        pages = list(self.pages)
        random.Random(seed).shuffle(pages)
        return KvFixture(
            self.built.planes,
            self.built.token_stride,
            self.built.block_tokens,
            pages,
            max_rows,
            max_blocks,
            self.built.device,
        )

    def logits(self, prompts: Sequence[torch.Tensor], chunk: int = 7) -> list[torch.Tensor]:
        """Every position's logits of each prompt, all rows together, `chunk` tokens at a time and the last two one by one."""
        rows = self.rows()
        done = [0] * len(prompts)
        found: list[list[torch.Tensor]] = [[] for _ in prompts]
        while any(start < len(prompt) for start, prompt in zip(done, prompts, strict=True)):
            chunks = []
            for row, prompt in enumerate(prompts):
                left = len(prompt) - done[row]
                if left > 0:
                    chunks.append((row, done[row], min(chunk, left - 2) if left > 2 else 1))
            positions, context = rows.step(chunks)
            ids = torch.cat([prompts[row][first : first + count] for row, first, count in chunks])
            with torch.inference_mode():
                logits = self.built.forward(ids, positions, torch.arange(len(ids)), context)
            for (row, _, count), part in zip(chunks, logits.split([count for _, _, count in chunks]), strict=True):
                found[row].append(part)
                done[row] += count
        return [torch.cat(parts) for parts in found]


def bring_up(
    checkpoint: Checkpoint, *, fuse: bool = True, max_model_len: int | None = None, kv_slabs: int = 12
) -> Resident:
    """Load, map and fill, as the engine would."""
    hardware = CpuDevice(EngineConfig(device="cpu", slab_bytes=SLAB_BYTES, device_budget_bytes=256 * SLAB_BYTES))
    blueprint = draw(
        "m",
        checkpoint,
        max_model_len,
        EquivalenceChecker(fuse),
        num_threads=2,
        min_group_bytes=MIN_GROUP_BYTES,
        host_order=hardware.host_order,
    )
    kv = kv_geometry("m", blueprint.shape, 16, blueprint.card.dtype.itemsize, SLAB_BYTES, 64)
    weight_slabs = -(-blueprint.layout.size_bytes // SLAB_BYTES)
    memory = hardware.take(blueprint.filler, blueprint.identity, weight_slabs, kv, threading.Event())
    built = assemble(blueprint, memory.weights_view, memory.kv_view, kv, blueprint.card.dtype, memory)
    memory.swap_in(range(weight_slabs))
    for index in range(kv_slabs):
        memory.map_kv(index, weight_slabs + index)
    pages = [
        slab * kv.pages_per_slab + block * kv.pages_per_block
        for slab in range(kv_slabs)
        for block in range(kv.blocks_per_slab)
    ]
    return Resident(blueprint, hardware, memory, built, pages)


def hf_logits(model: PreTrainedModel, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The oracle: every position's logits by the model's own forward pass."""
    with torch.inference_mode():
        return [model(input_ids=prompt[None], use_cache=False).logits[0] for prompt in prompts]


def prompts(vocab: int, lengths: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]
