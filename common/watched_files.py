"""Notices that files have changed, also when a file is replaced or a link to it is moved, as Kubernetes updates mounted secrets."""

from collections.abc import Sequence
from pathlib import Path

_Version = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles:
    """Compares the files' times, sizes and inodes with those at the last call. Construct it before the files are read."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(Path(path) for path in paths)
        self._seen = self._version()

    def changed(self) -> bool:
        """Return whether a file has changed since the last call that returned True, or since the construction."""
        version = self._version()
        if version == self._seen:
            return False
        self._seen = version
        return True

    def _version(self) -> _Version:
        return tuple(_version_of(path) for path in self._paths)


def _version_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
