"""The collective operations of one tensor-parallel group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.engine.parallel.shard import Shard

_JOIN_S = 120.0


class RankGroup:
    """A rank's membership in its group. Every rank must call the same operations in the same order.

    Gloo carries tensors on a CPU, NCCL those on GPUs, one GPU per rank.
    """

    def __init__(self, shard: Shard, device: torch.device, rendezvous: str) -> None:
        """Join the group, and wait for all ranks. `rendezvous` is a file in a directory that all ranks share."""
        self.shard = shard
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on one machine
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast needs rights that containers lack
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=shard.rank,
            world_size=shard.size,
            timeout=timedelta(seconds=_JOIN_S),
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the sum over all ranks, which is bit for bit the same on each. Returns it."""
        dist.all_reduce(tensor)
        return tensor
