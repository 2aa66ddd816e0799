"""The 16-bit linear in CUDA C++: that it compiles here, how work is cut; on a GPU, that it computes what the torch twin does."""

import pathlib
import shutil
import subprocess

import pytest
import torch

from runtime.engine.kernels import linear16
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.gpu import linear16_cuda, nvrtc
from runtime.engine.kernels.scratch import Scratch


@pytest.mark.parametrize(
    ("gated", "tiles", "height", "slabs"), [("true", 2, 4, 4), ("false", 2, 4, 2), ("false", 1, 2, 2)]
)
def test_compiles_for_hopper_without_spills(
    gated: str, tiles: int, height: int, slabs: int, tmp_path: pathlib.Path
) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    path = pathlib.Path(nvrtc.__file__).parent / linear16_cuda.SOURCE
    defines = ["-DHALF=false", f"-DGATED={gated}", f"-DTILES={tiles}", f"-DHEIGHT={height}", f"-DSLABS={slabs}"]
    command = [
        nvcc,
        "-std=c++17",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-cubin",
        "-Xptxas",
        "-v",
        *defines,
        str(path),
        "-o",
        str(tmp_path / "out.cubin"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr


def test_linear16_cuda_serves_nothing_without_a_gpu() -> None:
    x = torch.zeros(1, 4096, dtype=torch.bfloat16)
    out = torch.full((1, 2048), torch.nan, dtype=torch.bfloat16)
    assert not linear16_cuda.linear_16bit(x, torch.zeros(2048, 4096, dtype=torch.bfloat16), None, None, out, None)
    assert out.isnan().all()


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(
    ("num_outputs", "in_features", "gated", "splits"),
    [
        (6144, 4096, False, 1),
        (4096, 4096, False, 2),
        (14336, 4096, True, 1),
        (4096, 14336, False, 2),
        (3072, 2048, False, 1),
        (2048, 2048, False, 4),
        (8192, 2048, True, 1),
        (2048, 8192, False, 4),
    ],
)
def test_shares_are_even(num_outputs: int, in_features: int, gated: bool, splits: int, tiles: int) -> None:
    how = linear16_cuda.cut(num_outputs, in_features, tiles, gated, 132)
    assert how.splits == splits
    blocks = -(-num_outputs // linear16_cuda.outputs_each(num_outputs, splits, 132)) * splits
    assert blocks == 128


@pytest.mark.parametrize("processors", [1, 7, 132])
def test_linear16_cuda_cuts_fit(processors: int) -> None:
    for num_outputs in (8, 1000, 4096, 16383, 100000):
        for in_features in (256, 2048, 14336):
            for tiles in (1, 2):
                for gated in (False, True):
                    how = linear16_cuda.cut(num_outputs, in_features, tiles, gated, processors)
                    each = linear16_cuda.outputs_each(num_outputs, how.splits, processors)
                    assert each % 8 == 0
                    assert 1 <= how.splits <= max(1, in_features // 512)
                    assert each * max(1, processors // how.splits) >= num_outputs
                    bytes_of_rings = (how.stages * how.height * 16 + how.x_stages * tiles * 8) * 512
                    assert (
                        bytes_of_rings + 2 * 8 * tiles * 512 + 16 + (how.stages + how.x_stages) * 16
                        <= nvrtc.SHARED_BYTES
                    )


def _case(
    device: torch.device, num_rows: int, num_outputs: int, in_features: int, gated: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    rows = num_outputs * (2 if gated else 1)
    x = torch.randn(num_rows, in_features + 8, device=device).to(dtype)[:, :in_features]
    return (
        x,
        (torch.randn(rows, in_features, device=device) / in_features**0.5).to(dtype),
        torch.randn(rows, device=device).to(dtype),
    )


@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features", "gate", "dtype"),
    [
        (1, 6144, 4096, None, torch.bfloat16),
        (2, 4096, 4096, None, torch.bfloat16),
        (7, 2048, 2048, None, torch.bfloat16),
        (8, 1030, 14336, None, torch.bfloat16),
        (9, 3072, 2048, None, torch.bfloat16),
        (13, 130, 1536, None, torch.bfloat16),
        (16, 4096, 14336, None, torch.bfloat16),
        (1, 14336, 4096, "silu", torch.bfloat16),
        (8, 1001, 768, "gelu_tanh", torch.bfloat16),
        (11, 8192, 2048, "silu", torch.bfloat16),
        (16, 333, 4096, "gelu", torch.bfloat16),
        (5, 20, 256, "silu", torch.bfloat16),
        (6, 4096, 4096, None, torch.float16),
        (13, 1001, 2048, "silu", torch.float16),
    ],
)
def test_equals_twin(
    device: torch.device, num_rows: int, num_outputs: int, in_features: int, gate: Activation | None, dtype: torch.dtype
) -> None:
    cuts = [linear16_cuda.cut(num_outputs, in_features, -(-num_rows // 8), gate is not None, 132)]
    if dtype is torch.bfloat16:  # what is compiled for one type is compiled for the other
        cuts += (
            [linear16_cuda.Cut(4, 4, 3, 3, 2)]
            if gate
            else [linear16_cuda.Cut(4, 2, 3, 3, 2), linear16_cuda.Cut(2, 2, 2, 2, 1)]
        )
    if (
        device.type == "cpu"
        or linear16_cuda.module(device, dtype, gate is not None, -(-num_rows // 8), cuts[0]) is None
    ):
        pytest.skip("needs a GPU that the kernel is made for")
    x, weight, bias = _case(device, num_rows, num_outputs, in_features, gate is not None, dtype)
    bias_or_none = bias if num_rows % 2 else None
    expected = torch.empty(num_rows, num_outputs, dtype=dtype, device=device)
    linear16.linear_16bit_torch(x, weight, bias_or_none, gate, expected)
    scratch = Scratch.allocate(device)
    for how in cuts:
        results = [torch.full_like(expected, torch.nan) for _ in range(2)]
        for result in results:
            assert linear16_cuda.linear_16bit(x, weight, bias_or_none, gate, result, scratch, how)
        error = float((results[0].double() - expected.double()).norm() / expected.double().norm())
        assert error < (4e-3 if dtype is torch.bfloat16 else 6e-4), how
        assert torch.equal(*results)  # in any order
        assert not scratch.counters.any()


def test_replays_in_a_graph(device: torch.device) -> None:
    how = linear16_cuda.cut(4096, 4096, 1, False, 132)
    if device.type == "cpu" or linear16_cuda.module(device, torch.bfloat16, False, 1, how) is None:
        pytest.skip("needs a GPU that the kernel is made for")
    scratch = Scratch.allocate(device)
    x, weight, _ = _case(device, 4, 4096, 4096, False, torch.bfloat16)
    outs = [torch.empty(4, 4096, dtype=torch.bfloat16, device=device) for _ in range(3)]

    def chain() -> None:  # each reads what the one before it wrote
        for source, out in zip((x, *outs), outs, strict=False):
            assert linear16_cuda.linear_16bit(source, weight, None, None, out, scratch)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [out.clone() for out in outs]
    for source, out in zip((x, *replayed), outs, strict=False):
        linear16.linear_16bit_torch(source, weight, None, None, out)
    for one, other in zip(replayed, outs, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 4e-3
