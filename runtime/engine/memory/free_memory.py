"""Measures how much ordinary memory this process may still take: what the machine has left, or less where control groups limit it (a container)."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_bytes(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Pages of files that could be dropped count as free, as the machine's own figure has it."""
    return min([psutil.virtual_memory().available, *_left_in_groups(groups, own)])


def _left_in_groups(groups: Path, own: Path) -> Iterator[int]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used = groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        place = root / path.lstrip("/")
        # a limit further up holds too; in a container the own path may be one that only the machine sees
        for folder in (place, *place.parents):
            if folder == groups.parent:
                break
            left = _left(folder, limit, used)
            if left is not None:
                yield left


def _left(folder: Path, limit: str, used: str) -> int | None:
    """Return what a control group leaves; None where it sets no limit."""
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    prefix = "total_" if "total_active_file" in stat else ""
    files_bytes = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, limit_bytes - max(0, used_bytes - files_bytes))
