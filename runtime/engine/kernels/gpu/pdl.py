"""Programmatic dependent launch: a kernel may start while the kernel before it ends, up to the point where it needs
that kernel's results.

Every kernel launched with `launch_pdl` first allows its successor to start, then fetches data that no kernel writes
(weights), and then waits, in every program and before any early return. The end of a kernel therefore implies that
all kernels before it have ended. On GPUs without the feature both calls do nothing.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlaps(x: Tensor) -> bool:
    """Return whether launches on this tensor's device can overlap: an NVIDIA GPU of the Hopper generation or later."""
    return x.is_cuda and torch.version.hip is None and _overlaps(x.device)


def options(x: Tensor) -> dict[str, bool]:
    """Return the launch options for this tensor's device."""
    return {"launch_pdl": True} if overlaps(x) else {}


@triton.jit
def begin(PDL: tl.constexpr):
    """Allow the next kernel to start. That kernel waits for what it needs from this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended and what they wrote is visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()
