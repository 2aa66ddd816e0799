"""Decides which callers' calls a worker may carry by itself: those of keys without limits of their own, within the keys' rights."""

from collections.abc import Iterable

from mesh.access.caller import ANYBODY, Caller, set_caller
from mesh.access.key_table import KeyTable
from mesh.access.scopes import Scope


def admit_carried(keys: KeyTable, secrets: Iterable[str], name: str) -> bool:
    """Admit a call for a model's name and set the current task's caller, or return False: control judges the call, as if it were the first."""
    caller = _caller(keys, secrets)
    if caller is None or not caller.may_use(name):
        return False
    set_caller(caller)
    return True


def _caller(keys: KeyTable, secrets: Iterable[str]) -> Caller | None:
    if not keys.is_required:
        return ANYBODY
    key = keys.find_first(secrets)
    if key is None or key.requests_per_minute or key.max_concurrent or Scope.INFERENCE not in key.scopes:
        return None
    return key.caller
