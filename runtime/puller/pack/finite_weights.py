"""Refuses weights that are infinite or not a number while they are packed: with them every answer of the model would be an error."""

import torch
from torch import Tensor

from common.model_key import Quantization
from runtime.errors import LoadFailed
from runtime.puller.pack.quantize import Matrix


def check_finite(converted: Tensor, stored: Tensor, name: str) -> None:
    """Raise LoadFailed naming the tensor if `converted`, which is `stored` in another type, has such a value. One reduction on its device."""
    if _is_finite(converted):
        return
    if not _is_finite(stored):
        raise _damaged(name)
    dtype = str(converted.dtype).removeprefix("torch.")
    raise LoadFailed(f"tensor {name} has values that {dtype} cannot hold; register the model with another dtype")


def check_scales(quantized: Matrix, name: str, quantization: Quantization) -> None:
    """Raise LoadFailed naming the tensor if finite weights have scales that are infinite or not a number: int8 has its scales in float16."""
    if not _is_finite(quantized.scale):
        raise LoadFailed(
            f"tensor {name} has values that {quantization.value} cannot hold; register the model with another quantize"
        )


def check_stored(quantized: Matrix, name: str) -> None:
    """Raise LoadFailed naming the tensor if a matrix that was stored quantised has such scales or codes."""
    if not _is_finite(quantized.scale) or _has_fp8_nan(quantized.weight):
        raise _damaged(name)


def _has_fp8_nan(codes: Tensor) -> bool:
    # The NaNs of e4m3 are 0x7F and 0xFF, the largest codes with and without a sign.
    if codes.dtype is not torch.float8_e4m3fn or not codes.numel():
        return False
    return int(codes.view(torch.int8).max()) == 0x7F or int(codes.view(torch.uint8).max()) == 0xFF


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    least, most = tensor.aminmax()  # NaN if one value is
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _damaged(name: str) -> LoadFailed:
    return LoadFailed(
        f"tensor {name} has values that are infinite or not a number: the checkpoint is damaged; get its files again, or another revision"
    )
