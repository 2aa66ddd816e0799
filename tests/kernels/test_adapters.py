"""LoRA adapters: the Triton kernels against their twin, the twin against dense deltas and torch's grouped product."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from runtime.engine.kernels import adapters as op
from runtime.engine.kernels import inputs as layout
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.gpu import adapters as gpu
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.model.run.adapter_chunks import group_by_adapter

MAX_RANK = 64
Deltas = dict[tuple[int, int], torch.Tensor]  # (slot, module) → B · A


def a_table(
    slots: int, features: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0
) -> tuple[op.AdapterTable, Deltas]:
    """Adapters of random ranks over modules of (inputs, outputs); some leave some modules alone. Matrices begin at multiples of 128 elements."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    memory, places = [torch.randn(128).to(dtype)], torch.zeros((slots, len(features), 3), dtype=torch.int64)
    deltas: Deltas = {}
    at = 128

    def put(matrix: torch.Tensor) -> int:
        nonlocal at
        begin = at
        memory.extend((matrix.reshape(-1), torch.full((-matrix.numel() % 128,), float("nan"), dtype=dtype)))
        at += matrix.numel() + -matrix.numel() % 128
        return begin

    for slot in range(slots):
        for module, (inputs, outputs) in enumerate(features):
            rank = rng.choice((0, 16, 16, 32, 64))
            if not rank:
                continue
            a = (torch.randn(rank, inputs) / inputs**0.5).to(dtype)
            b = (torch.randn(outputs, rank) / rank**0.5).to(dtype)
            places[slot, module] = torch.tensor((put(a), put(b), rank))
            deltas[slot, module] = b.double() @ a.double()
    return op.AdapterTable(torch.cat(memory), places, MAX_RANK), deltas


def an_upload(rows: list[tuple[int, int]], chunk_tokens: int) -> tuple[torch.Tensor, int]:
    """The words of a step whose rows are (slot, tokens), and its number of chunks."""
    firsts = np.cumsum([0, *(count for _, count in rows)])
    chunks, order = group_by_adapter([slot for slot, _ in rows], firsts, chunk_tokens)
    head = layout.HEADER_WORDS
    words = np.concatenate((np.zeros(head, np.int64), chunks.ravel(), order)).astype(np.int32)
    words[layout.NUM_CHUNKS], words[layout.AT_CHUNKS] = len(chunks), head
    words[layout.AT_ORDER] = head + chunks.size
    return torch.from_numpy(words), len(chunks)


def chunks_of(
    rows: list[tuple[int, int]], num_tokens: int, device: torch.device | str, num_slots: int, size: int | None = None
) -> op.Chunks:
    """The chunks of a step of `num_tokens` tokens, padding included, as many as a graph of that size has room for."""
    size = op.chunk_tokens(num_tokens, on_gpu=True) if size is None else size
    upload, num_chunks = an_upload(rows, size)
    most = op.max_chunks(num_tokens, num_slots, size)
    assert num_chunks <= most
    return op.Chunks(upload.to(device), layout.NUM_CHUNKS, most, size)


