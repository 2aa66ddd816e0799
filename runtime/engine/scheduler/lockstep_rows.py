"""Holds the rows whose next step needs the result of their last one: rows with drafts, and rows with tokens that a grammar forced."""

from collections.abc import Iterable, Iterator

from runtime.engine.grammar.interfaces import MaskSource
from runtime.engine.scheduler.decode_batch import DecodeBatch
from runtime.engine.scheduler.sequence import Sequence, State

_LEAST_FORCED = 4  # a row that leaves the decode batch for its forced tokens takes three steps for them
_MOST_ROWS = 16  # in larger batches, looking for forced tokens costs more than the few long runs of them are worth


def worth_a_chunk(num_forced: int, num_rows: int) -> bool:
    """Whether a decode row should leave a batch of `num_rows` for its forced tokens.

    The row saves all but three of their steps. In exchange the step with its chunk, which has no graph of decode rows, takes up to half as long
    again for every row.
    """
    return num_forced >= max(_LEAST_FORCED, 3 + num_rows // 2)


class LockstepRows:
    """The rows past their prompts that are not decode rows, in the order in which they joined."""

    def __init__(self) -> None:
        self._sequences: dict[Sequence, None] = {}
        self._parked: dict[Sequence, None] = {}  # in no plan until their last draw is settled: forced tokens follow it

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence] = None

    def discard(self, sequence: Sequence) -> None:
        """Drop the sequence if it is here, parked or not."""
        self._sequences.pop(sequence, None)
        self._parked.pop(sequence, None)

    def kv_tokens(self) -> int:
        """Return how many tokens of KV the rows hold."""
        return sum(sequence.num_computed_tokens for sequence in self._sequences)

    def without_room(self, block_tokens: int) -> list[Sequence]:
        """Return the rows whose next token needs another block."""
        return [
            sequence
            for sequence in self._sequences
            if sequence.num_computed_tokens < len(sequence.tokens) > len(sequence.block_ids) * block_tokens
        ]

    def take_forced(self, sequence: Sequence, decode: DecodeBatch, *, in_flight: bool) -> Iterable[int]:
        """Return the tokens that follow without a draw, and let one chunk compute them all.

        A decode row whose next draw is `in_flight` gets them with that draw: it is parked until then.
        None are taken where each token's log-probability is wanted, which only a draw has.
        """
        source = sequence.mask_source
        if source is None or sequence.request.logprobs.generated is not None:
            return ()
        if sequence.state is State.WAITING:
            return source.forced()
        if sequence in self._parked:
            del self._parked[sequence]
        elif sequence.decode_index < 0 or not self._worth_leaving(source, len(decode) + len(self)):
            return ()
        else:
            decode.remove(sequence)
            if in_flight:
                self._parked[sequence] = None
                return ()
        sequence.num_computed_tokens = len(sequence.tokens) - 1
        self._sequences[sequence] = None
        return source.forced()

    @staticmethod
    def _worth_leaving(source: MaskSource, num_rows: int) -> bool:
        return num_rows <= _MOST_ROWS and worth_a_chunk(len(source.forced()), num_rows)
