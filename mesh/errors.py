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

from common import error_codes
from common.errors import ReportedError


class MeshError(ReportedError):
    """Base of all errors that a caller may see."""


class InvalidRequest(MeshError):
    code, http_status, openai_type = error_codes.INVALID


class Unauthenticated(MeshError):
    code, http_status, openai_type = error_codes.UNAUTHENTICATED


class PermissionDenied(MeshError):
    code, http_status, openai_type = error_codes.PERMISSION_DENIED


class NotFound(MeshError):
    code, http_status, openai_type = error_codes.NOT_FOUND


class AlreadyExists(MeshError):
    code, http_status, openai_type = error_codes.ALREADY_EXISTS


class PreconditionFailed(MeshError):
    code, http_status, openai_type = error_codes.PRECONDITION_FAILED


class LoadFailed(MeshError):
    """`detail` begins with the runtime's status code, as in ModelMesh: "INTERNAL: broken model".

    `lasting`: time alone does not help, as with a missing file or a model that exceeds the capacity.
    """

    code, http_status, openai_type = error_codes.MESH_LOAD_FAILED

    def __init__(
        self,
        detail: str,
        *,
        model: str | None = None,
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
    code, http_status, openai_type = error_codes.OVERLOADED


class TooLarge(MeshError):
    code, http_status, openai_type = error_codes.TOO_LARGE


class NotSupported(MeshError):
    code, http_status, openai_type = error_codes.NOT_SUPPORTED


class Unavailable(MeshError):
    code, http_status, openai_type = error_codes.UNAVAILABLE


class DeadlineExceeded(MeshError):
    code, http_status, openai_type = error_codes.DEADLINE_EXCEEDED


class StoreError(Unavailable):
    pass


class StoreRefused(StoreError):
    """The store answered that it does not do what was asked. `status`: the name of the gRPC status of its answer."""

    def __init__(self, detail: str, *, status: str) -> None:
        super().__init__(detail)
        self.status = status


class StoreUncertain(StoreError):
    pass
