"""The kernels in CUDA C++: that they compile here, that machine code is kept, how work is cut; on a GPU, that they compute what the torch twin does."""

import pathlib
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional

from runtime.checkpoint.quantized_shapes import BLOCK, GGUF_BLOCK, KEPT_BLOCKS, padded_width
from runtime.engine.kernels import linear4
from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.codebooks import Codebook
from runtime.engine.kernels.gpu import attention_cuda, linear4_cuda, linear4_wgmma, nvrtc, rank_sum
from runtime.engine.kernels.scratch import Scratch

SOURCES = [
    pytest.param(linear4_cuda.SOURCE, (), marks=pytest.mark.long),
    (linear4_cuda.SOURCE, ("SMALL_BLOCKS=true",)),
    (linear4_wgmma.SOURCE, ("IS_HALF=true",)),
    (linear4_wgmma.SOURCE, ("IS_HALF=false", "SMALL_BLOCKS=true")),
    pytest.param(linear4_wgmma.SOURCE, ("IS_HALF=false",), marks=pytest.mark.long),
    pytest.param(
        attention_cuda.SOURCE,
        ("HEAD_DIM=128", "HALF=false", "FP8=false", "TILES=1", "WARPS=8", "STAGES=3"),
        marks=pytest.mark.long,
    ),
    (attention_cuda.SOURCE, ("HEAD_DIM=128", "HALF=true", "FP8=false", "TILES=2", "WARPS=8", "STAGES=2")),
    (attention_cuda.SOURCE, ("HEAD_DIM=256", "HALF=false", "FP8=false", "TILES=1", "WARPS=4", "STAGES=2")),
    (attention_cuda.SOURCE, ("HEAD_DIM=128", "HALF=false", "FP8=true", "TILES=2", "WARPS=8", "STAGES=4")),
    (rank_sum.SOURCE, rank_sum.defines(2, torch.bfloat16)),
    (rank_sum.SOURCE, rank_sum.defines(2, torch.float16)),
]


@pytest.mark.parametrize(("source", "defines"), SOURCES)
def test_compiles_for_hopper_without_spills(source: str, defines: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    path = pathlib.Path(nvrtc.__file__).parent / source
    command = [
        nvcc,
        "-std=c++17",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-cubin",
        "-Xptxas",
        "-v",
        str(path),
        "-o",
        str(tmp_path / "out.cubin"),
    ]
    command += [f"-D{define}" for define in defines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert spills
    stored = [int(line.split(" bytes spill stores")[0].split()[-1]) for line in spills]
    assert max(stored) <= (16 if source == linear4_wgmma.SOURCE else 0), (
        spills
    )  # four counters there, with sums for 64 rows of x
    assert "serialized" not in done.stderr  # what ptxas says when it puts waits between wgmma instructions


def test_machine_code_is_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_source(name: str, text: bytes, architecture: str, defines: tuple[str, ...]) -> bytes:
        compiled.append(" ".join((architecture, *defines)))
        return f"code for {architecture}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    for architecture in ("sm_90a", "sm_90a", "sm_100", "sm_90a"):
        assert nvrtc.cubin(linear4_cuda.SOURCE, architecture) == f"code for {architecture}".encode()
    for _ in range(2):
        nvrtc.cubin(linear4_cuda.SOURCE, "sm_90a", ("A=1",))
    assert compiled == ["sm_90a", "sm_100", "sm_90a A=1"]


def test_included_files_are_part_of_a_source() -> None:
    text = nvrtc.source_text(attention_cuda.SOURCE).decode()
    assert "#include" not in text
    assert "struct Line" in text


def test_nvrtc_has_no_module_without_a_gpu() -> None:
    assert nvrtc.module(linear4_cuda.SOURCE, (), torch.device("cpu")) is None
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert not linear4_cuda.linear_4bit(
        x, torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 2), "nf4", None, torch.zeros(1, 8), None
    )
    cut = linear4_wgmma.fill(8, 4, 1)
    assert not linear4_wgmma.linear_4bit(
        x, torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 2), "nf4", None, torch.zeros(1, 8), None, cut
    )


