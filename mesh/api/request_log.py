"""Logs and counts each HTTP request: its id, its model and its outcome, never its content.

Requests that this pod's runtime logs with their tokens, and polls, are logged at debug.
"""

import logging
import os
import re
import time
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from common.logs import log_fields
from mesh.access.caller import ANYBODY, current_caller, set_caller
from mesh.api.request_memory import HeldMemory
from mesh.observability.metrics import Metrics

requests_logger = logging.getLogger("mesh.requests")
"""The logger of one line per request, of gRPC and of HTTP."""

_PROBES = ("/health", "/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")  # may be 503 for long
_ID_BYTES = 16
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class Record:
    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    route: str = "unknown"  # the route's path with its variables' names
    name: str = ""  # the model's name as the client wrote it
    model_id: str = ""
    code: str = ""
    first_s: float = 0.0  # until the first byte of the response
    is_logged: bool = False  # by this pod's runtime
    is_inference: bool = False  # forwarded to a copy of a model, and counted in the metrics
    request_bytes: int = 0
    response_bytes: int = 0
    memory: HeldMemory | None = None  # of the body, until the request has ended
    answered: bool = False  # the client has its whole answer, so its disconnecting is not a cancellation

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @classmethod
    def of(cls, request: web.Request) -> "Record":
        return request[_KEY]


_KEY = web.RequestKey("record", Record)


def log_requests(enabled: bool) -> None:
    """Switch the lines of requests that ended on or off for the process."""
    requests_logger.setLevel(logging.NOTSET if enabled else logging.WARNING)


def logs_requests() -> bool:
    """Return whether the lines are on."""
    return requests_logger.level < logging.WARNING


def request_id_of(given: str) -> str:
    """Return the client's request id, or a new one if it has none that can be logged and forwarded."""
    return given if _REQUEST_ID.fullmatch(given) else os.urandom(_ID_BYTES).hex()


def log_grpc_call(
    level: int,
    *,
    code: str,
    method: str,
    request_id: str,
    asked: str = "",
    model_id: str = "",
    first_s: float = 0.0,
    seconds: float = 0.0,
) -> None:
    """Log the end of a call of a method, `package.Service/Method`, by the current caller. `first_s`: until the first message of the response."""
    log_fields(
        requests_logger,
        level,
        "request",
        {
            "code": code,
            "method": "gRPC",
            "path": f"/{method}",
            "asked": asked,
            "model": model_id,
            "key": current_caller().name,
            "first_s": round(first_s, 3) or None,
            "total_s": round(seconds, 3),
            "request_id": request_id,
        },
    )


def request_log(metrics: Metrics) -> Middleware:
    """Return a middleware that gives each request an id (a valid one of the client is kept), sends it back, and logs the request's end."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        record = Record(request_id_of(given))
        if (resource := request.match_info.route.resource) is not None:
            record.route = resource.canonical
        request[_KEY] = record
        set_caller(ANYBODY)  # a connection's requests share one task
        try:
            response = await handler(request)
            record.code = record.code or str(response.status)
            if not response.prepared:
                response.headers.setdefault("X-Request-Id", record.request_id)
            return response
        except BaseException as error:
            if not record.answered:
                record.code = "CANCELLED" if not isinstance(error, Exception) else "DISCONNECTED"
            raise
        finally:
            if record.memory is not None:
                record.memory.close()
            _log_end(request, record, metrics)

    return middleware


def _log_end(request: web.Request, record: Record, metrics: Metrics) -> None:
    seconds = record.elapsed_s
    if record.is_inference:
        metrics.request(
            record.model_id,
            "http",
            record.code,
            record.route,
            seconds,
            key=current_caller().name,
            request_bytes=record.request_bytes,
            response_bytes=record.response_bytes,
        )
    is_read = request.method in ("GET", "HEAD")
    is_poll = is_read and (record.route in _PROBES or not record.code.startswith("5"))
    log_fields(
        requests_logger,
        logging.DEBUG if is_poll or record.is_logged else logging.INFO,
        "request",
        {
            "code": record.code,
            "method": request.method,
            "path": request.path,
            "asked": record.name,
            "model": record.model_id,
            "key": current_caller().name,
            "first_s": round(record.first_s, 3) or None,
            "total_s": round(seconds, 3),
            "request_id": record.request_id,
        },
    )
