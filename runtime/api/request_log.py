"""Logs one line per HTTP request when it has ended: the model's name as the client wrote it, tokens, waiting, times and the outcome; never a text.

A mesh in front passes on the name that its client wrote and how long the request waited there, and leaves the line to the runtime.
"""

import logging
import re
import uuid
from collections.abc import Callable
from urllib.parse import unquote

from aiohttp import web
from aiohttp.typedefs import Handler

from common.log_headers import CALLER_HEADER, LOGGED_HEADER, NAME_HEADER, WAITED_HEADER
from common.logs import log_fields
from runtime.observability.request_record import RequestRecord

REQUEST_ID_HEADER = "X-Request-Id"
logger = logging.getLogger(__name__)
"""The logger of one line per request, of gRPC and of HTTP."""

_REQUEST_ID = web.RequestKey("request_id", str)
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,256}")
_DISCONNECTED = "499"
_PROBES = ("/health", "/v2/health/ready")  # 503 for as long as the engine starts


@web.middleware
async def request_log(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each request an id (a valid one of the client is kept), and log its end."""
    request[_REQUEST_ID] = request_id_of(request.headers.get(REQUEST_ID_HEADER, ""))
    record = RequestRecord.begin()
    code = _DISCONNECTED
    try:
        response = await handler(request)
        code = str(response.status)
        return response
    finally:
        code = record.code or code
        log_end(
            record,
            code,
            method=request.method,
            path=request.path,
            request_id=request[_REQUEST_ID],
            header=lambda name: request.headers.get(name, ""),
            is_poll=request.method in ("GET", "HEAD") and (request.path in _PROBES or not code.startswith("5")),
        )


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the request's id, and for a mesh the mark that the request is logged here. For `on_response_prepare`."""
    if _REQUEST_ID not in request:  # the request could not be parsed
        return
    response.headers[REQUEST_ID_HEADER] = request[_REQUEST_ID]
    if NAME_HEADER in request.headers:
        response.headers[LOGGED_HEADER] = "1"


def request_id_of(given: str) -> str:
    """Return the client's request id, or a new one if it has none that can be logged."""
    return given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


def log_end(
    record: RequestRecord,
    code: str,
    *,
    method: str,
    path: str,
    request_id: str,
    header: Callable[[str], str],
    is_poll: bool,
) -> None:
    """Log the line of a request that has ended. `header` returns one of its headers, or an empty text. Polls are logged at debug."""
    level = logging.DEBUG if is_poll else logging.INFO
    if not logger.isEnabledFor(level):
        return
    waited_s = _seconds(header(WAITED_HEADER))
    log_fields(
        logger,
        level,
        "request",
        {
            "code": code,
            "method": method,
            "path": path,
            "asked": unquote(header(NAME_HEADER)),
            "key": unquote(header(CALLER_HEADER)),
            **record.fields(),
            "wait_s": round(waited_s, 3) or None,
            "total_s": round(waited_s + record.elapsed_s, 3),
            "request_id": request_id,
        },
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text or 0)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < float("inf") else 0.0
