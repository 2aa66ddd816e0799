"""The runtime's exception tree and its one mapping to gRPC status and HTTP code.

    RepertoryError
    ├── InvalidRequest          the caller's parameters are wrong
    ├── NotSupported            asked for and not here (yet)
    ├── ModelNotFound           no such model is loaded in this runtime
    ├── LoadFailed              the model could not be pulled, packed or loaded; carries the cause
    │   └── Quarantined         it took the engine down twice
    ├── Overloaded              a queue or a memory budget is full; carries a retry hint
    ├── DeadlineExceeded        the caller's time is up
    ├── Cancelled               the caller is gone
    ├── Unavailable             shutting down, or the engine is being restarted
    └── EngineFault             an invariant broke inside the engine; the request is lost

Every message names the model, the limit and the value. `code` is the gRPC status name and `http_status` the HTTP answer.
"""


class RepertoryError(Exception):
    """Base of all errors that a caller may see.

    Attributes:
        message: what a person should read.
        retry_after_s: when a repeat may succeed, if that is known.
    """

    code = "INTERNAL"
    http_status = 500
    openai_type = "server_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(RepertoryError):
    """The request can never succeed as it stands. `param` names the field in the API's own words, where there is one."""

    code = "INVALID_ARGUMENT"
    http_status = 400
    openai_type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotSupported(RepertoryError):
    """A known feature that this version does not have; never ignored silently. `param` as in InvalidRequest."""

    code = "UNIMPLEMENTED"
    http_status = 501
    openai_type = "not_supported_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(RepertoryError):
    """The model isn't loaded here. To a mesh this means: load it again."""

    code = "NOT_FOUND"
    http_status = 404
    openai_type = "invalid_request_error"


class LoadFailed(RepertoryError):
    """Pulling, packing or loading failed; the message carries the cause."""

    code = "FAILED_PRECONDITION"
    http_status = 424
    openai_type = "model_load_error"


class Quarantined(LoadFailed):
    """The model took the engine down twice and isn't tried again until it is registered anew."""


class Overloaded(RepertoryError):
    """A bounded queue or a memory budget is full."""

    code = "RESOURCE_EXHAUSTED"
    http_status = 429
    openai_type = "overloaded_error"


class DeadlineExceeded(RepertoryError):
    """The caller's deadline passed first."""

    code = "DEADLINE_EXCEEDED"
    http_status = 504
    openai_type = "timeout_error"


class Cancelled(RepertoryError):
    """The caller cancelled."""

    code = "CANCELLED"
    http_status = 499
    openai_type = "cancelled"


class Unavailable(RepertoryError):
    """Shutting down, or the engine is coming back; another copy or a later try may serve."""

    code = "UNAVAILABLE"
    http_status = 503
    openai_type = "unavailable_error"


class EngineFault(RepertoryError):
    """An engine step failed; the rows of that step are lost, the engine lives on."""

    code = "INTERNAL"
    http_status = 500


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


def from_code(code: str, message: str) -> RepertoryError:
    """The error that travelled as a status name and a text (engine → front)."""
    return _BY_CODE.get(code, EngineFault)(message)
