"""OpenAI's chat chunks and messages from typed parts, checked with the official client's own accumulator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from runtime.api.openai.chunks import CHAT_DELTAS, EventChunks, Head, StreamUsage
from runtime.api.openai.responses import chat_choice, encode
from runtime.generation.generator import Generator
from runtime.generation.parts import Part, Reasoning, Refusal, Text, ToolCall
from runtime.interfaces import ServedModel
from runtime.observability.metrics import RuntimeMetrics
from runtime.types import FinishReason, GenerationRequest, SamplingParams, StopParams
from tests.support import tokenizers as tiny
from tests.support.scripted_engine import ScriptedEngine, served

HEAD = Head("chatcmpl-1", "chat.completion.chunk", 7, "m1")
TWO_CALLS = [
    (Reasoning("I need "),),
    (Reasoning("two."), Text("Let me look.")),
    (ToolCall(0, "", "call_a", "weather"),),
    (ToolCall(0, '{"city":'), ToolCall(0, '"Paris"}')),
    (ToolCall(1, '{"n":3}', "call_b", "count"),),
]


class ScriptedParser:
    """Returns the next entry of a script for each text, and the rest of the script at the end."""

    in_reasoning = False
    num_calls = 0

    def __init__(self, script: Sequence[tuple[Part, ...]]) -> None:
        self._script = list(script)

    def push(self, text: str) -> tuple[Part, ...]:
        return self._script.pop(0) if self._script else ()

    def flush(self) -> tuple[Part, ...]:
        rest, self._script = self._script, []
        return tuple(part for parts in rest for part in parts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path: Path = tmp_path_factory.mktemp("m")
    return served(tiny.byte_level(path), "m1")


def request_of(max_tokens: int = 50) -> GenerationRequest:
    return GenerationRequest(prompt=(5, 6), sampling=SamplingParams(temperature=0.0), stop=StopParams(max_tokens))


def engine_of(model: ServedModel) -> ScriptedEngine:
    tokens = model.text.encode("The dog sleeps. A fox jumps over it.", add_special_tokens=False)
    return ScriptedEngine(lambda asked: [*tokens, 0])


async def streamed(
    model: ServedModel, script: Sequence[tuple[Part, ...]], max_tokens: int = 50
) -> list[dict[str, Any]]:
    """The events of a stream whose text a scripted parser splits."""
    chunks = EventChunks(model, HEAD, StreamUsage(2, 1, 1, None), CHAT_DELTAS)
    generator = Generator(engine_of(model), RuntimeMetrics())
    deltas = generator.stream(model, [request_of(max_tokens)], lambda request: ScriptedParser(script))
    data = b"".join([chunks.delta(delta) async for delta in deltas])
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    assert chunks.num_events == len(events)
    return [msgspec.json.decode(event.removeprefix("data: ")) for event in events]


def accumulated(events: list[dict[str, Any]]) -> Any:
    state = ChatCompletionStreamState()
    for event in events:
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
    return state.get_final_completion().choices[0]


async def test_chunks_carry_reasoning_text_and_tool_calls(model: ServedModel) -> None:
    choice = accumulated(await streamed(model, TWO_CALLS))
    assert choice.finish_reason == "tool_calls"
    assert choice.message.role == "assistant"
    assert choice.message.content == "Let me look."
    assert choice.message.reasoning == choice.message.reasoning_content == "I need two."
    calls = [(call.id, call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [
        ("call_a", "function", "weather", '{"city":"Paris"}'),
        ("call_b", "function", "count", '{"n":3}'),
    ]


async def test_chunks_of_a_call_name_it_once(model: ServedModel) -> None:
    events = await streamed(model, [(ToolCall(0, "", "call_a", "f"), ToolCall(0, "{"), ToolCall(0, "}"))])
    pieces = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert pieces == [
        {"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": "{"}},
        {"index": 0, "function": {"arguments": "}"}},
    ]
    assert events[-1]["choices"][0]["delta"] == {}


async def test_chunks_of_a_call_that_is_cut_end_with_length(model: ServedModel) -> None:
    events = await streamed(model, [(ToolCall(0, "{", "call_a", "f"),)], max_tokens=2)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_chunks_without_a_call_end_with_stop(model: ServedModel) -> None:
    choice = accumulated(await streamed(model, [(Refusal("I cannot "),), (Refusal("do that."),)]))
    assert (choice.finish_reason, choice.message.refusal) == ("stop", "I cannot do that.")


async def test_complete_joins_the_parts_that_a_stream_sends(model: ServedModel) -> None:
    generator = Generator(engine_of(model), RuntimeMetrics())
    [result] = await generator.complete(model, [request_of()], lambda request: ScriptedParser(TWO_CALLS))
    assert (result.text, result.reasoning, result.finish) == ("Let me look.", "I need two.", FinishReason.EOS)
    assert result.tool_calls == (
        ToolCall(0, '{"city":"Paris"}', "call_a", "weather"),
        ToolCall(1, '{"n":3}', "call_b", "count"),
    )
    choice = msgspec.json.decode(encode(chat_choice(model, result, with_logprobs=False)))
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][1] == {
        "id": "call_b",
        "type": "function",
        "function": {"name": "count", "arguments": '{"n":3}'},
    }


@pytest.mark.parametrize(
    ("part", "content"), [(ToolCall(0, "{}", "call_a", "f"), None), (Refusal("No."), None), (Text("Hi"), "Hi")]
)
async def test_chat_choice_has_no_content_beside_calls_and_refusals(
    model: ServedModel, part: Part, content: str | None
) -> None:
    generator = Generator(engine_of(model), RuntimeMetrics())
    [result] = await generator.complete(model, [request_of()], lambda request: ScriptedParser([(part,)]))
    message = msgspec.json.decode(encode(chat_choice(model, result, with_logprobs=False)))["message"]
    assert message["content"] == content
    assert ("tool_calls" in message) == isinstance(part, ToolCall)
    assert "reasoning" not in message
