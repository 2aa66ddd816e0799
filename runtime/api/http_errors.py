"""Turns errors into HTTP responses in OpenAI's JSON shape."""

import logging
import math

from aiohttp import web
from aiohttp.typedefs import Handler

from common.not_here import NOT_HERE_HEADER
from runtime.api.openai.errors import error_body
from runtime.api.openai.responses import ErrorAnswer, ErrorBody, encode
from runtime.errors import InvalidRequest, ModelNotFound, NotSupported, RepertoryError, Unavailable, is_panic

_LOG = logging.getLogger(__name__)


def error_response(error: RepertoryError) -> web.Response:
    return web.Response(
        status=error.http_status,
        body=error_body(error),
        headers=error_headers(error),
        content_type="application/json",
    )


def error_headers(error: RepertoryError) -> dict[str, str]:
    """Return the headers that an error has in every protocol: when to retry, and whether another copy can answer instead."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    if isinstance(error, NotSupported):
        headers["x-should-retry"] = "false"  # the official clients retry every 5xx twice
    if isinstance(error, ModelNotFound | Unavailable):
        headers[NOT_HERE_HEADER] = "1"
    return headers


def internal(error: BaseException) -> RepertoryError:
    """Return the error that a client may see: an unexpected exception is logged and becomes one without details."""
    if isinstance(error, RepertoryError):
        return error
    _LOG.error("unexpected error", exc_info=error)
    return RepertoryError("internal error; the server's log has the details")


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error before the first event of a stream into a JSON response."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge as error:
        limit = request.client_max_size
        body = ErrorBody(
            f"the body is larger than the limit of {limit} bytes", "invalid_request_error", None, "body_too_large"
        )
        return web.Response(status=error.status, body=encode(ErrorAnswer(body)), content_type="application/json")
    except web.HTTPException as error:
        body = ErrorBody(f"{request.method} {request.path}: {error.reason}", "invalid_request_error", None, None)
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return web.Response(
            status=error.status, body=encode(ErrorAnswer(body)), content_type="application/json", headers=headers
        )
    except web.RequestPayloadError as error:
        return error_response(InvalidRequest(f"the body cannot be read: {error}"))
    except ConnectionError:
        raise  # the client is gone
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return error_response(internal(error))
