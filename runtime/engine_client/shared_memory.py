"""Creates the shared memory of the engine's host tier. The front process owns it, so that the weights survive an engine crash."""

import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"^repertory-(\d+)-[0-9a-f]{8}(\.\d+)?$")


class SharedMemoryFile:
    """An empty file, which the engine sizes. Creating one removes the files of front processes that no longer run.

    Ranks after the first of a tensor-parallel engine have files of their own, whose names end in `.` and the rank.
    """

    def __init__(self, shared_memory: Path = Path("/dev/shm")) -> None:
        for left in shared_memory.iterdir() if shared_memory.is_dir() else ():
            match = _NAME.match(left.name)
            if match is not None and not Path(f"/proc/{match[1]}").exists():
                with suppress(OSError):
                    left.unlink()
        self.path = shared_memory / f"repertory-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def remove(self) -> None:
        for path in (self.path, *self.path.parent.glob(f"{self.path.name}.*")):
            with suppress(OSError):
                path.unlink()


def wants_arena(device: str) -> bool:
    """Return whether the engine will probably use a GPU, decided without loading the driver."""
    return device.startswith("cuda") or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))
