"""The image of an adapter that is cut for one of several devices holds the rows and columns of its channels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoint.adapter_layout import ALIGNMENT_BYTES, AdapterTarget, Channels, ImageLayout, cut_text
from runtime.checkpoint.safetensors_index import StoredTensor


@st.composite
def _channels(draw: st.DrawFn) -> Channels:
    """Parts of up to three slices, as a device has of q, k and v."""
    ranges, at = [], 0
    for full in draw(st.lists(st.sampled_from([2, 4, 12]), min_size=1, max_size=3)):
        parts = draw(st.sampled_from([1, 2]))
        ranges.append((at + draw(st.integers(0, parts - 1)) * full // parts, full // parts))
        at += full
    return Channels(at, tuple(ranges))


@given(_channels(), _channels(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 9))
def test_image_holds_the_channels_of_every_matrix(
    inputs: Channels, outputs: Channels, dtype: torch.dtype, rank: int
) -> None:
    a = torch.arange(rank * inputs.full).view(rank, inputs.full).to(dtype)
    b = -torch.arange(outputs.full * rank).view(outputs.full, rank).to(dtype)
    file = torch.cat([matrix.reshape(-1).view(torch.uint8) for matrix in (a, b)])
    layout = ImageLayout()
    stored_a = StoredTensor("a", "file", 0, tuple(a.shape), dtype)
    stored_b = StoredTensor("b", "file", a.nbytes, tuple(b.shape), dtype)
    a_at, b_at = layout.add_columns(stored_a, inputs), layout.add_rows(stored_b, outputs)
    image = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    for span in layout.spans:
        image[span.place : span.place + span.size_bytes] = file[span.at : span.at + span.size_bytes]
    for at, wanted in (
        (a_at, torch.cat([a[:, start : start + length] for start, length in inputs.ranges], 1)),
        (b_at, torch.cat([b[start : start + length] for start, length in outputs.ranges])),
    ):
        assert at % ALIGNMENT_BYTES == 0
        assert torch.equal(image[at : at + wanted.nbytes].view(dtype).view(wanted.shape), wanted)


def test_image_of_a_whole_adapter_is_read_in_one_piece() -> None:
    layout = ImageLayout()
    for number, shape in enumerate(((16, 64), (64, 16), (16, 64))):
        stored = StoredTensor(str(number), "file", 512 + 2048 * number, shape, torch.bfloat16)
        layout.add_rows(stored, Channels.whole(shape[0]))
    assert layout.spans == [(512, 0, 3 * 2048)]


def test_cut_text_differs_between_devices() -> None:
    whole, left, right = Channels.whole(8), Channels(8, ((0, 4),)), Channels(8, ((4, 4),))
    assert cut_text([AdapterTarget("q", whole, whole)]) == ""
    texts = {cut_text([AdapterTarget("q", *pair)]) for pair in ((whole, left), (whole, right), (left, whole))}
    assert len(texts) == 3
