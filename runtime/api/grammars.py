"""Makes the grammar of an answer for the handlers, off the event loop."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from runtime.errors import InvalidRequest, RepertoryError
from runtime.interfaces import ServedModel
from runtime.text.chat_grammar import ChatGrammar, chat_grammar, marker_texts
from runtime.text.constraint import Wanted
from runtime.text.grammar import answer_grammar
from runtime.text.output_format import OutputFormat
from runtime.types import GenerationRequest, Grammar, ReasoningBudget

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Guide:
    """The grammar of an answer, None = any text, and notes for the `Warning` header."""

    grammar: Grammar | None = None
    notes: tuple[str, ...] = ()

    def apply(self, requests: list[GenerationRequest]) -> list[GenerationRequest]:
        """Return the requests with the grammar."""
        if self.grammar is None:
            return requests
        return [msgspec.structs.replace(request, grammar=self.grammar) for request in requests]


async def guide_answer(model: ServedModel, wanted: Wanted | None) -> Guide:
    """Return the guide for what follows a plain prompt.

    Raises InvalidRequest naming the keyword and the path of what cannot be enforced.
    """
    if wanted is None:
        return Guide()
    text, notes = await off_loop(model, lambda: answer_grammar(wanted))
    return Guide(Grammar(text, param=wanted.param), notes)


async def guide_chat(model: ServedModel, chat: ChatGrammar, output_format: OutputFormat | None, prompt: str) -> Guide:
    """Return the guide for an answer to the chat's rendered `prompt`, whose calls are written in `output_format`. Raises like `guide_answer`."""
    if chat.is_free:
        return Guide()
    gate = reasoning_gate(model, prompt)
    found = model.text.marker_ids(marker_texts(output_format))
    ids = {text: token_id for text, token_id in found.items() if token_id < model.facts.vocab_size}
    after_reasoning = bool(gate.reasoning_close)
    text, notes = await off_loop(model, lambda: chat_grammar(chat, output_format, ids, after_reasoning=after_reasoning))
    param = "tools" if chat.wanted is None else chat.wanted.param
    return Guide(msgspec.structs.replace(gate, text=text, param=param), notes)


async def off_loop(model: ServedModel, work: Callable[[], _T]) -> _T:
    """Run `work` in a thread. Its errors carry the model's name."""
    try:
        return await asyncio.to_thread(work)
    except RepertoryError as error:
        error.model = model.name
        raise


def reasoning_budget(model: ServedModel, prompt: str, tokens: int) -> ReasoningBudget | None:
    """Return the budget of an answer to the rendered `prompt`; None if no single token ends the model's reasoning, or it does not reason.

    Raises InvalidRequest for a number below 0.
    """
    if tokens < 0:
        raise InvalidRequest(
            f"the budget of reasoning must be >= 0 tokens, got {tokens}",
            model=model.name,
            param="thinking_token_budget",
            limit=0,
            value=tokens,
        )
    gate = reasoning_gate(model, prompt)
    close_id = model.text.marker_ids([gate.reasoning_close]).get(gate.reasoning_close)
    if close_id is None or close_id >= model.facts.vocab_size:
        return None
    return ReasoningBudget(tokens, close_id, gate.reasoning_open_id, gate.starts_in_reasoning)


def reasoning_gate(model: ServedModel, prompt: str) -> Grammar:
    """Return a grammar without text that says where it begins: behind the reasoning if `prompt` has opened it, or if the output may open it."""
    output_format = model.text.output_format
    reasoning = output_format.reasoning if output_format is not None else None
    tail = prompt.rstrip()
    if not tail or reasoning is None or tail.endswith(reasoning[1].rstrip()):
        return Grammar("")
    if tail.endswith(reasoning[0].rstrip()):
        return Grammar("", reasoning_close=reasoning[1], starts_in_reasoning=True)
    open_id = model.text.marker_ids([reasoning[0]]).get(reasoning[0])
    if open_id is None or open_id >= model.facts.vocab_size:
        return Grammar("")
    return Grammar("", reasoning_close=reasoning[1], reasoning_open_id=open_id)
