"""Tells whether a model's source still has the files that were loaded."""

import asyncio
import logging

from runtime.errors import RepertoryError
from runtime.models.model_state import Prepared, Preparer
from runtime.types import ModelSource

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


async def is_current(preparer: Preparer, source: ModelSource, prepared: Prepared | None) -> bool:
    """Return False if the source's files differ from `prepared`. A source that cannot be reached counts as unchanged."""
    if prepared is None:
        return True
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await preparer.identity(source) == prepared.identity
    except (RepertoryError, TimeoutError) as error:
        log.warning("%s cannot be compared with what is loaded: %s", source.uri, error or type(error).__name__)
        return True
