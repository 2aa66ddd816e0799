"""Paged attention: the Triton kernels against the twin, the twin against a float64 reference that gathers nothing by pages."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from runtime.engine.kernels import attention
from runtime.engine.kernels.gpu import attention as gpu
from runtime.engine.kernels.gpu import attention_cuda
from runtime.engine.kernels.gpu.nvrtc import SHARED_BYTES
from runtime.engine.kernels.rope import rope_and_cache
from runtime.engine.kernels.scratch import Scratch

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Case:
    """A batch: (queries, context) of each row, and how the heads attend."""

    rows: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    fp8: bool = False
    block_tokens: int = 16
    padded_rows: int = 0


class Arguments(NamedTuple):
    """What `paged_attention` takes between `out` and `scratch`, in its order."""

    q: torch.Tensor
    k_plane: torch.Tensor
    v_plane: torch.Tensor
    page_unit: int
    page_table: torch.Tensor
    row_slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tokens: int
    num_kv_heads: int
    scale: float
    max_query_len: int
    max_context_len: int
    sliding_window: int
    softcap: float
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    case: Case
    arguments: Arguments
    out: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def _batch(case: Case, device: torch.device) -> Batch:
    """Lay random keys and values out over shuffled pages of a plane whose unit is larger than a block, as layers share a page."""
    width = case.kv_heads * case.dim
    block = case.block_tokens * width
    unit = 3 * block
    counts = [-(-context // case.block_tokens) for _, context in case.rows]
    num_pages = sum(counts) + 2
    order = torch.randperm(num_pages).tolist()
    plane_dtype = torch.float8_e4m3fn if case.fp8 else case.dtype
    k_plane = torch.full(((num_pages - 1) * unit + block,), 7.0).to(plane_dtype)
    v_plane = k_plane.clone()
    num_rows = len(case.rows)
    table = torch.full((num_rows + 3, max([*counts, 1]) + 1), -1, dtype=torch.int32)
    slots = torch.randperm(num_rows + 3)[: num_rows + case.padded_rows].int()
    keys, values = [], []
    for index, (_, context) in enumerate(case.rows):
        k, v = (torch.randn(2, context, case.kv_heads, case.dim)).to(plane_dtype)
        keys.append(k.double())
        values.append(v.double())
        for page_index in range(counts[index]):
            page = order.pop()
            table[slots[index], page_index] = page
            part = slice(page_index * case.block_tokens, min((page_index + 1) * case.block_tokens, context))
            size = (part.stop - part.start) * width
            k_plane[page * unit : page * unit + size] = k[part].reshape(-1)
            v_plane[page * unit : page * unit + size] = v[part].reshape(-1)
    lengths = [count for count, _ in case.rows] + [0] * case.padded_rows
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    contexts = torch.tensor([context for _, context in case.rows] + [0] * case.padded_rows, dtype=torch.int32)
    num_tokens = sum(lengths) + case.padded_rows
    q = torch.randn(num_tokens, case.heads, case.dim).to(case.dtype)
    sinks = torch.randn(case.heads).to(case.dtype) if case.sinks else None
    longest = max((count for count, _ in case.rows), default=1)
    arguments = Arguments(
        q.to(device),
        k_plane.to(device),
        v_plane.to(device),
        unit,
        table.to(device),
        slots.to(device),
        starts.to(device),
        contexts.to(device),
        case.block_tokens,
        case.kv_heads,
        case.dim**-0.5,
        longest,
        max(context for _, context in case.rows),
        case.window,
        case.softcap,
        None if sinks is None else sinks.to(device),
    )
    return Batch(case, arguments, torch.full_like(arguments.q, torch.nan), keys, values)


def _reference(batch: Batch) -> torch.Tensor:
    """Attention of each query alone, in float64."""
    case = batch.case
    q, sinks = batch.arguments.q, batch.arguments.sinks
    out = torch.full(q.shape, torch.nan, dtype=torch.float64)
    token = 0
    for (count, context), keys, values in zip(case.rows, batch.keys, batch.values, strict=True):
        for index in range(count):
            position = context - count + index
            first = max(0, position - case.window + 1) if case.window else 0
            for head in range(case.heads):
                kv_head = head * case.kv_heads // case.heads
                scores = keys[first : position + 1, kv_head] @ q[token, head].double().cpu() * case.dim**-0.5
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                weights = torch.exp(scores)
                total = weights.sum()
                if sinks is not None:
                    total = total + torch.exp(sinks[head].double().cpu())
                out[token, head] = (weights[:, None] * values[first : position + 1, kv_head]).sum(0) / total
            token += 1
    return out


DECODE = [
    Case(((1, 1), (1, 17), (1, 150))),
    Case(((1, 300), (1, 5)), padded_rows=1, dtype=torch.bfloat16, heads=7, kv_heads=1, dim=80),
    Case(((1, 290),), dtype=torch.float16, heads=2, kv_heads=2, dim=64, window=100, sinks=True),
    Case(((1, 200), (1, 260)), softcap=5.0, sinks=True, dim=96, heads=3, kv_heads=1, block_tokens=32),
    Case(((1, 70), (1, 140)), fp8=True, dtype=torch.bfloat16),
    Case(((1, 140),), fp8=True, dim=128, window=9),
    Case(((1, 40),), dim=256, heads=2, kv_heads=1),
]
MIXED = [
    Case(((5, 5), (1, 40), (9, 50), (3, 3))),
    Case(((33, 70), (1, 33)), padded_rows=1, dtype=torch.bfloat16, heads=6, kv_heads=2, dim=80),
    Case(((40, 90), (2, 20)), dtype=torch.float16, window=7, sinks=True, heads=2, kv_heads=2, dim=64),
    Case(((20, 100), (1, 1)), softcap=4.0, sinks=True, heads=5, kv_heads=1, dim=96),
    Case(((6, 30),), fp8=True, dtype=torch.bfloat16),
    Case(((4, 35), (3, 8)), fp8=True, dim=128),
    Case(((3, 20),), dim=256, heads=2, kv_heads=1),
]


@pytest.mark.parametrize("case", DECODE + MIXED)
def test_kernel_equals_twin(device: torch.device, case: Case) -> None:
    batch = _batch(case, device)
    twin = torch.full_like(batch.out, torch.nan)
    scratch = Scratch.allocate(device, partial_elements=1 << 19, num_counters=256)
    gpu.paged_attention(batch.out, *batch.arguments, scratch)
    attention.paged_attention_torch(twin, *batch.arguments, None)
    torch.testing.assert_close(batch.out, twin, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype], equal_nan=True)
    assert scratch.counters.count_nonzero() == 0
    assert batch.out.isnan().flatten(1).any(1).sum() == case.padded_rows


@pytest.mark.parametrize("rows", [((1, 40),), ((3, 40),)], ids=["decode", "mixed"])
def test_queries_beyond_fp16_meet_keys_of_eight_bits(device: torch.device, rows: tuple[tuple[int, int], ...]) -> None:
    """bf16 queries are multiplied with such keys in fp16, whose range is smaller. One channel decides which key has all the weight."""
    batch = _batch(Case(rows, fp8=True, dtype=BF16), device)
    batch.arguments.q.zero_()
    batch.arguments.q[:, :, 3] = 1e30
    gpu.paged_attention(batch.out, *batch.arguments, Scratch.allocate(device, partial_elements=1 << 19))
    torch.testing.assert_close(batch.out.double().cpu(), _reference_of_one_channel(batch, 3), rtol=0.02, atol=0.02)


def _reference_of_one_channel(batch: Batch, channel: int) -> torch.Tensor:
    """The mean of the values whose keys are largest in `channel`, for each query of the first row."""
    case = batch.case
    ((count, context),) = case.rows
    out = torch.empty(count, case.heads, case.dim, dtype=torch.float64)
    for index in range(count):
        for head in range(case.heads):
            kv_head = head * case.kv_heads // case.heads
            keys = batch.keys[0][: context - count + index + 1, kv_head, channel]
            out[index, head] = batch.values[0][: len(keys), kv_head][keys == keys.max()].mean(0)
    return out


@pytest.mark.parametrize("case", DECODE[:4] + MIXED)
def test_twin_against_float64(case: Case) -> None:
    batch = _batch(case, torch.device("cpu"))
    attention.paged_attention_torch(batch.out, *batch.arguments, None)
    torch.testing.assert_close(
        batch.out.double(), _reference(batch), rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype], equal_nan=True
    )


@pytest.mark.parametrize("partial_elements", [1, 1 << 19])
def test_split_keys_or_not_is_the_same(device: torch.device, partial_elements: int) -> None:
    """Too little scratch memory means one program a row; either way the result is the twin's."""
    batch = _batch(Case(((1, 500), (1, 130))), device)
    twin = torch.empty_like(batch.out)
    gpu.paged_attention(batch.out, *batch.arguments, Scratch.allocate(device, partial_elements=partial_elements))
    attention.paged_attention_torch(twin, *batch.arguments, None)
    torch.testing.assert_close(batch.out, twin, rtol=2e-5, atol=2e-5)


