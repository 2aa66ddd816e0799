"""A CUDA graph in which adapters run beside the base's products gives what steps without a graph give."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from runtime.engine.kernels.scratch import Scratch
from runtime.engine.model.run.adapters import AdapterSite, Beside, StepAdapters
from tests.kernels.test_adapters import a_table, chunks_of


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_step_adapters_graph_equals_eager_products(rows: int) -> None:
    device = torch.device("cuda")
    features = [(512, 512), (512, 256), (512, 512), (512, 512), (512, 512)]
    table, _ = a_table(4, features, torch.bfloat16)
    table = type(table)(table.memory.to(device), table.places.to(device), table.max_rank)
    chunks = chunks_of([(row % 5 - 1, 1) for row in range(rows)], rows, device, table.num_slots)
    adapters = StepAdapters(chunks, table, rows, Beside.create(device))
    scratch = Scratch.allocate(device)
    sites = [AdapterSite(0, (512,)), AdapterSite(1, (256,)), AdapterSite(2, (512,))]
    weights = [torch.randn(sum(site.widths), 512, device=device).bfloat16() * 512**-0.5 for site in sites]
    both = torch.randn(1024, 512, device=device).bfloat16() * 512**-0.5
    first = torch.randn(rows, 512, device=device).bfloat16()

    def product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: functional.linear(x, weight)

    def chain() -> list[torch.Tensor]:
        outputs, x = [], first
        for _ in range(6):
            for site, weight in zip(sites, weights, strict=True):
                y = adapters.around(site, x, product(x, weight), scratch)
                outputs.append(y)
                x = y if y.shape == x.shape else x
            x = adapters.around_gated(AdapterSite(3, (512, 512)), x, product(x, both), "silu", scratch)
            outputs.append(x)
        return outputs

    eager = [output.clone() for output in chain()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
