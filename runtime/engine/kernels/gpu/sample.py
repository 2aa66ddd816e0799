"""Draws tokens in Triton with one program per row. Thresholds are found by bisection over the bits of the scores, so that
nothing is sorted or copied.

Signed integers have the order of floats once the bits below the sign of negative ones are flipped. At most 32 halvings
find a threshold exactly.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _gumbel(ids, key, other):
    bits = _mixed(_mixed(ids ^ key) + other)
    u = (((bits >> 1) & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10
    wait = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25))), -tl.log(1.0 - u))
    return -tl.log(wait)


@triton.jit
def _ordered(x):
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(row_ptr, begin, vocab, temperature, BLOCK: tl.constexpr):
    ids = begin + tl.arange(0, BLOCK)
    return ids, tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32) / temperature


@triton.jit
def _count_from(row_ptr, vocab, temperature, bound, BLOCK: tl.constexpr):
    """Return how many scores are at least `bound`."""
    total = tl.zeros((), tl.int32)
    for begin in range(0, vocab, BLOCK):
        ids, z = _scores(row_ptr, begin, vocab, temperature, BLOCK)
        total += tl.sum(((_ordered(z).to(tl.int64) >= bound) & (ids < vocab)).to(tl.int32), axis=0)
    return total


@triton.jit
def _mass_from(row_ptr, vocab, temperature, best, bound, BLOCK: tl.constexpr):
    """Return the mass of scores of at least `bound`, relative to the largest score's, and their count."""
    total = tl.zeros((), tl.float32)
    count = tl.zeros((), tl.int32)
    for begin in range(0, vocab, BLOCK):
        ids, z = _scores(row_ptr, begin, vocab, temperature, BLOCK)
        kept = (_ordered(z).to(tl.int64) >= bound) & (ids < vocab)
        total += tl.sum(tl.where(kept, tl.exp(z - best), 0.0), axis=0)
        count += tl.sum(kept.to(tl.int32), axis=0)
    return total, count


@triton.jit
def _top_k_bound(row_ptr, vocab, temperature, k, best_key, BLOCK: tl.constexpr):
    """Return a bound that keeps the k largest scores: halve the interval until one score lies in it."""
    low = tl.full((), -2147483648, tl.int64)  # At least k scores are >= low.
    high = best_key + 1  # Fewer than k scores are >= high.
    from_low = vocab + 0 * k
    from_high = 0 * k
    while (high - low > 1) & (from_low - from_high > 1):
        middle = (low + high) >> 1
        count = _count_from(row_ptr, vocab, temperature, middle, BLOCK)
        enough = count >= k
        low = tl.where(enough, middle, low)
        from_low = tl.where(enough, count, from_low)
        high = tl.where(enough, high, middle)
        from_high = tl.where(enough, from_high, count)
    return low


@triton.jit
def _top_p_bound(row_ptr, vocab, temperature, p, best, best_key, bound, BLOCK: tl.constexpr):
    """Return the bound of top-p: halve the interval until one score, the last one kept, lies in it."""
    mass, above_low = _mass_from(row_ptr, vocab, temperature, best, bound, BLOCK)
    enough = p * mass
    low = bound - 1  # Scores above low have at least `enough` mass.
    high = best_key  # Scores above high have less.
    above_high = above_low * 0
    while (high - low > 1) & (above_low - above_high > 1):
        middle = (low + high) >> 1
        mass, count = _mass_from(row_ptr, vocab, temperature, best, middle + 1, BLOCK)
        less = mass < enough
        high = tl.where(less, middle, high)
        above_high = tl.where(less, count, above_high)
        low = tl.where(less, low, middle)
        above_low = tl.where(less, above_low, count)
    return low + 1


@triton.jit
def _surprise(z, best, log_mass, entropy):
    return tl.abs(-(z - best - log_mass) - entropy)


