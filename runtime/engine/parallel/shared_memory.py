"""Memory of each rank's GPU that all ranks of a group map, and the sums and gathers of torch's kernels in it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.engine.parallel.shard import Shard

ONE_SHOT_BYTES = 128 << 10  # above this size, two steps that each move a part take less time than one that moves all
SHARED_BYTES = 32 << 20
_DTYPES = (torch.bfloat16, torch.float32)
_ALIGNMENT = 16  # bytes that a thread of torch's kernels reads at once


class MappedMemory:
    """Bytes of this rank's GPU and the same bytes of the other ranks', all 0 at first. Every rank must make it at the same time, with one size."""

    def __init__(self, num_bytes: int, shard: Shard, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        world = dist.group.WORLD
        assert world is not None, "the group was joined"
        self.group_name = world.group_name
        self.own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        self.own.zero_()
        self._handle = symmetric.rendezvous(self.own, self.group_name)
        offset = self.own.data_ptr() - self._handle.buffer_ptrs[shard.rank]
        self.addresses: Sequence[int] = [address + offset for address in self._handle.buffer_ptrs]
        self.of_ranks: Sequence[Tensor] = [
            self.own if rank == shard.rank else self._handle.get_buffer(rank, (num_bytes,), torch.uint8, offset)
            for rank in range(shard.size)
        ]

    def barrier(self) -> None:
        """Let this rank's stream wait until all ranks' streams are here. What was written before can be read by all ranks then."""
        self._handle.barrier()


class SharedMemory:
    """Sums and gathers tensors by kernels that read and write the other ranks' memory over NVLink."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        """Map the ranks' memory. Every rank must do so at the same time."""
        self._shard = shard
        self._alignment = _ALIGNMENT * shard.size
        self._memory = MappedMemory(SHARED_BYTES, shard, device)

    def serves(self, tensor: Tensor) -> bool:
        """Whether `all_reduce` can sum a tensor of this size and type."""
        num_bytes = tensor.numel() * tensor.element_size()
        return num_bytes <= SHARED_BYTES and num_bytes % self._alignment == 0 and tensor.dtype in _DTYPES

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor that `serves` accepts. Of a larger tensor each rank sums a part, and the result is valid until the next call."""
        num_bytes = tensor.numel() * tensor.element_size()
        shared = self._memory.own[:num_bytes].view(tensor.dtype).view(tensor.shape)
        if num_bytes <= ONE_SHOT_BYTES:
            summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, tensor, "sum", self._memory.group_name)
            return summed
        shared.copy_(tensor)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._memory.group_name)
        return shared

    def gather(self, part: Tensor, num_columns: int) -> Tensor:
        """Return rows of `num_columns` columns. `part` [rows, columns]: those of this rank, as `Shard.slice_of` divides them."""
        size, bytes_each = self._shard.size, part.element_size()
        parts = [Shard(rank, size).slice_of(num_columns) for rank in range(size)]
        most_rows = SHARED_BYTES // (max(length for _, length in parts) * bytes_each)
        whole = part.new_empty(len(part), num_columns)
        for given, out in zip(part.split(most_rows), whole.split(most_rows), strict=True):
            shared = [
                memory[: len(given) * length * bytes_each].view(part.dtype).view(len(given), length)
                for memory, (_, length) in zip(self._memory.of_ranks, parts, strict=True)
            ]
            shared[self._shard.rank].copy_(given)
            self._memory.barrier()
            for found, (start, length) in zip(shared, parts, strict=True):
                out.narrow(1, start, length).copy_(given if found is shared[self._shard.rank] else found)
            self._memory.barrier()  # before any rank writes again
        return whole
