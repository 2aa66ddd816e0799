"""Local files: plain paths, file:// and mounted volumes. They are used in place, never copied, and only below the model roots.

A path outside the roots is refused with one text, whether it exists or not, so that registrations cannot explore the machine.
"""

import os.path
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import InvalidRequest, LoadFailed


def local_path(path: str, roots: Sequence[str]) -> Path:
    """Return the real path, which must be below one of `roots`. Raises InvalidRequest outside them, LoadFailed for a missing file."""
    if "\0" in path:
        raise InvalidRequest("the path has a NUL byte", param="modelPath")
    if not path.startswith("/"):
        raise InvalidRequest(f"path {path[:200]!r} is relative: give an absolute path or a URI", param="modelPath")
    if not roots:
        raise InvalidRequest(
            f"path {path[:200]!r}: this runtime reads no local paths; start it with --model-roots DIR",
            param="modelPath",
        )
    given = [Path(root).expanduser() for root in roots]
    bounds = [root.resolve() for root in given]
    normal = Path(os.path.normpath(path))
    if not _is_below(normal, [*given, *bounds]):
        raise _outside(path)
    try:
        real = Path(path).resolve()
        if not _is_below(real, bounds):
            raise _outside(path)
        if not real.exists():
            raise LoadFailed(f"{path}: no such file or directory")
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long, no permission
        raise LoadFailed(
            f"{path[:200]} cannot be used: {error.strerror if isinstance(error, OSError) else 'its links form a loop'}"
        ) from error
    if real.is_dir():
        for file in real.rglob("*"):
            if file.is_symlink() and not _is_below(file.resolve(), bounds):
                raise InvalidRequest(f"{file} links outside the model roots", param="modelPath")
    return real


def volume_path(volume: str, path: str, pvc_dir: str) -> Path:
    """Return a path in a mounted volume; it must not lead out of the volume."""
    if not volume or "/" in volume or volume in (".", ".."):
        raise InvalidRequest(f"volume name {volume!r} is not a name", param="modelPath")
    root = Path(pvc_dir) / volume
    if not root.is_dir():
        raise LoadFailed(f"volume {volume!r} is not mounted at {root}")
    return local_path(str(root / path.lstrip("/")), (str(root),))


def _is_below(path: Path, bounds: Sequence[Path]) -> bool:
    return any(path.is_relative_to(bound) for bound in bounds)


def _outside(path: str) -> InvalidRequest:
    return InvalidRequest(
        f"path {path[:200]!r} is outside the model roots; the runtime's model_roots setting lists them",
        param="modelPath",
    )
