"""A CUDA graph in which adapters run beside the base's products gives what steps without a graph give."""

import pytest
import torch
from torch.nn import functional

from runtime.engine.kernels.adapters import chunk_tokens, max_chunks
from runtime.engine.model.run.adapters import AdapterSite, StepAdapters
from tests.kernels.test_adapters import a_table, an_upload


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_step_adapters_graph_equals_eager_products(rows: int) -> None:
    device = torch.device("cuda")
    features = [(512, 512), (512, 256), (512, 512)]
    table, _ = a_table(4, features, torch.bfloat16)
    table = type(table)(table.memory.to(device), table.places.to(device), table.max_rank)
    upload, _ = an_upload([(row % 5 - 1, 1) for row in range(rows)], chunk_tokens(rows, on_gpu=True))
    chunks = max_chunks(rows, table.num_slots, on_gpu=True)
    adapters = StepAdapters(upload.to(device), table, rows, chunks, torch.cuda.Stream())
    sites = [AdapterSite(0, (512,)), AdapterSite(1, (256,)), AdapterSite(2, (512,))]
    weights = [torch.randn(sum(site.widths), 512, device=device).bfloat16() * 512**-0.5 for site in sites]
    first = torch.randn(rows, 512, device=device).bfloat16()

    def chain() -> list[torch.Tensor]:
        outputs, x = [], first
        for _ in range(6):
            for site, weight in zip(sites, weights, strict=True):
                y = adapters.around(site, x, lambda x=x, weight=weight: functional.linear(x, weight), None)  # type: ignore[misc]
                outputs.append(y)
                x = y if y.shape == x.shape else x
        return outputs

    eager = [output.clone() for output in chain()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
