"""Collects the masks of one step from its sequences' mask sources."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from runtime.engine.grammar.interfaces import MaskSource, TokenMasks
from runtime.engine.scheduler.sequence import Sequence, State
from runtime.errors import InvalidRequest

_ALL_ALLOWED = -1


@dataclass(frozen=True, slots=True)
class MaskFailure:
    """A sequence that must end. `code`: the error's gRPC status name; `text`: the reason."""

    sequence: Sequence
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class StepMasks:
    """`words` has one line per masked row of the plan. `failures`: sequences that must end.

    In the lines of these and of sequences that have left their row, all tokens are allowed.
    """

    words: TokenMasks
    failures: list[MaskFailure]


def fill_masks(
    sequences: Iterable[Sequence],
    words: TokenMasks,
    compute: Callable[[list[MaskSource | None], TokenMasks], None] = lambda sources, words: None,
) -> StepMasks:
    """Write the mask of every sequence's next token to its line of `words`. An error of a source is a failure of its sequence alone.

    `compute` is called first: see `MaskSources.compute`.
    """
    masked = list(sequences)
    words[:] = 0
    compute([s.mask_source if s.state is State.RUNNING else None for s in masked], words)
    failures: list[MaskFailure] = []
    for line, sequence in zip(words, masked, strict=True):
        assert sequence.mask_source is not None
        if sequence.state is not State.RUNNING:
            line[:] = _ALL_ALLOWED  # its draw is dropped
            continue
        try:
            sequence.mask_source.fill_mask(line)
        except Exception as error:
            line[:] = _ALL_ALLOWED
            # An exceeded limit is the request's own; any other exception is a fault.
            if isinstance(error, InvalidRequest):
                code, reason = error.code, error.detail
            else:
                code, reason = "INTERNAL", f"{type(error).__name__}: {error}"
            text = f"its grammar failed after {sequence.num_output_tokens} output tokens: {reason}"
            failures.append(MaskFailure(sequence, code, text))
    for index in np.flatnonzero(np.bitwise_or.reduce(words, axis=1) == 0):
        words[index] = _ALL_ALLOWED
        text = f"its grammar allows no token after {masked[index].num_output_tokens} output tokens"
        failures.append(MaskFailure(masked[index], "INTERNAL", text))
    return StepMasks(words, failures)
