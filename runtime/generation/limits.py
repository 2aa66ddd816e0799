"""Checks a request against its model's limits: number of sequences, prompt and output lengths, token ids, seeds and float ranges."""

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


def check_count(model: ServedModel, num_prompts: int, per_prompt: int = 1, *, param: str = "prompt") -> None:
    """Raise InvalidRequest if one request has too many sequences. Call it before the prompts are tokenized."""
    count = num_prompts * per_prompt
    if count > MAX_SEQUENCES:
        each = f" of n={per_prompt}" if per_prompt > 1 else ""
        raise InvalidRequest(
            f"{num_prompts} prompts{each} make {count} sequences; the limit of a request is {MAX_SEQUENCES}",
            model=model.name,
            param=param,
            limit=MAX_SEQUENCES,
            value=count,
        )


def check_chars(model: ServedModel, texts: Sequence[str], *, param: str = "prompt") -> None:
    """Raise ContextExceeded for texts that cannot fit the context however they are tokenized; its `limit` and `value` are characters.

    Tokenizing millions of characters would take seconds.
    """
    per_token, limit = model.text.most_chars_per_token, model.facts.max_model_len
    longest = max(map(len, texts), default=0)
    if per_token is not None and longest > per_token * limit:
        raise ContextExceeded(
            f"the prompt is too long: {_longest(limit)} of at most {per_token} characters each, and the prompt has {longest} characters; shorten it",
            model=model.name,
            param=param,
            limit=per_token * limit,
            value=longest,
        )


def check_prompt(model: ServedModel, prompt: Sequence[int], *, param: str = "prompt", output: int = 1) -> None:
    """Raise InvalidRequest for an empty prompt or one with ids outside of the model's vocabulary, ContextExceeded for one that is too long.

    `output`: tokens that must fit behind it.

    Some tokenizers have tokens that their model was never given. One such id would fail the step of every other request in the batch.
    """
    limit, size = model.facts.max_model_len, model.facts.vocab_size
    if not prompt:
        raise InvalidRequest("the prompt is empty (0 tokens); it needs at least 1", model=model.name, param=param)
    if len(prompt) + output > limit:
        raise ContextExceeded(
            f"the prompt is too long: {_longest(limit)}, and the prompt has {len(prompt)} tokens; shorten it to at most {limit - output}",
            model=model.name,
            param=param,
            limit=limit,
            value=len(prompt),
        )
    highest = max(prompt)
    if highest >= size:
        raise InvalidRequest(
            f"the prompt has the token {model.text.piece(highest)!r}, id {highest}, which its tokenizer knows "
            f"and the model does not (its vocabulary is 0 to {size - 1})",
            model=model.name,
            param=param,
            limit=size - 1,
            value=highest,
        )


def output_limit(
    model: ServedModel,
    prompt: Sequence[int],
    requested: int | None,
    default: int | None,
    *,
    param: str = "max_tokens",
    prompt_param: str = "prompt",
    least: int = 1,
) -> int:
    """Return how many tokens may follow a prompt, after checking the prompt.

    `default` replaces a limit that was not requested, and is cut to what the context leaves; None = all that it leaves.
    Raises InvalidRequest naming `param` for a requested limit below `least`, ContextExceeded for one above what the context leaves.
    """
    check_prompt(model, prompt, param=prompt_param)
    context = model.facts.max_model_len
    room = context - len(prompt)
    if requested is None:
        return room if default is None else min(room, default)
    if requested < least:
        raise InvalidRequest(
            f"{param} must be >= {least}, got {requested}", model=model.name, param=param, limit=least, value=requested
        )
    if requested > room:
        raise ContextExceeded(
            f"the prompt is too long for {param}={requested}: {_longest(context)}, and {len(prompt)} prompt tokens"
            f" and {param} make {len(prompt) + requested};"
            f" set {param} to at most {room} or shorten the prompt",
            model=model.name,
            param=param,
            limit=context,
            value=len(prompt) + requested,
        )
    return requested


def _longest(num_tokens: int) -> str:
    """Return OpenAI's phrase. Client libraries recognise the error by it and by Anthropic's "prompt is too long"."""
    return f"this model's maximum context length is {num_tokens} tokens"


def check_token_ids(model: ServedModel, token_ids: Sequence[int], *, param: str) -> None:
    """Raise InvalidRequest if an id is outside of the model's vocabulary."""
    size = model.facts.vocab_size
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= size):
        bad = next(token for token in token_ids if not 0 <= token < size)
        raise InvalidRequest(
            f"{param} has the token id {bad}, which is outside of its vocabulary (0 to {size - 1})",
            model=model.name,
            param=param,
            limit=size - 1,
            value=bad,
        )


def draw_seed() -> int:
    return secrets.randbits(SEED_BITS)


def engine_seed(seed: int, offset: int = 0) -> int:
    """Return a client's seed (any 64 bits) plus `offset` in the engine's range (63 bits)."""
    return (seed + offset) & _ENGINE_SEED_MASK


def within_float32(model: ServedModel, sampling: SamplingParams) -> SamplingParams:
    """Return equivalent parameters that the engine's float32 and int32 words can hold.

    Infinite scores would end the request with an error. A temperature that is too small for a second token to have any chance becomes
    greedy, and a top-k that drops no token is switched off.
    """
    return msgspec.structs.replace(
        sampling,
        temperature=sampling.temperature if sampling.temperature >= _LEAST_TEMPERATURE else 0.0,
        top_k=sampling.top_k if sampling.top_k < model.facts.vocab_size else 0,
        repetition_penalty=min(
            max(sampling.repetition_penalty, 1 / _MOST_REPETITION_PENALTY), _MOST_REPETITION_PENALTY
        ),
    )
