"""The planner of POST /v1/chat/completions: a request and its tokenized prompt to generation requests."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from runtime.api.openai.params import check_logprobs, generation_requests, truncated
from runtime.api.openai.tools import ToolPlan
from runtime.api.openai.types import ChatBody
from runtime.errors import InvalidRequest
from runtime.generation.format_parser import FormatParser, ParserOptions
from runtime.generation.limits import draw_seed, output_limit
from runtime.generation.parser import MakeParser, plain_text
from runtime.generation.template_parser import TemplateParser
from runtime.interfaces import ServedModel
from runtime.text.chat import ChatOptions, thinking_variables
from runtime.types import GenerationRequest, LogprobParams

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def chat_options(body: ChatBody, tools: ToolPlan) -> ChatOptions:
    """Return how the messages become a prompt. An assistant's message at the end is continued, unless the request says otherwise."""
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
    by_assistant = bool(body.messages) and body.messages[-1].role == "assistant"
    continues = by_assistant and body.continue_final_message is not False and not body.add_generation_prompt
    return ChatOptions(
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message) or continues,
        template=body.chat_template,
        variables=_variables(body),
        tools=tools.tools,
    )


def parser_of(
    model: ServedModel, tools: ToolPlan, prompt: str, *, whole_calls: bool, show_reasoning: bool = True
) -> MakeParser:
    """Return the maker of parsers for responses to the rendered `prompt`, which may have opened the reasoning."""
    output_format = tools.output_format or model.text.output_format
    if output_format is None or (
        output_format.template is None and output_format.reasoning is None and tools.schemas is None
    ):
        return plain_text
    template = output_format.template
    opens = (
        template is None
        and output_format.reasoning is not None
        and prompt.rstrip().endswith(output_format.reasoning[0].rstrip())
    )
    options = ParserOptions(
        tools=tools.schemas,
        parallel_calls=tools.parallel,
        whole_calls=whole_calls,
        starts_in_reasoning=opens,
        show_reasoning=show_reasoning,
    )
    if template is not None:
        tail = template.tail(prompt)
        return lambda request: TemplateParser(template, output_format.call_ids, tail, options)
    return lambda request: FormatParser(output_format, options)


def _variables(body: ChatBody) -> dict[str, Any]:
    """Return the template's variables: those of `reasoning_effort`, in which "none" switches thinking off, then the request's own."""
    effort = body.reasoning_effort
    if effort is not None and effort not in EFFORTS:
        raise InvalidRequest(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r}", param="reasoning_effort"
        )
    variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        variables |= thinking_variables(False)
    return variables | (body.chat_template_kwargs or {})


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
    requests = generation_requests(model, body, [kept], [limit], _logprobs(model, body), new_seed)
    if model.text.output_format is None:
        return requests
    return [msgspec.structs.replace(request, show_markers=True) for request in requests]


def _logprobs(model: ServedModel, body: ChatBody) -> LogprobParams:
    check_logprobs(model, "top_logprobs", body.top_logprobs)
    if body.logprobs:
        return LogprobParams(generated=body.top_logprobs or 0)
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", model=model.name, param="top_logprobs")
    return LogprobParams()
