"""The runtime's exceptions and their gRPC status and HTTP codes.

    RepertoryError
    ├── InvalidRequest          a parameter of the request is invalid
    │   └── ContextExceeded     prompt and requested output exceed the model's context
    ├── PermissionDenied        a web page of another site
    ├── NotSupported            a feature that this version does not have
    ├── ModelNotFound           no such model is loaded in this runtime
    ├── LoadFailed              the model could not be pulled, packed or loaded; carries the cause
    │   ├── ModelTooLarge       it exceeds a whole memory or disk budget, so no eviction makes it fit
    │   └── Quarantined         its load or steps crashed the engine twice
    ├── Overloaded              a queue or a memory budget is full; carries a retry hint
    ├── DeadlineExceeded        the request's deadline has passed
    ├── Cancelled               the client cancelled or disconnected
    ├── Unavailable             shutting down, or the engine is being restarted
    │   └── EngineUnfit         this machine cannot run the engine with its configuration
    └── EngineFault             a step of the engine failed; the request is lost

An error carries its facts as fields. `message` puts the model's name in front of the detail, so no caller edits a text.
`code` is the gRPC status name and `http_status` the HTTP status.
"""

from common import error_codes
from common.errors import ReportedError


class RepertoryError(ReportedError):
    """Base of all errors that a client may see. The edge replaces a model's id with the name that the client knows."""


class InvalidRequest(RepertoryError):
    """The request can never succeed as it stands."""

    code, http_status, openai_type = error_codes.INVALID


class ContextExceeded(InvalidRequest):
    """The prompt, with the output that was asked for, has `value` tokens (or characters); the context holds `limit`."""


class PermissionDenied(RepertoryError):
    """The caller may not use this server."""

    code, http_status, openai_type = error_codes.PERMISSION_DENIED


class NotSupported(RepertoryError):
    """A known feature that this version does not have; it is never ignored silently."""

    code, http_status, openai_type = error_codes.NOT_SUPPORTED


class ModelNotFound(RepertoryError):
    """The model is not loaded in this runtime. A mesh then loads it again."""

    code, http_status, openai_type = error_codes.NOT_FOUND


class LoadFailed(RepertoryError):
    """Pulling, packing or loading failed; the message carries the cause."""

    code, http_status, openai_type = error_codes.LOAD_FAILED


class ModelTooLarge(LoadFailed):
    """The model needs `value` bytes of a budget of `limit` bytes, so it does not fit even when nothing else is loaded."""


class Quarantined(LoadFailed):
    """The model crashed the engine twice and is not loaded again until it is registered again."""


class Overloaded(RepertoryError):
    """A bounded queue or a memory budget is full."""

    code, http_status, openai_type = error_codes.OVERLOADED


class DeadlineExceeded(RepertoryError):
    """The caller's deadline passed first."""

    code, http_status, openai_type = error_codes.DEADLINE_EXCEEDED


class Cancelled(RepertoryError):
    """The caller cancelled."""

    code, http_status, openai_type = error_codes.CANCELLED


class Unavailable(RepertoryError):
    """Shutting down, or the engine is restarting; another copy or a later attempt may succeed."""

    code, http_status, openai_type = error_codes.UNAVAILABLE


class EngineUnfit(Unavailable):
    """This machine cannot run the engine with its configuration. Starting it again would not help."""


class EngineFault(RepertoryError):
    """An engine step failed; the rows of that step are lost and the engine continues."""

    code, http_status, openai_type = error_codes.INTERNAL


_BY_CODE: dict[str, type[RepertoryError]] = {
    kind.code: kind
    for kind in (
        InvalidRequest,
        NotSupported,
        ModelNotFound,
        LoadFailed,
        Overloaded,
        DeadlineExceeded,
        Cancelled,
        Unavailable,
    )
}


def from_code(
    code: str, detail: str, *, model: str | None = None, retry_after_s: float | None = None
) -> RepertoryError:
    """Restore the error that the engine or the packer sent as a status name and a text."""
    return _BY_CODE.get(code, EngineFault)(detail, model=model, retry_after_s=retry_after_s)


def is_panic(error: BaseException) -> bool:
    """Return whether a library written in Rust has panicked. Its PanicException is not a subclass of Exception, and its module cannot be imported."""
    return type(error).__name__ == "PanicException"
