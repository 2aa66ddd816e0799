"""The mesh's exception tree and its one mapping to gRPC status and HTTP code.

    MeshError
    ├── InvalidRequest        INVALID_ARGUMENT     400
    ├── Unauthenticated       UNAUTHENTICATED      401
    ├── NotFound              NOT_FOUND            404   no such model or vmodel
    ├── AlreadyExists         ALREADY_EXISTS       409   other attributes or owner
    ├── PreconditionFailed    FAILED_PRECONDITION  412
    ├── LoadFailed            FAILED_PRECONDITION  424   carries the cause
    ├── Overloaded            RESOURCE_EXHAUSTED   429   with a retry hint
    ├── TooLarge              RESOURCE_EXHAUSTED   413   a body or a message over the limit
    ├── NotSupported          UNIMPLEMENTED        501
    ├── Unavailable           UNAVAILABLE          503   with a retry hint
    ├── DeadlineExceeded      DEADLINE_EXCEEDED    504
    └── StoreError            UNAVAILABLE          503   the store can't be reached, nothing was changed
        └── StoreUncertain                               the connection broke after a write was sent: it may have happened

Every message names the model, the limit and the value.
"""


class MeshError(Exception):
    """Base of all errors that a caller may see. `retry_after_s`: when a repeat may succeed, if that is known."""

    code = "INTERNAL"
    http_status = 500
    openai_type = "server_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(MeshError):
    code = "INVALID_ARGUMENT"
    http_status = 400
    openai_type = "invalid_request_error"


class Unauthenticated(MeshError):
    code = "UNAUTHENTICATED"
    http_status = 401
    openai_type = "invalid_request_error"


class NotFound(MeshError):
    code = "NOT_FOUND"
    http_status = 404
    openai_type = "invalid_request_error"


class AlreadyExists(MeshError):
    code = "ALREADY_EXISTS"
    http_status = 409
    openai_type = "invalid_request_error"


class PreconditionFailed(MeshError):
    code = "FAILED_PRECONDITION"
    http_status = 412
    openai_type = "invalid_request_error"


class LoadFailed(MeshError):
    code = "FAILED_PRECONDITION"
    http_status = 424
    openai_type = "model_load_error"


class Overloaded(MeshError):
    code = "RESOURCE_EXHAUSTED"
    http_status = 429
    openai_type = "overloaded_error"


class TooLarge(MeshError):
    code = "RESOURCE_EXHAUSTED"
    http_status = 413
    openai_type = "invalid_request_error"


class NotSupported(MeshError):
    code = "UNIMPLEMENTED"
    http_status = 501
    openai_type = "not_supported_error"


class Unavailable(MeshError):
    code = "UNAVAILABLE"
    http_status = 503
    openai_type = "unavailable_error"


class DeadlineExceeded(MeshError):
    code = "DEADLINE_EXCEEDED"
    http_status = 504
    openai_type = "timeout_error"


class StoreError(Unavailable):
    pass


class StoreUncertain(StoreError):
    pass