def gated(y: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = y.chunk(2, 1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def exact(
    x: torch.Tensor, y: torch.Tensor, rows: list[tuple[int, int]], deltas: Deltas, module: int, widths: list[int]
) -> torch.Tensor:
    """Token by token in float64."""
    wanted = y.double().clone()
    slots = [slot for slot, count in rows for _ in range(count)]
    for token, slot in enumerate(slots):
        column = 0
        for number, width in enumerate(widths):
            if (slot, module + number) in deltas:
                wanted[token, column : column + width] += deltas[slot, module + number] @ x[token].double()
            column += width
    return wanted


CASES = [
    # rows (slot, tokens), inputs, widths, first module
    ([(0, 1)], 256, [80, 40, 40], 0),
    ([(2, 1), (-1, 1), (0, 1), (2, 1), (1, 1)], 512, [64], 1),
    ([(1, 5), (-1, 3), (0, 40), (1, 1), (3, 17)], 384, [96, 70], 0),
    ([(0, 70), (3, 1), (-1, 10)], 1024, [48], 2),
    ([(0, 1), (1, 1)], 100, [33, 9, 17], 0),
    ([(-1, 4)], 128, [32], 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "widths", "first_module"), CASES)
def test_twin_is_the_dense_delta(
    rows: list[tuple[int, int]], inputs: int, widths: list[int], first_module: int, dtype: torch.dtype
) -> None:
    features = [(inputs, 8)] * first_module + [(inputs, width) for width in widths]
    table, deltas = a_table(4, features, dtype)
    tokens = sum(count for _, count in rows)
    x, y = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, sum(widths)).to(dtype)
    wanted = exact(x, y, rows, deltas, first_module, widths)
    op.add_adapters(y, x, chunks_of(rows, tokens, "cpu", 4, 1000), table, first_module=first_module, widths=widths)
    tolerance = 1e-4 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "inputs", "widths", "first_module", "dtype", "scratch"),
    [
        # Each case runs once with scratch memory and once without, in the two types by turns.
        pytest.param(
            *case, dtype, scratch, marks=() if scratch == ((number + at) % 2 == 0) and at < 2 else pytest.mark.long
        )
        for number, case in enumerate(CASES)
        for at, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        for scratch in (False, True)
    ],
)
def test_kernel_equals_twin(
    rows: list[tuple[int, int]],
    inputs: int,
    widths: list[int],
    first_module: int,
    dtype: torch.dtype,
    scratch: bool,
    device: torch.device,
) -> None:
    """With more programs than chunks, and with padding tokens behind the step's."""
    features = [(inputs, 8)] * first_module + [(inputs, width) for width in widths]
    table, _ = a_table(4, features, dtype)
    tokens = sum(count for _, count in rows) + 3
    x, y = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, sum(widths)).to(dtype)
    wanted = y.clone()
    op.add_adapters_torch(wanted, x, chunks_of(rows, tokens, "cpu", 4), table, first_module, widths)
    on_device = op.AdapterTable(table.memory.to(device), table.places.to(device), MAX_RANK)
    found = y.clone().to(device)
    shared = Scratch.allocate(device, partial_elements=1 << 20) if scratch else None
    gpu.add_adapters(found, x.to(device), chunks_of(rows, tokens, device, 4), on_device, first_module, widths, shared)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.cpu()[-3:], y[-3:])


@pytest.mark.parametrize(("features", "widths"), [(128, [48]), (256, [32, 70]), (200, [33, 16, 40])])
def test_kernel_of_many_tokens_takes_large_chunks(features: int, widths: list[int], device: torch.device) -> None:
    """Their shrink reads x once for all modules, whose ranks differ."""
    rows = [(0, 150), (-1, 30), (2, 110), (0, 9), (1, 20)]
    table, deltas = a_table(3, [(features, width) for width in widths], torch.float32, seed=3)
    tokens = sum(count for _, count in rows)
    chunks = chunks_of(rows, tokens, device, 3)
    assert chunks.tokens == 64
    assert gpu.tiling(chunks, features, len(widths)).modules_each == len(widths)
    x, y = torch.randn(tokens, features), torch.randn(tokens, sum(widths))
    on_device = op.AdapterTable(table.memory.to(device), table.places.to(device), MAX_RANK)
    found = y.clone().to(device)
    gpu.add_adapters(found, x.to(device), chunks, on_device, 0, widths, None)
    wanted = exact(x, y, rows, deltas, 0, widths)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


def test_large_steps_of_all_sizes_need_one_expand() -> None:
    """A load compiles the kernels of one large step; another number of parts must not need another kernel."""
    upload = op.zero_upload(torch.device("cpu"))
    for columns in (64, 4096, 14336):
        splits = {
            gpu.tiling(op.Chunks(upload, 13, most, 64), columns, 3).splits for most in (1, 17, 90, 128, 256, 1000)
        }
        assert {gpu.parts_read(each) for each in splits} == {4}
        assert columns == 64 or splits == {1, 2, 3, 4}


# Each activation with each width, and each type with either number of tokens.
GATED = (
    ("silu", torch.float32, [72, 72], True),
    ("silu", torch.bfloat16, [144], False),
    ("gelu", torch.bfloat16, [72, 72], True),
    ("gelu", torch.float32, [144], False),
    ("gelu_tanh", torch.float32, [72, 72], False),
    ("gelu_tanh", torch.bfloat16, [144], True),
)


