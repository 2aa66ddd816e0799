"""Answers the errors of one protocol's routes in that protocol's shape. Routes without a shape of their own use OpenAI's (`http_errors`)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from runtime.api.http_errors import error_headers, internal
from runtime.api.route import Handler, Route
from runtime.errors import InvalidRequest, RepertoryError, is_panic


class BodyTooLarge(RepertoryError):
    http_status = 413
    openai_type = "invalid_request_error"


def _http_status(error: RepertoryError) -> int:
    return error.http_status


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """`body` returns an error's JSON, of the type `answer`, and `status` its HTTP status."""

    answer: Any
    body: Callable[[RepertoryError], bytes]
    status: Callable[[RepertoryError], int] = _http_status

    def response(self, error: RepertoryError) -> web.Response:
        return web.Response(
            status=self.status(error),
            body=self.body(error),
            headers=error_headers(error),
            content_type="application/json",
        )

    def shape(self, route: Route) -> Route:
        """Return the route with its errors in this shape."""
        return replace(route, handler=self.around(route.handler), error=self.answer)

    def around(self, handler: Handler) -> Handler:
        """Return the handler with its errors before the first event of a stream answered in this shape."""

        async def answered(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except web.HTTPRequestEntityTooLarge:
                limit = request.client_max_size
                return self.response(BodyTooLarge(f"the body is larger than the limit of {limit} bytes", limit=limit))
            except web.RequestPayloadError as error:
                return self.response(InvalidRequest(f"the body cannot be read: {error}"))
            except (web.HTTPException, ConnectionError):
                raise
            except BaseException as error:
                if not isinstance(error, Exception) and not is_panic(error):
                    raise
                return self.response(internal(error))

        return answered
