"""Checks that saved KV comes back as it left, through a model's memory on a GPU or on its stand-in."""

from collections.abc import Callable

import torch

from runtime.engine.memory.cuda_model import CudaModelMemory
from runtime.engine.memory.kv_runs import plane_layout


def check_blocks_return(taken: CudaModelMemory, slab_bytes: int, slab: int, drain: Callable[[], None]) -> None:
    """Save blocks in three runs, lose their slab to the weights at once, and restore them to other places of another slab.

    `slab`: one of the slabs that the weights are about to take. `drain` waits until the device has done its work.
    """
    kv = taken.kv
    layout = plane_layout(kv, slab_bytes)
    assert kv.blocks_per_slab >= 5

    def block(place: int, number: int) -> torch.Tensor:
        start = place * slab_bytes
        planes = taken.kv_view[start : start + layout.num_planes * layout.plane_bytes].view(layout.num_planes, -1)
        return planes[:, number * layout.block_bytes : (number + 1) * layout.block_bytes]

    taken.map_kv(0, slab)
    generator = torch.Generator(taken.kv_view.device).manual_seed(1)
    content = {}
    for number in range(5):
        target = block(0, number)
        target.copy_(torch.randint(0, 256, target.shape, generator=generator, device=target.device, dtype=torch.uint8))
        content[number] = target.cpu().clone()
    taken.host_kv.map(2)
    moves = {0: 2, 1: 3, 2: 0, 4: 4}  # block → its place in the chunk: neighbours, then two of their own
    pages = [
        (number * kv.pages_per_block, 2 * kv.pages_per_slab + to * kv.pages_per_block) for number, to in moves.items()
    ]
    taken.host_kv.save(pages)
    taken.unmap_kv(0)
    taken.swap_in([slab, *(number for number in range(taken.weight_slabs) if number != slab)][: taken.weight_slabs])
    taken.evict()
    taken.map_kv(1, slab)
    taken.kv_view[slab_bytes : 2 * slab_bytes].zero_()
    back = {0: 1, 1: 2, 2: 4, 4: 0}
    host = dict(zip(moves, (host for _, host in pages), strict=True))
    taken.host_kv.restore([(kv.pages_per_slab + to * kv.pages_per_block, host[number]) for number, to in back.items()])
    drain()
    for number, to in back.items():
        assert torch.equal(block(1, to).cpu(), content[number]), f"block {number}"
    assert not block(1, 3).any(), "a block that nobody restored"
    taken.host_kv.unmap(2)
    taken.unmap_kv(1)