@pytest.mark.parametrize(
    ("activation", "dtype", "widths", "few"),
    [
        pytest.param(*case, marks=() if case in GATED else pytest.mark.long)
        for case in itertools.product(
            ("silu", "gelu", "gelu_tanh"), (torch.float32, torch.bfloat16), ([72, 72], [144]), (True, False)
        )
    ],
)
def test_gated_kernel_equals_twin(
    activation: Activation, dtype: torch.dtype, widths: list[int], few: bool, device: torch.device
) -> None:
    """Rows without an adapter get the base's own gate and up."""
    rows = [(1, 5), (-1, 3), (0, 40), (2, 1), (3, 17)] if few else [(1, 150), (-1, 70), (0, 33), (2, 10)]
    table, deltas = a_table(4, [(384, 8), *((384, width) for width in widths)], dtype, seed=1)
    tokens = sum(count for _, count in rows)
    x, y = torch.randn(tokens, 384).to(dtype), torch.randn(tokens, 144).to(dtype)
    wanted = gated(exact(x, y, rows, deltas, 1, widths), activation)
    twin = op.add_adapters_gated_torch(y.clone(), x, chunks_of(rows, tokens, "cpu", 4), table, activation, 1, widths)
    on_device = op.AdapterTable(table.memory.to(device), table.places.to(device), MAX_RANK)
    found = gpu.add_adapters_gated(
        y.to(device), x.to(device), chunks_of(rows, tokens, device, 4), on_device, activation, 1, widths, None
    )
    exactness = 1e-4 if dtype is torch.float32 else 6e-2
    torch.testing.assert_close(twin.double(), wanted, rtol=exactness, atol=exactness)
    torch.testing.assert_close(found.cpu(), twin, rtol=exactness, atol=exactness)


@pytest.mark.parametrize("first", [0, 2])
def test_kernel_leaves_all_alone_without_chunks(first: int, device: torch.device) -> None:
    """What a capture of a graph launches."""
    table, _ = a_table(2, [(128, 32)] * 3, torch.float32)
    on_device = op.AdapterTable(table.memory.to(device), table.places.to(device), MAX_RANK)
    x, y = torch.randn(5, 128, device=device), torch.randn(5, 32, device=device)
    before = y.clone()
    gpu.add_adapters(y, x, op.Chunks(op.zero_upload(device), layout.NUM_CHUNKS, 5, 16), on_device, first, [32], None)
    assert torch.equal(y, before)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has no grouped product")
def test_twin_equals_torchs_grouped_product() -> None:
    rows = [(0, 3), (1, 8), (0, 5), (2, 1), (1, 2)]
    slots, inputs, outputs, rank = 3, 64, 40, 16
    a, b = torch.randn(slots, rank, inputs), torch.randn(slots, outputs, rank)
    places = torch.zeros((slots, 1, 3), dtype=torch.int64)
    for slot in range(slots):
        places[slot, 0] = torch.tensor((slot * rank * inputs, a.numel() + slot * outputs * rank, rank))
    table = op.AdapterTable(torch.cat((a.reshape(-1), b.reshape(-1))), places, rank)
    tokens = sum(count for _, count in rows)
    x, y = torch.randn(tokens, inputs), torch.zeros(tokens, outputs)
    chunks = chunks_of(rows, tokens, "cpu", slots, 1000)
    op.add_adapters(y, x, chunks, table, first_module=0, widths=[outputs])
    order = chunks.upload[int(chunks.upload[layout.AT_ORDER]) :].long()
    ends = torch.tensor([8, 18, 19], dtype=torch.int32)
    hidden = torch.nn.functional.grouped_mm(x[order].bfloat16(), a.transpose(1, 2).bfloat16(), offs=ends)
    wanted = torch.nn.functional.grouped_mm(hidden, b.transpose(1, 2).bfloat16(), offs=ends)
    torch.testing.assert_close(y[order], wanted.float(), rtol=5e-2, atol=0.5)
