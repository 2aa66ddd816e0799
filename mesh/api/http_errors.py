"""Turns errors into HTTP responses in the shape of the request's protocol."""

import logging
import math

from aiohttp import web
from aiohttp.typedefs import Handler

from common.not_here import NOT_HERE_HEADER
from mesh.access.caller import current_caller
from mesh.api.error_shapes import shape_for
from mesh.errors import InvalidRequest, MeshError, NotFound, NotSupported, TooLarge, Unavailable

logger = logging.getLogger(__name__)


def response_of(error: MeshError, path: str) -> web.Response:
    """Return the response to a request to `path`."""
    shape = shape_for(path)
    response = web.Response(status=shape.status(error), body=shape.body(error), content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, NotSupported):
        response.headers["x-should-retry"] = "false"  # the official clients retry any 5xx three times
    if current_caller().is_peer and isinstance(error, NotFound | Unavailable):
        response.headers[NOT_HERE_HEADER] = "1"
    if isinstance(error, TooLarge):
        # The rest of the body is not read, so the connection cannot be used again.
        response.force_close()
    return response


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
            status=error.status, body=shape_for(request.path).body(problem), content_type="application/json"
        )
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise  # the client has disconnected
    except Exception as error:
        return response_of(as_mesh_error(error), request.path)
