"""Attention on a CPU, with its tiles and gathered pages, equals the plain twin of the kernel for every shape of batch."""

import random

import pytest
import torch

from runtime.engine.kernels.attention import paged_attention_torch
from runtime.engine.kernels.rope import rope_and_cache_torch
from runtime.engine.model.cpu import attention_plan
from runtime.engine.model.run.attention import attend, rope_write, write_kv
from runtime.engine.model.run.step import AttentionSpec, KvPlanes, RopeSpec, StepContext

BLOCK = 16


def a_step(seed: int, heads: int, dim: int, dtype: torch.dtype, contiguous: bool) -> tuple[StepContext, int]:
    """Random rows over scrambled (or neighbouring) pages whose unit is a third of a block; planes full of numbers."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    unit = BLOCK * heads * dim // 4
    shapes = [(rng.randint(1, 100), 1) for _ in range(rng.randint(0, 9))]
    shapes += [(length, rng.randint(1, length)) for length in (rng.randint(2, 90) for _ in range(rng.randint(0, 4)))]
    shapes = shapes or [(33, 1)]
    width = 8
    pages = list(range(len(shapes) * width))
    if not contiguous:
        rng.shuffle(pages)
    table = torch.tensor(pages, dtype=torch.int32).view(len(shapes), width) * 4
    order = list(range(len(shapes)))
    rng.shuffle(order)
    table = table[torch.tensor(order).argsort()]
    plane = torch.randn(2, (len(pages) + 1) * 4 * unit).to(dtype)
    starts = torch.tensor([0, *(count for _, count in shapes)]).cumsum(0).int()
    contexts = torch.tensor([length for length, _ in shapes], dtype=torch.int32)
    slots = [
        int(table[row, p // BLOCK]) * unit + p % BLOCK * heads * dim
        for row, (length, count) in zip(order, shapes, strict=True) for p in range(length - count, length)
    ]  # fmt: skip
    step = StepContext(
        [KvPlanes(plane[0, 8:], plane[1, 8:], unit)],
        table,
        torch.tensor(order, dtype=torch.int32),
        starts,
        contexts,
        torch.tensor(slots),
        BLOCK,
        max(count for _, count in shapes),
        int(contexts.max()),
    )
    return step, int(starts[-1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(0, 0.0, False), (24, 0.0, False), (1, 0.0, False), (0, 5.0, False), (24, 5.0, True), (0, 0.0, True)],
)
def test_equals_the_twin(seed: int, window: int, softcap: float, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "QUERY_TILE", 16)
    heads, group, dim = (2, 3, 20) if seed % 2 else (1, 1, 32)
    step, num_tokens = a_step(seed, heads, dim, torch.float32, contiguous=seed % 3 == 0)
    spec = AttentionSpec(0, heads * group, heads, dim, 0.3, window, softcap)
    q = torch.randn(num_tokens, heads * group, dim)
    k, v = torch.randn(2, num_tokens, heads, dim)
    write_kv(step, spec, k, v)
    sink = torch.randn(heads * group) if sinks else None
    planes = step.planes[0]
    where = step.slots[:, None] + torch.arange(heads * dim)
    assert torch.equal(planes.k[where], k.flatten(1))
    assert torch.equal(planes.v[where], v.flatten(1))
    expected = torch.empty_like(q)
    paged_attention_torch(
        expected, q, planes.k, planes.v, planes.page_unit, step.page_table, step.row_slots, step.query_starts, step.context_lens, BLOCK, heads, 0.3,
        step.max_query_len, step.max_context_len, window, softcap, sink, None,
    )  # fmt: skip
    torch.testing.assert_close(attend(step, spec, q, sinks=sink), expected, atol=2e-6, rtol=1e-5)
    again = torch.empty_like(q)
    assert attend(step, spec, q, out=again, sinks=sink) is again  # a second layer of the same step reads the same plan


def test_fp8_planes_hold_what_fits_in_them() -> None:
    step, num_tokens = a_step(1, 2, 16, torch.float8_e4m3fn, contiguous=False)
    spec = AttentionSpec(0, 4, 2, 16, 0.25)
    q = torch.randn(num_tokens, 4, 16)
    k, v = torch.randn(2, num_tokens, 2, 16)
    write_kv(step, spec, k, v)
    wide = [KvPlanes(p.k.float(), p.v.float(), p.page_unit) for p in step.planes]
    reference = StepContext(wide, *(getattr(step, name) for name in StepContext.__slots__[1:9]))
    torch.testing.assert_close(attend(step, spec, q), attend(reference, spec, q), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(20), RopeSpec(8), RopeSpec(12, interleaved=True), RopeSpec(20, norm_eps=1e-5), RopeSpec(20, norm_eps=1e-5, norm_plus_one=True),
    ],
)  # fmt: skip
def test_rope_and_write_equal_the_twin(rope: RopeSpec, dtype: torch.dtype) -> None:
    step, num_tokens = a_step(1, 2, 20, dtype, contiguous=False)
    spec = AttentionSpec(0, 6, 2, 20, 0.3)
    planes = step.planes[0]
    qkv = torch.randn(num_tokens, 10 * 20).to(dtype)
    angles = torch.randn(num_tokens, rope.rotary_dim // 2)
    norms = torch.rand(2, 20).to(dtype) + 0.5 if rope.norm_eps else (None, None)
    expected = torch.empty(num_tokens, 6, 20, dtype=dtype)
    k, v = planes.k.clone(), planes.v.clone()
    rope_and_cache_torch(
        expected, qkv, angles.cos(), angles.sin(), step.slots, k, v, 6, 2, 20, rope.rotary_dim, rope.interleaved, norms[0], norms[1], rope.norm_eps,
        rope.norm_plus_one,
    )  # fmt: skip
    q = rope_write(step, spec, rope, qkv, angles.cos(), angles.sin(), norms[0], norms[1])
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(planes.k, k)
    assert torch.equal(planes.v, v)
