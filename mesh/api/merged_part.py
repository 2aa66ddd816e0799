"""Collects one model's response to a request for several models."""

from mesh.api.call_metadata import Metadata
from mesh.api.replay_buffer import ServerContext


class MergedPart:
    """Takes the place of the caller's context while one model answers; `body` holds the bytes of its response."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self.body = b""

    def time_remaining(self) -> float | None:
        return self._context.time_remaining()

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """Drop the headers: those of several models cannot be merged."""

    async def write(self, message: bytes) -> None:
        self.body += message
