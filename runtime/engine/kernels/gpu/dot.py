"""The matrix product that all kernels use, with its precision."""

import triton
import triton.language as tl
from torch import Tensor


def precision(operand: Tensor) -> str:
    """Return the PRECISION argument of `dot` for an operand: float32 products stay float32, never TF32."""
    if not operand.is_cuda:
        return "widen"  # The interpreter reads bf16 bits as integers.
    return "ieee" if operand.element_size() == 4 else "tf32"


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return a · b, summed in float32."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a · b, summed in float32."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
