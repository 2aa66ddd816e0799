"""Identifies who makes a request. The guards of both ports set the caller; handlers read it."""

from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mesh.errors import PermissionDenied

EVERY_MODEL = ("*",)


@dataclass(frozen=True, slots=True)
class Caller:
    """`name`: of the key, empty without keys. `models`: patterns of the names that the key may use, in which `*` stands for any text.

    `may_manage`: whether the key has the right to management. `is_peer`: another pod of the mesh, which has already authorised the request.
    """

    name: str = ""
    models: tuple[str, ...] = EVERY_MODEL
    may_manage: bool = True
    is_peer: bool = False

    def may_use(self, model: str) -> bool:
        return self.models == EVERY_MODEL or any(fnmatchcase(model, pattern) for pattern in self.models)

    def check_model(self, model: str) -> None:
        """Raise PermissionDenied unless the caller may use a model, by the name that the request has for it."""
        if not self.may_use(model):
            raise PermissionDenied(
                f"key {self.name} may not use it; its models are {', '.join(self.models)}", model=model
            )


ANYBODY = Caller()
PEER = Caller("peer", is_peer=True)

_CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    """Return the caller of the request that the current task handles."""
    return _CALLER.get()


def set_caller(caller: Caller) -> None:
    """Set the caller for the rest of the current task and the tasks that it starts."""
    _CALLER.set(caller)
