"""Fills the image of a packed adapter from its file, where the matrices lie as they will lie in memory."""

import os
import threading
from collections.abc import Callable

from runtime.checkpoint.packed_adapter import AdapterImage
from runtime.engine.memory.weight_buffer import WeightBuffer
from runtime.errors import Cancelled, LoadFailed

_PIECE_BYTES = 16 * 1024 * 1024


class AdapterFiller:
    """Implements Filler. An adapter is one group."""

    def __init__(self, image: AdapterImage) -> None:
        self.group_ends: tuple[int, ...] = (image.size_bytes,)
        self._image = image

    def fill(self, image: WeightBuffer, cancelled: threading.Event, on_group: Callable[[int], None]) -> None:
        path, size_bytes = self._image.path, self._image.size_bytes
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                for start in range(0, size_bytes, _PIECE_BYTES):
                    if cancelled.is_set():
                        raise Cancelled("the load was cancelled")
                    at = self._image.offset + start
                    for piece in image.pieces(start, min(_PIECE_BYTES, size_bytes - start)):
                        _read(file, path, at, piece.numpy().data)
                        at += piece.numel()
            finally:
                os.close(file)
        except OSError as error:
            raise LoadFailed(f"{path} cannot be read: {error.strerror}") from error
        on_group(0)


def _read(file: int, path: str, at: int, into: "memoryview[int]") -> None:
    while len(into):
        count = os.preadv(file, [into], at)
        if count == 0:
            raise LoadFailed(f"{path} is truncated: it ends before byte {at + len(into)}")
        into, at = into[count:], at + count
