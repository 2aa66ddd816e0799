"""The file behind the engine's host tier: shared memory that the front owns, so that an engine that dies finds its models still warm."""

import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"^repertory-(\d+)-[0-9a-f]{8}$")


class SharedMemoryFile:
    """An empty file that the engine sizes. `remove` when the front ends."""

    def __init__(self, shared_memory: Path = Path("/dev/shm")) -> None:
        for left in shared_memory.iterdir() if shared_memory.is_dir() else ():
            match = _NAME.match(left.name)
            if match is not None and not Path(f"/proc/{match[1]}").exists():
                with suppress(OSError):
                    left.unlink()
        self.path = shared_memory / f"repertory-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink()


def wants_arena(device: str) -> bool:
    """Whether the engine will find a GPU, as far as can be told without asking the driver."""
    return device.startswith("cuda") or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))
