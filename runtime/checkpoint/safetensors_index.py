"""Reads the headers of a checkpoint's safetensors files and checks them against the files' sizes."""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.errors import LoadFailed

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `size_bytes` from `offset`."""

    name: str
    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_index(paths: Sequence[str]) -> dict[str, StoredTensor]:
    """Return the tensors of all files by name. Raises LoadFailed naming a file that is missing, truncated or of another format."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in _read_header(path):
            if tensor.name in found:
                raise LoadFailed(f"tensor {tensor.name} is in two files: {found[tensor.name].path} and {path}")
            found[tensor.name] = tensor
    return found


def read_metadata(path: str) -> dict[str, str]:
    """Return the metadata of the file's header."""
    metadata = _header(path)[0].get("__metadata__") or {}
    return {str(key): str(value) for key, value in metadata.items()}


def _header(path: str) -> tuple[dict[str, Any], int, int]:
    """(entries, bytes before the data, bytes of the file)."""
    try:
        file_bytes = Path(path).stat().st_size
        with Path(path).open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise LoadFailed(f"{path} is truncated: {file_bytes} bytes, not even a header")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > _MAX_HEADER_BYTES:
                raise LoadFailed(f"{path} is not a safetensors file: it claims a header of {header_bytes} bytes")
            if 8 + header_bytes > file_bytes:
                raise LoadFailed(f"{path} is truncated: {file_bytes} bytes, its header alone needs {8 + header_bytes}")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LoadFailed(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise LoadFailed(f"{path} is not a safetensors file: its header is not an object")
    return header, 8 + header_bytes, file_bytes


def _read_header(path: str) -> list[StoredTensor]:
    header, data_start, file_bytes = _header(path)
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            code = entry["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise LoadFailed(f"{path}: tensor {name} has a damaged header entry") from error
        if code not in _DTYPES:
            raise LoadFailed(f"{path}: tensor {name} is of type {code}, which is not supported")
        tensor = StoredTensor(name, path, data_start + start, shape, _DTYPES[code])
        if end - start != tensor.size_bytes:
            raise LoadFailed(f"{path}: tensor {name} needs {tensor.size_bytes} bytes and has {end - start}")
        if tensor.offset + tensor.size_bytes > file_bytes:
            raise LoadFailed(
                f"{path} is truncated: {file_bytes} bytes, tensor {name} ends at {tensor.offset + tensor.size_bytes}"
            )
        tensors.append(tensor)
    return tensors
