"""OpenAI's request bodies: its own fields, vLLM's extensions, and the fields that are refused."""

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class LoraRequest(msgspec.Struct, frozen=True):
    """vLLM's LoRARequest, of which the name counts."""

    lora_name: str
    lora_path: str = ""
    lora_int_id: int = 0


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that chat and text completions have in common. None = not given."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    # extensions
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    # an adapter of the model
    adapter_id: str | None = None
    adapter_source: str | None = None  # a mesh registers the adapter from there; here it must be loaded
    lora_request: LoraRequest | None = None
    # accepted without effect: they describe the client, not the response
    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    request_id: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # what the answer must match; see structured.py
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: Any = None  # without effect: there is one
    json_schema: Any = None
    grammar: Any = None
    # refused
    store: bool | None = None
    best_of: int | None = None
    structural_tag: Any = None
    logits_processors: Any = None
    use_beam_search: bool | None = None
    adapter_parameters: Any = None
    prompt_logprobs: Any = None

    @property
    def adapter(self) -> tuple[str, str]:
        """The field that names an adapter, and the name; "" if there is none."""
        if self.adapter_id or self.lora_request is None:
            return "adapter_id", self.adapter_id or ""
        return "lora_request", self.lora_request.lora_name


class HistoryFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] = "{}"


class HistoryCall(msgspec.Struct, frozen=True):
    """A tool call that the assistant made earlier."""

    function: HistoryFunction
    id: str = ""
    type: str = "function"
    index: int | None = None  # of no effect: clients keep it from the stream


class ChatTurn(msgspec.Struct, frozen=True):
    """A message. `content` is a string or a list of parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[HistoryCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None


class ChatBody(Shared, frozen=True, kw_only=True):
    messages: list[ChatTurn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    reasoning_effort: str | None = None
    # refused
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None


class CompletionBody(Shared, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str = ""
    prompt: str | None = None
    messages: list[ChatTurn] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str = ""
    tokens: list[int]
