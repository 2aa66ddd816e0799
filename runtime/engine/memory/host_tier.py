"""The host tier: weight images and saved KV in chunks of one arena. Images are evicted least recently used first. Thread-safe.

The index names complete images only, so a later engine never finds a partial one.
"""

import threading
from collections.abc import Callable, Iterable

from torch import Tensor

from runtime.engine.memory.arena_index import ArenaIndex, IndexEntry


class HostWeights:
    """One image in the arena. Implements WeightBuffer. `gone`: its chunks have been given to another image.

    `readers`: one callable for each holder of the image; it returns whether the holder reads or fills the image now. Only HostTier changes it.
    """

    def __init__(self, key: str, size_bytes: int, chunks: tuple[int, ...], memory: Tensor, chunk_bytes: int) -> None:
        self.key = key
        self.size_bytes = size_bytes
        self.chunks = chunks
        self.complete = False
        self.gone = False
        self.readers: list[Callable[[], bool]] = []
        self._memory = memory
        self._chunk_bytes = chunk_bytes

    def busy(self) -> bool:
        return any(reads() for reads in self.readers)

    def pieces(self, offset: int, size_bytes: int) -> Iterable[Tensor]:
        end = offset + size_bytes
        while offset < end:
            place, inside = divmod(offset, self._chunk_bytes)
            count = min(self._chunk_bytes - inside, end - offset)
            start = self.chunks[place] * self._chunk_bytes + inside
            yield self._memory[start : start + count]
            offset += count


class HostTier:
    """`memory` (uint8 on the host) in chunks of `chunk_bytes`."""

    def __init__(self, memory: Tensor, chunk_bytes: int, index: ArenaIndex) -> None:
        self.chunk_bytes = chunk_bytes
        self.total_chunks = memory.numel() // chunk_bytes
        self._memory = memory
        self._index = index
        self._lock = threading.Lock()
        self._images: dict[str, HostWeights] = {}  # least recently used first
        kept = index.read(chunk_bytes, self.total_chunks)
        for entry in kept:
            image = HostWeights(entry.key, entry.size_bytes, entry.chunks, memory, chunk_bytes)
            image.complete = True
            self._images[entry.key] = image
        taken = {chunk for entry in kept for chunk in entry.chunks}
        # low chunks last: they are registered first, so they are given first
        self._free = [chunk for chunk in range(self.total_chunks - 1, -1, -1) if chunk not in taken]

    @property
    def total_bytes(self) -> int:
        return self.total_chunks * self.chunk_bytes

    def free_bytes(self) -> int:
        """Bytes in chunks that are free or belong to an image that no model holds. Such an image is kept for its model's next load, and is dropped first."""
        with self._lock:
            idle = sum(len(image.chunks) for image in self._images.values() if image.complete and not image.readers)
            return (len(self._free) + idle) * self.chunk_bytes

    @property
    def num_free_chunks(self) -> int:
        """Chunks that hold no image."""
        return len(self._free)

    def find(self, key: str, reader: Callable[[], bool] | None = None) -> HostWeights | None:
        """Return a complete image by its key. It becomes the most recently used, and `reader` holds it."""
        with self._lock:
            image = self._images.get(key)
            if image is None or not image.complete:
                return None
            self._images[key] = self._images.pop(key)
            if reader is not None and reader not in image.readers:
                image.readers.append(reader)
            return image

    def release(self, image: HostWeights, reader: Callable[[], bool]) -> None:
        """Remove `reader` from the holders of the image."""
        with self._lock:
            image.readers.remove(reader)

    def allocate(self, key: str, size_bytes: int, reader: Callable[[], bool] | None = None) -> HostWeights | None:
        """Room for an image that `reader` holds, taken from the least recently used idle ones; None if even that is not enough, or `key` is being
        filled already."""
        count = -(-size_bytes // self.chunk_bytes)
        with self._lock:
            if key in self._images:
                return None
            idle = sorted(
                (image for image in self._images.values() if image.complete and not image.busy()),
                key=lambda image: bool(image.readers),
            )
            if len(self._free) + sum(len(image.chunks) for image in idle) < count:
                return None
            while len(self._free) < count:
                self._forget(idle.pop(0))
            self._write_index()
            chunks = tuple(self._free.pop() for _ in range(count))
            image = HostWeights(key, size_bytes, chunks, self._memory, self.chunk_bytes)
            if reader is not None:
                image.readers.append(reader)
            self._images[key] = image
            return image

    def take_chunk(self) -> int | None:
        """Take a chunk for KV: a free one, or one of the least recently used image that no model holds. Returns None if there is neither."""
        with self._lock:
            if not self._free:
                unheld = next((i for i in self._images.values() if i.complete and not i.readers), None)
                if unheld is None:
                    return None
                self._forget(unheld)
                self._write_index()
            return self._free.pop()

    def chunk(self, number: int) -> Tensor:
        """Return the memory of a chunk."""
        return self._memory[number * self.chunk_bytes : (number + 1) * self.chunk_bytes]

    def give_chunk(self, number: int) -> None:
        """Free a chunk that `take_chunk` returned. Nothing may read or write it any more."""
        with self._lock:
            self._free.append(number)

    def commit(self, image: HostWeights) -> None:
        """Mark an image as complete: from now on it can be found, kept and evicted."""
        with self._lock:
            image.complete = True
            self._write_index()

    def drop(self, image: HostWeights) -> None:
        """Free the chunks of an image."""
        with self._lock:
            if not image.gone:
                self._forget(image)
                self._write_index()

    def _forget(self, image: HostWeights) -> None:
        image.gone = True
        del self._images[image.key]
        self._free += sorted(image.chunks, reverse=True)

    def _write_index(self) -> None:
        entries = tuple(
            IndexEntry(image.key, image.size_bytes, image.chunks) for image in self._images.values() if image.complete
        )
        self._index.write(self.chunk_bytes, self.total_chunks, entries)
