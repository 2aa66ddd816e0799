"""A walk over a GGUF file's index before its own library reads it, which believes every count: a few damaged bytes would take it all memory.

Knows where things lie and how long they are; not what they mean. (Layout: ggml's docs/gguf.md.)
"""

import math
import mmap
import struct
from pathlib import Path

from runtime.errors import LoadFailed

# bytes of the kinds of values; text and arrays say their own length
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _TEXT, _ARRAY = 4, 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT_BYTES = 32
_LEAST_ENTRY_BYTES = 13  # an empty name, a kind and a byte


def check_index(path: Path) -> None:
    """Raises LoadFailed for a file whose index doesn't end within it or whose tensors don't, naming the sizes."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path.name, data).check()
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise LoadFailed(f"{path.name} can't be read: {error}") from error


class _Walk:
    def __init__(self, name: str, data: mmap.mmap) -> None:
        self._name = name
        self._data = data
        self._at = 4

    def check(self) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        version = self._number("<I")
        if version not in (2, 3):
            raise LoadFailed(f"{self._name} is GGUF of version {version}; 2 and 3 can be read")
        tensors, entries = self._count(_LEAST_ENTRY_BYTES), self._count(_LEAST_ENTRY_BYTES)
        alignment = _ALIGNMENT_BYTES
        for _ in range(entries):
            key = self._text()
            kind = self._number("<I")
            if key == b"general.alignment" and kind == _UINT32:
                alignment = (
                    max(1, struct.unpack_from("<I", self._data, self._at)[0])
                    if self._at + 4 <= len(self._data)
                    else alignment
                )
            self._value(kind)
        end = 0
        for _ in range(tensors):
            name = self._text()
            dimensions = self._number("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise LoadFailed(f"{self._name} is damaged: tensor {name[:100]!r} has {dimensions} dimensions")
            numel = math.prod(self._number("<Q") for _ in range(dimensions))
            sizes = GGML_QUANT_SIZES.get(self._number("<I"))
            if sizes is None:
                raise LoadFailed(f"{self._name}: tensor {name[:100]!r} is of a kind that isn't known here")
            block, block_bytes = sizes
            end = max(end, self._number("<Q") + -(-numel // block) * block_bytes)
        needed = self._at + -self._at % alignment + end if tensors else self._at
        if needed > len(self._data):
            raise self._truncated(needed)

    def _value(self, kind: int) -> None:
        if kind == _TEXT:
            self._text()
            return
        if kind != _ARRAY:
            self._skip(self._size(kind))
            return
        item = self._number("<I")
        if item == _TEXT:
            for _ in range(self._count(8)):
                self._skip(self._number("<Q"))
        else:
            size_bytes = self._size(item)
            self._skip(self._count(size_bytes) * size_bytes)

    def _size(self, kind: int) -> int:
        size_bytes = _SIZES.get(kind)
        if size_bytes is None:
            raise LoadFailed(f"{self._name} is damaged: a value in its index is of kind {kind}")
        return size_bytes

    def _count(self, item_bytes: int) -> int:
        """A number of things of at least so many bytes, which the rest of the file must hold."""
        count = self._number("<Q")
        if count * item_bytes > len(self._data) - self._at:
            raise self._truncated(self._at + count * item_bytes)
        return count

    def _text(self) -> bytes:
        start = self._at + 8
        self._skip(self._number("<Q"))
        return self._data[start : min(self._at, start + 200)]

    def _number(self, form: str) -> int:
        at = self._at
        self._skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self._data, at)[0])

    def _skip(self, count: int) -> None:
        if self._at + count > len(self._data):
            raise self._truncated(self._at + count)
        self._at += count

    def _truncated(self, needed: int) -> LoadFailed:
        return LoadFailed(
            f"{self._name} is truncated or damaged: {len(self._data)} bytes, its index describes {needed}"
        )
