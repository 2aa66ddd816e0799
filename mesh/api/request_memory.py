"""Bounds the memory of all requests that this pod holds: bodies that wait for a model or may have to be sent again."""

from mesh.errors import Overloaded

_RETRY_S = 1.0


class RequestMemory:
    """`limit_bytes`: of all requests together."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def hold(self) -> "HeldMemory":
        """Return the account of one request."""
        return HeldMemory(self)


class HeldMemory:
    """The bytes that one request holds until `close`."""

    __slots__ = ("_held_bytes", "_memory")

    def __init__(self, memory: RequestMemory) -> None:
        self._memory = memory
        self._held_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Account for bytes that arrive. Raises Overloaded if the pod holds too many."""
        memory = self._memory
        if memory.used_bytes + num_bytes > memory.limit_bytes:
            raise Overloaded(
                f"this pod holds {memory.used_bytes} bytes of requests, and {num_bytes} more exceed its limit of {memory.limit_bytes};"
                " try again, or raise request_memory_bytes",
                limit=memory.limit_bytes,
                value=memory.used_bytes + num_bytes,
                retry_after_s=_RETRY_S,
            )
        memory.used_bytes += num_bytes
        self._held_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        """Account for bytes that are kept no longer."""
        self._memory.used_bytes -= num_bytes
        self._held_bytes -= num_bytes

    def close(self) -> None:
        self.remove(self._held_bytes)
