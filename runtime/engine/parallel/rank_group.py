"""The collective operations of one tensor-parallel group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from runtime.engine.parallel.shard import Shard

ONE_SHOT_BYTES = 128 << 10  # above this size, two steps that each move a part take less time than one that moves all
SHARED_BYTES = 32 << 20  # tensors up to this size are summed in shared memory, larger ones by NCCL
_JOIN_S = 120.0
_SHARED_DTYPES = (torch.bfloat16, torch.float32)
_ALIGNMENT = 16  # bytes that a thread of torch's kernels reads at once


class RankGroup:
    """A rank's membership in its group. Every rank must call the same operations in the same order, with tensors of equal shapes.

    Gloo carries tensors on a CPU. On GPUs, one per rank, tensors are summed through memory that all ranks map. NCCL carries the largest, types that
    torch's kernels do not know, and all where GPUs cannot map each other's memory. CUDA graphs may hold both.
    """

    def __init__(self, shard: Shard, device: torch.device, rendezvous: str) -> None:
        """Join the group, and wait for all ranks. `rendezvous` is a file in a directory that all ranks share."""
        self.shard = shard
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on one machine
        # Multicast needs rights that containers lack.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # else a capture waits for the other ranks
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{rendezvous}",
            rank=shard.rank,
            world_size=shard.size,
            timeout=timedelta(seconds=_JOIN_S),
            device_id=device if on_gpu else None,
        )
        self._shared = SharedMemory(device, shard.size) if on_gpu and _reach_each_other(shard, device) else None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks, bit for bit the same on each. May overwrite `tensor`. The result is valid until the next call."""
        if self._shared is not None and self._shared.serves(tensor):
            return self._shared.all_reduce(tensor)
        dist.all_reduce(tensor)
        return tensor

    def gather(self, part: Tensor, num_columns: int) -> Tensor:
        """Return rows of `num_columns` columns. `part` [rows, columns]: those of this rank, as `Shard.slice_of` divides them."""
        size = self.shard.size
        lengths = [Shard(rank, size).slice_of(num_columns)[1] for rank in range(size)]
        padded = functional.pad(part, (0, max(lengths) - part.shape[1])).contiguous()  # Parts must be of one length.
        parts = padded.new_empty(size, *padded.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), padded)
        return torch.cat([one[:, :length] for one, length in zip(parts, lengths, strict=True)], 1)


def _reach_each_other(shard: Shard, device: torch.device) -> bool:
    first = (device.index or 0) - shard.rank
    devices = range(first, first + shard.size)
    return all(torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices if a != b)


class SharedMemory:
    """Sums tensors by kernels that read and write the other ranks' memory over NVLink."""

    def __init__(self, device: torch.device, num_ranks: int) -> None:
        """Map the ranks' buffers. Every rank must do so at the same time."""
        from torch.distributed import _symmetric_memory as symmetric

        world = dist.group.WORLD
        assert world is not None, "the group was joined"
        self._group = world.group_name
        self._alignment = _ALIGNMENT * num_ranks
        self._buffer = symmetric.empty(SHARED_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._buffer, self._group)

    def serves(self, tensor: Tensor) -> bool:
        """Whether `all_reduce` can sum a tensor of this size and type."""
        num_bytes = tensor.numel() * tensor.element_size()
        return num_bytes <= SHARED_BYTES and num_bytes % self._alignment == 0 and tensor.dtype in _SHARED_DTYPES

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor that `serves` accepts. Of a larger tensor each rank sums a part, and the result is valid until the next call."""
        num_bytes = tensor.numel() * tensor.element_size()
        shared = self._buffer[:num_bytes].view(tensor.dtype).view(tensor.shape)
        if num_bytes <= ONE_SHOT_BYTES:
            summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, tensor, "sum", self._group)
            return summed
        shared.copy_(tensor)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._group)
        return shared
