"""Writes the packed file: safetensors' format, each tensor at a multiple of 256 bytes, a content hash in the metadata. Knows bytes; no torch."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from runtime.errors import EngineFault
from runtime.puller.pack.request import FORMAT

ALIGNMENT_BYTES = 256
_HASH = "content_blake2b"
_PLACE = "0" * 64
PADDING = "_padding."                   # a reader looks tensors up by name and never meets these


@dataclass(frozen=True, slots=True)
class Entry:
    """`dtype` in safetensors' words."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class PackedWriter:
    """Tensors come in the order of `entries`; `finish` after the last."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self._entries = entries
        self._next = 0
        self._digest = hashlib.blake2b(digest_size=32)
        header: dict[str, object] = {"__metadata__": {"format": FORMAT, **metadata, _HASH: _PLACE}}
        offset = 0
        for number, entry in enumerate(entries):
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size_bytes]}
            offset += entry.size_bytes
            if padding := -offset % ALIGNMENT_BYTES:
                header[f"{PADDING}{number}"] = {"dtype": "U8", "shape": [padding], "data_offsets": [offset, offset + padding]}
                offset += padding
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
        self.total_bytes = 8 + len(text) + offset
        self.written_bytes = 8 + len(text)
        self._place = 8 + text.index(_PLACE.encode())
        self._file: BinaryIO = path.open("w+b")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, data: memoryview) -> None:
        """The next tensor's bytes."""
        entry = self._entries[self._next]
        if name != entry.name or data.nbytes != entry.size_bytes:
            raise EngineFault(f"packing: {name} of {data.nbytes} bytes came where {entry.name} of {entry.size_bytes} bytes was due")
        self._next += 1
        self._put(data)
        self._put(memoryview(bytes(-entry.size_bytes % ALIGNMENT_BYTES)))

    def finish(self) -> str:
        """Put the hash in, flush, read everything back and compare. Returns the hash; raises OSError if the disk gives back something else."""
        if self._next != len(self._entries):
            raise EngineFault(f"packing: {len(self._entries) - self._next} tensors did not come, the first is {self._entries[self._next].name}")
        wanted = self._digest.hexdigest()
        with self._file:
            header_bytes = self.total_bytes - self._data_bytes()
            self._file.seek(self._place)
            self._file.write(wanted.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.seek(header_bytes)
            check = hashlib.blake2b(digest_size=32)
            while chunk := self._file.read(1 << 22):
                check.update(chunk)
        if check.hexdigest() != wanted:
            raise OSError(f"{self._file.name} does not read back as it was written")
        return wanted

    def close(self) -> None:
        self._file.close()

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.written_bytes += data.nbytes

    def _data_bytes(self) -> int:
        return sum(entry.size_bytes + -entry.size_bytes % ALIGNMENT_BYTES for entry in self._entries)
