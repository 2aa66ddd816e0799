"""Turns a panic of the tokenizers library, which `except Exception` does not catch, into an error with a cause."""

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import RepertoryError, is_panic


@contextmanager
def panics_as(kind: type[RepertoryError], what: str) -> Iterator[None]:
    """Raise `kind` in place of a panic inside. `what` says what failed."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if not is_panic(error):
            raise
        raise kind(f"{what}: the tokenizers library panicked: {error}") from error
