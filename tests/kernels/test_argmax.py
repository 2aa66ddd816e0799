"""The largest logit: the Triton kernel against torch, ties and padded samples included."""

import pytest
import torch

from runtime.engine.interfaces import NO_TOKEN
from runtime.engine.kernels import argmax
from runtime.engine.kernels import inputs as layout
from runtime.engine.kernels.gpu import argmax as gpu
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.kernels.step_inputs import StepInputs

SIZES = ((1, 1, 5000), (3, 4, 9001), (2, 2, 100))


@pytest.mark.parametrize(
    ("num_samples", "padded", "vocab", "dtype"),
    [
        *((*sizes, dtype) for sizes in SIZES for dtype in (torch.bfloat16, torch.float32)),
        (300, 300, 257, torch.bfloat16),
        pytest.param(300, 300, 257, torch.float32, marks=pytest.mark.long),
    ],
)
def test_kernel_equals_twin(
    device: torch.device, num_samples: int, padded: int, vocab: int, dtype: torch.dtype
) -> None:
    logits = torch.randn(padded, vocab, device=device).to(dtype)  # bf16: many ties
    logits[0, vocab // 2 :] = float("-inf")
    upload = torch.zeros(layout.HEADER_WORDS, dtype=torch.int32, device=device)
    upload[layout.NUM_SAMPLES], upload[layout.RING_LINE] = num_samples, 2
    inputs = StepInputs.allocate(device, padded, padded)
    inputs.sample_rows[:num_samples] = torch.randperm(400)[:num_samples].int().to(device)
    inputs.sample_rows[num_samples:] = -1
    found = []
    for run in ("twin", "kernel"):
        drawn = torch.full((padded,), -7, dtype=torch.int64, device=device)
        last, ring = (
            torch.full((400,), -7, dtype=torch.int64, device=device),
            torch.full((4, padded), -7, dtype=torch.int64, device=device),
        )
        if run == "twin":
            drawn[:] = torch.tensor([int((row == row.max()).nonzero()[0, 0]) for row in logits], device=device)
            layout.commit_draws_torch(drawn, upload, inputs, last, ring, padded)
        else:
            scratch = Scratch.allocate(device)
            gpu.draw_largest(logits, drawn, upload, inputs, last, ring, padded, scratch)
            assert not scratch.counters.any()
        found.append((drawn, last, ring))
    for twin, kernel in zip(*found, strict=True):
        assert torch.equal(twin, kernel)


@pytest.mark.parametrize("vocab", [100, 9001])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_row_without_a_finite_maximum_draws_no_token(device: torch.device, bad: float, vocab: int) -> None:
    logits = torch.randn(6, vocab, device=device)
    best = logits.argmax(1).tolist()
    logits[1] = bad
    logits[4] = torch.where(torch.arange(vocab, device=device) == vocab - 3, float("nan"), logits[4])
    upload = torch.zeros(layout.HEADER_WORDS, dtype=torch.int32, device=device)
    upload[layout.NUM_SAMPLES], upload[layout.RING_LINE] = 5, 1
    inputs = StepInputs.allocate(device, 6, 6)
    inputs.sample_rows[:] = torch.tensor([3, 2, 7, 1, 0, -1], device=device)
    expected = [best[0], NO_TOKEN, best[2], best[3], NO_TOKEN]
    assert argmax.largest(logits[:5]).tolist() == expected
    for run in ("twin", "kernel"):
        drawn = argmax.largest(logits)
        last, ring = (torch.full(size, 9, dtype=torch.int64, device=device) for size in ((8,), (2, 6)))
        if run == "twin":
            layout.commit_draws_torch(drawn, upload, inputs, last, ring, 6)
        else:
            drawn.fill_(-7)
            gpu.draw_largest(logits, drawn, upload, inputs, last, ring, 6, Scratch.allocate(device))
        assert drawn[:5].tolist() == expected
        assert ring.tolist() == [[9] * 6, [*expected, 9]]
        assert last.tolist() == [0, best[3], 0, best[0], 9, 9, 9, best[2]]


def test_argmax_on_a_cpu() -> None:
    upload = torch.zeros(layout.HEADER_WORDS, dtype=torch.int32)
    upload[layout.NUM_SAMPLES] = 2
    inputs = StepInputs.allocate(torch.device("cpu"), 2, 2)
    inputs.sample_rows[:] = torch.tensor([5, 3])
    drawn, last, ring = (
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(8, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.int64),
    )
    argmax.draw_largest(torch.eye(4)[[2, 1]], drawn, upload, inputs, last, ring, num_samples=2, scratch=None)
    assert (drawn.tolist(), last.tolist(), ring[0].tolist()) == ([2, 1], [0, 0, 0, 1, 0, 2, 0, 0], [2, 1])
