"""Vectors through the mesh and the engine are pooled from transformers' last hidden states, of length 1."""

import json
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.support import stack
from tests.support.checkpoints import tiny_llama


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_vectors_are_pooled_from_transformers_hidden_states(served: stack.Stack, tmp_path: Path, pooling: str) -> None:
    folder = tiny_llama(tmp_path / f"emb-{pooling}", seed=8)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    stack.load_and_wait(served, f"emb-{pooling}", str(folder))
    texts = ["The company keeps many plays ready.", "é", "a" * 300]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model=f"emb-{pooling}", input=texts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, entry in zip(texts, answer.data, strict=True):
        with torch.inference_mode():
            output = model(torch.tensor([tokenizer.encode(text).ids]), output_hidden_states=True)
        states = output.hidden_states[-1][0]
        hidden = (states.mean(0) if pooling == "mean" else states[-1]).numpy()
        np.testing.assert_allclose(entry.embedding, hidden / np.linalg.norm(hidden), atol=1e-4)
