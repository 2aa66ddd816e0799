"""Gives rows and KV blocks to the sequences of one model that run, and collects the changes that the next step carries to the device."""

from runtime.engine.interfaces import RowSetup
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.scheduler.kv_return import KvReturn
from runtime.engine.scheduler.limits import KvRoom
from runtime.engine.scheduler.prefix_blocks import prefix_hits, publish_blocks, reusable_hashes
from runtime.engine.scheduler.reservations import Reservations
from runtime.engine.scheduler.row_pool import ModelRows
from runtime.engine.scheduler.sequence import Sequence, State, row_setup

NewBlock = tuple[int, int, int]  # row, index in its block table, block id


class RunningRows:
    """The sequences that have a row. Admission decides by `reservations`; the cache alone knows which blocks are free.

    Attributes:
        sequences: all sequences with a row, including those whose last token is in flight.
    """

    def __init__(self, cache: PrefixCache, rows: ModelRows) -> None:
        self.sequences: set[Sequence] = set()
        self.reservations = Reservations(cache)
        self._cache = cache
        self._rows = rows
        self._block_tokens = cache.blocks.geometry.block_tokens
        self._refused_at: tuple[int, KvRoom, int, bool] | None = None
        self._opened: list[RowSetup] = []
        self._new_blocks: list[NewBlock] = []

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_free(self) -> int:
        """The number of rows that no model uses."""
        return self._rows.free

    def hits_if_room(self, sequence: Sequence, room: KvRoom, now: float) -> int | None:
        """Return how many of the sequence's blocks are cached if it can begin in `room`, else None."""
        overdue = self.reservations.is_overdue(sequence, now)
        key = (sequence.request_id, room, len(self.sequences), overdue)
        if key == self._refused_at:
            return None
        hits = prefix_hits(self._cache, sequence)
        if not self.reservations.fits(sequence, hits, room, self.sequences, overdue=overdue):
            self._refused_at = key
            return None
        return hits

    def open(
        self,
        sequence: Sequence,
        hits: int,
        suppressed: tuple[int, ...],
        now: float,
        kv_return: KvReturn | None = None,
        queued: int = 0,
    ) -> None:
        """Give the sequence a row, its `hits` cached blocks, and the blocks after them that host memory holds, unless `kv_return` finds computing faster.

        `suppressed`: ids that may not be drawn before min_tokens. `queued`: tokens that the model computes first.
        """
        sequence.block_ids = self._cache.acquire(sequence.block_hashes[:hits])
        further = reusable_hashes(self._cache, sequence)[hits:]
        if kv_return is None or self._returns_faster(further, hits, kv_return, queued):
            sequence.block_ids += self._cache.fetch(further, now)
        hits = len(sequence.block_ids)
        sequence.num_shared_blocks = sequence.num_published_blocks = hits
        sequence.num_computed_tokens = hits * self._block_tokens
        sequence.pooled = None
        sequence.row = self._rows.take()
        sequence.state = State.RUNNING
        self.reservations.add(sequence, now)
        self.sequences.add(sequence)
        sequence.count_adapter(running=1)
        self._new_blocks.extend((sequence.row, i, block_id) for i, block_id in enumerate(sequence.block_ids))
        self._opened.append(row_setup(sequence, suppressed))

    def _returns_faster(self, digests: list[bytes], hits: int, kv_return: KvReturn, queued: int) -> bool:
        """Whether to copy the leading ones of these blocks, which follow `hits` cached ones, from host memory."""
        found, copied = self._cache.fetchable(digests)
        size = self._block_tokens
        return copied > 0 and kv_return.is_faster(hits * size, (hits + found) * size, copied * size, queued)

    def close(self, sequence: Sequence, now: float) -> None:
        """Release the sequence's row and blocks. Blocks that it filled stay in the prefix cache."""
        if self._opened:
            self._opened = [setup for setup in self._opened if setup.row != sequence.row]
        if self._new_blocks:
            self._new_blocks = [block for block in self._new_blocks if block[0] != sequence.row]
        self.sequences.remove(sequence)
        sequence.count_adapter(running=-1)
        self.reservations.remove(sequence, now)
        self._rows.release(sequence.row)
        self._cache.release(sequence.block_ids, now)
        sequence.block_ids = []
        sequence.num_published_blocks = sequence.num_computed_tokens = sequence.num_shared_blocks = 0
        sequence.row = -1

    def add_block(self, sequence: Sequence) -> bool:
        """Allocate the sequence's next block. Returns False if there is none."""
        block_id = self._cache.take()
        if block_id is None:
            return False
        self._new_blocks.append((sequence.row, len(sequence.block_ids), block_id))
        sequence.block_ids.append(block_id)
        return True

    def add_blocks(self, sequence: Sequence, end: int) -> int:
        """Allocate blocks for the sequence's first `end` tokens. Returns for how many tokens there are blocks, at most `end`."""
        while len(sequence.block_ids) * self._block_tokens < end:
            if not self.add_block(sequence):
                return len(sequence.block_ids) * self._block_tokens
        return end

    def publish(self, sequence: Sequence, computed: int) -> None:
        """Add the blocks that the sequence's first `computed` tokens fill to the prefix cache."""
        publish_blocks(self._cache, sequence, computed)

    def take_changes(self) -> tuple[list[RowSetup], list[NewBlock]]:
        """Return the rows and blocks that were given since the last call."""
        changes = self._opened, self._new_blocks
        self._opened, self._new_blocks = [], []
        return changes

    def check(self) -> None:
        """Raise AssertionError unless all blocks in use belong to running sequences."""
        self._cache.check()
        held = {block_id for sequence in self.sequences for block_id in sequence.block_ids}
        if len(held) != self._cache.blocks.used_blocks:
            raise AssertionError(f"rows hold {len(held)} blocks, {self._cache.blocks.used_blocks} are used")
        self.reservations.check(self.sequences)
