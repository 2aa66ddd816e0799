"""A request against its model's limits: prompt and output lengths, seeds, and what the engine's arithmetic can hold.

Every refusal names the model, the limit and the value.
"""

import secrets
from collections.abc import Sequence

import msgspec

from runtime.errors import ContextExceeded, InvalidRequest
from runtime.interfaces import ServedModel
from runtime.types import SamplingParams

SEED_BITS = 32
MAX_SEQUENCES = 2048  # of one request, over all its prompts
_ENGINE_SEED_MASK = (1 << 63) - 1
_LEAST_TEMPERATURE = 1e-5
_MOST_REPETITION_PENALTY = 1e6


def check_count(model: ServedModel, num_prompts: int, per_prompt: int = 1) -> None:
    """Raises InvalidRequest. To be asked before anything is done with the prompts."""
    count = num_prompts * per_prompt
    if count > MAX_SEQUENCES:
        each = f" of n={per_prompt}" if per_prompt > 1 else ""
        raise InvalidRequest(
            f"{num_prompts} prompts{each} make {count} sequences; the limit of a request is {MAX_SEQUENCES}",
            model=model.name,
            param="prompt",
            limit=MAX_SEQUENCES,
            value=count,
        )


def check_chars(model: ServedModel, texts: Sequence[str], *, param: str = "prompt") -> None:
    """Refuses what can't fit whatever its tokens are, without the seconds that millions of letters take to be tokenized."""
    per_token, limit = model.text.most_chars_per_token, model.facts.max_model_len
    longest = max(map(len, texts), default=0)
    if per_token is not None and longest > per_token * limit:
        raise InvalidRequest(
            f"the prompt has {longest} characters; its context is {limit} tokens of at most {per_token} characters each",
            model=model.name,
            param=param,
            limit=per_token * limit,
            value=longest,
        )


def room_for_output(model: ServedModel, num_prompt: int, *, param: str = "prompt") -> int:
    """How many tokens may follow a prompt of `num_prompt` tokens; at least 1. Raises InvalidRequest."""
    limit = model.facts.max_model_len
    if num_prompt == 0:
        raise InvalidRequest("the prompt is empty (0 tokens); it needs at least 1", model=model.name, param=param)
    if num_prompt >= limit:
        raise ContextExceeded(
            f"the prompt has {num_prompt} tokens; its context is {limit} tokens, "
            f"so that a prompt can have at most {limit - 1}",
            model=model.name,
            param=param,
            limit=limit,
            value=num_prompt,
        )
    return limit - num_prompt


def check_output(model: ServedModel, num_prompt: int, max_tokens: int, *, param: str = "max_tokens") -> None:
    """Raises InvalidRequest when prompt and output together don't fit the model's context."""
    limit = model.facts.max_model_len
    if num_prompt + max_tokens > limit:
        raise InvalidRequest(
            f"{num_prompt} prompt tokens and {param}={max_tokens} make {num_prompt + max_tokens}; "
            f"its context is {limit} tokens",
            model=model.name,
            param=param,
            limit=limit,
            value=num_prompt + max_tokens,
        )


def check_token_ids(model: ServedModel, token_ids: Sequence[int], *, param: str) -> None:
    size = model.facts.vocab_size
    bad = next((token for token in token_ids if not 0 <= token < size), None)
    if bad is not None:
        raise InvalidRequest(
            f"token id {bad} is outside of its vocabulary (0 to {size - 1})",
            model=model.name,
            param=param,
            limit=size - 1,
            value=bad,
        )


def check_prompt(model: ServedModel, prompt: Sequence[int]) -> None:
    """Some tokenizers know tokens that were never given to their model; one of them would fail the step of every other request with it."""
    size, highest = model.facts.vocab_size, max(prompt)
    if highest >= size:
        raise InvalidRequest(
            f"the prompt has the token {model.text.piece(highest)!r}, id {highest}, which its tokenizer knows "
            f"and the model doesn't (its vocabulary is 0 to {size - 1})",
            model=model.name,
            param="prompt",
            limit=size - 1,
            value=highest,
        )


def draw_seed() -> int:
    return secrets.randbits(SEED_BITS)


def engine_seed(seed: int, offset: int = 0) -> int:
    """A caller's seed (any 64 bits) as the engine takes it (63 bits)."""
    return (seed + offset) & _ENGINE_SEED_MASK


def within_float32(model: ServedModel, sampling: SamplingParams) -> SamplingParams:
    """The same way of drawing in the engine's 32-bit words, where a wild number would become an infinity, and fail the step of every other request with it.

    A temperature too small to leave a second token any chance is greedy, a top-k that drops nothing is off.
    """
    return msgspec.structs.replace(
        sampling,
        temperature=sampling.temperature if sampling.temperature >= _LEAST_TEMPERATURE else 0.0,
        top_k=sampling.top_k if sampling.top_k < model.facts.vocab_size else 0,
        repetition_penalty=min(
            max(sampling.repetition_penalty, 1 / _MOST_REPETITION_PENALTY), _MOST_REPETITION_PENALTY
        ),
    )
