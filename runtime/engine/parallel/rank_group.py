"""The collective operations of one tensor-parallel group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.gpu.rank_sum import RankSum, inbox_bytes
from runtime.engine.kernels.norm import add_rms_norm
from runtime.engine.parallel.shard import Shard
from runtime.engine.parallel.shared_memory import MappedMemory, SharedMemory

_JOIN_S = 120.0


class RankGroup:
    """A rank's membership in its group. Every rank must call the same operations in the same order, with tensors of equal shapes.

    Gloo carries tensors on a CPU. On GPUs, one per rank, tensors are summed through memory that all ranks map: up to some MiB by kernels of this
    project, larger ones by torch's. NCCL carries the largest, types that the kernels do not know, and all where GPUs cannot map each other's memory.
    CUDA graphs may hold each of them.
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
        self._shared: SharedMemory | None = None
        self._small: RankSum | None = None
        if on_gpu and _reach_each_other(shard, device):
            self._shared = SharedMemory(shard, device)
            self._inbox = MappedMemory(inbox_bytes(shard.size), shard, device)
            self._small = _small_sums(self._inbox, shard, device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks, bit for bit the same on each. May overwrite `tensor`. The result is valid until the next call."""
        if self._small is not None and self._small.serves(tensor):
            return self._small.all_reduce(tensor)
        if self._shared is not None and self._shared.serves(tensor):
            return self._shared.all_reduce(tensor)
        dist.all_reduce(tensor)
        return tensor

    def add_rms_norm(
        self, part: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        """Add the sum of `part` over all ranks to `residual` in place, and normalise it. Returns (normed, residual).

        Both are bit for bit the same on each rank. May overwrite `part`.
        """
        if self._small is not None and self._small.serves(part):
            return self._small.add_rms_norm(part, residual, weight, eps, plus_one), residual
        return add_rms_norm(self.all_reduce(part), residual, weight, eps, plus_one)

    def gather(self, part: Tensor, num_columns: int) -> Tensor:
        """Return rows of `num_columns` columns. `part` [rows, columns]: those of this rank, as `Shard.slice_of` divides them."""
        size = self.shard.size
        if self._small is not None and num_columns % size == 0 and self._small.serves_gather(part):
            return self._small.gather(part)
        if self._shared is not None:
            return self._shared.gather(part, num_columns)
        lengths = [Shard(rank, size).slice_of(num_columns)[1] for rank in range(size)]
        padded = functional.pad(part, (0, max(lengths) - part.shape[1])).contiguous()  # Parts must be of one length.
        parts = padded.new_empty(size, *padded.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), padded)
        return torch.cat([one[:, :length] for one, length in zip(parts, lengths, strict=True)], 1)


def _reach_each_other(shard: Shard, device: torch.device) -> bool:
    first = (device.index or 0) - shard.rank
    devices = range(first, first + shard.size)
    return all(torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices if a != b)


def _small_sums(inbox: MappedMemory, shard: Shard, device: torch.device) -> RankSum | None:
    """Return the sums by this project's kernels, or None if a rank cannot run them. Every rank must call it at the same time."""
    sums = RankSum(inbox.addresses, shard.rank, device)
    least = torch.tensor([sums.num_processors], dtype=torch.int32, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)  # after it, every rank's inbox is zeroed
    num_processors = int(least.item())
    if not num_processors:
        return None
    sums.use(num_processors)
    return sums
