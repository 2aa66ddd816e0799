"""Measures the CPU seconds of mesh, runtime and engine, which it finds by their command lines."""

from dataclasses import dataclass

import psutil

_PARTS = (
    ("engine", ("runtime.engine", "bench.fast_engine")),
    ("runtime", ("runtime", "bench.fast_runtime")),
    ("mesh", ("serve-mesh", "mesh.pod")),
)


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """CPU seconds by part: engine, runtime, mesh."""

    by_part: dict[str, float]

    def since(self, before: "CpuSeconds") -> "CpuSeconds":
        return CpuSeconds({part: seconds - before.by_part.get(part, 0.0) for part, seconds in self.by_part.items()})


def cpu_seconds(pid: int) -> CpuSeconds:
    """Return the CPU seconds of a process and its descendants."""
    found: dict[str, float] = {}
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            words = process.cmdline()
            times = process.cpu_times()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        part = next((part for part, names in _PARTS if any(name in words for name in names)), None)
        if part is not None:
            found[part] = found.get(part, 0.0) + times.user + times.system
    return CpuSeconds(found)


def process_of(pid: int, part: str) -> int:
    """Return the pid of a part, for a profiler."""
    names = dict(_PARTS)[part]
    root = psutil.Process(pid)
    return next(
        process.pid
        for process in (root, *root.children(recursive=True))
        if any(name in process.cmdline() for name in names)
    )
