"""Errors in text-generation-inference's shape, with its statuses and types, by which its clients choose an exception."""

from runtime.api.openai.responses import encode
from runtime.api.protocol_errors import ErrorShape
from runtime.api.tgi.types import ErrorAnswer
from runtime.errors import EngineFault, InvalidRequest, LoadFailed, Overloaded, RepertoryError

_UNPROCESSABLE = 422
_FAILED_DEPENDENCY = 424


def error_body(error: RepertoryError) -> bytes:
    match error:
        case InvalidRequest():
            return encode(ErrorAnswer(f"Input validation error: {error.message}", "validation"))
        case Overloaded():
            return encode(ErrorAnswer(error.message, "overloaded"))
        case LoadFailed() | EngineFault():
            return encode(ErrorAnswer(f"Request failed during generation: {error.message}", "generation"))
    return encode(ErrorAnswer(error.message, error.code.lower()))


def _status(error: RepertoryError) -> int:
    match error:
        case InvalidRequest():
            return _UNPROCESSABLE
        case EngineFault():
            return _FAILED_DEPENDENCY
    return error.http_status


ERRORS = ErrorShape(ErrorAnswer, error_body, _status)
