"""Fills a weight buffer from files: several threads read in buffer order, directly into place, and convert types
where needed.

On a CPU the matrices are then rearranged into oneDNN's layout. The same loader serves again each time the model
returns from disk.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint.name_mapping import Conversion, Resolution
from runtime.checkpoint.safetensors_index import StoredTensor
from runtime.checkpoint.weight_layout import Placed, WeightLayout
from runtime.engine.memory.weight_buffer import WeightBuffer
from runtime.engine.model.cpu.onednn_layout import OneDnnMatrix
from runtime.errors import Cancelled, LoadFailed

_PIECE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Read:
    """A read of bytes `start` to `end` of the tensor `placed` from its file."""

    placed: Placed
    stored: StoredTensor
    start: int
    end: int


class WeightFiller:
    """Fills the weight buffer of one model from its files. Implements Filler.

    A tensor named in `ordered` must be contiguous in the buffer.
    """

    def __init__(
        self,
        layout: WeightLayout,
        resolution: Resolution,
        model: Any,
        num_threads: int,
        ordered: Mapping[str, OneDnnMatrix],
    ) -> None:
        self.group_ends = layout.group_ends
        self._model = model  # transformers' converters read its configuration
        self._num_threads = num_threads
        placed = {tensor.name: tensor for tensor in layout.tensors}
        self._placed = placed
        self._groups: list[list[_Read | Conversion]] = [[] for _ in layout.group_ends]
        for conversion in resolution.conversions:
            # A conversion belongs to the first group that needs any of its targets.
            self._groups[min(self._group_of(placed[name]) for name in conversion.targets)].append(conversion)
        for tensor in layout.tensors:
            if stored := resolution.direct.get(tensor.name):
                self._groups[self._group_of(tensor)].extend(_reads(tensor, stored))
        self._ordered: list[list[tuple[Placed, OneDnnMatrix]]] = [[] for _ in layout.group_ends]
        for tensor in (*layout.tensors, *layout.joined):
            if matrix := ordered.get(tensor.name):
                self._ordered[self._group_of(tensor)].append((tensor, matrix))

    def fill(self, image: WeightBuffer, cancelled: threading.Event, on_group: Callable[[int], None]) -> None:
        """Fill the whole image; `on_group(i)` is called from this thread, in order, once groups 0 … i are in.

        Raises LoadFailed if a file is missing or too short, or Cancelled.
        """
        files = _Files()
        try:
            with ThreadPoolExecutor(self._num_threads, thread_name_prefix="weights") as pool:
                waiting: list[list[Future[None]]] = [
                    [pool.submit(self._do, work, image, files, cancelled) for work in group] for group in self._groups
                ]
                try:
                    for index, futures in enumerate(waiting):
                        for future in futures:
                            future.result()
                        self._arrange(self._ordered[index], image, cancelled)
                        on_group(index)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        finally:
            files.close()

    def _group_of(self, tensor: Placed) -> int:
        end = tensor.offset + tensor.size_bytes
        return next(index for index, limit in enumerate(self.group_ends) if end <= limit)

    def _arrange(
        self, matrices: "list[tuple[Placed, OneDnnMatrix]]", image: WeightBuffer, cancelled: threading.Event
    ) -> None:
        for placed, matrix in matrices:
            _go_on(cancelled)
            [memory] = image.pieces(placed.offset, placed.size_bytes)
            matrix.arrange(memory)

    def _do(self, work: "_Read | Conversion", image: WeightBuffer, files: "_Files", cancelled: threading.Event) -> None:
        _go_on(cancelled)
        if isinstance(work, _Read):
            _read(work, image, files)
        else:
            self._convert(work, image, files)

    def _convert(self, work: Conversion, image: WeightBuffer, files: "_Files") -> None:
        converter = deepcopy(work.converter)
        for pattern, stored in work.sources:
            converter.add_tensor(work.first_target, stored.name, pattern, _Lazy(stored, files))
        try:
            made: Mapping[str, Tensor | list[Tensor]] = converter.convert(
                work.first_target, model=self._model, config=self._model.config
            )
        except LoadFailed:
            raise
        except Exception as error:
            raise LoadFailed(f"tensor {work.first_target} cannot be converted from the checkpoint: {error}") from error
        for name in work.targets:
            if name not in made:
                raise LoadFailed(f"tensor {name} is missing after the conversion of {work.sources[0][1].name}")
            value = made[name]
            tensor = value[0] if isinstance(value, list) else value
            placed = self._placed[name]
            if tuple(tensor.shape) != placed.shape:
                raise LoadFailed(
                    f"tensor {name} has shape {list(tensor.shape)} after conversion, the model needs {list(placed.shape)}"
                )
            flat = tensor.to(placed.dtype).contiguous().view(-1).view(torch.uint8)
            start = 0
            for piece in image.pieces(placed.offset, placed.size_bytes):
                piece.copy_(flat[start : start + piece.numel()])
                start += piece.numel()


def _go_on(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Cancelled("the load was cancelled")


class _Lazy:
    """A tensor that is read when transformers' converter calls it."""

    def __init__(self, stored: StoredTensor, files: "_Files") -> None:
        self._stored = stored
        self._files = files

    def __call__(self) -> Tensor:
        memory = torch.empty(self._stored.size_bytes, dtype=torch.uint8)
        self._files.read(self._stored, 0, memory)
        return memory.view(self._stored.dtype).view(self._stored.shape)


def _reads(placed: Placed, stored: StoredTensor) -> Sequence[_Read]:
    step = _PIECE_BYTES
    return [
        _Read(placed, stored, start, min(start + step, placed.size_bytes))
        for start in range(0, placed.size_bytes, step)
    ]


def _read(work: _Read, image: WeightBuffer, files: "_Files") -> None:
    placed, stored = work.placed, work.stored
    start = work.start
    for piece in image.pieces(placed.offset + work.start, work.end - work.start):
        if stored.dtype is placed.dtype:
            files.read(stored, start, piece)
        else:
            count = piece.numel() // placed.dtype.itemsize
            memory = torch.empty(count * stored.dtype.itemsize, dtype=torch.uint8)
            files.read(stored, start // placed.dtype.itemsize * stored.dtype.itemsize, memory)
            piece.view(placed.dtype).copy_(memory.view(stored.dtype))
        start += piece.numel()


class _Files:
    """Open files, shared by the reading threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def read(self, stored: StoredTensor, start: int, into: Tensor) -> None:
        """Fill `into` (uint8) with the tensor's bytes from `start`."""
        if not into.numel():
            return
        buffer = into.numpy().data
        try:
            file = self._descriptor(stored.path)
            at, done = stored.offset + start, 0
            while done < len(buffer):
                count = os.preadv(file, [buffer[done:]], at + done)
                if count == 0:
                    raise LoadFailed(f"{stored.path} is truncated: tensor {stored.name} ends beyond the file's end")
                done += count
        except OSError as error:
            raise LoadFailed(f"{stored.path} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open.clear()

    def _descriptor(self, path: str) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]
