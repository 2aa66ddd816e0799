"""Identifies who makes a request. The guards of both ports set the caller; handlers read it."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`name`: of the key, empty without keys. `is_peer`: another pod of the mesh, which has already authorised the request."""

    name: str = ""
    is_peer: bool = False


ANYBODY = Caller()
PEER = Caller("peer", is_peer=True)

_CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    """Return the caller of the request that the current task handles."""
    return _CALLER.get()


def set_caller(caller: Caller) -> None:
    """Set the caller for the rest of the current task and the tasks that it starts."""
    _CALLER.set(caller)
