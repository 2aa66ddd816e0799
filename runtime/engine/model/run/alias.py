"""Provides views of device memory that do not own it."""

import torch


class _Alias:
    """Presents a tensor's memory to `torch.as_tensor` without owning it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the memory that does not own it, if `tensor` is contiguous, so that the pool may reuse the memory for other graphs."""
    if not tensor.is_contiguous():
        return tensor
    flat = torch.as_tensor(_Alias(tensor), device=tensor.device)
    return flat.view(tensor.dtype).view(tensor.shape)
