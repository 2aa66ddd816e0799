"""A few bytes that outlive the engine: which model it was about to step when it died.

The engine writes before each launch, and while it rests the model whose weights come in, or nobody; the front reads
after a death.
"""

import mmap
import struct
from pathlib import Path

_SIZE_BYTES = 4096
_LENGTH = struct.Struct("<H")


class CrashMarker:
    """A mapped file with one model id in it. `mark` costs about a microsecond, nothing when the model is the same as before."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.exists() or self._path.stat().st_size != _SIZE_BYTES:
            self._path.write_bytes(bytes(_SIZE_BYTES))
        with self._path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE_BYTES)
        self._marked: str | None = None

    def mark(self, model_id: str) -> None:
        """Note that `model_id` is about to run; "" for none."""
        if model_id == self._marked:
            return
        data = model_id.encode()[: _SIZE_BYTES - _LENGTH.size]
        # length last: a death in between reads as "nobody", never as a torn name
        _LENGTH.pack_into(self._map, 0, 0)
        self._map[_LENGTH.size : _LENGTH.size + len(data)] = data
        _LENGTH.pack_into(self._map, 0, len(data))
        self._marked = model_id

    def read(self) -> str | None:
        """The model marked last, by whichever process; None = nobody yet."""
        self._marked = None  # what this process marked last may not be what is there
        (length,) = _LENGTH.unpack_from(self._map, 0)
        return self._map[_LENGTH.size : _LENGTH.size + length].decode(errors="replace") or None

    def close(self) -> None:
        self._map.close()
