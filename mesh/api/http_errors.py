"""Encodes errors as HTTP responses in OpenAI's JSON shape, and as the last event of a stream that has begun.

Errors below /v1/messages also have the mark and the event name that Anthropic's clients look for.
"""

import logging
import math

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from mesh.errors import InvalidRequest, MeshError, NotFound, NotSupported, Overloaded, TooLarge

logger = logging.getLogger(__name__)

_MESSAGES_PATH = "/v1/messages"
_CODES: dict[type[MeshError], str] = {NotFound: "model_not_found", TooLarge: "body_too_large", Overloaded: "overloaded"}


class Problem(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: Problem
    type: str | msgspec.UnsetType = msgspec.UNSET


def body_of(error: MeshError, path: str) -> bytes:
    """Return the error's JSON for a request to `path`."""
    problem = Problem(error.message, error.openai_type, None, _CODES.get(type(error), error.code.lower()))
    return msgspec.json.encode(ErrorBody(problem, "error" if path.startswith(_MESSAGES_PATH) else msgspec.UNSET))


def response_of(error: MeshError, path: str) -> web.Response:
    """Return the response to a request to `path`."""
    response = web.Response(status=error.http_status, body=body_of(error, path), content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, NotSupported):
        response.headers["x-should-retry"] = "false"  # the official clients retry any 5xx three times
    if isinstance(error, TooLarge):
        # The rest of the body is not read, so the connection cannot be used again.
        response.force_close()
    return response


def event_of(body: bytes, path: str) -> bytes:
    """Return an error's JSON as the last server-sent event of a stream from `path`; official clients raise on it."""
    return (
        (b"event: error\n" if path.startswith(_MESSAGES_PATH) else b"")
        + b"data: "
        + b" ".join(body.split(b"\n"))
        + b"\n\n"
    )


def as_mesh_error(error: Exception) -> MeshError:
    """Return the error itself, or one without details for an unexpected exception, which is logged."""
    if isinstance(error, MeshError):
        return error
    logger.error("unexpected error", exc_info=error)
    return MeshError("internal error; the server's log has the details")


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions that are raised before a response begins into JSON responses."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        problem = InvalidRequest(f"{request.method} {request.path}: {error.reason}")
        response = web.Response(
            status=error.status, body=body_of(problem, request.path), content_type="application/json"
        )
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise  # the client has disconnected
    except Exception as error:
        return response_of(as_mesh_error(error), request.path)
