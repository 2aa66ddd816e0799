"""Defines the interface between scheduling and grammars: sources of the token masks of guided sequences."""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.ipc.messages import GrammarFigures
from runtime.types import Checkpoint, Grammar, ModelFacts

TokenMasks = npt.NDArray[np.int32]
"""Packed masks [rows, mask_words(vocab_size)]: bit t % 32 of word t // 32 is set if token t may be drawn."""


def mask_words(vocab_size: int) -> int:
    """Return the number of int32 words of one packed mask."""
    return -(-vocab_size // 32)


class MaskSource(Protocol):
    """The tokens with which one sequence may continue, computed on the host in the engine thread."""

    def fill_mask(self, words: TokenMasks) -> None:
        """Write the mask [words] of the next token, with at least one bit set.

        Called once per draw, after the step's forward pass has been launched and all earlier tokens have been accepted. If it raises, or leaves the
        mask empty, the sequence ends with an error.
        """

    def accept(self, tokens: Sequence[int]) -> None:
        """Advance by tokens that the sequence has got. An error in here is raised by the next `fill_mask`."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that must come next, as far as the grammar has only one continuation. They are accepted like drawn ones."""

    @property
    def finished(self) -> bool:
        """Whether the accepted tokens form a complete text of the grammar after which nothing may follow."""

    @property
    def is_spent(self) -> bool:
        """Whether every token is allowed from now on, whatever comes."""


class MaskSourceJob(Protocol):
    """A mask source that is being made in the background."""

    def ready(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> MaskSource:
        """Wait for the mask source. Raises RepertoryError if the grammar cannot be enforced for this model."""


class MaskSources(Protocol):
    """Makes the mask sources of requests that have a grammar."""

    def open(self, checkpoint: Checkpoint, facts: ModelFacts, grammar: Grammar) -> MaskSourceJob:
        """Begin to make a mask source for one sequence. Returns at once."""

    def compute(self, sources: Sequence[MaskSource | None], words: TokenMasks) -> None:
        """Write the next masks of several sequences at once, each to its line of `words`. None: the line is not touched.

        Every source's `fill_mask` follows with the same line, and completes what is there or writes it.
        """

    def retain(self, model_dirs: Collection[str]) -> None:
        """Release everything that is kept for models outside these folders."""

    @property
    def host_bytes(self) -> int:
        """The memory that is kept for models."""

    @property
    def figures(self) -> GrammarFigures:
        """Counts of what has been built so far. Masks are counted elsewhere."""
