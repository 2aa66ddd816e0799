"""The JSON bodies of the Open Inference Protocol's REST API."""

from typing import Any

import msgspec

from runtime.api.openai.types import Shared


class TensorIn(msgspec.Struct, frozen=True):
    """An input. Its values are in `data`, nested or flat, or follow the JSON if the parameters have a `binary_data_size`."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class RequestedOutput(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct, frozen=True):
    inputs: list[TensorIn]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[RequestedOutput] = []


class TensorOut(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    data: list[str] | msgspec.UnsetType = msgspec.UNSET


class InferAnswer(msgspec.Struct, frozen=True):
    model_name: str
    model_version: str
    outputs: list[TensorOut]
    id: str | msgspec.UnsetType = msgspec.UNSET


class GenerateBody(Shared, frozen=True, kw_only=True):
    """One prompt. Parameters are in `parameters`, or beside the prompt as Triton has them."""

    text_input: str
    id: str = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class GenerateAnswer(msgspec.Struct, frozen=True):
    """The whole text, or in a stream the next piece of it."""

    model_name: str
    model_version: str
    text_output: str


class ServerMetadata(msgspec.Struct, frozen=True):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, frozen=True):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    properties: dict[str, str]


class Live(msgspec.Struct, frozen=True):
    live: bool


class Ready(msgspec.Struct, frozen=True):
    ready: bool


class ModelReady(msgspec.Struct, frozen=True):
    name: str
    ready: bool


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: str
