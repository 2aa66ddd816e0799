"""Encodes descriptors of matrices in device memory for the GPU's tensor copies (TMA)."""

import ctypes
import functools
from typing import Any, Literal

TENSOR_MAP_BYTES = 128
_ALIGNMENT = 64

Element = Literal["byte", "16-bit", "float32"]
_ELEMENTS: dict[Element, tuple[int, int]] = {
    "byte": (0, 1),
    "16-bit": (1, 2),
    "float32": (7, 4),
}  # (the driver's number of the type, bytes)
_SWIZZLES = {False: 0, True: 3}  # no swizzle, 128-byte swizzle
_PROMOTE_TO_256_BYTES = 3


class TensorMapError(RuntimeError):
    """The driver rejected the description of a matrix."""


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@functools.lru_cache(maxsize=1 << 14)
def tensor_map(
    address: int,
    element: Element,
    shape: tuple[int, ...],
    pitches_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzled: bool,
) -> bytes:
    """Encode a map of an array of `shape`, the dense dimension first, from which boxes of shape `box` are copied.

    `pitches_bytes` are the strides of the other dimensions. Elements beyond the edges are copied as zeros. A copy is
    dense in shared memory. If `swizzled`, its rows have 128 bytes, and the index of each 16-byte cell is xor-ed with the
    row's number modulo 8. Address and pitches must be multiples of 16 bytes. Raises TensorMapError.
    """
    kind, element_bytes = _ELEMENTS[element]
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + _ALIGNMENT)
    at = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    rank = len(shape)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        ctypes.c_int(kind),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*pitches_bytes),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLES[swizzled]),
        ctypes.c_int(_PROMOTE_TO_256_BYTES),
        ctypes.c_int(0),
    )
    if status != 0:
        raise TensorMapError(
            f"tensor map of {shape} of {element_bytes} bytes, {pitches_bytes} apart, boxes of {box}: error {status}"
        )
    return ctypes.string_at(at, TENSOR_MAP_BYTES)
