"""Reserves KV blocks for the sequences that one model runs, and decides whether one more fits."""

from collections.abc import Set as AbstractSet

from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.scheduler.admission import LengthEstimate, blocks_for, peak_blocks
from runtime.engine.scheduler.limits import KvRoom
from runtime.engine.scheduler.sequence import Sequence

# An estimate alone holds a sequence back for this long. It also bounds the preemptions that too many admissions cost: one a second and model.
_PATIENCE_S = 1.0


class Reservations:
    """Counts blocks that running sequences will need. The count is an estimate; the block pool alone knows what is free.

    An estimate postpones a sequence for which there is memory now by a second at most, and never the first one of an idle model.

    Attributes:
        promised_blocks: blocks on which the last admission relied.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.promised_blocks = 0
        self._cache = cache
        self._block_tokens = cache.blocks.geometry.block_tokens
        self._lengths = LengthEstimate()
        self._reserved = 0
        self._changed_s = 0.0  # when a reservation was last added or removed

    def is_overdue(self, sequence: Sequence, now: float) -> bool:
        """Whether the sequence has waited long enough to begin with what is free now, whatever the running ones may need later."""
        return now - max(sequence.arrived_s, self._changed_s) >= _PATIENCE_S

    def fits(
        self, sequence: Sequence, hits: int, room: KvRoom, running: AbstractSet[Sequence], *, overdue: bool = False
    ) -> bool:
        """Whether `room` suffices for `running` and `sequence`, whose first `hits` blocks are cached. Sets the blocks to reserve for it."""
        block_tokens = self._block_tokens
        remaining = self.expected_left(sequence)
        sequence.reserved_blocks = blocks_for(len(sequence.tokens) + remaining, block_tokens)
        if not running:
            # A lone sequence begins with the room for its next token. Later it takes blocks from other models, or it is preempted.
            if blocks_for(sequence.tokens_to_begin, block_tokens) > room.now:
                return False
            self.promised_blocks = min(sequence.reserved_blocks, room.planned)
            return True
        if self._reserved + sequence.reserved_blocks <= room.planned:
            self.promised_blocks = self._reserved + sequence.reserved_blocks
            return True
        held = [len(s.tokens) - s.num_shared_blocks * block_tokens for s in running]
        left = [self.expected_left(s) for s in running]
        own = sum(len(s.block_ids) - s.num_shared_blocks for s in running)
        base = max(self._cache.blocks.used_blocks - own, 0) + self._cache.idle_among(sequence.block_hashes[:hits])
        held.append(len(sequence.tokens) - hits * block_tokens)
        left.append(remaining)
        peak = base + peak_blocks(held, left, block_tokens)
        if peak <= room.planned:
            self.promised_blocks = peak
            return True
        return overdue and self._fits_now(sequence, hits, room.now, len(running))

    def _fits_now(self, sequence: Sequence, hits: int, blocks: int, running: int) -> bool:
        """Whether the sequence can begin, and every running one can take its next block, without a preemption."""
        new = blocks_for(sequence.tokens_to_begin, self._block_tokens) - hits
        revived = self._cache.idle_among(sequence.block_hashes[:hits])
        return self._cache.blocks.used_blocks + running + revived + new <= blocks

    def add(self, sequence: Sequence, now: float) -> None:
        """Reserve what `fits` counted for the sequence."""
        self._changed_s = now
        self._reserved += sequence.reserved_blocks

    def remove(self, sequence: Sequence, now: float) -> None:
        """End the sequence's reservation."""
        self._changed_s = now
        self._reserved -= sequence.reserved_blocks
        self.promised_blocks = min(self.promised_blocks, self._reserved)

    def expected_left(self, sequence: Sequence) -> int:
        """Return how many tokens the sequence is expected to draw yet."""
        return self._lengths.expected(sequence.max_output_tokens, sequence.num_output_tokens)

    def steps_left(self, running: AbstractSet[Sequence]) -> tuple[int, int]:
        """Return the expected steps until the first and until the last of these sequences ends; (0, 0) if there is none."""
        left = [self.expected_left(sequence) for sequence in running]
        return (min(left), max(left)) if left else (0, 0)

    def record_length(self, sequence: Sequence) -> None:
        """Learn from a sequence that has ended."""
        self._lengths.record(sequence.num_output_tokens)

    def check(self, running: AbstractSet[Sequence]) -> None:
        if self._reserved != sum(sequence.reserved_blocks for sequence in running):
            raise AssertionError("reserved blocks are miscounted")
