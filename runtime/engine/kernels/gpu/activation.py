"""act(gate) × up in Triton, with one program per row and range of columns, or per row where the result is quantised."""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.activation import GATE_CODES, Activation
from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.quantized_rows import codes_of_row, num_warps_for
from runtime.engine.kernels.quantized_rows import QuantizedRows, largest


@triton.jit
def activated(g, KIND: tl.constexpr):
    """Return act(g) of float32 `g`. KIND: as in GATE_CODES."""
    if KIND == 1:
        return g / (1.0 + tl.exp(-g))
    elif KIND == 2:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        return g / (1.0 + tl.exp(-2.0 * inner))  # 0.5 (1 + tanh z) = sigmoid 2z
    else:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))


@triton.jit
def _act_mul(base, cols, mask, width, KIND: tl.constexpr):
    """Return act(gate) × up of some columns of the row at `base`, in float32, 0 where `mask` is false."""
    gate = tl.load(base + cols, mask=mask, other=0.0)
    up = tl.load(base + width + cols, mask=mask, other=0.0)
    act = activated(gate.to(tl.float32), KIND)
    return act.to(gate.dtype).to(tl.float32) * up.to(tl.float32)


@triton.jit
def _act_mul_kernel(gate_up_ptr, out_ptr, width, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl.begin(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    y = _act_mul(gate_up_ptr + row * 2 * width, cols, mask, width, KIND)
    tl.store(out_ptr + row * width + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _act_mul_quantized_kernel(
    gate_up_ptr,
    codes_ptr,
    scale_ptr,
    width,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    y = _act_mul(gate_up_ptr + row * 2 * width, cols, mask, width, KIND)
    # Round where a separate launch would round.
    codes, scale = codes_of_row(y.to(gate_up_ptr.dtype.element_ty).to(tl.float32), codes_ptr, LARGEST)
    tl.store(codes_ptr + row * width + cols, codes, mask=mask)
    tl.store(scale_ptr + row, scale)


def act_mul(gate_up: Tensor, kind: Activation, out: Tensor) -> None:
    """See runtime.engine.kernels.activation.act_mul. Both tensors must be contiguous."""
    if not (gate_up.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"act_mul: needs contiguous tensors, strides are {gate_up.stride()} and {out.stride()}")
    width = out.shape[-1]
    num_rows = out.numel() // width
    if num_rows == 0:
        return
    block = min(triton.next_power_of_2(width), 2048 if num_rows >= 64 else 512)
    _act_mul_kernel[(num_rows, triton.cdiv(width, block))](
        gate_up, out, width, KIND=GATE_CODES[kind], BLOCK=block, PDL=pdl.overlaps(out), num_warps=4, **pdl.options(out)
    )


def act_mul_quantized(gate_up: Tensor, kind: Activation, out: QuantizedRows) -> None:
    """See runtime.engine.kernels.activation.act_mul_quantized. `gate_up` must be contiguous."""
    if not gate_up.is_contiguous():
        raise ValueError(f"act_mul_quantized: needs a contiguous tensor, strides are {gate_up.stride()}")
    num_rows, width = out.codes.shape
    if num_rows == 0:
        return
    block = triton.next_power_of_2(width)
    _act_mul_quantized_kernel[(num_rows,)](
        gate_up,
        out.codes,
        out.scale,
        width,
        KIND=GATE_CODES[kind],
        LARGEST=largest(out.codes.dtype),
        BLOCK=block,
        PDL=pdl.overlaps(gate_up),
        num_warps=num_warps_for(block),
        **pdl.options(gate_up),
    )
