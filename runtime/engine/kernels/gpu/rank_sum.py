"""Launches sums over the ranks of a group, alone or with the addition to the residual and RMSNorm, and the gathering of columns (`rank_sum.cu`).

Compared with torch's kernels, numbers cross the link once without a signal before them, launches overlap with those beside them, and the norm needs no
launch. Each rank sends all of its numbers to every other rank, so that for large tensors, and many ranks, other ways take less time.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.engine.kernels.gpu import nvrtc

SOURCE = "rank_sum.cu"
# As measured on two H200s (docs/benchmarks/parallel.md). Packets take twice as many bytes on the link.
PACKET_SUM_BYTES = 128 << 10  # sums up to this size are sent as packets
MOST_PACKET_BYTES = 512 << 10  # what one rank sends another as packets
MOST_BYTES = 2 << 20  # what one rank sends to all others together
_BLOCKS = 256  # at most in a launch
_THREADS = 512
_UNIT_BYTES = 8
_PACKET_BYTES = 16
_SHARED_BYTES = 2 * _THREADS // 32 * 4
_HALF = {torch.bfloat16: "false", torch.float16: "true"}
_GATHER = "gather_packets"


@dataclass(frozen=True, slots=True)
class _SumKernel:
    """A kernel for rows of up to `units` units in each thread, of which `blocks_each` blocks run on a multiprocessor at once."""

    name: str
    units: int
    blocks_each: int


_PACKETS = (_SumKernel("sum_packets_2", 2, 1), _SumKernel("sum_packets_4", 4, 1))
_PLAIN = (_SumKernel("sum_plain_2", 2, 2), _SumKernel("sum_plain_4", 4, 2), _SumKernel("sum_plain_8", 8, 1))
_NAMES = (*(kernel.name for kernel in (*_PACKETS, *_PLAIN)), _GATHER)


def inbox_bytes(num_ranks: int) -> int:
    """Return the size of each rank's inbox, which all ranks map, and which is 0 at first."""
    packet_units, plain_units = _capacity(num_ranks)
    return 2 * num_ranks * (packet_units * _PACKET_BYTES + plain_units * _UNIT_BYTES + 4 * _BLOCKS)


