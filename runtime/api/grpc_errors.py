"""Turns errors into gRPC statuses, and reads the model id from a call's metadata."""

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from common.not_here import NOT_HERE_HEADER
from runtime.api.model_lookup import MODEL_ID_HEADER
from runtime.errors import ModelNotFound, RepertoryError, Unavailable, is_panic

_LOG = logging.getLogger(__name__)
AnyContext = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def statuses(context: AnyContext, *, names_model: bool = True) -> AsyncIterator[None]:
    """End the call with the status of what is raised inside; the client learns of an internal error only that it happened.

    `names_model` False: the text leaves the model's name out, for a caller that puts the name that its own clients know in front.
    """
    try:
        yield
    except RepertoryError as error:
        # Trailers given to `abort` replace those that were set before.
        trailing = (*(context.trailing_metadata() or ()), *_trailers(error))
        await context.abort(grpc.StatusCode[error.code], error.message if names_model else error.detail, trailing)
    except grpc.aio.AbortError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        _LOG.error("unexpected error", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")


def _trailers(error: RepertoryError) -> tuple[tuple[str, str], ...]:
    trailers = []
    if error.retry_after_s is not None:
        trailers.append(("retry-after-ms", str(math.ceil(error.retry_after_s * 1000))))
    if isinstance(error, ModelNotFound | Unavailable):
        trailers.append((NOT_HERE_HEADER, "1"))
    return tuple(trailers)


def model_id_header(context: AnyContext) -> str | None:
    """Return the mesh's header, in its text or binary form, or None."""
    for key, value in context.invocation_metadata() or ():
        if key == MODEL_ID_HEADER or key == f"{MODEL_ID_HEADER}-bin":
            return value if isinstance(value, str) else value.decode(errors="replace")
    return None
