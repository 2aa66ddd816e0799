"""Reads a GGUF file's index: its metadata and its tensors' names and shapes.

The format's own library does not check counts, so a few damaged bytes would make it allocate all memory. This reader checks each length
against the file's size first. The layout is specified in ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import LoadFailed
from runtime.puller.sizing import TensorShape

_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_ALIGNMENT_BYTES = 32
_MIN_ENTRY_BYTES = 13  # an empty name, a value type and a byte
_MAX_TEXT_BYTES = 1 << 20
_MAGIC = b"GGUF"
_FIRST_READ_BYTES = 4 << 20  # of a remote file; a vocabulary of 32,000 takes about 1 MiB
_MAX_INDEX_BYTES = 64 << 20
_MAX_NUMBERS = 4096  # of an array that is kept: one number per layer, not one per vocabulary entry

Value = int | float | bool | str | tuple[int | float | bool, ...] | None


@dataclass(frozen=True, slots=True)
class GgufIndex:
    """The metadata and tensors that a file declares. Arrays of texts and long arrays are None in `metadata`; `num_items` has their lengths."""

    metadata: Mapping[str, Value]
    num_items: Mapping[str, int]
    tensors: Sequence[TensorShape]  # with the dtype F32, as they are unpacked

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture") or "")

    def number(self, key: str) -> int | None:
        """Return an integer of the metadata, None if it is absent or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_index(path: Path) -> GgufIndex:
    """Read a file's index. Raises LoadFailed for a file whose index or tensors end beyond it, and for one part of a split file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _checked(path.name, _IndexReader(path.name, data, len(data)).read())
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise LoadFailed(f"{path.name} cannot be read: {error}") from error


def read_remote_index(name: str, size_bytes: int, read: Callable[[int], bytes]) -> GgufIndex:
    """Read the index of a remote file of `size_bytes`. `read(count)` returns its first `count` bytes. Raises LoadFailed as `read_index` does."""
    num_bytes = _FIRST_READ_BYTES
    while True:
        data = read(min(num_bytes, size_bytes))
        if not data.startswith(_MAGIC):
            raise LoadFailed(f"{name} is not a GGUF file")
        try:
            return _checked(name, _IndexReader(name, data, size_bytes).read())
        except _IncompleteError:
            if num_bytes >= _MAX_INDEX_BYTES:
                raise LoadFailed(f"{name}: its index is longer than {_MAX_INDEX_BYTES} bytes; load it once") from None
            num_bytes *= 4


def _checked(name: str, index: GgufIndex) -> GgufIndex:
    """Return the index of a whole file. Raises LoadFailed for one part of a split file."""
    num_parts = index.number("split.count") or 1
    if num_parts > 1:
        part = (index.number("split.no") or 0) + 1
        raise LoadFailed(
            f"{name} is part {part} of a GGUF file that was split into {num_parts}, which cannot be loaded in parts; "
            "merge them with `llama-gguf-split --merge` and register the whole file"
        )
    return index


class _IncompleteError(Exception):
    """The index continues after the bytes that were read of the file."""


class _IndexReader:
    """`data`: the first bytes of a file of `size_bytes`."""

    def __init__(self, name: str, data: mmap.mmap | bytes, size_bytes: int) -> None:
        self._name = name
        self._data = data
        self._size_bytes = size_bytes
        self._at = len(_MAGIC)

    def read(self) -> GgufIndex:
        version = self._number("<I")
        if version not in (2, 3):
            raise LoadFailed(f"{self._name} is GGUF of version {version}; versions 2 and 3 can be read")
        num_tensors, num_entries = self._count(_MIN_ENTRY_BYTES), self._count(_MIN_ENTRY_BYTES)
        metadata: dict[str, Value] = {}
        num_items: dict[str, int] = {}
        for _ in range(num_entries):
            key = self._text()
            metadata[key] = self._value(self._number("<I"), key, num_items)
        tensors, data_bytes = self._tensors(num_tensors)
        alignment = metadata.get("general.alignment")
        step = max(1, alignment) if isinstance(alignment, int) else _ALIGNMENT_BYTES
        needed = self._at + -self._at % step + data_bytes if tensors else self._at
        if needed > self._size_bytes:
            raise self._truncated(needed)
        return GgufIndex(metadata, num_items, tensors)

    def _tensors(self, count: int) -> tuple[list[TensorShape], int]:
        """Return the tensors and the bytes of the data section."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors, end = [], 0
        for _ in range(count):
            name = self._text()
            num_dimensions = self._number("<I")
            if num_dimensions > _MAX_DIMENSIONS:
                raise LoadFailed(f"{self._name} is damaged: tensor {name[:100]!r} has {num_dimensions} dimensions")
            # The fastest dimension comes first.
            shape = tuple(int(self._number("<Q")) for _ in range(num_dimensions))[::-1]
            kind = self._number("<I")
            sizes = GGML_QUANT_SIZES.get(kind)
            if sizes is None:
                raise LoadFailed(f"{self._name}: tensor {name[:100]!r} has an unknown type")
            block, block_bytes = sizes
            stored_bytes = -(-math.prod(shape) // block) * block_bytes
            end = max(end, self._number("<Q") + stored_bytes)
            tensors.append(TensorShape(name, "F32", shape, GGMLQuantizationType(kind).name, stored_bytes))
        return tensors, end

    def _value(self, kind: int, key: str, num_items: dict[str, int]) -> Value:
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._scalar(kind)
        item = self._number("<I")
        if item == _TEXT:
            num_items[key] = self._count(8)
            for _ in range(num_items[key]):
                self._skip(self._number("<Q"))
            return None
        form = self._form(item)
        count = num_items[key] = self._count(struct.calcsize(form))
        start = self._at
        self._skip(count * struct.calcsize(form))
        if count > _MAX_NUMBERS:
            return None
        return struct.unpack_from(f"<{count}{form[1]}", self._data, start)

    def _scalar(self, kind: int) -> int | float | bool:
        form = self._form(kind)
        start = self._at
        self._skip(struct.calcsize(form))
        [value] = struct.unpack_from(form, self._data, start)
        number: int | float | bool = value
        return number

    def _form(self, kind: int) -> str:
        form = _FORMS.get(kind)
        if form is None:
            raise LoadFailed(f"{self._name} is damaged: a value in its index has the unknown type {kind}")
        return form

    def _count(self, item_bytes: int) -> int:
        """Read a number of items of at least `item_bytes` each, which the rest of the file must hold."""
        count = self._number("<Q")
        if count * item_bytes > self._size_bytes - self._at:
            raise self._truncated(self._at + count * item_bytes)
        return count

    def _text(self) -> str:
        start = self._at + 8
        self._skip(self._number("<Q"))
        return self._data[start : min(self._at, start + _MAX_TEXT_BYTES)].decode(errors="replace")

    def _number(self, form: str) -> int:
        at = self._at
        self._skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self._data, at)[0])

    def _skip(self, count: int) -> None:
        if self._at + count > self._size_bytes:
            raise self._truncated(self._at + count)
        if self._at + count > len(self._data):
            raise _IncompleteError
        self._at += count

    def _truncated(self, needed: int) -> LoadFailed:
        return LoadFailed(
            f"{self._name} is truncated or damaged: {self._size_bytes} bytes, its index describes {needed}"
        )
