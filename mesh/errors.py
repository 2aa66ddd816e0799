"""The mesh's exceptions and their gRPC status and HTTP codes.

    MeshError
    ├── InvalidRequest        INVALID_ARGUMENT     400
    ├── Unauthenticated       UNAUTHENTICATED      401
    ├── PermissionDenied      PERMISSION_DENIED    403   a key without the right, or a foreign web page
    ├── NotFound              NOT_FOUND            404   unknown model or vmodel
    ├── AlreadyExists         ALREADY_EXISTS       409   other attributes or owner
    ├── PreconditionFailed    FAILED_PRECONDITION  412
    ├── LoadFailed            INTERNAL             424   `detail` is the cause
    ├── Overloaded            RESOURCE_EXHAUSTED   429   with a retry hint
    ├── TooLarge              RESOURCE_EXHAUSTED   413   a body or a message over the limit
    ├── NotSupported          UNIMPLEMENTED        501
    ├── Unavailable           UNAVAILABLE          503   with a retry hint
    ├── DeadlineExceeded      DEADLINE_EXCEEDED    504
    └── StoreError            UNAVAILABLE          503   the store is unreachable and nothing was changed
        └── StoreUncertain                               the connection broke after a write was sent, so it may have been applied

The fields carry what happened; `message` is the sentence for people, made from them. Code decides by type and field, never by text.
"""


class MeshError(Exception):
    """Base of all errors that a caller may see.

    Attributes:
        detail: what happened, without the model's name.
        model: the model's id or name, as the caller knows it; empty if no model is concerned.
        limit: the limit that was exceeded, in the unit that `detail` states; None if there is none.
        value: the value that exceeded it.
        retry_after_s: when a repeat may succeed; None if unknown.
    """

    code = "INTERNAL"
    http_status = 500
    openai_type = "server_error"

    def __init__(
        self,
        detail: str,
        *,
        model: str = "",
        limit: float | None = None,
        value: float | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.model = model
        self.limit = limit
        self.value = value
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        return f"model {self.model}: {self.detail}" if self.model else self.detail

    def __str__(self) -> str:
        return self.message


class InvalidRequest(MeshError):
    code = "INVALID_ARGUMENT"
    http_status = 400
    openai_type = "invalid_request_error"


class Unauthenticated(MeshError):
    code = "UNAUTHENTICATED"
    http_status = 401
    openai_type = "invalid_request_error"


class PermissionDenied(MeshError):
    code = "PERMISSION_DENIED"
    http_status = 403
    openai_type = "permission_error"


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
    """`detail` begins with the runtime's status code, as in ModelMesh: "INTERNAL: broken model".

    `lasting`: time alone does not help, as with a missing file or a model that exceeds the capacity.
    """

    code = "INTERNAL"
    http_status = 424
    openai_type = "model_load_error"

    def __init__(
        self,
        detail: str,
        *,
        model: str = "",
        limit: float | None = None,
        value: float | None = None,
        retry_after_s: float | None = None,
        lasting: bool = False,
    ) -> None:
        super().__init__(detail, model=model, limit=limit, value=value, retry_after_s=retry_after_s)
        self.lasting = lasting

    @property
    def message(self) -> str:
        return f"{self.detail} (model {self.model} failed to load)" if self.model else self.detail


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
