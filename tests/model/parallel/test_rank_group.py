"""Two GPUs sum, normalise and gather rows of every size and type alike, eagerly and in a CUDA graph."""

import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.engine.kernels.gpu.rank_sum import MOST_BYTES, MOST_PACKET_BYTES
from runtime.engine.kernels.norm import add_rms_norm_torch
from runtime.engine.parallel.rank_group import RankGroup
from runtime.engine.parallel.shard import Shard
from runtime.engine.parallel.shared_memory import ONE_SHOT_BYTES, SHARED_BYTES

SIZES = (
    8,
    24,
    4 + 2052,
    8192,
    ONE_SHOT_BYTES,
    MOST_PACKET_BYTES + 8192,
    MOST_BYTES,
    MOST_BYTES + 32,
    SHARED_BYTES,
    SHARED_BYTES + 64,
)
SHAPES = ((1, 64), (3, 100), (1, 4096), (32, 4096), (5, 5120), (2, 8192), (200, 4096), (17, 16384), (1500, 4096))
PARTS = ((1, 128256), (1, 193), (3, 1000), (40, 128256), (300, 128256), (5, 151937))


def _sums(group: RankGroup, device: torch.device) -> Iterator[str]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_bytes in SIZES:
            count = num_bytes // dtype.itemsize
            parts = [torch.arange(count, device=device).remainder(61).add(part).to(dtype) for part in (1, 5)]
            given = parts[group.shard.rank]
            if not _holds(partial(_sum, group, given), partial(torch.equal, parts[0] + parts[1])):
                yield f"the sum of {num_bytes} bytes of {dtype}"


def _norms(group: RankGroup, device: torch.device) -> Iterator[str]:
    for dtype, shape, plus_one in product((torch.bfloat16, torch.float16, torch.float32), SHAPES, (False, True)):
        generator = torch.Generator(device).manual_seed(shape[0])
        parts = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)]
        before = torch.randn(shape, generator=generator, device=device).to(dtype)
        weight = torch.randn(shape[1], generator=generator, device=device).to(dtype)
        residual, normed = before.clone(), torch.empty_like(before)
        add_rms_norm_torch(parts[0] + parts[1], residual, weight, 1e-5, plus_one, normed)
        operate = partial(_norm, group, parts[group.shard.rank], before, weight, plus_one)
        if not _holds(operate, partial(_is_near, normed, residual)):
            yield f"the norm of {shape} of {dtype}, plus_one {plus_one}"


def _gathers(group: RankGroup, device: torch.device) -> Iterator[str]:
    for dtype, (rows, columns) in product((torch.bfloat16, torch.float32), PARTS):
        whole = torch.arange(rows * columns, device=device).remainder(251).to(dtype).view(rows, columns)
        part = whole.narrow(1, *group.shard.slice_of(columns)).contiguous()
        if not _holds(partial(group.gather, part, columns), partial(torch.equal, whole)):
            yield f"the gathering of {rows} x {columns} of {dtype}"


def _sum(group: RankGroup, given: Tensor) -> Tensor:
    return group.all_reduce(given.clone())


def _norm(group: RankGroup, part: Tensor, before: Tensor, weight: Tensor, plus_one: bool) -> Tensor:
    return torch.stack(group.add_rms_norm(part.clone(), before.clone(), weight, 1e-5, plus_one))


def _is_near(normed: Tensor, residual: Tensor, got: Tensor) -> bool:
    """Whether the residual is right, and the normed rows but for the order in which squares are added."""
    error = (got[0].double() - normed.double()).norm() / normed.double().norm()
    return torch.equal(got[1], residual) and float(error) < max(torch.finfo(normed.dtype).eps / 4, 1e-6)


def _holds(operate: Callable[[], Tensor], is_right: Callable[[Tensor], bool]) -> bool:
    """Return whether the operation is right several times in a row, since memory is used again, and in a graph that is replayed."""
    eager = [is_right(operate()) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [operate().clone() for _ in range(4)]
    replayed = []
    for _ in range(2):
        for result in results:
            result.zero_()
        graph.replay()
        replayed += [is_right(result) for result in results]
    return all(eager) and all(replayed)


def _run(rank: int, folder: str, results: "multiprocessing.SimpleQueue[list[str]]") -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = RankGroup(Shard(rank, 2), device, f"{folder}/rendezvous")
    wrong = [*_sums(group, device), *_norms(group, device), *_gathers(group, device)]
    torch.cuda.synchronize()
    results.put(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rank_group_gives_every_rank_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_run, args=(rank, str(tmp_path), results), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert [results.get() for _ in ranks] == [[], []]
    for rank in ranks:
        rank.join(30)
