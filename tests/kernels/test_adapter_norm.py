"""The norm that adds LoRA adapters to its input: the Triton kernel against its twin, whose parts other tests compare with float64."""

import pytest
import torch

from runtime.engine.kernels.adapter_norm import add_rms_norm_adapted_torch
from runtime.engine.kernels.adapters import AdapterTable
from runtime.engine.kernels.gpu import adapter_norm as gpu
from runtime.engine.kernels.gpu.adapters import shrink
from tests.kernels.test_adapters import MAX_RANK, a_table, chunks_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("slots", [[0], [-1], [2, 0, -1, 2, 1, 0, 3], [3] * 17 + [0] * 3])
def test_kernel_equals_twin(slots: list[int], plus_one: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Three padding tokens stand behind the rows; modules have ranks of 0 to 64."""
    for module, width in ((1, 200), (2, 64)):
        table, _ = a_table(4, [(256, 8), (256, 200), (256, 64)], dtype, seed=len(slots))
        rows = [(slot, 1) for slot in slots]
        tokens = len(rows) + 3
        x, y = torch.randn(tokens, 256).to(dtype), torch.randn(tokens, width).to(dtype)
        residual, weight = torch.randn(tokens, width).to(dtype), torch.randn(width).to(dtype)
        wanted_residual, found_residual = residual.clone(), residual.clone().to(device)
        wanted = add_rms_norm_adapted_torch(
            y.clone(), x, wanted_residual, weight, 1e-5, plus_one, chunks_of(rows, tokens, "cpu", 4), table, module
        )
        on_device = AdapterTable(table.memory.to(device), table.places.to(device), MAX_RANK)
        chunks = chunks_of(rows, tokens, device, 4)
        shrunk = shrink(x.to(device), chunks, on_device, module, 1)
        found = gpu.add_rms_norm(
            y.to(device), found_residual, weight.to(device), 1e-5, plus_one, shrunk, chunks.upload, on_device, module
        )
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found_residual.cpu(), wanted_residual, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)


def test_kernel_of_an_empty_step_is_the_plain_norm(device: torch.device) -> None:
    """What a capture of a graph launches."""
    table, _ = a_table(2, [(128, 64)], torch.float32)
    on_device = AdapterTable(table.memory.to(device), table.places.to(device), MAX_RANK)
    x, y, residual = torch.randn(5, 128), torch.randn(5, 64), torch.randn(5, 64)
    chunks = chunks_of([], 5, device, 2)
    shrunk = shrink(x.to(device), chunks, on_device, 0, 1)
    found = gpu.add_rms_norm(
        y.to(device),
        residual.clone().to(device),
        torch.ones(64, device=device),
        1e-5,
        False,
        shrunk,
        chunks.upload,
        on_device,
        0,
    )
    torch.testing.assert_close(found.cpu(), torch.nn.functional.rms_norm(y + residual, (64,), eps=1e-5))
