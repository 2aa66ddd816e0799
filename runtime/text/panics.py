"""Recognises a panic of the tokenizers library, which is a BaseException and would end a handler without an answer."""

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import RepertoryError


@contextmanager
def panics_as(kind: type[RepertoryError], what: str) -> Iterator[None]:
    """Raise `kind` in place of a panic inside. `what` says what failed."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: the tokenizers library panicked: {error}") from error
