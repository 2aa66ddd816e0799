"""Packs a PEFT adapter once: one type, ranks padded to a power of two, scaling folded into B.

Rank patterns, rank stabilisation and the types of the training vanish here. The arithmetic is float32 and is rounded once.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import LoadFailed
from runtime.models.model_state import Phase
from runtime.puller.adapter.files import TEMPLATE_NAMES, AdapterFiles
from runtime.puller.adapter.modules import AdaptedModule, packed_bytes
from runtime.puller.pack.request import PACKED_NAME
from runtime.puller.pack.writer import ALIGNMENT_BYTES, Entry, PackedWriter
from runtime.puller.progress import PullJob
from runtime.puller.safetensors_header import DataStart, read_data_start
from runtime.puller.sizing import DTYPE_BYTES

FORMAT = "repertory-adapter-1"

_STORED: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Floats = npt.NDArray[np.float32]


def size_of(files: AdapterFiles, dtype: str) -> int:
    """Return the bytes of the packed matrices in memory."""
    return packed_bytes(files.modules, DTYPE_BYTES[dtype], ALIGNMENT_BYTES)


def pack_adapter(files: AdapterFiles, dtype: str, folder: Path, job: PullJob) -> None:
    """Write `folder`/packed.safetensors, with tensors `<module>.lora_A` [R, in] and `<module>.lora_B` [out, R], and copy the chat template beside it.

    Raises LoadFailed naming a tensor with values that are not finite, Cancelled, or OSError.
    """
    code = _NAMES[dtype]
    entries = [
        entry
        for module in files.modules
        for entry in (
            _entry(f"{module.module}.lora_A", code, (module.padded_rank, module.in_features)),
            _entry(f"{module.module}.lora_B", code, (module.out_features, module.padded_rank)),
        )
    ]
    rank = max(module.rank for module in files.modules)
    metadata = {"format": FORMAT, "dtype": dtype, "source": files.identity, "rank": str(rank)}
    source = read_data_start(files.weights)
    writer = PackedWriter(folder / PACKED_NAME, entries, metadata)
    try:
        for module in files.modules:
            job.check()
            for name, values in _matrices(module, source):
                writer.write(name, narrowed(values, dtype, name).data.cast("B"))
            job.say(Phase.PACKING, writer.written_bytes, writer.total_bytes, "packing the adapter")
        writer.finish()
    finally:
        writer.close()
    for name in TEMPLATE_NAMES:
        if (files.folder / name).is_file():
            shutil.copyfile(files.folder / name, folder / name)


def _matrices(module: AdaptedModule, source: DataStart) -> list[tuple[str, Floats]]:
    """Return A and B as they are packed, in float32."""
    a, b = _read(source, module.a), _read(source, module.b)
    extra = module.padded_rank - module.rank
    return [
        (f"{module.module}.lora_A", np.pad(a, ((0, extra), (0, 0)))),
        (f"{module.module}.lora_B", np.pad(b * np.float32(module.scaling), ((0, 0), (0, extra)))),
    ]


def _read(source: DataStart, name: str) -> Floats:
    code, shape, offset = source.places[name]
    stored = np.fromfile(source.path, _STORED[code], count=shape[0] * shape[1], offset=offset).reshape(shape)
    values: Floats = (
        (stored.astype(np.uint32) << 16).view(np.float32) if code == "BF16" else stored.astype(np.float32, copy=False)
    )
    _check_finite(values, name)
    return values


def narrowed(values: Floats, dtype: str, name: str) -> npt.NDArray[Any]:
    """Return the bits of `values` rounded to `dtype`, ties to even. Raises LoadFailed for what the type cannot hold."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        _check_finite((rounded.astype(np.uint32) << 16).view(np.float32), name)
        return rounded
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16 if dtype == "float16" else np.float32, copy=False)
    _check_finite(stored, name)
    return np.ascontiguousarray(stored)


def _check_finite(values: npt.NDArray[Any], name: str) -> None:
    if not np.isfinite(values).all():
        raise LoadFailed(f"tensor {name} has values that are infinite or not a number; the adapter cannot be used")


def _entry(name: str, code: str, shape: tuple[int, int]) -> Entry:
    return Entry(name, code, shape, shape[0] * shape[1] * DTYPE_BYTES[code])
