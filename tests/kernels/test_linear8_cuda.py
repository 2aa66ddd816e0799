"""The 8-bit linear in CUDA C++: that it compiles here; on a GPU, that it computes what the torch twin does."""

import pathlib
import shutil
import subprocess

import pytest
import torch

from runtime.engine.kernels import linear8
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.gpu import few_rows, linear8_cuda, nvrtc
from runtime.engine.kernels.quantized_rows import QuantizedRows, quantize_rows, quantize_rows_torch
from runtime.engine.kernels.scratch import Scratch

CODES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("integers", ["true", "false"])
@pytest.mark.parametrize(
    ("gated", "tiles", "height", "slabs"),
    [("true", 2, 4, 4), ("true", 4, 4, 2), ("false", 4, 4, 2), ("false", 2, 4, 2), ("false", 1, 2, 2)],
)
def test_compiles_for_hopper_without_spills(
    integers: str, gated: str, tiles: int, height: int, slabs: int, tmp_path: pathlib.Path
) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    path = pathlib.Path(nvrtc.__file__).parent / linear8_cuda.SOURCE
    defines = {
        "FP16": "false",
        "INT8": integers,
        "GATED": gated,
        "TILES": tiles,
        "HEIGHT": height,
        "SLABS": slabs,
    }
    command = [nvcc, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    done = subprocess.run(
        [*command, str(path), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr


def test_linear8_cuda_serves_nothing_without_a_gpu() -> None:
    x = quantize_rows(torch.zeros(1, 4096, dtype=torch.bfloat16), torch.int8)
    weight, scale = torch.zeros(2048, 4096, dtype=torch.int8), torch.ones(2048)
    out = torch.full((1, 2048), torch.nan, dtype=torch.bfloat16)
    assert not linear8.applies_gate(x, weight)
    assert not linear8_cuda.linear_8bit(x, weight, scale, None, None, out, None)
    assert out.isnan().all()


def _case(
    device: torch.device, num_rows: int, num_weights: int, in_features: int, codes: torch.dtype, dtype: torch.dtype
) -> tuple[QuantizedRows, QuantizedRows, torch.Tensor]:
    x = torch.randn(num_rows, in_features, device=device).to(dtype)
    weight = torch.randn(num_weights, in_features, device=device) / in_features**0.5
    rows, packed = QuantizedRows.empty(x, in_features, codes), QuantizedRows.empty(weight, in_features, codes)
    quantize_rows_torch(x, rows)
    quantize_rows_torch(weight, packed)
    return rows, packed, torch.randn(num_weights, device=device).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("codes", CODES)
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
        (21, 4096, 4096, None, torch.bfloat16),
        (32, 4096, 14336, None, torch.bfloat16),
        (1, 14336, 4096, "silu", torch.bfloat16),
        (8, 1001, 1536, "gelu_tanh", torch.bfloat16),
        (11, 8192, 2048, "silu", torch.bfloat16),
        (16, 333, 4096, "gelu", torch.bfloat16),
        (29, 14336, 4096, "silu", torch.bfloat16),
        (5, 20, 512, "silu", torch.bfloat16),
        (6, 4096, 4096, None, torch.float16),
        (13, 1001, 2048, "silu", torch.float16),
    ],
)
def test_equals_twin(
    codes: torch.dtype, num_rows: int, num_outputs: int, in_features: int, gate: Activation | None, dtype: torch.dtype
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiles, gated = -(-num_rows // 8), gate is not None
    cuts = [few_rows.cut(num_outputs, in_features, tiles, gated, 132)]
    if dtype is torch.bfloat16:  # what is compiled for one type is compiled for the other
        further = [few_rows.Cut(4, 2, 3, 3, 2)] if gate else [few_rows.Cut(4, 2, 3, 3, 2), few_rows.Cut(2, 2, 2, 2, 1)]
        cuts += further
    if device.type == "cpu" or linear8_cuda.module(device, codes, dtype, gated, tiles, cuts[0]) is None:
        pytest.skip("needs a GPU that the kernel is made for")
    x, weight, bias = _case(device, num_rows, num_outputs * (2 if gated else 1), in_features, codes, dtype)
    bias_or_none = bias if num_rows % 2 else None
    expected = torch.empty(num_rows, num_outputs, dtype=dtype, device=device)
    linear8.linear_8bit_torch(x, weight.codes, weight.scale, bias_or_none, gate, expected)
    scratch = Scratch.allocate(device)
    for how in cuts:
        results = [torch.full_like(expected, torch.nan) for _ in range(2)]
        for result in results:
            assert linear8_cuda.linear_8bit(x, weight.codes, weight.scale, bias_or_none, gate, result, scratch, how), (
                how
            )
        error = float((results[0].double() - expected.double()).norm() / expected.double().norm())
        assert error < (4e-3 if dtype is torch.bfloat16 else 6e-4), how
        assert torch.equal(*results)  # in any order
        assert not scratch.counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("codes", CODES)
def test_replays_in_a_graph(codes: torch.dtype) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = few_rows.cut(4096, 4096, 1, False, 132)
    if device.type == "cpu" or linear8_cuda.module(device, codes, torch.bfloat16, False, 1, how) is None:
        pytest.skip("needs a GPU that the kernel is made for")
    scratch = Scratch.allocate(device)
    _, weight, _ = _case(device, 1, 4096, 4096, codes, torch.bfloat16)
    x = torch.randn(4, 4096, device=device, dtype=torch.bfloat16)
    outs = [torch.empty_like(x) for _ in range(3)]

    def chain() -> None:  # each reads what the one before it wrote
        for source, out in zip((x, *outs), outs, strict=False):
            linear8.linear_8bit(source, weight.codes, weight.scale, out=out, scratch=scratch)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [out.clone() for out in outs]
    for source, out in zip((x, *replayed), outs, strict=False):
        linear8.linear_8bit_torch(quantize_rows(source, codes), weight.codes, weight.scale, None, None, out)
    for one, other in zip(replayed, outs, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 4e-3
