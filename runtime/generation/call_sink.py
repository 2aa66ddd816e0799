"""Collects the tool calls that a parser reads and turns them into parts, piece by piece or only when a call is complete."""

import secrets
import string
from collections.abc import Callable

from runtime.generation.json_text import MalformedCall, decode
from runtime.generation.parts import Part, ToolCall
from runtime.text.output_format import CallIds

_LETTERS = string.ascii_letters + string.digits


class CallSink:
    """`whole`: a call is emitted when it is complete and its arguments are a JSON object. `single`: calls after the first are dropped."""

    def __init__(self, emit: Callable[[Part], None], call_ids: CallIds, *, whole: bool, single: bool) -> None:
        self._emit = emit
        self._call_ids = call_ids
        self._whole = whole
        self._single = single
        self._held: list[str] = []
        self._begun: ToolCall | None = None
        self.num_calls = 0
        self.is_open = False  # the client has a call's beginning

    def begin(self, name: str, call_id: str | None = None) -> None:
        if self._call_ids is CallIds.NINE:
            call_id = "".join(secrets.choice(_LETTERS) for _ in range(9))
        self._begun, self._held = ToolCall(self.num_calls, "", call_id, name), []
        if not self._whole and not self._drops:
            self.is_open = True
            self._emit(self._begun)

    def arguments(self, text: str) -> None:
        if self._whole:
            self._held.append(text)
        elif not self._drops:
            self._emit(ToolCall(self.num_calls, text))

    def end(self) -> None:
        """End the call. Raises MalformedCall if `whole` finds arguments that are not a JSON object."""
        begun = self._begun
        assert begun is not None
        if self._whole:
            arguments = "".join(self._held)
            if not isinstance(decode(arguments), dict):
                raise MalformedCall
            if not self._drops:
                self._emit(ToolCall(begun.index, arguments, begun.call_id, begun.name))
        self.num_calls += 1
        self.is_open = False

    def abandon(self) -> None:
        """End a call that the model did not write to its end; the client keeps what it has."""
        self.num_calls += 1
        self.is_open = False

    @property
    def _drops(self) -> bool:
        return self._single and self.num_calls > 0
