"""Rows that answer with a vector: it is made of transformers' last hidden states, beside rows that generate."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from runtime.types import (
    Checkpoint,
    FinishReason,
    GenerationRequest,
    LogprobParams,
    Pooling,
    SamplingParams,
    StopParams,
)
from tests.support.families import family
from tests.support.oracle import prompts, reference
from tests.support.real_engine import RealEngine, run_engine


def pooled_as_reference(states: torch.Tensor, modes: Sequence[Pooling]) -> np.ndarray:
    """Return the vectors of one text's hidden states [N, hidden size], as sentence-transformers' Pooling computes them from a padded batch."""
    mask = torch.ones(len(states), 1)
    weights = torch.arange(1, len(states) + 1).float().unsqueeze(-1) * mask
    found = {
        Pooling.FIRST: states[0],
        Pooling.MAX: states.masked_fill(mask == 0, -1e9).max(0).values,
        Pooling.MEAN: (states * mask).sum(0) / mask.sum(0),
        Pooling.MEAN_SQRT_LEN: (states * mask).sum(0) / torch.sqrt(mask.sum(0)),
        Pooling.WEIGHTED_MEAN: (states * weights).sum(0) / weights.sum(0),
        Pooling.LAST: states[-1],
    }
    joined: np.ndarray = torch.cat([found[mode] for mode in modes]).numpy()
    return joined


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "fuse"), [("llama", True), ("llama", False), ("gpt2", False), ("gemma3", True)])
@pytest.mark.parametrize("pooling", [*((mode,) for mode in Pooling), (Pooling.FIRST, Pooling.LAST), tuple(Pooling)])
def test_vector_is_pooled_from_transformers_hidden_states(
    name: str, fuse: bool, pooling: tuple[Pooling, ...], device: str, tmp_path: Path
) -> None:
    model = family(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), tuple(map(str, tmp_path.glob("*.safetensors"))), dtype="float32")
    asked: list[GenerationRequest] = []
    for index, prompt in enumerate(prompts(5, 8)):  # some are longer than a step
        pooled = pooling if index % 2 == 0 else ()
        stop = StopParams(0 if pooled else 8, ignore_eos=True)
        request = GenerationRequest(
            prompt=tuple(prompt), sampling=SamplingParams(temperature=0.0), stop=stop, pooling=pooled
        )
        asked.append(request)
    asked[2] = msgspec.structs.replace(asked[2], logprobs=LogprobParams(prompt=0))
    run = run_engine(checkpoint, asked, device=device, fuse=fuse)
    assert run.path.startswith("fused" if fuse else "unfused")
    for request, rows, text in zip(asked, run.rows, run.texts(), strict=True):
        if not request.pooling:
            assert text == reference(model, list(request.prompt), 8)
            assert all(row.vector is None for row in rows)
            continue
        with torch.inference_mode():
            states = model(torch.tensor([request.prompt]), output_hidden_states=True).hidden_states[-1][0]
        assert len(rows) == 1
        assert (rows[0].tokens, rows[0].finish) == ((), FinishReason.LENGTH)
        assert rows[0].vector is not None
        np.testing.assert_allclose(
            np.frombuffer(rows[0].vector, np.float32), pooled_as_reference(states, pooling), atol=2e-4, rtol=1e-3
        )
        if request.logprobs.prompt is not None:
            assert rows[0].prompt_logprobs is not None
            assert len(rows[0].prompt_logprobs) == len(request.prompt)


def test_prompts_that_share_a_beginning_are_pooled_whole(tmp_path: Path) -> None:
    """The prefix cache, which leaves tokens out, must not change a mean."""
    model = family("llama")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), tuple(map(str, tmp_path.glob("*.safetensors"))), dtype="float32")
    prompt = tuple(range(1, 101))
    engine = RealEngine()
    engine.load("m", checkpoint)
    for pooling in Pooling:
        request = GenerationRequest(
            prompt=prompt, sampling=SamplingParams(temperature=0.0), stop=StopParams(0), pooling=(pooling,)
        )
        [[first], [second]] = [engine.run([("m", request)])[0] for _ in range(2)]
        assert first.vector is not None
        assert second.vector is not None
        np.testing.assert_allclose(
            np.frombuffer(first.vector, np.float32), np.frombuffer(second.vector, np.float32), atol=1e-5
        )
        assert bool(second.cached_tokens) == (pooling is Pooling.LAST)
    engine.close()
