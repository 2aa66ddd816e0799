"""Makes loading Triton kernels safe from several threads.

Triton 3.6 loads each kernel's launcher as an extension module of one name, `__triton_launcher`. Python keeps one module object per name, so a
launcher that another thread loads between a thread's load and its use of the module replaces the first thread's function: the kernel then
runs with another kernel's launcher. Launchers are therefore built under one lock.
"""

import threading
from collections.abc import Callable
from typing import Any

import triton
from triton.backends.nvidia.driver import CudaDriver

Build = Callable[[Any, Any], Any]


def one_at_a_time(build: Build) -> Build:
    """Return `build` with its calls serialised."""
    lock = threading.Lock()

    def locked(source: Any, metadata: Any) -> Any:
        with lock:
            return build(source, metadata)

    return locked


class SerialCudaDriver(CudaDriver):  # type: ignore[misc]  # Triton ships no types
    """Triton's driver for NVIDIA GPUs, which builds one launcher at a time."""

    launcher_cls: Build

    def __init__(self) -> None:
        super().__init__()
        self.launcher_cls = one_at_a_time(self.launcher_cls)


def serialise_launchers() -> None:
    """Make Triton use this driver from now on. Call it before several threads launch kernels. Without an NVIDIA GPU nothing changes."""
    if CudaDriver.is_active() and not isinstance(triton.runtime.driver.active, SerialCudaDriver):
        triton.runtime.driver.set_active(SerialCudaDriver())