def defines(num_ranks: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the compile-time constants of the source."""
    packet_units, plain_units = _capacity(num_ranks)
    sizes = (f"RANKS={num_ranks}", f"BLOCKS={_BLOCKS}", f"PACKET_UNITS={packet_units}", f"PLAIN_UNITS={plain_units}")
    return (*sizes, f"HALF={_HALF[dtype]}")


def _capacity(num_ranks: int) -> tuple[int, int]:
    """Return how many units an inbox holds from one rank, as packets and plain."""
    most_bytes = MOST_BYTES // (num_ranks - 1) // _PACKET_BYTES * _PACKET_BYTES
    return min(MOST_PACKET_BYTES, most_bytes) // _UNIT_BYTES, most_bytes // _UNIT_BYTES


@dataclass(frozen=True, slots=True)
class _Norm:
    residual: Tensor
    weight: Tensor
    eps: float
    plus_one: bool


class RankSum:
    """Sums rows of bfloat16 or float16. Every rank must make the same calls in the same order, on one stream, after `use`.

    Args:
        inboxes: the addresses of all ranks' inboxes, by rank. They must stay mapped.
    """

    def __init__(self, inboxes: Sequence[int], rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._num_processors = 0
        self._num_ranks = len(inboxes)
        self._calls = torch.zeros(_BLOCKS, dtype=torch.int32, device=device)
        packet_units, plain_units = _capacity(self._num_ranks)
        self._most_packet_bytes = packet_units * _UNIT_BYTES
        self._most_bytes = plain_units * _UNIT_BYTES
        self._inboxes = (ctypes.c_void_p * self._num_ranks)(*inboxes)
        pointers = [(name, ctypes.c_void_p) for name in ("in", "out", "residual", "weight")]
        numbers = [(name, ctypes.c_int) for name in ("num_rows", "row_units", "rank", "plus_one")]
        fields = [*pointers, ("inboxes", type(self._inboxes)), ("calls", ctypes.c_void_p), *numbers]
        self._arguments: Any = type("_Arguments", (ctypes.Structure,), {"_fields_": [*fields, ("eps", ctypes.c_float)]})
        self._modules = {
            dtype: nvrtc.module(SOURCE, _NAMES, device, defines(self._num_ranks, dtype)) for dtype in _HALF
        }

    @property
    def num_processors(self) -> int:
        """The number of multiprocessors of this rank's GPU, 0 if the kernels cannot run on it."""
        if None in self._modules.values():
            return 0
        return torch.cuda.get_device_properties(self._device).multi_processor_count

    def use(self, num_processors: int) -> None:
        """Let launches have as many blocks as run on so many multiprocessors at once. The number must be the same on all ranks."""
        self._num_processors = num_processors

    def serves(self, rows: Tensor) -> bool:
        """Whether `all_reduce` and `add_rms_norm` can sum rows of this shape and type."""
        return self._fits(rows, self._most_bytes) and rows.shape[-1] <= 4 * _THREADS * _PLAIN[-1].units

    def serves_gather(self, part: Tensor) -> bool:
        """Whether `gather` can put together parts of this shape and type."""
        return self._fits(part, self._most_packet_bytes)

    def all_reduce(self, rows: Tensor) -> Tensor:
        """Return the sum over all ranks, bit for bit the same on each. Numbers are added in float32, in the order of the ranks."""
        return self._sum(rows, None)

    def add_rms_norm(self, rows: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        """Add the sum over all ranks to `residual` in place, and return what `kernels.norm.rms_norm` makes of the residual. It must be contiguous."""
        return self._sum(rows, _Norm(residual, weight, eps, plus_one))

    def gather(self, part: Tensor) -> Tensor:
        """Return rows of all ranks' columns, in the order of the ranks. `part`: this rank's columns, as many as every other rank's."""
        width = part.shape[-1]
        out = part.new_empty((*part.shape[:-1], width * self._num_ranks))
        blocks = -(-part.numel() * part.element_size() // (_UNIT_BYTES * _THREADS))
        self._launch(_GATHER, min(blocks, self._num_processors, _BLOCKS), part, out, None)
        return out

    def _fits(self, rows: Tensor, most_bytes: int) -> bool:
        return (
            rows.dtype in _HALF
            and 0 < rows.numel() * rows.element_size() <= most_bytes
            and rows.shape[-1] * rows.element_size() % _UNIT_BYTES == 0
            and rows.is_contiguous()
            and rows.data_ptr() % _UNIT_BYTES == 0
        )

    def _sum(self, rows: Tensor, norm: _Norm | None) -> Tensor:
        out = torch.empty_like(rows)
        num_rows, each = rows.numel() // rows.shape[-1], -(-rows.shape[-1] // (4 * _THREADS))
        are_few = rows.numel() * rows.element_size() <= min(PACKET_SUM_BYTES, self._most_packet_bytes)
        kernel = next(one for one in (*(_PACKETS if are_few else ()), *_PLAIN) if one.units >= each)
        most_blocks = min(self._num_processors * kernel.blocks_each, _BLOCKS)
        self._launch(kernel.name, min(num_rows, most_blocks), rows, out, norm)
        return out

    def _launch(self, name: str, blocks: int, given: Tensor, out: Tensor, norm: _Norm | None) -> None:
        width = given.shape[-1]
        compiled = self._modules[given.dtype]
        assert compiled is not None, "ranks use the kernels only where all have them"
        arguments = self._arguments(
            given.data_ptr(),
            out.data_ptr(),
            None if norm is None else norm.residual.data_ptr(),
            None if norm is None else norm.weight.data_ptr(),
            self._inboxes,
            self._calls.data_ptr(),
            given.numel() // width,
            width * given.element_size() // _UNIT_BYTES,
            self._rank,
            norm is not None and norm.plus_one,
            0.0 if norm is None else norm.eps,
        )
        compiled.launch(name, (blocks, 1, 1), _THREADS, _SHARED_BYTES, arguments)
