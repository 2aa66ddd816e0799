"""Defines what the errors of mesh and runtime have in common: facts as fields, and the sentence that is made from them."""

from common import error_codes


class ReportedError(Exception):
    """Base of all errors that a caller may see. `code` is the gRPC status name.

    Attributes:
        detail: what happened, without the model's name.
        model: the model's name or id, as the caller knows it; None if no model is concerned.
        param: the request's field at fault, in the API's own words.
        limit: the limit that was exceeded, in the unit that `detail` states.
        value: the value that exceeded it.
        retry_after_s: when a retry may succeed; None if unknown.
    """

    code, http_status, openai_type = error_codes.INTERNAL

    def __init__(
        self,
        detail: str,
        *,
        model: str | None = None,
        param: str | None = None,
        limit: float | None = None,
        value: float | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.model = model
        self.param = param
        self.limit = limit
        self.value = value
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        """The sentence for people: the detail, after the model's name if there is one."""
        return f"model {self.model}: {self.detail}" if self.model else self.detail

    def __str__(self) -> str:
        return self.message


class ConfigError(ValueError):
    """A flag, an environment variable or a field of a configuration file is invalid. The text names its source and its value.

    Mesh and runtime end with exit status 2 and the text.
    """

    @property
    def message(self) -> str:
        return str(self)
