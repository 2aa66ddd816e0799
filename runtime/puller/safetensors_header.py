"""Reads the header of a safetensors file without torch and checks it against the file's size."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from runtime.errors import LoadFailed
from runtime.puller.sizing import DTYPE_BYTES, TensorShape

_MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Header:
    tensors: Sequence[TensorShape]
    metadata: dict[str, str]
    file_bytes: int  # as the header needs it


def read_header(path: Path, max_header_bytes: int = _MAX_HEADER_BYTES) -> Header:
    """Raises LoadFailed naming the file and the sizes when it is truncated, too long or no safetensors file."""
    try:
        actual_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(path.name, file.read(8), actual_bytes, max_header_bytes)
            header = parse_header(path.name, file.read(length))
    except OSError as error:
        raise LoadFailed(f"{path.name} cannot be read: {error.strerror}") from error
    if header.file_bytes != actual_bytes:
        what = "truncated" if actual_bytes < header.file_bytes else "corrupt"
        raise LoadFailed(f"{path.name} is {what}: {actual_bytes} bytes, its header describes {header.file_bytes}")
    return header


@dataclass(frozen=True, slots=True)
class DataStart:
    """Where the tensors of a file begin: type, shape and offset in the file, by name."""

    path: Path
    places: Mapping[str, tuple[str, tuple[int, ...], int]]


def read_data_start(path: Path) -> DataStart:
    """Return the places of the tensors of a file that `read_header` accepts. Raises like it."""
    read_header(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return DataStart(
        path,
        {
            name: (entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
        },
    )


def header_length(name: str, prefix: bytes, file_bytes: int, limit: int = _MAX_HEADER_BYTES) -> int:
    """Return the header's length in bytes from a file's first eight bytes. Raises LoadFailed if it exceeds `limit`."""
    if len(prefix) < 8:
        raise LoadFailed(f"{name} is truncated: {file_bytes} bytes, less than a header's length")
    (length,) = struct.unpack("<Q", prefix)
    if length > limit or length == 0:
        # The length itself is left out: it would quote a file that need not be a checkpoint's.
        raise LoadFailed(
            f"{name} is not a safetensors file: the length of its header is out of range, which is 1 to {limit} bytes"
        )
    if 8 + length > file_bytes:
        raise LoadFailed(f"{name} is truncated: {file_bytes} bytes, its header alone needs more")
    return int(length)


def parse_header(name: str, data: bytes) -> Header:
    """Parse the header's JSON in `data`, which does not include its length."""
    try:
        entries = json.loads(data)
        metadata = entries.pop("__metadata__", None) or {}
        tensors, places = [], []
        for tensor, entry in entries.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
                raise LoadFailed(
                    f"{name} is corrupt: tensor {tensor} has offsets or sizes that are not whole numbers from 0 on"
                )
            expected = math.prod(shape) * DTYPE_BYTES[entry["dtype"]]
            if end - start != expected:
                raise LoadFailed(
                    f"{name} is corrupt: tensor {tensor} has {end - start} bytes, its shape needs {expected}"
                )
            tensors.append(TensorShape(tensor, entry["dtype"], shape))
            places.append((start, end))
        if not all(isinstance(value, str) for value in metadata.values()):
            raise LoadFailed(f"{name} is corrupt: its metadata has values that are not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadFailed(
            f"{name} is not a safetensors file: its header cannot be read ({type(error).__name__})"
        ) from None
    places.sort()
    if any(before > start for (_, before), (start, _) in pairwise(places)):
        raise LoadFailed(f"{name} is corrupt: some of its tensors lie over each other")
    return Header(tensors, metadata, 8 + len(data) + (places[-1][1] if places else 0))
