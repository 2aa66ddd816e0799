"""Errors of this process as gRPC statuses, and the model that a call's metadata names."""

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from runtime.api.model_lookup import MODEL_ID_HEADER
from runtime.errors import RepertoryError

_LOG = logging.getLogger(__name__)
AnyContext = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def statuses(context: AnyContext) -> AsyncIterator[None]:
    """What is raised inside ends the call with its status; a fault of ours says no more than that it happened."""
    try:
        yield
    except RepertoryError as error:
        trailing = (
            () if error.retry_after_s is None else (("retry-after-ms", str(math.ceil(error.retry_after_s * 1000))),)
        )
        await context.abort(grpc.StatusCode[error.code], error.message, trailing)
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        _LOG.error("unexpected error", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")


def model_id_header(context: AnyContext) -> str | None:
    """The mesh's header, as text or in its binary form."""
    for key, value in context.invocation_metadata() or ():
        if key == MODEL_ID_HEADER or key == f"{MODEL_ID_HEADER}-bin":
            return value if isinstance(value, str) else value.decode(errors="replace")
    return None
