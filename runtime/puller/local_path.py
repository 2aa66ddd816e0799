"""Files that are on this machine already: plain paths, file:// and mounted volumes. Used where they lie, never copied, never outside their bounds."""

from collections.abc import Sequence
from pathlib import Path

from runtime.errors import InvalidRequest, LoadFailed


def local_path(path: str, roots: Sequence[str]) -> Path:
    """The real path, which must lie below one of `roots` (empty: anywhere). Raises InvalidRequest out of bounds, LoadFailed if missing."""
    if "\0" in path:
        raise InvalidRequest("the path has a NUL byte", param="modelPath")
    bounds = [Path(root).resolve() for root in roots]
    try:
        given = Path(path).expanduser()
        if not given.is_absolute():
            raise InvalidRequest(f"path {path!r} is relative: give an absolute path or a URI", param="modelPath")
        real = given.resolve()
        if bounds and not any(real.is_relative_to(bound) for bound in bounds):
            raise InvalidRequest(f"path {path!r} is outside the model roots ({', '.join(roots)})", param="modelPath")
        if not real.exists():
            raise LoadFailed(f"{path}: no such file or directory")
    except (
        OSError,
        RuntimeError,
    ) as error:  # links in a circle, a name too long, a home that nobody has, no right to look
        raise LoadFailed(
            f"{path[:200]} can't be used: {error.strerror if isinstance(error, OSError) else error}"
        ) from error
    if bounds and real.is_dir():
        for file in real.rglob("*"):
            if file.is_symlink() and not any(file.resolve().is_relative_to(bound) for bound in bounds):
                raise InvalidRequest(f"{file} links outside the model roots ({', '.join(roots)})", param="modelPath")
    return real


def volume_path(volume: str, path: str, pvc_dir: str) -> Path:
    """A path in a mounted volume; it must not lead out of it."""
    if not volume or "/" in volume or volume in (".", ".."):
        raise InvalidRequest(f"volume name {volume!r} is not a name", param="modelPath")
    root = Path(pvc_dir) / volume
    if not root.is_dir():
        raise LoadFailed(f"volume {volume!r} is not mounted at {root}")
    return local_path(str(root / path.lstrip("/")), (str(root),))
