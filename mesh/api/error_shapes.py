"""The JSON shape and the status of an error in each protocol, chosen by the request's path."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from common.error_codes import ANTHROPIC_TYPES
from mesh.errors import InvalidRequest, LoadFailed, MeshError, NotFound, Overloaded, TooLarge

_CODES: dict[type[MeshError], str] = {NotFound: "model_not_found", TooLarge: "body_too_large", Overloaded: "overloaded"}


class Problem(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAiError(msgspec.Struct, frozen=True):
    error: Problem


class AnthropicProblem(msgspec.Struct, frozen=True):
    """`code`: as OpenAI's, by which another pod finds another copy."""

    type: str
    message: str
    code: str


class AnthropicError(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    error: AnthropicProblem


class TextError(msgspec.Struct, frozen=True):
    """The shape of the Open Inference Protocol and of Ollama."""

    error: str


class TgiError(msgspec.Struct, frozen=True):
    """The shape of text-generation-inference, whose clients choose an exception by `error_type`."""

    error: str
    error_type: str


def _http_status(error: MeshError) -> int:
    return error.http_status


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How one protocol writes an error: `body` returns the JSON, `status` the HTTP status, `event_name` names the error event of a stream."""

    body: Callable[[MeshError], bytes]
    status: Callable[[MeshError], int] = _http_status
    event_name: str = ""

    def event(self, body: bytes) -> bytes:
        """Return an error's JSON as the last server-sent event of a stream; the clients raise on it."""
        name = b"event: " + self.event_name.encode() + b"\n" if self.event_name else b""
        return name + b"data: " + b" ".join(body.split(b"\n")) + b"\n\n"


def _problem(error: MeshError) -> Problem:
    return Problem(error.message, error.openai_type, error.param, _code(error))


def _code(error: MeshError) -> str:
    return _CODES.get(type(error), error.code.lower())


_OPENAI = ErrorShape(lambda error: msgspec.json.encode(OpenAiError(_problem(error))))


def _anthropic_body(error: MeshError) -> bytes:
    kind = ANTHROPIC_TYPES.get(error.http_status, "api_error")
    return msgspec.json.encode(AnthropicError(AnthropicProblem(kind, error.message, _code(error))))


_ANTHROPIC = ErrorShape(_anthropic_body, event_name="error")
_TEXT = ErrorShape(lambda error: msgspec.json.encode(TextError(error.message)))


def _tgi_body(error: MeshError) -> bytes:
    match error:
        case InvalidRequest():
            return msgspec.json.encode(TgiError(f"Input validation error: {error.message}", "validation"))
        case Overloaded():
            return msgspec.json.encode(TgiError(error.message, "overloaded"))
        case LoadFailed():
            return msgspec.json.encode(TgiError(f"Request failed during generation: {error.message}", "generation"))
    return msgspec.json.encode(TgiError(error.message, error.code.lower()))


def _tgi_status(error: MeshError) -> int:
    return 422 if isinstance(error, InvalidRequest) else error.http_status


_TGI = ErrorShape(_tgi_body, _tgi_status)


def shape_for(path: str) -> ErrorShape:
    """Return the shape of errors for requests to `path`."""
    match path.split("/", 3)[1:3]:
        case ["v1", "messages"]:
            return _ANTHROPIC
        case ["v2" | "api", *_]:
            return _TEXT
        case ["" | "generate" | "generate_stream" | "info"]:
            return _TGI
        case ["tgi", _] if "/v1/" not in path:
            return _TGI
    return _OPENAI
