"""Prepares a chat for generation, for every protocol whose requests can be written as an OpenAI chat."""

from dataclasses import dataclass, replace

import msgspec

from runtime.api.grammars import guide_chat, reasoning_budget
from runtime.api.openai.chat_plan import chat_options, parser_of, plan_chat
from runtime.api.openai.context import render_chat
from runtime.api.openai.structured import wanted_of
from runtime.api.openai.tools import ToolPlan, plan_tools
from runtime.api.openai.types import ChatBody
from runtime.api.tokenization import encode_text
from runtime.generation.limits import check_chars
from runtime.generation.parser import MakeParser
from runtime.interfaces import ServedModel
from runtime.text.chat_grammar import ChatGrammar
from runtime.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """`notes` are for the `Warning` header. `names_function`: the request names the function that must be called."""

    requests: list[GenerationRequest]
    make_parser: MakeParser
    notes: tuple[str, ...]
    names_function: bool = False

    @property
    def num_prompt(self) -> int:
        return len(self.requests[0].prompt)


async def prepare_chat(
    model: ServedModel, body: ChatBody, *, cut_to_context: bool = False, format_param: str | None = None
) -> PreparedChat:
    """Render, tokenize and plan. `cut_to_context`: `max_tokens` above what fits the context is reduced instead of refused.

    `format_param`: the protocol's own name of `response_format`.

    Raises InvalidRequest or NotSupported naming the field.
    """
    tools = plan_tools(model, body.tools, body.tool_choice, body.parallel_tool_calls)
    wanted = wanted_of(body)
    if wanted is not None and format_param is not None:
        wanted = replace(wanted, param=format_param, path=f"{format_param}.schema")
    text, prompt = await render_prompt(model, body, tools)
    if cut_to_context and body.max_tokens is not None:
        room = model.facts.max_model_len - len(prompt)
        body = msgspec.structs.replace(body, max_tokens=min(body.max_tokens, max(1, room)))
    show_reasoning = body.include_reasoning is not False
    make_parser = parser_of(model, tools, text, whole_calls=not body.stream, show_reasoning=show_reasoning)
    requests = plan_chat(model, body, prompt)
    chat = ChatGrammar(tools.calls, tools.functions, tools.parallel, wanted)
    guide = await guide_chat(model, chat, tools.output_format or model.text.output_format, text)
    notes = (*guide.notes, *_template_notes(model, body, tools))
    if body.thinking_token_budget is not None:
        budget = reasoning_budget(model, text, body.thinking_token_budget)
        if budget is None:
            notes = (*notes, "the budget of reasoning has no effect: no token ends the reasoning of this model")
        requests = [msgspec.structs.replace(request, reasoning_budget=budget) for request in requests]
    return PreparedChat(guide.apply(requests), make_parser, notes, tools.names_one)


async def render_prompt(model: ServedModel, body: ChatBody, tools: ToolPlan) -> tuple[str, list[int]]:
    """Return the prompt's text and tokens."""
    text = await render_chat(model, body.messages, chat_options(body, tools))
    if body.truncate_prompt_tokens is None:
        check_chars(model, [text], param="messages")
    return text, await encode_text(model, text, add_special_tokens=bool(body.add_special_tokens))


def _template_notes(model: ServedModel, body: ChatBody, tools: ToolPlan) -> list[str]:
    """Return what the chat template makes no use of."""

    def reads(variable: str) -> bool:
        return model.text.template_reads(model.name, body.chat_template, variable)

    notes: list[str] = []
    if tools.tools and not reads("tools"):
        notes.append("the model does not see the tools: its chat template has no place for them")
    if body.reasoning_effort not in (None, "none") and not reads("reasoning_effort"):
        notes.append("reasoning_effort has no effect: the chat template does not read it")
    wants_reasoning = (body.chat_template_kwargs or {}).get("enable_thinking") is True
    if wants_reasoning and model.text.output_format is None and not reads("thinking"):
        notes.append("the model does not reason first: its chat template has no place for it")
    return notes
