"""Launches that overlap: a kernel may start while the one before it ends, as far as the point where it needs that one's results.

Every kernel launched with `launch_pdl` first lets its follower start, fetches what nobody writes (weights) and then waits, in every program and before
any early return: its end then says that all kernels before it have ended too. On machines without the feature both calls do nothing.
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
    """Whether launches on this tensor's device can overlap: an NVIDIA GPU of Hopper's kind or later."""
    return x.is_cuda and torch.version.hip is None and _overlaps(x.device)


def options(x: Tensor) -> dict[str, bool]:
    """What a launch on this tensor's device is told."""
    return {"launch_pdl": True} if overlaps(x) else {}


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start. It waits itself for what it needs of this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended and what they wrote is visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()
