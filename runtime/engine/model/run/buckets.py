"""Chooses the padded sizes to which small steps are rounded up, so that a few CUDA graphs cover all of them."""

from bisect import bisect_left

from runtime.engine.interfaces import Bucket

DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Up to a few hundred tokens, reading the weights dominates and padding is free. Above that, padding adds at most a third to a step. From
# 1,024 tokens of an 8B model on, the device takes as long as Python needs to launch the step, so a graph saves nothing.
MIXED_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024)
MIXED_ROWS = (16, 512)  # A padded row costs only its logits: under a twentieth of such a step.
# A decode step's attention divides a row's keys among programs by the largest context of the bucket.
CONTEXT_TOKENS = (1024, 4096, 16384, 65536, 262144, 1048576, 4194304)

_ANY_ROWS_TOKENS = 64  # Up to here the cost of a token's logits is not measurable.
_LIKELY_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Steps of these sizes take about as long as smaller ones, because the time to read the weights dominates.
_FREE_ROWS, _FREE_TOKENS = 64, 256
_WIDE_ROWS, _WIDE_CONTEXT = (16, 64), 4096
_WIDE_TOKENS = (256, 512, 1024)
_MOST_CONTEXT_PADDING = 4  # A row's keys are divided among more programs than they need.


def bucket_of(
    num_tokens: int, num_rows: int, num_samples: int, max_query_len: int, max_context_len: int
) -> Bucket | None:
    """Return the bucket of a step, or None if the step is too large to gain from a graph."""
    context = _at_least(CONTEXT_TOKENS, max_context_len)
    if context is None:
        return None
    if max_query_len == 1:
        rows = _at_least(DECODE_ROWS, num_rows)
        # A decode graph computes the logits of every token. A one-token chunk that is not a prompt's last is rare and runs eagerly.
        return None if rows is None or num_samples < num_rows else _decode(rows, context)
    tokens = _at_least(MIXED_TOKENS, num_tokens)
    rows = _at_least(MIXED_ROWS, max(num_rows, num_samples)) if num_tokens > _ANY_ROWS_TOKENS else MIXED_ROWS[-1]
    return None if tokens is None or rows is None else _mixed(tokens, rows)


def standard() -> tuple[Bucket, ...]:
    """Return the buckets to capture in advance, most likely first. Buckets of longer contexts are captured when steps request them."""
    context = CONTEXT_TOKENS[0]
    likely = [_decode(rows, context) for rows in _LIKELY_ROWS]
    others = [_decode(rows, context) for rows in DECODE_ROWS if rows not in _LIKELY_ROWS]
    many = [_mixed(tokens, MIXED_ROWS[-1]) for tokens in MIXED_TOKENS]
    few = [_mixed(tokens, MIXED_ROWS[0]) for tokens in MIXED_TOKENS if tokens > _ANY_ROWS_TOKENS]
    wide = [_decode(rows, _WIDE_CONTEXT) for rows in _WIDE_ROWS]
    wide += [_mixed(tokens, MIXED_ROWS[-1]) for tokens in _WIDE_TOKENS]
    # First what a model's first request needs and what covers most other steps, then a single prompt of up to 384 tokens, then many that arrive one after another.
    first = (likely[0], wide[2], wide[0], wide[4], many[2], few[0], few[2], few[3])
    return tuple(dict.fromkeys((*first, *many, *few[:4], *wide, *likely, *few, *others)))


def covers(graph: Bucket, step: Bucket) -> bool:
    """Whether the graph of one bucket may run a step of another: the step exceeds none of its sizes, and the padding takes less time than a pass without
    a graph."""
    is_decode = step.max_query_len == 1
    if (graph.max_query_len == 1) != is_decode or graph.adapted != step.adapted:
        return False
    if any(size < needed for size, needed in zip(graph[:4], step[:4], strict=True)):
        return False
    if graph.max_context_len > _MOST_CONTEXT_PADDING * step.max_context_len:
        return False
    return graph.num_tokens <= max(_FREE_ROWS if is_decode else _FREE_TOKENS, 2 * step.num_tokens)


def wide(bucket: Bucket) -> Bucket:
    """Return a bucket that covers this one and most others of its kind, for a model whose graphs have little memory."""
    if bucket.max_query_len == 1:
        rows = _at_least(_WIDE_ROWS, bucket.num_rows) or bucket.num_rows
        return _decode(rows, max(bucket.max_context_len, _WIDE_CONTEXT))._replace(adapted=bucket.adapted)
    tokens = _at_least(_WIDE_TOKENS, bucket.num_tokens) or bucket.num_tokens
    return _mixed(tokens, MIXED_ROWS[-1])._replace(adapted=bucket.adapted)


def _decode(rows: int, context: int) -> Bucket:
    return Bucket(rows, rows, 1, context)


def _mixed(tokens: int, rows: int) -> Bucket:
    # The kernel for rows with several queries reads each row's length from the inputs.
    return Bucket(tokens, min(rows, tokens), tokens, CONTEXT_TOKENS[-1])


def _at_least(sizes: tuple[int, ...], size: int) -> int | None:
    at = bisect_left(sizes, size)
    return sizes[at] if at < len(sizes) else None
