"""Logs one line per HTTP request when it has ended: who was asked for, tokens, waiting, times and the outcome; never a text.

A mesh in front passes on the name that its client asked for and how long the request waited there, and leaves the line to the runtime.
"""

import logging
import re
import uuid
from urllib.parse import unquote

from aiohttp import web
from aiohttp.typedefs import Handler

from runtime.observability.request_record import RequestRecord

REQUEST_ID_HEADER = "X-Request-Id"
NAME_HEADER = "x-repertory-name"  # percent-encoded
CALLER_HEADER = "x-repertory-caller"  # the name of the client's key, percent-encoded
WAITED_HEADER = "x-repertory-waited"  # seconds
LOGGED_HEADER = "x-repertory-logged"  # of the response
logger = logging.getLogger(__name__)

_REQUEST_ID = web.RequestKey("request_id", str)
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,256}")
_DISCONNECTED = "499"


@web.middleware
async def request_log(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each request an id (a valid one of the client is kept), and log its end."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    request[_REQUEST_ID] = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
    record = RequestRecord.begin()
    code = _DISCONNECTED
    try:
        response = await handler(request)
        code = str(response.status)
        return response
    finally:
        _log_end(request, record, record.code or code)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the request's id, and for a mesh the mark that the request is logged here. For `on_response_prepare`."""
    if _REQUEST_ID not in request:  # the request could not be parsed
        return
    response.headers[REQUEST_ID_HEADER] = request[_REQUEST_ID]
    if NAME_HEADER in request.headers:
        response.headers[LOGGED_HEADER] = "1"


def _log_end(request: web.Request, record: RequestRecord, code: str) -> None:
    waited_s = _seconds(request.headers.get(WAITED_HEADER, ""))
    is_poll = request.method in ("GET", "HEAD") and not code.startswith("5")
    logger.log(
        logging.DEBUG if is_poll else logging.INFO,
        "request",
        extra={
            "code": code,
            "method": request.method,
            "path": request.path,
            "asked": unquote(request.headers.get(NAME_HEADER, "")),
            "key": unquote(request.headers.get(CALLER_HEADER, "")),
            **record.fields(),
            "wait_s": round(waited_s, 3) or None,
            "total_s": round(waited_s + record.elapsed_s, 3),
            "request_id": request[_REQUEST_ID],
        },
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text or 0)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < float("inf") else 0.0