def test_splits_fill_the_device_and_no_more() -> None:
    assert gpu.num_key_splits(1, 8, 1 << 20, 132) == 64
    assert gpu.num_key_splits(1, 8, 100, 132) == 1
    assert gpu.num_key_splits(256, 8, 4096, 132) == 1
    assert gpu.num_key_splits(8, 8, 1024, 132) == 8


def _lengths(count: int, longest: int) -> tuple[tuple[int, int], ...]:
    return tuple(
        (1, int(length))
        for length in torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(count))
    )


CUT = attention_cuda.Cut
CUDA = [
    (
        Case(((1, 1), (1, 17), (1, 150)), dtype=BF16, heads=8, kv_heads=2, dim=64),
        (CUT(2, 3, 1, 8, 3), CUT(1, 9, 2, 4, 4)),
    ),
    (
        Case(((1, 300),), dtype=BF16, heads=32, kv_heads=8, dim=128),
        (CUT(1, 1, 24, 8, 3), CUT(4, 5, 4, 4, 3), CUT(8, 3, 1, 8, 3)),
    ),
    (Case(((1, 300), (1, 5)), padded_rows=1, dtype=BF16, heads=7, kv_heads=1, dim=80), (CUT(1, 4, 1, 8, 3),)),
    (
        Case(((1, 290), (1, 33), (1, 260)), dtype=FP16, heads=12, kv_heads=4, dim=64, window=37, sinks=True),
        (CUT(4, 5, 2, 8, 3),),
    ),
    (
        Case(((1, 200), (1, 260)), softcap=5.0, sinks=True, dim=96, heads=3, kv_heads=1, block_tokens=32, dtype=FP16),
        (CUT(1, 9, 1, 8, 3),),
    ),
    (Case(((1, 140), (1, 600)), dtype=BF16, dim=128, heads=24, kv_heads=2), (CUT(2, 13, 1, 8, 2),)),
    (Case(((1, 40), (1, 170)), dim=256, heads=2, kv_heads=1, dtype=FP16), (CUT(1, 2, 3, 4, 2),)),
    (Case(((1, 4000), (1, 70)), dtype=BF16, heads=8, kv_heads=2, dim=128), (CUT(1, 40, 8, 8, 3), CUT(2, 66, 24, 4, 3))),
    (
        Case(_lengths(60, 600), padded_rows=4, dtype=BF16, heads=32, kv_heads=8, dim=128),
        (CUT(2, 66, 32, 4, 3), CUT(4, 200, 5, 4, 3), CUT(1, 17, 1, 8, 3)),
    ),
    (
        Case(_lengths(200, 500), padded_rows=30, dtype=BF16, heads=8, kv_heads=2, dim=64),
        (CUT(1, 132, 24, 4, 4), CUT(2, 60, 7, 8, 3)),
    ),
    (Case(_lengths(700, 40), dtype=FP16, heads=2, kv_heads=2, dim=64), (CUT(2, 132, 24, 4, 4), CUT(1, 700, 1, 8, 3))),
    (
        Case(((1, 1), (1, 17), (1, 150)), dtype=BF16, heads=8, kv_heads=2, dim=64, fp8=True),
        (CUT(2, 3, 1, 8, 3), CUT(1, 9, 2, 4, 8)),
    ),
    (
        Case(((1, 290), (1, 33), (1, 260)), dtype=FP16, heads=36, kv_heads=4, dim=96, window=37, sinks=True, fp8=True),
        (CUT(4, 5, 2, 8, 3),),
    ),
    (
        Case(_lengths(60, 600), padded_rows=4, dtype=BF16, heads=32, kv_heads=8, dim=128, fp8=True),
        (CUT(2, 66, 32, 4, 6), CUT(1, 17, 1, 8, 3)),
    ),
    (Case(((1, 40), (1, 170)), dim=256, heads=2, kv_heads=1, dtype=BF16, softcap=5.0, fp8=True), (CUT(1, 2, 3, 4, 4),)),
]


