"""Asks a drafter for guesses that a step verifies."""

from runtime.engine.interfaces import Drafter
from runtime.engine.scheduler.sequence import Sequence


class Speculation:
    """Hands out the draft slots of one step at a time. A step draws at most as many tokens as there are rows."""

    def __init__(self, drafter: Drafter | None) -> None:
        self._drafter = drafter
        self._slots = 0

    def begin_step(self, slots: int) -> None:
        """Allow `slots` drafts in the next step."""
        self._slots = max(0, slots) if self._drafter is not None else 0

    def covers(self, sequence: Sequence) -> bool:
        """Whether the sequence's draws can be verified: they depend on no mask, and on no history that a wrong draft would enter."""
        return (
            self._drafter is not None
            and sequence.mask_source is None
            and not sequence.request.sampling.needs_history
            and not sequence.wants_prompt_logprobs
        )

    def propose(self, sequence: Sequence, budget: int) -> list[int]:
        """Return guesses that follow the sequence's known tokens, at most `budget`."""
        if not self._slots or self._drafter is None or not self.covers(sequence):
            return []
        most = min(budget, self._slots, sequence.max_output_tokens - sequence.num_output_tokens - 1)
        drafts = self._drafter.propose(sequence.tokens, most) if most > 0 else []
        self._slots -= len(drafts)
        return drafts
