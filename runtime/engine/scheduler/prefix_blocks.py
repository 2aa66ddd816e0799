"""Finds a sequence's leading blocks in the prefix cache, and adds the blocks that it fills."""

from runtime.engine.kvcache.prefix import PrefixCache, chain
from runtime.engine.scheduler.pooling import reads_every_chunk
from runtime.engine.scheduler.sequence import Sequence


def publish_blocks(cache: PrefixCache, sequence: Sequence, computed: int) -> None:
    """Add the blocks that the first `computed` tokens fill to the prefix cache, as far as the tokens are known."""
    block_tokens = cache.blocks.geometry.block_tokens
    full = min(computed, len(sequence.tokens)) // block_tokens
    if full <= sequence.num_published_blocks:
        return
    chain(sequence.tokens, block_tokens, sequence.block_hashes, full, sequence.prefix_root)
    for i in range(sequence.num_published_blocks, full):
        cache.publish(sequence.block_ids[i], sequence.block_hashes[i])
    sequence.num_published_blocks = full


def reusable_hashes(cache: PrefixCache, sequence: Sequence) -> list[bytes]:
    """Return the hashes of the leading blocks that need not be computed if they are cached. The last known token is always computed, because a draw
    needs its logits."""
    if sequence.wants_prompt_logprobs or reads_every_chunk(sequence.request.pooling):
        return []
    block_tokens = cache.blocks.geometry.block_tokens
    # After a preemption the runner counts the earlier output for penalties from the tokens that it computes again.
    known = sequence.prompt_len if sequence.request.sampling.needs_history else len(sequence.tokens)
    most = min(known, len(sequence.tokens) - 1) // block_tokens
    chain(sequence.tokens, block_tokens, sequence.block_hashes, most, sequence.prefix_root)
    return sequence.block_hashes[:most]


def prefix_hits(cache: PrefixCache, sequence: Sequence) -> int:
    """Return how many leading blocks are cached on the device."""
    return cache.match(reusable_hashes(cache, sequence))
