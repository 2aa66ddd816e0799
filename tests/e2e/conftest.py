"""A whole Repertory as processes, once a module, and what Hugging Face says to the same prompts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import stack
from tests.support.checkpoints import tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three checkpoints with different weights, so that an answer tells which model gave it."""
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_llama(base / name, seed) for seed, name in enumerate(("ada", "bob", "cyd"))}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Stack]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with stack.serve("--memory", "64MiB", log=log) as running:
        yield running


def greedy(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """transformers' answer to a text prompt, special tokens left out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
