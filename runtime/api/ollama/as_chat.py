"""Turns a chat of Ollama's API into an OpenAI chat."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from runtime.api.ollama.types import ChatRequest, GenerateRequest, Message, Options, Request
from runtime.api.openai.body import refuse_unsupported
from runtime.api.openai.types import ChatBody, ChatTurn, HistoryCall, HistoryFunction
from runtime.errors import InvalidRequest, NotSupported
from runtime.text.chat import thinking_variables

# Options of Ollama's own engine, and of samplers that are refused unless they are switched off.
_WITHOUT_EFFECT = frozenset(
    {
        "f16_kv", "logits_all", "low_vram", "main_gpu", "mirostat_eta", "mirostat_tau", "num_batch", "num_ctx", "num_gpu", "num_keep", "num_thread",
        "numa", "penalize_newline", "repeat_last_n", "use_mlock", "use_mmap", "vocab_only", "embedding_only",
    }
)  # fmt: skip
# As in Go: numbers with units, or a number of seconds alone.
_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?|(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+)")
_REFUSED = ("suffix", "template", "context", "images")


def as_chat(body: ChatRequest) -> ChatBody:
    """Return the chat. Raises InvalidRequest or NotSupported naming the field."""
    return _chat(body, list(_turns(body.messages or [])), body.tools or None)


def prompt_as_chat(body: GenerateRequest) -> ChatBody:
    """Return a completion's prompt as a chat of one turn. Raises InvalidRequest or NotSupported naming the field."""
    for name in _REFUSED:
        if getattr(body, name):
            raise NotSupported(f"{name} is not supported", param=name)
    if body.raw and body.system:
        raise InvalidRequest("raw mode does not support system: put its text into the prompt", param="system")
    turns = [ChatTurn("system", body.system)] if body.system else []
    return _chat(body, [*turns, ChatTurn("user", body.prompt or "")], None)


def unknown_options(body: Request) -> list[str]:
    """Return the paths of options that neither this server nor Ollama's engine has."""
    known = {*Options.__struct_fields__, *_WITHOUT_EFFECT}
    return [f"options.{name}" for name in body.options or {} if name not in known]


def notes_of(body: Request, max_model_len: int) -> tuple[str, ...]:
    """Return what the `Warning` header says about a context that is larger than the model's."""
    asked = (body.options or {}).get("num_ctx")
    if isinstance(asked, int | float) and asked > max_model_len:
        return (f"num_ctx has no effect: the context is {max_model_len} tokens",)
    return ()


def check_keep_alive(body: Request) -> None:
    """Raise InvalidRequest for a time that Ollama refuses. The mesh acts on it: 0 unloads the model."""
    given = body.keep_alive
    if given is None or (isinstance(given, int | float) and not isinstance(given, bool)):
        return
    if not isinstance(given, str) or _DURATION.fullmatch(given) is None:
        raise InvalidRequest(
            "keep_alive must be a number of seconds or a duration such as 5m or 1h30m", param="keep_alive"
        )


def _chat(body: Request, turns: list[ChatTurn], tools: list[dict[str, Any]] | None) -> ChatBody:
    options = _options(body)
    thinking: dict[str, Any] = {}
    if isinstance(body.think, bool):
        thinking = {"chat_template_kwargs": thinking_variables(body.think), "include_reasoning": body.think}
    elif body.think is not None:
        thinking = {"reasoning_effort": body.think}
    chat = ChatBody(
        model=body.model,
        messages=turns,
        tools=tools,
        response_format=_response_format(body.format),
        logprobs=body.logprobs or body.top_logprobs is not None or None,
        top_logprobs=body.top_logprobs,
        # A number below 0 is Ollama's "as much as fits".
        max_tokens=options.num_predict if options.num_predict is not None and options.num_predict >= 0 else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        typical_p=options.typical_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        stop=options.stop,
        **thinking,
    )
    refuse_unsupported(chat)
    return chat


def _options(body: Request) -> Options:
    try:
        options = msgspec.convert(body.options or {}, Options, strict=False)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidRequest(f"an option has the wrong type: {error}", param="options") from error
    if options.mirostat:
        raise NotSupported("mirostat is not supported", param="options.mirostat")
    if options.tfs_z not in (None, 1.0):
        raise NotSupported("tfs_z is not supported", param="options.tfs_z")
    return options


def _response_format(asked: Any) -> dict[str, Any] | None:
    if asked is None or asked == "":
        return None
    if asked == "json":
        return {"type": "json_object"}
    if isinstance(asked, dict):
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": asked}}
    raise InvalidRequest('format must be "json" or a JSON schema', param="format")


def _turns(messages: Sequence[Message]) -> Iterator[ChatTurn]:
    """Yield the messages, with ids of calls: a result belongs to the first call without one, of its function if it names one."""
    unanswered: list[tuple[str, str]] = []
    count = 0
    for index, message in enumerate(messages):
        if message.images:
            raise NotSupported(f"messages[{index}].images is not supported, only text", param="messages")
        calls: list[HistoryCall] = []
        for call in message.tool_calls or ():
            calls.append(HistoryCall(HistoryFunction(call.function.name, call.function.arguments), f"call_{count}"))
            unanswered.append((f"call_{count}", call.function.name))
            count += 1
        answered: str | None = None
        if message.role == "tool" and unanswered:
            named = next((each for each in unanswered if each[1] == message.tool_name), unanswered[0])
            unanswered.remove(named)
            answered = named[0]
        yield ChatTurn(
            message.role,
            message.content or (None if calls else ""),
            name=message.tool_name or None,
            reasoning_content=message.thinking or None,
            tool_calls=calls or None,
            tool_call_id=answered,
        )
