"""Records in a file which model the engine is about to run, so that the front process can read it after a crash.

The engine writes the model's id before each launch and before it copies weights to the device, and clears it when it is idle.
"""

import mmap
import struct
from pathlib import Path

_SIZE_BYTES = 4096
_LENGTH = struct.Struct("<H")


class CrashMarker:
    """A memory-mapped file with one model id. `mark` takes about a microsecond, and nothing if the model has not changed."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.exists() or self._path.stat().st_size != _SIZE_BYTES:
            self._path.write_bytes(bytes(_SIZE_BYTES))
        with self._path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE_BYTES)
        self._marked: str | None = None

    def mark(self, model_id: str) -> None:
        """Record that `model_id` is about to run; an empty id stands for no model."""
        if model_id == self._marked:
            return
        data = model_id.encode()[: _SIZE_BYTES - _LENGTH.size]
        # The length is written last, so that a crash in between reads as no model and never as half an id.
        _LENGTH.pack_into(self._map, 0, 0)
        self._map[_LENGTH.size : _LENGTH.size + len(data)] = data
        _LENGTH.pack_into(self._map, 0, len(data))
        self._marked = model_id

    def read(self) -> str | None:
        """Return the id that was recorded last, by either process; None if there is none."""
        self._marked = None  # The other process may have written since.
        (length,) = _LENGTH.unpack_from(self._map, 0)
        return self._map[_LENGTH.size : _LENGTH.size + length].decode(errors="replace") or None

    def close(self) -> None:
        self._map.close()
