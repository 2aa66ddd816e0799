"""Rows that answer with a vector: it is transformers' last hidden state, beside rows that generate."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from runtime.types import Checkpoint, FinishReason, GenerationRequest, LogprobParams, SamplingParams, StopParams
from tests.support.families import family
from tests.support.oracle import prompts, reference
from tests.support.real_engine import run_engine


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "fuse"), [("llama", True), ("llama", False), ("gpt2", False), ("gemma3", True)])
def test_vector_equals_transformers_last_hidden_state(name: str, fuse: bool, device: str, tmp_path: Path) -> None:
    model = family(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), tuple(map(str, tmp_path.glob("*.safetensors"))), dtype="float32")
    asked: list[GenerationRequest] = []
    for index, prompt in enumerate(prompts(5, 8)):  # some are longer than a step
        pooling = index % 2 == 0
        stop = StopParams(0 if pooling else 8, ignore_eos=True)
        request = GenerationRequest(
            prompt=tuple(prompt), sampling=SamplingParams(temperature=0.0), stop=stop, pooling=pooling
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
            hidden = model(torch.tensor([request.prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
        assert len(rows) == 1
        assert (rows[0].tokens, rows[0].finish) == ((), FinishReason.LENGTH)
        assert rows[0].vector is not None
        np.testing.assert_allclose(np.frombuffer(rows[0].vector, np.float32), hidden.numpy(), atol=2e-4, rtol=1e-3)
        if request.logprobs.prompt is not None:
            assert rows[0].prompt_logprobs is not None
            assert len(rows[0].prompt_logprobs) == len(request.prompt)
