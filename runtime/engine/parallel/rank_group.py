"""The collective operations of one tensor-parallel group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.engine.parallel.shard import Shard

ONE_SHOT_BYTES = 1 << 20  # each rank reads all the others' tensors whole, which pays only for small ones
_JOIN_S = 120.0
_ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)
_ALIGNMENT = 16  # bytes that torch's kernel reads at once


class RankGroup:
    """A rank's membership in its group. Every rank must call the same operations in the same order, with tensors of equal shapes.

    Gloo carries tensors on a CPU. On GPUs, one per rank, small tensors are summed through memory that all ranks map, and NCCL carries the others.
    CUDA graphs may hold both.
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
        self._one_shot = OneShot(device) if on_gpu else None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks, which is bit for bit the same on each. May overwrite `tensor`."""
        if self._one_shot is not None and self._one_shot.serves(tensor):
            return self._one_shot.all_reduce(tensor)
        dist.all_reduce(tensor)
        return tensor


class OneShot:
    """Sums small tensors by one kernel that reads the other ranks' memory over NVLink."""

    def __init__(self, device: torch.device) -> None:
        """Map the ranks' buffers. Every rank must do so at the same time."""
        from torch.distributed import _symmetric_memory as symmetric

        world = dist.group.WORLD
        assert world is not None, "the group was joined"
        self._group = world.group_name
        self._buffer = symmetric.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._buffer, self._group)

    def serves(self, tensor: Tensor) -> bool:
        num_bytes = tensor.numel() * tensor.element_size()
        return num_bytes <= ONE_SHOT_BYTES and num_bytes % _ALIGNMENT == 0 and tensor.dtype in _ONE_SHOT_DTYPES

    def all_reduce(self, tensor: Tensor) -> Tensor:
        num_bytes = tensor.numel() * tensor.element_size()
        shared = self._buffer[:num_bytes].view(tensor.dtype).view(tensor.shape)
        summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, tensor, "sum", self._group)
        return summed
