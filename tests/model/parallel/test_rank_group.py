"""Two GPUs sum tensors of every size and type alike, eagerly and in a CUDA graph."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from runtime.engine.parallel.rank_group import ONE_SHOT_BYTES, SHARED_BYTES, RankGroup
from runtime.engine.parallel.shard import Shard


def _run(rank: int, folder: str, results: "multiprocessing.SimpleQueue[list[str]]") -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = RankGroup(Shard(rank, 2), device, f"{folder}/rendezvous")
    wrong: list[str] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_bytes in (16, 24, 8192, ONE_SHOT_BYTES, ONE_SHOT_BYTES + 32, 4 << 20, SHARED_BYTES + 64):
            count = num_bytes // dtype.itemsize
            parts = [torch.arange(count, device=device).remainder(61).add(part).to(dtype) for part in (1, 5)]
            wanted = parts[0] + parts[1]
            eager = [
                torch.equal(group.all_reduce(parts[rank].clone()), wanted) for _ in range(3)
            ]  # one buffer, used again
            if not all(eager):
                wrong.append(f"{dtype} of {num_bytes} bytes")
            graph, given = torch.cuda.CUDAGraph(), parts[rank].clone()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                summed = [group.all_reduce(given.clone()).clone() for _ in range(4)]
            graph.replay()
            torch.cuda.synchronize()
            if not all(torch.equal(each, wanted) for each in summed):
                wrong.append(f"{dtype} of {num_bytes} bytes in a graph")
    results.put(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rank_group_all_reduce_sums_on_every_rank(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_run, args=(rank, str(tmp_path), results), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert [results.get() for _ in ranks] == [[], []]
    for rank in ranks:
        rank.join(30)
