"""The kernels in CUDA C++: that they compile here, that machine code is kept, how work is cut; on a GPU, that they compute what the torch twin does."""

import pathlib
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional

from runtime.engine.kernels import linear4
from runtime.engine.kernels.gpu import attention_cuda, linear4_cuda, linear4_wide, native
from runtime.engine.kernels.layout import padded_width
from runtime.engine.kernels.scratch import Scratch

SOURCES = [
    (linear4_cuda.SOURCE, ()),
    (linear4_wide.SOURCE, ()),
    (attention_cuda.SOURCE, ("HEAD_DIM=128", "HALF=false", "TILES=1", "WARPS=8", "STAGES=3")),
    (attention_cuda.SOURCE, ("HEAD_DIM=128", "HALF=true", "TILES=2", "WARPS=8", "STAGES=2")),
    (attention_cuda.SOURCE, ("HEAD_DIM=256", "HALF=false", "TILES=1", "WARPS=4", "STAGES=2")),
]


@pytest.mark.parametrize(("source", "defines"), SOURCES)
def test_compiles_for_hopper_without_spills(source: str, defines: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    path = pathlib.Path(native.__file__).parent / source
    command = [nvcc, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", str(path), "-o", str(tmp_path / "out.cubin")]
    command += [f"-D{define}" for define in defines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert spills
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), spills
    assert "serialized" not in done.stderr  # what ptxas says when it puts waits between wgmma instructions


def test_machine_code_is_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_source(name: str, text: bytes, architecture: str, defines: tuple[str, ...]) -> bytes:
        compiled.append(" ".join((architecture, *defines)))
        return f"code for {architecture}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "compile_source", compile_source)
    for architecture in ("sm_90a", "sm_90a", "sm_100", "sm_90a"):
        assert native.cubin(linear4_cuda.SOURCE, architecture) == f"code for {architecture}".encode()
    for _ in range(2):
        native.cubin(linear4_cuda.SOURCE, "sm_90a", ("A=1",))
    assert compiled == ["sm_90a", "sm_100", "sm_90a A=1"]


def test_included_files_are_part_of_a_source() -> None:
    text = native.source_text(attention_cuda.SOURCE).decode()
    assert "#include" not in text
    assert "struct Line" in text


def test_no_module_without_a_gpu() -> None:
    assert native.module(linear4_cuda.SOURCE, (), torch.device("cpu")) is None
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert not linear4_cuda.linear_4bit(x, torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 2), "nf4", None, torch.zeros(1, 8), None)
    assert not linear4_wide.linear_4bit(x, torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 2), "nf4", None, torch.zeros(1, 8), None)


@pytest.mark.parametrize("groups_a_warp", [1, 2])
def test_warps_cover_k(groups_a_warp: int) -> None:
    for groups_each in range(1, 300):
        warps = linear4_cuda.warps_of_k(groups_each, groups_a_warp)
        passes = -(-groups_each // (warps * groups_a_warp))
        assert 1 <= warps <= 16
        assert passes == -(-groups_each // (16 * groups_a_warp))


def _operands(num_rows: int, num_outputs: int, in_features: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    weight = torch.randint(0, 256, (num_outputs, padded_width(in_features) // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(num_outputs, padded_width(in_features) // 64, device=device) + 0.05
    absmax[:, in_features // 64 :] = 0
    return torch.randn(num_rows, in_features, device=device).to(dtype), weight, absmax, torch.randn(num_outputs, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_outputs", "in_features"), [
    (1, 70, 128), (8, 333, 64 * 33), (9, 130, 64), (16, 4096, 1024), (5, 40, 14336), (33, 600, 64 * 11), (130, 264, 192), (300, 301, 1024),
])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_equals_twin(
    device: torch.device, kind: linear4.Codebook, num_rows: int, num_outputs: int, in_features: int, dtype: torch.dtype
) -> None:
    if device.type == "cpu" or linear4_cuda.module(device) is None:
        pytest.skip("needs a GPU that the kernels are made for")
    x, weight, absmax, bias = _operands(num_rows, num_outputs, in_features, dtype, device)
    wide = linear4.dequantize_4bit_torch(weight, absmax, kind, in_features, torch.float32)
    exact = functional.linear(x.double(), wide.double(), bias.double())
    twin = torch.empty(num_rows, num_outputs, dtype=dtype, device=device)
    linear4.linear_4bit_torch(x, weight, absmax, kind, bias, None, twin)
    allowed = 1.5 * float((twin.double() - exact).norm() / exact.norm())
    scratch = Scratch.allocate(device)
    for splits in (1, 3):
        results = [torch.full_like(twin, torch.nan) for _ in range(3)]
        served = []
        if num_rows <= linear4_cuda.MAX_ROWS:
            served.append(linear4_cuda.linear_4bit(x, weight, absmax, kind, bias, results[0], scratch, splits))
        for columns, result in ((64, results[1]), (128, results[2])):
            served.append(linear4_wide.linear_4bit(x, weight, absmax, kind, bias, result, scratch, columns, splits))
        assert all(served)
        for result in results[-len(served) :]:
            assert float((result.double() - exact).norm() / exact.norm()) <= allowed
        assert scratch.counters.count_nonzero() == 0


def test_replays_in_a_graph(device: torch.device) -> None:
    if device.type == "cpu" or linear4_cuda.module(device) is None:
        pytest.skip("needs a GPU that the kernels are made for")
    scratch = Scratch.allocate(device)
    for num_rows in (1, 16, 100):
        x, weight, absmax, bias = _operands(num_rows, 512, 2048, torch.bfloat16, device)
        out = torch.empty(num_rows, 512, dtype=torch.bfloat16, device=device)
        linear4.linear_4bit(x, weight, absmax, "nf4", bias, None, out, scratch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            linear4.linear_4bit(x, weight, absmax, "nf4", bias, None, out, scratch)
        x.copy_(torch.randn_like(x))
        graph.replay()
        again = torch.empty_like(out)
        linear4.linear_4bit(x, weight, absmax, "nf4", bias, None, again, scratch)
        assert torch.equal(out, again)
