"""Host memory that a GPU copies from at full speed: mapped once, touched by many threads and registered slab by slab in the background.

The memory is usable at once; parts that are not registered yet are copied more slowly. A file in shared memory keeps its contents when the process ends.
"""

import ctypes
import errno
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

_REGISTER_BYTES = 64 << 20  # the driver holds launches up meanwhile: 3 ms at a time
_TOUCH_BYTES = 2 << 20  # another thread that maps memory waits for at most one of these
_MOST_TOUCH_THREADS = 16
_MADV_POPULATE_WRITE = 23  # Linux 5.14: backs pages with memory and leaves what they hold


class PinnedMemory:
    """`size_bytes` of host memory. `path`: a file on a shared-memory file system, "" = private to this process.

    `chunk_bytes`: nothing is copied that crosses a multiple of it. A chunk is registered at once, since the driver refuses a copy from memory that is
    registered in part.
    """

    def __init__(self, size_bytes: int, path: str, device: torch.device, chunk_bytes: int = _REGISTER_BYTES) -> None:
        self.size_bytes = size_bytes
        self._unit_bytes = max(1, _REGISTER_BYTES // chunk_bytes) * chunk_bytes
        self._device = device
        if path:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if os.fstat(file).st_size != size_bytes:
                    os.ftruncate(file, 0)  # A file of another size belongs to another engine.
                    os.ftruncate(file, size_bytes)
                self._pages = mmap.mmap(file, size_bytes)
            finally:
                os.close(file)
        else:
            self._pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._view = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._registered: list[tuple[int, int]] = []  # (offset, size)
        self._registered_bytes = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def view(self) -> Tensor:
        """All of it as uint8."""
        return self._view

    @property
    def registered_bytes(self) -> int:
        """The bytes from the start that are registered by now."""
        return self._registered_bytes

    def start_registering(self) -> None:
        self._thread = threading.Thread(target=self._register_all, name="register", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Unregister. Copies from it must have ended."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        for offset, _ in self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._view.data_ptr() + offset)
        self._registered.clear()

    def _register_all(self) -> None:
        torch.cuda.set_device(self._device)
        # Half of the cores are left to the engine and its loads.
        num_threads = max(1, min(_MOST_TOUCH_THREADS, (os.cpu_count() or 2) // 2))
        with ThreadPoolExecutor(num_threads, thread_name_prefix="touch") as pool:
            for offset in range(0, self.size_bytes, self._unit_bytes):
                size = min(self._unit_bytes, self.size_bytes - offset)
                stretches = self._view[offset : offset + size].split(_TOUCH_BYTES)
                touched = list(pool.map(lambda pages: populate(pages, self._stopping), stretches))
                if self._stopping.is_set() or not all(touched):
                    return
                status = torch.cuda.cudart().cudaHostRegister(self._view.data_ptr() + offset, size, 0)
                if int(status) != 0:
                    return  # The limit of lockable memory is reached. Copies of the rest are slower.
                self._registered.append((offset, size))
                self._registered_bytes = offset + size


def shared_memory_free_bytes(path: str) -> int:
    """Return what the file system below `path` can still hold, including the file itself and the files beside it under its name."""
    file = Path(path)
    status = os.statvfs(file.parent)
    return status.f_bavail * status.f_frsize + sum(
        held.stat().st_blocks * 512 for held in file.parent.glob(f"{file.name}*")
    )


def populate(pages: Tensor, stopping: threading.Event) -> bool:
    """Back a stretch with memory. Returns False if there is none left (a full shared-memory file system), or once `stopping` is set."""
    if stopping.is_set():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(pages.data_ptr()), ctypes.c_size_t(pages.numel()), _MADV_POPULATE_WRITE) == 0:
        return True
    # An older kernel does not know the advice: registering touches the pages itself, in one thread.
    return ctypes.get_errno() == errno.EINVAL
