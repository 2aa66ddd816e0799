"""Weights on a GPU: they go host → device group by group on the copy stream, and passes wait for the groups they read.

From the host arena all copies are queued at once; from disk a thread reads and queues them as they arrive. Eviction copies nothing.
"""

import mmap
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from runtime.engine.memory.background_load import BackgroundLoad
from runtime.engine.memory.cuda import CudaMemory
from runtime.engine.memory.device import VirtualRange
from runtime.engine.memory.host_tier import HostTier, HostWeights
from runtime.engine.memory.weight_buffer import Filler, WeightBuffer
from runtime.errors import Cancelled


class CudaWeights:
    """The weights of a model, or the matrices of an adapter, over `weights`. Implements WeightReadiness. Use it from the engine thread, except `stage`."""

    def __init__(
        self,
        memory: CudaMemory,
        copy_stream: torch.cuda.Stream,
        arena: HostTier,
        weights: VirtualRange,
        filler: Filler,
        identity: str,
    ) -> None:
        self.weight_slabs = weights.num_slabs
        self.weight_bytes = filler.group_ends[-1]
        self._memory = memory
        self._copy_stream = copy_stream
        self._arena = arena
        self._weights = weights
        self._filler = filler
        self._identity = identity
        self._image: HostWeights | None = None
        self._filling: BackgroundLoad | None = None  # a return from disk
        self._copied: list[torch.cuda.Event] = []  # one a group whose copy is queued
        self._readers: dict[int, torch.cuda.Event] = {}  # place → when saved KV has left its slab
        self._queueing = False
        self._resident = False
        self._pending = True

    # loading -------------------------------------------------------------------------------------------------------------------------------

    def stage(self, cancelled: threading.Event) -> None:
        """Bring the weights into the host arena, from where they lie or from files; without room the model stays on disk. Called by a loading thread.

        Raises LoadFailed or Cancelled.
        """
        self._image = self._arena.find(self._identity, self._busy)
        if self._image is not None:
            return
        image = self._arena.allocate(self._identity, self.weight_bytes, self._busy)
        if image is None:
            return
        try:
            self._filler.fill(image, cancelled, lambda group: None)
        except BaseException:
            self._arena.drop(image)
            raise
        if cancelled.is_set():
            self._arena.drop(image)
            raise Cancelled("the load was cancelled")
        self._image = image
        self._arena.commit(image)

    # WeightReadiness -------------------------------------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        if (
            self._pending
            and self._resident
            and len(self._copied) == len(self._filler.group_ends)
            and self._copied[-1].query()
        ):
            self._pending = False
        return self._pending

    def wait(self, group: int) -> None:
        if not self._resident:
            raise RuntimeError("a model that is not resident was asked to run")
        if self._filling is not None:
            self._filling.wait(group)
        torch.cuda.current_stream(self._memory.device).wait_event(self._copied[group])

    # Tiers ---------------------------------------------------------------------------------------------------------------------------------

    @property
    def weights_view(self) -> Tensor:
        return self._weights.bytes_view

    def swap_in(self, slabs: Sequence[int]) -> None:
        self._readers = self._memory.take_readers(slabs)
        self._weights.map(0, slabs)
        self._resident = True
        self._copied = []
        # a slab's last user may still be at work
        self._copy_stream.wait_stream(self._memory.compute_stream)
        self._queueing = True  # a loading thread may look for room between what is found and the first copy's event
        try:
            self._hold(self._arena.find(self._identity, self._busy))
            if self._image is not None:
                for group in range(len(self._filler.group_ends)):
                    self._wait_for_readers(group)
                    self._copy(self._image, group)
                return
        finally:
            self._queueing = False
        self._hold(self._arena.allocate(self._identity, self.weight_bytes, self._busy))
        source: WeightBuffer = self._image or PageableWeights(self.weight_bytes)
        self._filling = BackgroundLoad(self._filler, source, lambda group: self._read_in(source, group))

    def swap_in_done(self) -> bool:
        if self._filling is not None and self._filling.failed() is not None:
            return True  # over, if not well: what runs next gets the error from `wait`
        return self._resident and not self.pending

    def evict(self) -> None:
        for passed in self._readers.values():  # the copies that would have waited may never be queued
            self._memory.compute_stream.wait_event(passed)
        self._readers = {}
        if not self._resident:
            return
        if self._filling is not None:
            self._filling.cancel()
            if self._image is not None and not self._image.complete:
                self._arena.drop(self._image)
                self._hold(None)
            self._filling = None
        if self.pending:
            # copies on their way would land in slabs that others get
            self._memory.compute_stream.wait_stream(self._copy_stream)
        self._resident = False
        self._pending = True
        self._weights.unmap(0, self.weight_slabs)

    def host_bytes(self) -> int:
        return (
            len(self._image.chunks) * self._arena.chunk_bytes if self._image is not None and not self._image.gone else 0
        )

    def drop_host(self) -> None:
        if self._image is None:
            return
        if self._busy():
            self._copy_stream.synchronize()
        if self._filling is None or self._filling.done():
            self._arena.drop(self._image)
            self._hold(None)

    def close(self) -> None:
        self.evict()
        if self._image is not None:
            if self._copied and not self._copied[-1].query():
                self._copied[-1].synchronize()
            self._hold(None)  # it stays in the arena for the model's next load, until its room is wanted
        self._weights.close()

    def _hold(self, image: HostWeights | None) -> None:
        """Release the host image held so far, and keep `image`, which is held already."""
        if self._image is not None and self._image is not image:
            self._arena.release(self._image, self._busy)
        self._image = image

    def _busy(self) -> bool:
        """Whether the host image is being read or filled."""
        if self._queueing or (self._filling is not None and not self._filling.done()):
            return True
        return bool(self._copied) and not self._copied[-1].query()

    def _read_in(self, source: WeightBuffer, group: int) -> None:
        torch.cuda.set_device(self._memory.device)
        self._wait_for_readers(group)
        self._copy(source, group)
        if isinstance(source, PageableWeights):
            self._copied[-1].synchronize()
            source.forget(0, self._filler.group_ends[group])
        elif group == len(self._filler.group_ends) - 1 and isinstance(source, HostWeights):
            self._arena.commit(source)

    def _wait_for_readers(self, group: int) -> None:
        """Have the copies wait until saved KV has left the slabs of a group."""
        start = self._filler.group_ends[group - 1] if group else 0
        slab_bytes = self._memory.slab_bytes
        for place, passed in self._readers.items():
            if start < (place + 1) * slab_bytes and place * slab_bytes < self._filler.group_ends[group]:
                self._copy_stream.wait_event(passed)

    def _copy(self, source: WeightBuffer, group: int) -> None:
        """Queue one group's copies."""
        start = self._filler.group_ends[group - 1] if group else 0
        end = self._filler.group_ends[group]
        view = self._weights.bytes_view
        event = torch.cuda.Event()
        with torch.cuda.stream(self._copy_stream):
            for piece in source.pieces(start, end - start):
                view[start : start + piece.numel()].copy_(piece, non_blocking=True)
                start += piece.numel()
            event.record(self._copy_stream)
        self._copied.append(event)


class PageableWeights:
    """An image in ordinary memory, for a model that the arena has no room for. Implements WeightBuffer."""

    def __init__(self, size_bytes: int) -> None:
        self._pages = mmap.mmap(-1, size_bytes)
        self._view = torch.frombuffer(self._pages, dtype=torch.uint8)

    def pieces(self, offset: int, size_bytes: int) -> Iterable[Tensor]:
        yield self._view[offset : offset + size_bytes]

    def forget(self, start: int, end: int) -> None:
        """Return the pages of a range to the kernel."""
        end -= end % mmap.PAGESIZE
        if end > start:
            self._pages.madvise(mmap.MADV_DONTNEED, start, end - start)
