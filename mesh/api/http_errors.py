"""Errors as HTTP answers in OpenAI's JSON shape, and as the last event of a stream that has begun. Knows no routes."""

import logging
import math

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from mesh.errors import InvalidRequest, MeshError, NotFound, NotSupported, Overloaded, TooLarge

logger = logging.getLogger(__name__)

_CODES: dict[type[MeshError], str] = {NotFound: "model_not_found", TooLarge: "body_too_large", Overloaded: "overloaded"}


class Problem(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: Problem


def body_of(error: MeshError) -> bytes:
    return msgspec.json.encode(
        ErrorBody(Problem(error.message, error.openai_type, None, _CODES.get(type(error), error.code.lower())))
    )


def response_of(error: MeshError) -> web.Response:
    response = web.Response(status=error.http_status, body=body_of(error), content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, NotSupported):
        response.headers["x-should-retry"] = "false"  # the official clients would try any 5xx three times
    if isinstance(error, TooLarge):
        # the rest of the body is not going to be read
        response.force_close()
    return response


def event_of(body: bytes) -> bytes:
    """An error's JSON as a server-sent event; official clients raise on it, and nothing may follow."""
    return b"data: " + b" ".join(body.split(b"\n")) + b"\n\n"


def as_mesh_error(error: Exception) -> MeshError:
    """What a caller sees of a fault of ours: that it happened, and no more."""
    if isinstance(error, MeshError):
        return error
    logger.error("unexpected error", exc_info=error)
    return MeshError("internal error; the server's log has the details")


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong before an answer begins becomes JSON."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        problem = InvalidRequest(f"{request.method} {request.path}: {error.reason}")
        response = web.Response(status=error.status, body=body_of(problem), content_type="application/json")
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise  # the caller is gone: nobody to tell
    except Exception as error:
        return response_of(as_mesh_error(error))
