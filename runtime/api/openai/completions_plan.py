"""The planner of POST /v1/completions: a request and its tokenized prompts to generation requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.api.openai.params import check_logprobs, generation_requests
from runtime.api.openai.types import CompletionBody
from runtime.errors import InvalidRequest
from runtime.generation.limits import draw_seed, output_limit
from runtime.interfaces import ServedModel
from runtime.types import GenerationRequest, LogprobParams

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. `text` is what the client wrote, None if it came as token ids or was truncated."""

    token_ids: list[int]
    text: str | None


def separate_prompts(prompt: str | list[str | int | list[int]], *, param: str = "prompt") -> list[str | list[int]]:
    """Return the prompts one by one. Raises InvalidRequest for an empty list, or one that mixes forms."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest(f"{param} is empty: it needs at least one prompt", param=param)
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    texts_or_lists = [item for item in prompt if not isinstance(item, int)]
    if ids or len({type(item) for item in texts_or_lists}) > 1:
        raise InvalidRequest(f"{param} mixes strings, token ids and lists of token ids", param=param)
    return texts_or_lists


def plan_completions(
    model: ServedModel, body: CompletionBody, prompts: Sequence[Prompt], new_seed: Callable[[], int] = draw_seed
) -> list[GenerationRequest]:
    """Return `n` requests per prompt. Raises InvalidRequest naming the field.

    The engine always generates a token: with max_tokens=0 the response leaves it out.
    """
    check_logprobs(model, "logprobs", body.logprobs)
    default = model.text.sampling.max_tokens or DEFAULT_MAX_TOKENS
    token_ids = [prompt.token_ids for prompt in prompts]
    limits = [max(1, output_limit(model, prompt, body.max_tokens, default, least=0)) for prompt in token_ids]
    logprobs = LogprobParams(generated=body.logprobs, prompt=body.logprobs if body.echo else None)
    return generation_requests(model, body, token_ids, limits, logprobs, new_seed)
