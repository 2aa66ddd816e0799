"""Shrink and expand of LoRA adapters in CUDA C++: that they compile here, how a shrink is cut; on a GPU, that they compute what the torch twin does."""

import pathlib
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.kernels import adapters as op
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.gpu import adapters as gpu
from runtime.engine.kernels.gpu import adapters_cuda, nvrtc
from runtime.engine.kernels.scratch import Scratch
from tests.kernels.test_adapters import MAX_RANK, a_table, chunks_of

NUM_SLOTS = 6
# rows (slot, tokens)
STEPS = {
    "one token": [(2, 1)],
    "no adapter": [(-1, 1)] * 3,
    "five rows": [(row % 3 - 1, 1) for row in range(5)],
    "rows of one adapter": [(4, 1)] * 4,
    "rows for Triton": [(row % 7 - 1, 1) for row in range(40)],
    "prompts": [(0, 70), (3, 1), (-1, 110), (1, 129), (3, 64)],
}


@pytest.mark.parametrize(
    ("source", "defines", "most_spilled"),
    [
        (adapters_cuda.SHRINK_SOURCE, ("HALF=false",), 0),
        (adapters_cuda.EXPAND_SOURCE, ("HALF=false", "GATED=false"), 0),
        (adapters_cuda.EXPAND_SOURCE, ("HALF=true", "GATED=true"), 20),
    ],
)
def test_compiles_for_hopper(source: str, defines: tuple[str, ...], most_spilled: int, tmp_path: pathlib.Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v"]
    command += [f"-D{define}" for define in defines]
    command += [str(pathlib.Path(nvrtc.__file__).parent / source), "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert spills
    stored = [int(line.split(" bytes spill stores")[0].split()[-1]) for line in spills]
    assert max(stored) <= most_spilled


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3))
def test_every_module_of_every_chunk_has_a_warp(num_tokens: int, most_chunks: int, num_modules: int) -> None:
    tasks = adapters_cuda.tasks_of(num_tokens, most_chunks, num_modules)
    groups = most_chunks * num_modules
    assert groups <= tasks <= groups * adapters_cuda.most_parts(num_tokens)
    assert tasks * 256 * op.SMALL_CHUNK <= 1 << 22  # parts of rank 256 fit the memory beside the products


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("in_features", "widths", "activation"),
    [
        (4096, (512, 128, 64), None),
        (14336, (96,), None),
        (1024, (320, 320), "silu"),
        (256, (640,), "gelu_tanh"),
    ],
)
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_adapters_cuda_equal_twin(
    rows: list[tuple[int, int]],
    in_features: int,
    widths: tuple[int, ...],
    activation: Activation | None,
    dtype: torch.dtype,
) -> None:
    """With padding tokens behind the step's, which stay as they are."""
    device = torch.device("cuda")
    table, _ = a_table(NUM_SLOTS, [(256, 8), *((in_features, width) for width in widths)], dtype)
    table = op.AdapterTable(table.memory.to(device), table.places.to(device), MAX_RANK)
    tokens = sum(count for _, count in rows)
    chunks = chunks_of(rows, tokens + 3, device, NUM_SLOTS)
    x = torch.randn(tokens + 3, in_features + 8, device=device).to(dtype)[:, :in_features]
    y = torch.randn(tokens + 3, sum(widths), device=device).to(dtype)
    scratch = Scratch.allocate(device)
    scratch.partials.fill_(torch.nan)
    shrunk = adapters_cuda.shrink(x, chunks, table, 1, len(widths), scratch)
    assert (shrunk is not None) == (len(x) <= adapters_cuda.FEW_ROWS)
    expected, results = y.clone(), [y.clone() for _ in range(2)]
    if activation is None:
        op.add_adapters_torch(expected, x, chunks, table, 1, widths)
        for result in results:
            gpu.add_adapters(result, x, chunks, table, 1, widths, scratch)
        assert torch.equal(results[0][tokens:], y[tokens:])
    else:
        expected = op.add_adapters_gated_torch(expected, x, chunks, table, activation, 1, widths)
        results = [gpu.add_adapters_gated(one, x, chunks, table, activation, 1, widths, scratch) for one in results]
    tolerance = 2e-2 if dtype is torch.bfloat16 else 2e-3
    torch.testing.assert_close(results[0][:tokens], expected[:tokens], rtol=tolerance, atol=tolerance)
    assert torch.equal(results[0][:tokens], results[1][:tokens])
    assert not scratch.counters.any()
