"""The JSON bodies of Ollama's API."""

from typing import Any

import msgspec

from runtime.api.openai.responses import TokenLogprob


class Call(msgspec.Struct, frozen=True):
    name: str
    arguments: dict[str, Any] = {}


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a function, with its arguments as an object. The protocol has no ids of calls."""

    function: Call


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str = ""
    thinking: str | msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType | None = msgspec.UNSET
    tool_name: str | msgspec.UnsetType | None = msgspec.UNSET
    images: Any = msgspec.UNSET


class Options(msgspec.Struct, frozen=True):
    """The options that concern generation. None = not given."""

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    mirostat: int | None = None
    tfs_z: float | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that chats and completions have in common. `stream` is true unless it is given."""

    model: str = ""
    stream: bool | None = None
    options: dict[str, Any] | None = None
    format: Any = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    keep_alive: Any = None  # of effect in the mesh only


class ChatRequest(Request, frozen=True, kw_only=True):
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Request, frozen=True, kw_only=True):
    """`raw`: the prompt goes to the model without the chat template."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    # refused
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: Any = None


class ShowRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str = ""
    name: str = ""  # an older name of `model`
    verbose: bool | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a stream, or the whole answer. The last line has `done_reason`, counts of tokens and durations in nanoseconds."""

    model: str
    created_at: str
    done: bool = False
    done_reason: str | msgspec.UnsetType = msgspec.UNSET
    total_duration: int | msgspec.UnsetType = msgspec.UNSET
    load_duration: int | msgspec.UnsetType = msgspec.UNSET
    prompt_eval_count: int | msgspec.UnsetType = msgspec.UNSET
    prompt_eval_duration: int | msgspec.UnsetType = msgspec.UNSET
    eval_count: int | msgspec.UnsetType = msgspec.UNSET
    eval_duration: int | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[TokenLogprob] | msgspec.UnsetType = msgspec.UNSET


class ChatLine(Line, frozen=True, kw_only=True):
    message: Message


class GenerateLine(Line, frozen=True, kw_only=True):
    response: str
    thinking: str | msgspec.UnsetType = msgspec.UNSET


class Details(msgspec.Struct, frozen=True):
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    parent_model: str = ""


class ShowAnswer(msgspec.Struct, frozen=True):
    details: Details
    model_info: dict[str, str | int]
    capabilities: list[str]
    template: str = ""
    modelfile: str = ""
    parameters: str = ""


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: str
