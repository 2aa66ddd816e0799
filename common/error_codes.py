"""The codes of each kind of error, once for mesh and runtime: gRPC status, HTTP status, and the type in OpenAI's error body."""

from typing import NamedTuple

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""The type in an error body of Anthropic's API, by HTTP status; `api_error` for others."""


class ErrorCodes(NamedTuple):
    code: str
    http_status: int
    openai_type: str


INTERNAL = ErrorCodes("INTERNAL", 500, "server_error")
INVALID = ErrorCodes("INVALID_ARGUMENT", 400, "invalid_request_error")
UNAUTHENTICATED = ErrorCodes("UNAUTHENTICATED", 401, "invalid_request_error")
PERMISSION_DENIED = ErrorCodes("PERMISSION_DENIED", 403, "permission_error")
NOT_FOUND = ErrorCodes("NOT_FOUND", 404, "invalid_request_error")
ALREADY_EXISTS = ErrorCodes("ALREADY_EXISTS", 409, "invalid_request_error")
PRECONDITION_FAILED = ErrorCodes("FAILED_PRECONDITION", 412, "invalid_request_error")
TOO_LARGE = ErrorCodes("RESOURCE_EXHAUSTED", 413, "invalid_request_error")
LOAD_FAILED = ErrorCodes("FAILED_PRECONDITION", 424, "model_load_error")
MESH_LOAD_FAILED = LOAD_FAILED._replace(code="INTERNAL")  # as in ModelMesh, whose text begins with the runtime's code
OVERLOADED = ErrorCodes("RESOURCE_EXHAUSTED", 429, "overloaded_error")
CANCELLED = ErrorCodes("CANCELLED", 499, "cancelled")
NOT_SUPPORTED = ErrorCodes("UNIMPLEMENTED", 501, "not_supported_error")
UNAVAILABLE = ErrorCodes("UNAVAILABLE", 503, "unavailable_error")
DEADLINE_EXCEEDED = ErrorCodes("DEADLINE_EXCEEDED", 504, "timeout_error")
