"""Shortens the import of transformers: libraries that a text engine never uses look absent meanwhile.

transformers imports torch's compiler and its distributed tensors for a few decorators and type checks. With sympy, which those need, they are half of
an engine's imports (docs/decisions/0003-engine-imports.md). Everything is put back at the end, so later imports get the real libraries.
"""

import contextlib
import gc
import sys
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

_ABSENT = ("sklearn", "scipy", "pandas", "torchvision", "torchaudio", "librosa", "accelerate", "boto3")
_COMPILER = "torch._dynamo"
_INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"


@contextlib.contextmanager
def light_imports(*, keep: Collection[str] = ()) -> Iterator[None]:
    """Hide optional packages (except `keep`), torch's compiler and torch.distributed while the body imports transformers.

    Functions that the imported modules mark for compilation stay as they are. What is imported already stays visible. No garbage is collected
    meanwhile, and what exists at the end is exempt from later collections: nearly all of it are modules. Enter it from one thread, before other
    threads use torch's compiler.
    """
    hidden = [name for name in _ABSENT if name not in keep and name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        with _without_collections(), _without_compiler():
            yield
    finally:
        for name in hidden:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    import torch
    import torch.distributed

    if _COMPILER in sys.modules:
        yield
        return
    indexing = types.ModuleType(_INDEXING)
    indexing.TransformGetItemToIndex = _Indexing  # type: ignore[attr-defined]
    stand_ins = {_COMPILER: _Decorators(_COMPILER), _INDEXING: indexing}
    with _replaced(torch, "compile", _unchanged), _replaced(torch.distributed, "is_available", lambda: False):
        sys.modules.update(stand_ins)
        try:
            yield
        finally:
            for name, module in stand_ins.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]


@contextlib.contextmanager
def _replaced(owner: types.ModuleType, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _Decorators(types.ModuleType):
    """A package in which every name is a decorator that returns its function."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # makes it a package; it has no submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


class _Indexing:
    """Becomes the real TransformGetItemToIndex when an instance is made."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        return TransformGetItemToIndex(*args, **options)


def _unchanged(function: Any = None, *args: Any, **options: Any) -> Any:
    """Return a decorator, with arguments or without, that returns its function."""
    return function if function is not None else _unchanged
