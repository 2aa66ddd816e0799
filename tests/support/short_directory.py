"""Makes directories for unix sockets, whose paths must be short."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """Yield a new directory whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="envoy-") as name:
        yield Path(name)
