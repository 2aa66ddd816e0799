"""Errors in OpenAI's JSON shape: as a body, or as the last event of a stream that has begun."""

from runtime.api.openai.responses import ErrorAnswer, ErrorBody, encode
from runtime.errors import ContextExceeded, ModelNotFound, RepertoryError

_CODES: dict[type[RepertoryError], str] = {
    ModelNotFound: "model_not_found",
    ContextExceeded: "context_length_exceeded",
}


def error_body(error: RepertoryError) -> bytes:
    return encode(ErrorAnswer(ErrorBody(error.message, error.openai_type, error.param, error_code(error))))


def error_code(error: RepertoryError) -> str:
    return _CODES.get(type(error), error.code.lower())


def error_event(error: RepertoryError) -> bytes:
    """Return the error as an event. The official client raises on it, so nothing may follow."""
    return b"data: " + error_body(error) + b"\n\n"