@triton.jit
def _typical_bound(row_ptr, vocab, temperature, typical, best, bound, log_mass, entropy, BLOCK: tl.constexpr):
    enough = typical * tl.exp(log_mass)
    low = tl.full((), -1, tl.int64)
    high = tl.full((), 0x7F7FFFFF, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        mass = tl.zeros((), tl.float32)
        for begin in range(0, vocab, BLOCK):
            _, z = _scores(row_ptr, begin, vocab, temperature, BLOCK)
            near = _surprise(z, best, log_mass, entropy).to(tl.int32, bitcast=True).to(tl.int64) <= middle
            mass += tl.sum(tl.where(near & (_ordered(z).to(tl.int64) >= bound), tl.exp(z - best), 0.0), axis=0)
        high = tl.where(mass >= enough, middle, high)
        low = tl.where(mass >= enough, low, middle)
    return high


@triton.jit(do_not_specialize=["logits_stride", "rules_stride"])
def _draw_kernel(
    logits_ptr,
    source_ptr,
    target_ptr,
    slots_ptr,
    positions_ptr,
    rules_ptr,
    drawn_ptr,
    logits_stride,
    rules_stride,
    vocab,
    SORTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row_ptr = logits_ptr + tl.load(source_ptr + i) * logits_stride
    rule_ptr = rules_ptr + tl.load(slots_ptr + i) * rules_stride
    given = tl.load(rule_ptr).to(tl.float32, bitcast=True)
    min_p = tl.load(rule_ptr + 3).to(tl.float32, bitcast=True)
    greedy = given == 0.0
    temperature = tl.where(greedy, 1.0, given)
    best = tl.full((), float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        _, z = _scores(row_ptr, begin, vocab, temperature, BLOCK)
        best = tl.maximum(best, tl.max(tl.where(z == z, z, float("inf")), axis=0))  # a NaN makes it infinite
    best_key = _ordered(best).to(tl.int64)
    bound = tl.full((), -2147483648, tl.int64)
    near = tl.full((), 0x7F800000, tl.int64)
    log_mass = tl.full((), 0.0, tl.float32)
    entropy = tl.full((), 0.0, tl.float32)
    if SORTS:  # noqa: SIM102 - the first condition is known at compile time, the second is not
        if not greedy:
            k = tl.load(rule_ptr + 1)
            p = tl.load(rule_ptr + 2).to(tl.float32, bitcast=True)
            if (k > 0) & (k < vocab):
                bound = _top_k_bound(row_ptr, vocab, temperature, k, best_key, BLOCK)
            if p < 1.0:
                bound = _top_p_bound(row_ptr, vocab, temperature, p, best, best_key, bound, BLOCK)
    if min_p > 0.0:
        bound = tl.maximum(bound, _ordered(best + tl.log(min_p)).to(tl.int64))
    if SORTS:
        typical = tl.load(rule_ptr + 4).to(tl.float32, bitcast=True)
        if (typical < 1.0) & (not greedy):
            mass, _num_kept = _mass_from(row_ptr, vocab, temperature, best, bound, BLOCK)
            log_mass = tl.log(mass)
            for begin in range(0, vocab, BLOCK):
                _, z = _scores(row_ptr, begin, vocab, temperature, BLOCK)
                log_p = z - best - log_mass
                kept = (_ordered(z).to(tl.int64) >= bound) & (z > float("-inf"))
                entropy -= tl.sum(tl.where(kept, tl.exp(log_p) * log_p, 0.0), axis=0)
            near = _typical_bound(row_ptr, vocab, temperature, typical, best, bound, log_mass, entropy, BLOCK)
    seed_low = tl.load(rule_ptr + 5)
    seed_high = tl.load(rule_ptr + 6)
    key = _mixed(seed_low ^ _mixed(seed_high ^ _mixed(tl.load(positions_ptr + i).to(tl.int32) + -1640531527)))
    other = _mixed(key ^ -2048144789)
    chosen = tl.zeros((), tl.int32)
    largest = tl.full((), float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        ids, z = _scores(row_ptr, begin, vocab, temperature, BLOCK)
        kept = _ordered(z).to(tl.int64) >= bound
        if SORTS:
            kept = kept & (_surprise(z, best, log_mass, entropy).to(tl.int32, bitcast=True).to(tl.int64) <= near)
        noise = tl.where(greedy, 0.0, _gumbel(ids, key, other))
        value, where = tl.max(tl.where(kept, z + noise, float("-inf")), axis=0, return_indices=True)
        if value > largest:
            largest = value
            chosen = begin + where
    chosen = tl.where(tl.abs(best) < float("inf"), chosen, -1)  # NO_TOKEN
    tl.store(drawn_ptr + tl.load(target_ptr + i), chosen.to(tl.int64))


def draw(
    logits: Tensor,
    source: Tensor,
    target: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    rules: Tensor,
    drawn: Tensor,
    sorts: bool,
) -> None:
    _draw_kernel[(source.shape[0],)](
        logits,
        source,
        target,
        row_slots,
        positions,
        rules,
        drawn,
        logits.stride(0),
        rules.stride(0),
        logits.shape[1],
        SORTS=sorts,
        BLOCK=_BLOCK,
        num_warps=16,
    )
