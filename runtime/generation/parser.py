"""Defines output parsers, which split the text of a running sequence into typed parts for the API's encoder."""

from collections.abc import Callable
from typing import Protocol

from runtime.generation.parts import Part, Text
from runtime.types import GenerationRequest


class OutputParser(Protocol):
    """Splits the text of one sequence. It may hold text back until it knows what the text belongs to."""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends in the model's reasoning."""

    @property
    def num_calls(self) -> int:
        """Tool calls that have ended so far."""

    def push(self, text: str) -> tuple[Part, ...]:
        """Return the parts that `text` (never empty) completes."""

    def flush(self) -> tuple[Part, ...]:
        """Return what is still held back. The sequence has ended, perhaps inside a tool call."""


MakeParser = Callable[[GenerationRequest], OutputParser]


class PlainText:
    """Returns every text as a piece of the answer."""

    in_reasoning = False
    num_calls = 0

    def push(self, text: str) -> tuple[Part, ...]:
        return (Text(text),)

    def flush(self) -> tuple[Part, ...]:
        return ()


def plain_text(request: GenerationRequest) -> OutputParser:
    return PlainText()
