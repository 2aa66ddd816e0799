"""Collects what one request has used so far (tokens, waiting, the first token) where its text is generated, for the log line at its end."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

_CURRENT: ContextVar["RequestRecord | None"] = ContextVar("request_record", default=None)


@dataclass(slots=True)
class RequestRecord:
    """Times are seconds. `queue_s` is the longest wait of a sequence for its first step, `first_s` the time of the first token.

    `code` is the outcome where the response's status does not show it, as for a stream that failed.
    """

    started_s: float = field(default_factory=time.monotonic)
    model: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue_s: float = 0.0
    first_s: float = 0.0
    code: str = ""

    @classmethod
    def begin(cls) -> "RequestRecord":
        """Return a record that `current` finds in this task and in tasks that it starts."""
        record = cls()
        _CURRENT.set(record)
        return record

    @classmethod
    def current(cls) -> "RequestRecord":
        """Return the record of the request that is being answered. Outside of a request the record is discarded."""
        return _CURRENT.get() or cls()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def take(self, num_tokens: int, queue_s: float | None) -> None:
        """Count new tokens, and the wait of a sequence that has got its first one."""
        self.output_tokens += num_tokens
        if num_tokens and not self.first_s:
            self.first_s = self.elapsed_s
        if queue_s is not None and queue_s > self.queue_s:
            self.queue_s = queue_s

    def fields(self) -> dict[str, object]:
        """Return the fields of the log line; those without a value are left out."""
        found = {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "queue_s": round(self.queue_s, 3),
            "first_s": round(self.first_s, 4),
        }
        return {name: value for name, value in found.items() if value}
