"""Writes the packed file: safetensors' format, each tensor at a multiple of 256 bytes, a content hash in the metadata.

Tensors may come from several threads and in any order: each has its place from the start. The content hash is the hash of the tensors' own, in the
file's order, so that it too is made by all threads.
"""

import ctypes
import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EngineFault
from runtime.puller.pack.request import FORMAT

ALIGNMENT_BYTES = 256
_HASH = "content_blake2b"
_PLACE = "0" * 64
PADDING = "_padding."  # a reader looks tensors up by name and never meets these
_READ_BYTES = 1 << 22
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """`dtype` in safetensors' words."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class PackedWriter:
    """`write` each of `entries` once, then `finish`, then `close`."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._entries = {entry.name: entry for entry in entries}
        self._offsets: dict[str, int] = {}
        self._digests: dict[str, bytes] = {}
        self._lock = threading.Lock()
        header: dict[str, object] = {"__metadata__": {"format": FORMAT, **metadata, _HASH: _PLACE}}
        offset = 0
        for number, entry in enumerate(entries):
            self._offsets[entry.name] = offset
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.size_bytes],
            }
            offset += entry.size_bytes
            if padding := -offset % ALIGNMENT_BYTES:
                header[f"{PADDING}{number}"] = {
                    "dtype": "U8",
                    "shape": [padding],
                    "data_offsets": [offset, offset + padding],
                }
                offset += padding
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
        self._data_at = 8 + len(text)
        self.total_bytes = self._data_at + offset
        self.written_bytes = self._data_at
        self._place = 8 + text.index(_PLACE.encode())
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._put(memoryview(struct.pack("<Q", len(text)) + text), 0)
        os.truncate(self._file, self.total_bytes)  # padding is zeros

    def write(self, name: str, data: memoryview) -> None:
        """Write one tensor's bytes. Raises OSError, or EngineFault for a tensor whose turn it is not."""
        entry = self._entries.get(name)
        if entry is None or data.nbytes != entry.size_bytes or name in self._digests:
            due = f"{entry.size_bytes} bytes were due" if entry is not None else "nothing was due"
            raise EngineFault(f"packing: {name} of {data.nbytes} bytes came where {due}")
        at = self._data_at + self._offsets[name]
        self._put(data, at)
        _begin_writeback(self._file, at, data.nbytes)
        digest = hashlib.blake2b(data, digest_size=32).digest()
        with self._lock:
            self._digests[name] = digest
            self.written_bytes += data.nbytes + -data.nbytes % ALIGNMENT_BYTES

    def finish(self, each: Callable[[Callable[[str], bool], Iterable[str]], Iterable[bool]] = map) -> str:
        """Put the hash in, flush, read everything back and compare; `each` is a `map` that may use threads. Returns the hash; raises OSError if the
        disk gives back something else."""
        missing = [name for name in self._entries if name not in self._digests]
        if missing:
            raise EngineFault(f"packing: {len(missing)} tensors did not come, the first is {missing[0]}")
        digest = hashlib.blake2b(b"".join(self._digests[name] for name in self._entries), digest_size=32).hexdigest()
        self._put(memoryview(digest.encode()), self._place)
        os.fsync(self._file)
        if not all(each(self._reads_back, self._entries)):
            raise OSError(f"{self._path} does not read back as it was written")
        return digest

    def close(self) -> None:
        os.close(self._file)

    def _put(self, data: memoryview, at: int) -> None:
        data = data.cast("B")
        while data.nbytes:
            count = os.pwrite(self._file, data, at)
            data, at = data[count:], at + count

    def _reads_back(self, name: str) -> bool:
        entry, at = self._entries[name], self._data_at + self._offsets[name]
        check = hashlib.blake2b(digest_size=32)
        end = at + entry.size_bytes
        while at < end:
            chunk = os.pread(self._file, min(_READ_BYTES, end - at), at)
            if not chunk:
                return False
            check.update(chunk)
            at += len(chunk)
        return check.digest() == self._digests[name]


def _begin_writeback(file: int, at: int, size_bytes: int) -> None:
    """Let the disk begin now, so that the flush at the end finds little to do. A hint: where it is not known, nothing is lost."""
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if sync_file_range is not None:
        sync_file_range(
            ctypes.c_int(file), ctypes.c_int64(at), ctypes.c_int64(size_bytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        )
