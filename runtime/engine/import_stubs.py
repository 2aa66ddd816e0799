"""What libraries would import and we never use: left out, because imports are most of a start. Knows names; imports none of them unasked.

transformers brings torch's compiler and its distributed tensors in for a few decorators and type checks; together with sympy, which those need, they
are two fifths of an engine's imports. What is left out here comes in as ever when something does ask for it later.
"""

import contextlib
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

_ABSENT = ("sklearn", "scipy", "pandas", "torchvision", "torchaudio", "librosa", "accelerate", "boto3")
_COMPILER = "torch._dynamo"
_INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"


def leave_out(*, but: Collection[str] = ()) -> None:
    """Before the first import of torch or transformers: what serves no text model looks absent to them, unless it is here already, or in `but`."""
    for name in set(_ABSENT) - set(but):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """While transformers' modules are imported: functions that they mark for torch's compiler stay as they are. Nothing is distributed and nothing is
    compiled, now or later: an engine is one process, and bitsandbytes would wrap functions that we never call, with torch's whole compiler brought in.
    If the compiler is here already, nothing changes."""
    import torch
    import torch.distributed

    if _COMPILER in sys.modules:
        yield
        return
    torch.compile = _as_it_is  # type: ignore[assignment]
    torch.distributed.is_available = _never
    indexing = types.ModuleType(_INDEXING)
    indexing.TransformGetItemToIndex = _Indexing  # type: ignore[attr-defined]
    stand_ins = {_COMPILER: _Marks(_COMPILER), _INDEXING: indexing}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Marks(types.ModuleType):
    """Every name in it is a decorator that changes nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # a package, without parts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _as_it_is


class _Indexing:
    """The real one, once somebody makes one."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        return TransformGetItemToIndex(*args, **options)


def _as_it_is(function: Any = None, *args: Any, **options: Any) -> Any:
    return function if function is not None else _as_it_is


def _never() -> bool:
    return False
