"""Rearranges a matrix in place into oneDNN's own layout, which products of up to about 32 rows read 1.3 to 2 times as
fast as row-major weights.

Only layouts without padding are used, so that the matrix keeps its size and stays in the slabs that it is charged to.
torch's Python API creates such tensors only in memory of its own; the stable C functions that torch offers to
compiled models create them over existing memory. On a machine where that fails, weights stay row-major.
"""

import ctypes
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_LARGEST_BYTES = 512 << 20  # a second copy exists while a matrix is put in order


@dataclass(frozen=True, slots=True)
class OneDnnMatrix:
    """How [N, K] lies in oneDNN's order. `metadata` is oneDNN's description of it."""

    shape: tuple[int, int]
    dtype: torch.dtype
    metadata: bytes = field(repr=False)
    shim: "_Shim" = field(repr=False)

    def arrange(self, memory: Tensor) -> None:
        """Put the elements in `memory` (uint8, row after row) in order."""
        ordered = torch.ops.mkldnn._reorder_linear_weight(memory.view(self.dtype).view(self.shape), None)
        if _metadata(ordered) != self.metadata:
            raise RuntimeError(f"oneDNN orders a matrix of {list(self.shape)} {self.dtype} in two ways")
        ctypes.memmove(memory.data_ptr(), torch.ops.mkldnn.data_ptr(ordered), memory.numel())

    def over(self, memory: Tensor) -> Tensor:
        """What oneDNN's products take. It does not keep `memory` alive."""
        return self.shim.tensor_over(memory, self.shape, self.dtype, self.metadata)


class OneDnnLayout:
    """What this machine's oneDNN can put in order. Raises RuntimeError or AttributeError where it can't be told."""

    def __init__(self) -> None:
        self._shim = _Shim()
        self._dtypes = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
        self._known: dict[tuple[tuple[int, int], torch.dtype], OneDnnMatrix | None] = {}
        self._prove()

    @classmethod
    def create(cls) -> "OneDnnLayout | None":
        try:
            return cls()
        except (RuntimeError, AttributeError, OSError) as error:
            _LOG.info("matrices stay in rows: %s", error)
            return None

    def matrix(self, shape: tuple[int, ...], dtype: torch.dtype) -> OneDnnMatrix | None:
        """How a matrix of this kind is ordered; None if it had better stay as it is."""
        if len(shape) != 2 or dtype not in self._dtypes:
            return None
        key = ((shape[0], shape[1]), dtype)
        if key not in self._known:
            self._known[key] = self._look(*key)
        return self._known[key]

    def _look(self, shape: tuple[int, int], dtype: torch.dtype) -> OneDnnMatrix | None:
        size_bytes = math.prod(shape) * dtype.itemsize
        if not 0 < size_bytes <= _LARGEST_BYTES:
            return None
        ordered = torch.ops.mkldnn._reorder_linear_weight(torch.empty(shape, dtype=dtype), None)
        if torch.ops.mkldnn._nbytes(ordered) != size_bytes:
            return None
        return OneDnnMatrix(shape, dtype, _metadata(ordered), self._shim)

    def _prove(self) -> None:
        """Multiply by a matrix in order over memory of ours, and by the same one in rows."""
        for dtype in self._dtypes:
            matrix = self._look((128, 64), dtype)
            if matrix is None:
                raise RuntimeError(f"oneDNN pads a matrix of 128 by 64 {dtype}")
            rows = torch.arange(128 * 64).remainder(97).sub(48).to(dtype).view(128, 64)
            x = torch.arange(3 * 64).remainder(13).sub(6).to(dtype).view(3, 64)
            memory = rows.clone().view(-1).view(torch.uint8)
            matrix.arrange(memory)
            product = torch.ops.mkldnn._linear_pointwise(x, matrix.over(memory), None, "none", [], "")
            if not torch.equal(product, torch.nn.functional.linear(x, rows)):
                raise RuntimeError(f"a product over oneDNN's order in {dtype} is wrong")


def _metadata(ordered: Tensor) -> bytes:
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(ordered).numpy())


class _Shim:
    """torch's C interface for compiled models, as far as it is needed to name memory a tensor of oneDNN's."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._create = self._library.aoti_torch_create_tensor_from_blob_v2
        longs = ctypes.POINTER(ctypes.c_int64)
        self._create.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            longs,
            longs,
            ctypes.c_int64,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int32,
            ctypes.c_char_p,
            ctypes.c_int64,
        ]
        self._create.restype = ctypes.c_int32
        self._layout: int = self._library.aoti_torch_layout__mkldnn()
        self._device: int = self._library.aoti_torch_device_type_cpu()
        self._dtypes = {
            torch.float32: int(self._library.aoti_torch_dtype_float32()),
            torch.bfloat16: int(self._library.aoti_torch_dtype_bfloat16()),
        }
        self._capsule = ctypes.pythonapi.PyCapsule_New
        self._capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self._capsule.restype = ctypes.py_object

    def tensor_over(self, memory: Tensor, shape: tuple[int, int], dtype: torch.dtype, metadata: bytes) -> Tensor:
        made = ctypes.c_void_p()
        pair = ctypes.c_int64 * 2
        status = self._create(
            memory.data_ptr(),
            2,
            pair(*shape),
            pair(shape[1], 1),
            0,
            self._dtypes[dtype],
            self._device,
            0,
            ctypes.byref(made),
            self._layout,
            metadata,
            len(metadata),
        )
        if status != 0:
            raise RuntimeError(f"torch makes no tensor of oneDNN's over memory: status {status}")
        tensor: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(self._capsule(made, None, None))
        return tensor
