"""Processes of a CPU gather the columns of rows, also where these do not divide evenly."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from runtime.engine.parallel.rank_group import RankGroup
from runtime.engine.parallel.shard import Shard


def _run(rank: int, size: int, folder: str, results: "multiprocessing.SimpleQueue[list[str]]") -> None:
    group = RankGroup(Shard(rank, size), torch.device("cpu"), f"{folder}/rendezvous")
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, columns in ((1, 193), (5, 64), (3, 6)):
            whole = torch.arange(rows * columns).remainder(61).to(dtype).view(rows, columns)
            part = whole.narrow(1, *group.shard.slice_of(columns))
            if not torch.equal(group.gather(part, columns), whole):
                wrong.append(f"{dtype} {rows} x {columns}")
    results.put(wrong)


@pytest.mark.parametrize("size", [2, 4])
def test_gather_returns_all_columns_on_every_rank(size: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_run, args=(rank, size, str(tmp_path), results), daemon=True) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    assert [results.get() for _ in ranks] == [[]] * size
    for rank in ranks:
        rank.join(30)
