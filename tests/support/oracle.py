"""The oracle of greedy text: transformers' own `generate`, and prompts to ask it."""

import random

import torch
from transformers import PreTrainedModel

from tests.support.families import VOCAB


def reference(model: PreTrainedModel, prompt: list[int], max_new: int) -> list[int]:
    """Return the `max_new` tokens of transformers' greedy `generate`."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def prompts(seed: int, count: int) -> list[list[int]]:
    """Return random prompts whose lengths lie on both sides of block and step bounds."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 15, 16, 17, 40, 63, 90)))] for _ in range(count)]