@pytest.mark.parametrize("groups_a_warp", [1, 2])
def test_warps_cover_k(groups_a_warp: int) -> None:
    for groups_each in range(1, 300):
        warps = linear4_cuda.warps_of_k(groups_each, groups_a_warp)
        passes = -(-groups_each // (warps * groups_a_warp))
        assert 1 <= warps <= 16
        assert passes == -(-groups_each // (16 * groups_a_warp))


def test_cuts_fit() -> None:
    """Rings as deep as shared memory allows; never more blocks than multiprocessors, so that blocks which wait for each other all run."""
    for num_rows in range(1, 513):
        for num_outputs in (64, 4096, 6144, 28672, 151936):
            cut = linear4_wgmma.choose(num_rows, num_outputs, 132)
            if cut is None:
                assert num_rows <= 16
                continue
            assert cut.columns >= min(num_rows, 256)
            assert cut.blocks <= 132
            assert cut.shared_bytes <= nvrtc.SHARED_BYTES
            assert cut.x_stages >= 2
            assert cut.w_stages >= 2
    assert linear4_wgmma.choose(513, 4096, 132) is None


def _operands(
    num_rows: int, num_outputs: int, in_features: int, dtype: torch.dtype, device: torch.device, kind: str = "nf4"
) -> tuple[torch.Tensor, ...]:
    weight = torch.randint(0, 256, (num_outputs, padded_width(in_features) // 2), dtype=torch.uint8, device=device)
    block = GGUF_BLOCK if kind in KEPT_BLOCKS.values() else BLOCK
    absmax = torch.rand(num_outputs, padded_width(in_features) // block, device=device) + 0.05
    absmax[:, in_features // block :] = 0
    if block == GGUF_BLOCK:
        absmax = absmax.half()
    return (
        torch.randn(num_rows, in_features, device=device).to(dtype),
        weight,
        absmax,
        torch.randn(num_outputs, device=device).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features"),
    [
        (1, 70, 128),
        (8, 333, 64 * 33),
        (9, 130, 64),
        (16, 4096, 1024),
        (5, 40, 14336),
        (33, 600, 64 * 11),
        (130, 264, 192),
        (300, 301, 1024),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "q4_0"])
def test_equals_twin(
    device: torch.device, kind: Codebook, num_rows: int, num_outputs: int, in_features: int, dtype: torch.dtype
) -> None:
    if device.type == "cpu" or linear4_cuda.module(device) is None:
        pytest.skip("needs a GPU that the kernels are made for")
    x, weight, absmax, bias = _operands(num_rows, num_outputs, in_features, dtype, device, kind)
    wide = linear4.dequantize_4bit_torch(weight, absmax, kind, in_features, torch.float32)
    exact = functional.linear(x.double(), wide.double(), bias.double())
    twin = torch.empty(num_rows, num_outputs, dtype=dtype, device=device)
    linear4.linear_4bit_torch(x, weight, absmax, kind, bias, None, twin)
    allowed = 1.5 * float((twin.double() - exact).norm() / exact.norm())
    scratch = Scratch.allocate(device)
    results = []
    if num_rows <= linear4_cuda.MAX_ROWS:
        for splits in (1, 3):
            results.append(torch.full_like(twin, torch.nan))
            assert linear4_cuda.linear_4bit(x, weight, absmax, kind, bias, results[-1], scratch, splits)
    for columns, groups in linear4_wgmma.SHAPES:
        for blocks in (1, 7, 132):
            results.append(torch.full_like(twin, torch.nan))
            assert linear4_wgmma.linear_4bit(
                x, weight, absmax, kind, bias, results[-1], scratch, linear4_wgmma.fill(columns, groups, blocks)
            )
    for result in results:
        assert float((result.double() - exact).norm() / exact.norm()) <= allowed
    assert scratch.counters.count_nonzero() == 0


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features"),
    [(1, 28672, 4096), (10, 70, 64 * 33), (40, 600, 512), (200, 2 * 333, 1024)],
)
def test_gate_equals_twin(
    device: torch.device, activation: Activation, num_rows: int, num_outputs: int, in_features: int
) -> None:
    if device.type == "cpu" or linear4_wgmma.module(device, torch.bfloat16) is None:
        pytest.skip("needs a GPU that the kernels are made for")
    x, weight, absmax, bias = _operands(num_rows, num_outputs, in_features, torch.bfloat16, device)
    wide = linear4.dequantize_4bit_torch(weight, absmax, "nf4", in_features, torch.float32)
    exact = act_mul(functional.linear(x.double(), wide.double(), bias.double()).float(), activation)
    twin = torch.empty(num_rows, num_outputs // 2, dtype=x.dtype, device=device)
    linear4.linear_4bit_torch(x, weight, absmax, "nf4", bias, activation, twin)
    allowed = 1.5 * float((twin.float() - exact).norm() / exact.norm())
    scratch = Scratch.allocate(device)
    for columns, groups in linear4_wgmma.SHAPES:
        for blocks in (5, 132):
            result = torch.full_like(twin, torch.nan)
            cut = linear4_wgmma.fill(columns, groups, blocks)
            assert linear4_wgmma.linear_4bit(x, weight, absmax, "nf4", bias, result, scratch, cut, activation) == (
                groups % 2 == 0
            )
            if groups % 2 == 0:
                assert float((result.float() - exact).norm() / exact.norm()) <= allowed
    through = linear4.linear_4bit(x, weight, absmax, "nf4", bias, activation, scratch=scratch)
    assert float((through.float() - exact).norm() / exact.norm()) <= allowed


def test_launches_in_a_row_agree(device: torch.device) -> None:
    """Launches overlap, rings are filled as fast as they are emptied: the same operands must give the same bits every time."""
    if device.type == "cpu" or linear4_wgmma.module(device, torch.bfloat16) is None:
        pytest.skip("needs a GPU that the kernels are made for")
    scratch = Scratch.allocate(device)
    for num_rows in (8, 16, 32, 64, 128, 256):
        x, weight, absmax, _ = _operands(num_rows, 28672, 4096, torch.bfloat16, device)
        for blocks in (112, 128, 132):
            cut = linear4_wgmma.fill(*next(shape for shape in linear4_wgmma.SHAPES if shape[0] >= num_rows), blocks)
            results = [torch.full((num_rows, 28672), torch.nan, dtype=torch.bfloat16, device=device) for _ in range(6)]
            for result in results:
                assert linear4_wgmma.linear_4bit(x, weight, absmax, "nf4", None, result, scratch, cut)
            assert all(torch.equal(result, results[0]) for result in results[1:])


def test_replays_in_a_graph(device: torch.device) -> None:
    if device.type == "cpu" or linear4_cuda.module(device) is None:
        pytest.skip("needs a GPU that the kernels are made for")
    scratch = Scratch.allocate(device)
    for num_rows in (1, 16, 40, 100, 200):
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
