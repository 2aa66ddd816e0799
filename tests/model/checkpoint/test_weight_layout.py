"""A layout covers every tensor once, aligned and in layer order; joined matrices are views of neighbours; KV pages do not overlap."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint.weight_layout import ALIGNMENT, Join, TensorSpec, lay_out
from runtime.engine.model.run.kv_geometry import AttentionGeometry, kv_geometry, kv_planes
from runtime.errors import LoadFailed

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int8])


@st.composite
def models(draw: st.DrawFn) -> tuple[list[TensorSpec], list[Join], int]:
    num_layers = draw(st.integers(1, 5))
    specs = [TensorSpec("embed", (draw(st.integers(1, 50)), 8), torch.float32, -1)]
    joins = []
    for layer in range(num_layers):
        width, dtype = draw(st.integers(1, 70)), draw(DTYPES)
        members = draw(st.integers(1, 4))
        names = tuple(f"{layer}.part{i}" for i in range(members))
        specs += [TensorSpec(name, (draw(st.integers(1, 9)), width), dtype, layer) for name in names]
        if members > 1:
            joins.append(Join(f"{layer}.whole", names))
        specs.append(TensorSpec(f"{layer}.scalar", (), torch.float32, layer))
    specs.append(TensorSpec("norm", (draw(st.integers(1, 300)),), torch.bfloat16, num_layers))
    return draw(st.permutations(specs)), joins, num_layers


@given(models(), st.integers(1, 5000))
@settings(deadline=None)
def test_layout(model: tuple[list[TensorSpec], list[Join], int], min_group_bytes: int) -> None:
    specs, joins, num_layers = model
    layout = lay_out(specs, joins, num_layers, min_group_bytes)
    by_name = {tensor.name: tensor for tensor in layout.tensors}
    assert sorted(by_name) == sorted(spec.name for spec in specs)
    for spec in specs:
        assert (by_name[spec.name].shape, by_name[spec.name].dtype) == (spec.shape, spec.dtype)
        assert by_name[spec.name].offset % spec.dtype.itemsize == 0
    for a, b in pairwise(layout.tensors):
        assert a.offset + a.size_bytes <= b.offset
    assert layout.tensors[-1].offset + layout.tensors[-1].size_bytes <= layout.size_bytes

    inside = {name for join in joins for name in join.members[1:]}
    assert all(tensor.offset % ALIGNMENT == 0 for tensor in layout.tensors if tensor.name not in inside)
    for join, joined in zip(
        sorted(joins, key=lambda j: j.name), sorted(layout.joined, key=lambda t: t.name), strict=True
    ):
        members = [by_name[name] for name in join.members]
        assert joined.offset % ALIGNMENT == 0
        assert joined.shape == (sum(member.shape[0] for member in members), *members[0].shape[1:])
        assert [member.offset for member in members] == [
            joined.offset + sum(before.size_bytes for before in members[:index]) for index in range(len(members))
        ]

    # a layer is complete with its group, and groups follow layers
    assert layout.group_ends[-1] == layout.size_bytes
    assert list(layout.group_ends) == sorted(set(layout.group_ends))
    assert len(layout.layer_groups) == num_layers + 2
    for spec in specs:
        group = layout.layer_groups[spec.layer + 1]
        assert by_name[spec.name].offset + spec.size_bytes <= layout.group_ends[group]
    starts = [0, *layout.group_ends]
    assert all(end - start >= min_group_bytes for start, end in list(zip(starts, layout.group_ends, strict=False))[:-1])


def test_members_must_fit_together() -> None:
    specs = [TensorSpec("a", (2, 4), torch.float32, 0), TensorSpec("b", (2, 5), torch.float32, 0)]
    with pytest.raises(ValueError, match="one matrix"):
        lay_out(specs, [Join("ab", ("a", "b"))], 1, 1)
    with pytest.raises(ValueError, match="twice"):
        lay_out([specs[0], specs[0]], [], 1, 1)


@given(
    num_layers=st.integers(1, 6),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([8, 12, 64, 80]),
    block_log2=st.integers(4, 6),
    item=st.sampled_from([torch.float32, torch.bfloat16]),
    slab_log2=st.integers(15, 18),
    num_slabs=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_kv_blocks_cover_slabs_without_overlap(
    num_layers: int, heads: int, head_dim: int, block_log2: int, item: torch.dtype, slab_log2: int, num_slabs: int
) -> None:
    shape = AttentionGeometry(num_layers, heads, head_dim)
    block_tokens, slab_bytes = 2**block_log2, 2**slab_log2
    if 2 * num_layers * block_tokens * shape.token_stride * item.itemsize > slab_bytes:
        with pytest.raises(LoadFailed, match=f"slab_bytes is {slab_bytes}"):
            kv_geometry("m", shape, block_tokens, item.itemsize, slab_bytes, num_slabs)
        return
    kv = kv_geometry("m", shape, block_tokens, item.itemsize, slab_bytes, num_slabs)
    memory = torch.zeros(num_slabs * slab_bytes, dtype=torch.uint8)
    block = block_tokens * shape.token_stride
    written = 0
    for planes in kv_planes(memory, kv, shape, item):
        for slab in range(num_slabs):
            for place in range(kv.blocks_per_slab):
                start = (slab * kv.pages_per_slab + place * kv.pages_per_block) * planes.page_unit
                for plane in (planes.k, planes.v):
                    plane[start : start + block] += 1
                    written += block
                    in_slab = (plane.storage_offset() + start) * item.itemsize
                    assert in_slab // slab_bytes == (in_slab + block * item.itemsize - 1) // slab_bytes == slab
    counts = memory.view(item)
    assert int(counts.max()) == 1
    assert int(counts.sum(dtype=torch.float64)) == written
    assert kv.bytes_per_token * block_tokens * kv.blocks_per_slab <= slab_bytes
