"""The server-sent events of the generate extension: one piece of text each."""

from collections.abc import Callable

from runtime.api.oip.model import VERSION
from runtime.api.oip.rest_types import GenerateAnswer
from runtime.api.openai.responses import encode, finish_word
from runtime.errors import RepertoryError
from runtime.generation.parts import Delta
from runtime.interfaces import ServedModel


class GenerateEvents:
    """Makes the events of one text. `error_body` returns an error's JSON."""

    def __init__(self, model: ServedModel, shown_name: str, error_body: Callable[[RepertoryError], bytes]) -> None:
        self.num_events = 0
        self._model = model
        self._shown_name = shown_name
        self._error_body = error_body

    def delta(self, delta: Delta) -> bytes:
        """Return the delta's event. Raises Unavailable for a sequence that the runtime ended."""
        if delta.finish is not None:
            finish_word(self._model, delta.finish.reason)
        if not delta.text and delta.finish is None:
            return b""
        self.num_events += 1
        return _event(encode(GenerateAnswer(self._shown_name, VERSION, delta.text)))

    def end(self) -> bytes:
        return b""

    def error(self, error: RepertoryError) -> bytes:
        return _event(self._error_body(error))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
