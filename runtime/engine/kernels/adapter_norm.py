"""Adds LoRA adapters to the output of a linear layer that goes to a residual and its norm, in the norm's own launch.

With few tokens, a launch takes longer than the work of an expand. It serves steps with one token per row only, whose upload names the adapter of each
place in the order.
"""

from torch import Tensor

from runtime.engine.kernels.adapters import AdapterTable, Chunks, add_adapters_torch
from runtime.engine.kernels.norm import add_rms_norm_torch
from runtime.engine.kernels.scratch import Scratch

MAX_TOKENS = 64  # Each token's program reads all of B, which more tokens of one adapter share in an expand.
MAX_WIDTH = 4096  # B has room in registers.


def add_rms_norm_adapted(
    y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    plus_one: bool,
    chunks: Chunks,
    table: AdapterTable,
    *,
    module: int,
    scratch: Scratch | None = None,
) -> Tensor:
    """Add the adapters' products of `x` [T, K] for one module, and `y` [T, H], to `residual` [T, H] in place, and return the sum normalised."""
    if y.is_cuda:
        from runtime.engine.kernels.gpu import adapter_norm, adapters

        shrunk = adapters.shrink(x, chunks, table, module, 1, scratch)
        return adapter_norm.add_rms_norm(y, residual, weight, eps, plus_one, shrunk, chunks.upload, table, module)
    return add_rms_norm_adapted_torch(y, x, residual, weight, eps, plus_one, chunks, table, module)


def add_rms_norm_adapted_torch(
    y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    plus_one: bool,
    chunks: Chunks,
    table: AdapterTable,
    module: int,
) -> Tensor:
    """Torch twin of the Triton launches. `y` is overwritten."""
    add_adapters_torch(y, x, chunks, table, module, [y.shape[1]])
    out = y.new_empty(y.shape)
    add_rms_norm_torch(y, residual, weight, eps, plus_one, out)
    return out
