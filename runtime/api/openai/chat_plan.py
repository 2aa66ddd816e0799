"""The planner of POST /v1/chat/completions: a request and its tokenized prompt to generation requests. Pure."""

from collections.abc import Callable, Sequence

from runtime.api.openai.params import check_logprobs, generation_requests, truncated
from runtime.api.openai.types import ChatBody
from runtime.errors import InvalidRequest
from runtime.generation.limits import draw_seed, output_limit
from runtime.interfaces import ServedModel
from runtime.text.chat import ChatOptions
from runtime.types import GenerationRequest, LogprobParams


def chat_options(body: ChatBody) -> ChatOptions:
    """Return how the messages become a prompt. An assistant's message at the end is continued, unless the request says otherwise."""
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt can't both be true", param="continue_final_message"
        )
    by_assistant = bool(body.messages) and body.messages[-1].role == "assistant"
    continues = by_assistant and body.continue_final_message is not False and not body.add_generation_prompt
    return ChatOptions(
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message) or continues,
        template=body.chat_template,
        variables=body.chat_template_kwargs or {},
    )


def plan_chat(
    model: ServedModel, body: ChatBody, prompt: Sequence[int], new_seed: Callable[[], int] = draw_seed
) -> list[GenerationRequest]:
    """Return `n` requests. Raises InvalidRequest naming the field."""
    kept = truncated(model, body, list(prompt))
    second = body.max_completion_tokens is not None
    limit = output_limit(
        model,
        kept,
        body.max_completion_tokens if second else body.max_tokens,
        model.text.sampling.max_tokens,
        param="max_completion_tokens" if second else "max_tokens",
        prompt_param="messages",
    )
    return generation_requests(model, body, [kept], [limit], _logprobs(model, body), new_seed)


def _logprobs(model: ServedModel, body: ChatBody) -> LogprobParams:
    check_logprobs(model, "top_logprobs", body.top_logprobs)
    if body.logprobs:
        return LogprobParams(generated=body.top_logprobs or 0)
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", model=model.name, param="top_logprobs")
    return LogprobParams()
