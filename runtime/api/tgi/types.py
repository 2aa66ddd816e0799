"""The JSON bodies of text-generation-inference's own HTTP API."""

from typing import Any

import msgspec


class Parameters(msgspec.Struct, frozen=True):
    """None = not given. With any of `temperature`, `top_k`, `top_p` and `typical_p` tokens are sampled, also without `do_sample`."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Any = None
    adapter_id: str | None = None
    adapter_source: str | None = None  # a mesh registers the adapter from there; here it must be loaded
    adapter_parameters: Any = None


class GenerateBody(msgspec.Struct, frozen=True):
    """`model` is an addition, for servers with several models. Without `parameters` tokens are sampled."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool = False
    model: str = ""

    @property
    def adapter(self) -> str:
        """The name of an adapter; "" if there is none."""
        return (self.parameters.adapter_id if self.parameters else None) or ""


class TokenizeBody(msgspec.Struct, frozen=True):
    inputs: str
    model: str = ""


class InputToken(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float | None


class Token(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float
    special: bool


class Details(msgspec.Struct, frozen=True):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[InputToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class Answer(msgspec.Struct, frozen=True):
    generated_text: str
    details: Details | msgspec.UnsetType = msgspec.UNSET


class StreamDetails(msgspec.Struct, frozen=True):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class Event(msgspec.Struct, frozen=True):
    """One token of a stream. The last event also has the whole text, and the details if they were requested."""

    index: int  # from 1
    token: Token
    top_tokens: list[Token] | msgspec.UnsetType = msgspec.UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class TokenSpan(msgspec.Struct, frozen=True):
    """A token of a tokenized text, and where it lies in the text, in characters."""

    id: int
    text: str
    start: int
    stop: int


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the model and the server. A limit of 0 means that there is none."""

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str = "text-generation"
    max_concurrent_requests: int
    max_best_of: int = 1
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_client_batch_size: int
    router: str = "repertory"
    version: str
    sha: str | None = None
    docker_label: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: str
    error_type: str
