"""Fills the image of a packed adapter from its file."""

import os
import threading
from collections.abc import Callable

from runtime.checkpoint.adapter_layout import Span
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
        path = self._image.path
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                for span in self._image.spans:
                    self._fill(file, span, image, cancelled)
            finally:
                os.close(file)
        except OSError as error:
            raise LoadFailed(f"{path} cannot be read: {error.strerror}") from error
        on_group(0)

    def _fill(self, file: int, span: Span, image: WeightBuffer, cancelled: threading.Event) -> None:
        for start in range(0, span.size_bytes, _PIECE_BYTES):
            if cancelled.is_set():
                raise Cancelled("the load was cancelled")
            at = span.at + start
            for piece in image.pieces(span.place + start, min(_PIECE_BYTES, span.size_bytes - start)):
                _read(file, self._image.path, at, piece.numpy().data)
                at += piece.numel()


def _read(file: int, path: str, at: int, into: "memoryview[int]") -> None:
    while len(into):
        count = os.preadv(file, [into], at)
        if count == 0:
            raise LoadFailed(f"{path} is truncated: it ends before byte {at + len(into)}")
        into, at = into[count:], at + count
