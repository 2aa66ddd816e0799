"""Collects the masks of one step from its sequences' mask sources."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from runtime.engine.grammar.interfaces import MaskSource, TokenMasks
from runtime.engine.scheduler.sequence import Sequence, State

_ALL_ALLOWED = -1


@dataclass(frozen=True, slots=True)
class StepMasks:
    """`words` has one line per masked row of the plan. `failures`: sequences that must end, with the reason.

    In the lines of these and of sequences that have left their row, all tokens are allowed.
    """

    words: TokenMasks
    failures: list[tuple[Sequence, str]]


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
    failures: list[tuple[Sequence, str]] = []
    for line, sequence in zip(words, masked, strict=True):
        assert sequence.mask_source is not None
        if sequence.state is not State.RUNNING:
            line[:] = _ALL_ALLOWED  # its draw is dropped
            continue
        try:
            sequence.mask_source.fill_mask(line)
        except Exception as error:
            line[:] = _ALL_ALLOWED
            text = (
                f"its grammar failed after {sequence.num_output_tokens} output tokens: {type(error).__name__}: {error}"
            )
            failures.append((sequence, text))
    for index in np.flatnonzero(np.bitwise_or.reduce(words, axis=1) == 0):
        words[index] = _ALL_ALLOWED
        text = f"its grammar allows no token after {masked[index].num_output_tokens} output tokens"
        failures.append((masked[index], text))
    return StepMasks(words, failures)