@pytest.mark.parametrize(("case", "cuts"), CUDA)
def test_cuda_decode_equals_twin(device: torch.device, case: Case, cuts: tuple[attention_cuda.Cut, ...]) -> None:
    if device.type == "cpu" or attention_cuda.module(device, 64, BF16, 1, CUT(1, 1, 1, 8, 3)) is None:
        pytest.skip("needs a GPU that the kernel is made for")
    batch = _batch(case, device)
    twin = torch.full_like(batch.out, torch.nan)
    attention.paged_attention_torch(twin, *batch.arguments, None)
    serves_any = case.fp8 or len(case.rows) * case.kv_heads <= attention_cuda.MAX_PAIRS
    for how in (*cuts, None) if serves_any else cuts:
        scratch = Scratch.allocate(device)
        scratch.partials.fill_(torch.nan)
        out = torch.full_like(twin, torch.nan)
        torch.cuda.synchronize()
        assert attention_cuda.decode_attention(
            out,
            *batch.arguments[:11],
            *batch.arguments[12:],
            scratch,
            how,
        )
        torch.testing.assert_close(out, twin, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype], equal_nan=True)
        assert scratch.counters.count_nonzero() == 0


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("count", "length"), [(1, 300), (3, 1), (8, 330), (64, 200)])
def test_overlapped_decode_sees_the_newest_token(device: torch.device, count: int, length: int, *, fp8: bool) -> None:
    """Whatever stood in its place before: the ring is filled while the kernel that writes it may still run."""
    if device.type == "cpu" or attention_cuda.module(device, 64, BF16, 1, CUT(1, 1, 1, 8, 3)) is None:
        pytest.skip("needs a GPU that the kernel is made for")
    rows = tuple((1, length) for _ in range(count))
    batch = _batch(Case(rows, dtype=BF16, heads=32, kv_heads=8, dim=128, fp8=fp8), device)
    k, v, unit, table, slots = batch.arguments[1:6]
    page = table[slots[:count].long(), (length - 1) // 16].long()
    places = page * unit + (length - 1) % 16 * 1024
    newest = (places[:, None] + torch.arange(1024, device=device)).flatten()
    qkv = torch.randn(count, 48 * 128, device=device).to(BF16)
    angles = torch.rand(count, 64, device=device)
    q = torch.empty(count, 32, 128, dtype=BF16, device=device)
    scratch = Scratch.allocate(device)

    def step() -> None:
        rope_and_cache(
            q,
            qkv,
            angles.cos().to(BF16),
            angles.sin().to(BF16),
            places,
            k,
            v,
            num_q_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rotary_dim=128,
            interleaved=False,
            q_norm=None,
            k_norm=None,
            norm_eps=0.0,
            norm_plus_one=False,
        )
        gpu.paged_attention(batch.out, q, *batch.arguments[1:], scratch)

    step()
    twin = torch.empty_like(q)
    attention.paged_attention_torch(twin, q, *batch.arguments[1:], None)
    stale = torch.tensor(48.0, device=device).to(k.dtype)
    for _ in range(20):
        for plane in (k, v):
            plane.view(torch.int8 if fp8 else BF16)[newest] = stale.view(torch.int8 if fp8 else BF16)
        batch.out.fill_(torch.nan)
        step()
        torch.testing.assert_close(batch.out, twin, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_cuts_fit(head_dim: int) -> None:
    for num_rows in (1, 2, 8, 16, 17, 33, 64, 512):
        for kv_heads in (1, 2, 3, 5, 6, 8, 32):
            for group in (1, 4, 7, 8, 16):
                if num_rows * kv_heads > attention_cuda.MAX_PAIRS or (group > 8 and head_dim == 256):
                    continue
                for longest, key_bytes in ((1, 2), (1024, 2), (131072, 2), (1024, 1)):
                    how = attention_cuda.cut(num_rows, kv_heads, group, head_dim, longest, 132, key_bytes)
                    assert kv_heads % how.heads_each == 0
                    assert how.warps % how.heads_each == 0
                    if key_bytes == 2:
                        assert how.blocks >= num_rows
                        assert how.blocks * kv_heads // how.heads_each >= min(132, num_rows * (longest // 16 // 12))
                    else:
                        assert 1 <= how.blocks * kv_heads // how.heads_each <= max(132, kv_heads)
                    assert how.shared_bytes(num_rows, group, head_dim, key_bytes) <= SHARED_BYTES
