"""Draws tokens: applies temperature, top-k, top-p, min-p and typical-p in transformers' order, then Gumbel-max with
noise from a counter.

The noise of a token is a function of (seed, position, token id) only, in 32-bit integer arithmetic that the Triton
kernel repeats exactly, so that a text does not depend on the rest of the batch. Each filter keeps scores at or above a
threshold: tokens that tie with the last one kept are kept.

The filters over z = logit / temperature, where M is the mass that the earlier filters kept:
    top-k    z at least the k-th largest
    top-p    mass of the strictly larger ones < p · M
    min-p    z ≥ max z + log(min_p)
    typical  |−log p − entropy| at most the smallest bound under which `typical_p` of the mass lies
"""

import numpy as np
import torch
from torch import Tensor

from runtime.engine.interfaces import NO_TOKEN
from runtime.engine.kernels.argmax import largest

# Positions of the words of a rule; the same as in model/run/row_state.py.
TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P, SEED_LOW, SEED_HIGH = range(7)
_CANDIDATES = 1024


def draw(
    logits: Tensor,
    source: Tensor,
    target: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    rules: Tensor,
    drawn: Tensor,
    *,
    sorts: bool,
) -> None:
    """Draw n tokens. Draw i reads row source[i] of `logits` [N, V] and writes drawn[target[i]].

    It applies the rules of row slot row_slots[i] with the noise of positions[i]. Temperature 0 takes the largest logit.
    A row with a NaN or without a finite maximum draws NO_TOKEN.
    `source`, `target`, `row_slots` and `positions` are [n] int64, `rules` is [max_rows, words] int32 and `drawn` int64.
    `sorts` says whether any of the rules has top-k, top-p or typical-p.
    """
    if logits.is_cuda:
        from runtime.engine.kernels.gpu import sample

        sample.draw(logits, source, target, row_slots, positions, rules, drawn, sorts)
    else:
        draw_torch(logits, source, target, row_slots, positions, rules, drawn, sorts)


def draw_torch(
    logits: Tensor,
    source: Tensor,
    target: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    rules: Tensor,
    drawn: Tensor,
    sorts: bool,
) -> None:
    """Torch twin of the Triton launch. Filters the best candidates, and all tokens only where those do not suffice."""
    words = rules[row_slots]
    scores = scaled(logits.index_select(0, source), words)
    best = largest(scores)
    takes_best = (words.view(torch.float32)[:, TEMPERATURE] == 0) | (best == NO_TOKEN)
    if not sorts:
        kept = min_p_filtered(scores, words)
        noise = gumbel(words, positions, torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32)[None])
        drawn[target] = torch.where(takes_best, best, (kept + noise).argmax(1))
        return
    top, ids = scores.topk(min(_CANDIDATES, scores.shape[1]), dim=1)
    total = (scores - top[:, :1]).exp().sum(1, keepdim=True)
    whole = undecided(top, total, words) if top.shape[1] < scores.shape[1] else torch.zeros_like(takes_best)
    kept = filtered(top, words, total)
    choice = (kept + gumbel(words, positions, ids.int())).argmax(1, keepdim=True)
    chosen = torch.where(takes_best, best, ids.gather(1, choice).squeeze(1))
    whole &= ~takes_best
    if bool(whole.any()):
        again = whole.nonzero().squeeze(1)
        all_kept = filtered(scores[again], words[again], None)
        every = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32)[None]
        chosen[again] = (all_kept + gumbel(words[again], positions[again], every)).argmax(1)
    drawn[target] = chosen


def scaled(logits: Tensor, words: Tensor) -> Tensor:
    """Return float32 logits [n, V] divided by each row's temperature, or undivided for temperature 0."""
    temperature = words.view(torch.float32)[:, TEMPERATURE, None]
    return logits.float() / torch.where(temperature == 0, torch.ones_like(temperature), temperature)


def undecided(top: Tensor, total: Tensor, words: Tensor) -> Tensor:
    """Return which rows [n] have filters that may keep more than the candidates `top` [n, C] (descending).

    `total` [n, 1] is the mass of all tokens relative to that of the largest.
    """
    floats = words.view(torch.float32)
    num = top.shape[1]
    mass = (top - top[:, :1]).exp().sum(1)
    by_k = (
        (words[:, TOP_K] > 0)
        & (words[:, TOP_K] < num)
        & (top[:, -1] < top.gather(1, words[:, TOP_K, None].clamp(1, num).long() - 1).squeeze(1))
    )
    by_p = (floats[:, TOP_P] < 1) & (mass >= floats[:, TOP_P] * total.squeeze(1))
    by_min = (floats[:, MIN_P] > 0) & (top[:, -1] < top[:, 0] + floats[:, MIN_P].log())
    # The entropy of typical-p is over what top-k and top-p keep, which min-p alone bounds too.
    return ~(by_k | ((words[:, TOP_K] <= 0) & (by_p | by_min))) & (floats[:, TEMPERATURE] > 0)


def min_p_filtered(scores: Tensor, words: Tensor) -> Tensor:
    """Return `scores` [n, V] with -inf where min-p removes a token."""
    min_p = words.view(torch.float32)[:, MIN_P, None]
    return scores.masked_fill(scores < scores.amax(1, keepdim=True) + min_p.log(), float("-inf"))


def filtered(scores: Tensor, words: Tensor, total: Tensor | None) -> Tensor:
    """Return `scores` [n, C] with -inf where the filters remove a token.

    If they are the best C of more tokens, `total` [n, 1] is the mass of all tokens relative to that of the largest.
    """
    floats = words.view(torch.float32)
    ordered = _descending(scores)
    best = ordered[:, :1]
    weight = (ordered - best).exp()
    k = words[:, TOP_K, None].long()
    by_k = torch.where(k > 0, ordered.gather(1, k.clamp(1, ordered.shape[1]) - 1), float("-inf"))
    in_k = ordered >= by_k
    kept_weight = weight * in_k
    mass = kept_weight.sum(1, keepdim=True)
    if total is not None:
        mass = torch.where(k > 0, mass, total)
    p = floats[:, TOP_P, None]
    above = kept_weight.cumsum(1) - kept_weight  # Ties that are separated here are rejoined by the threshold.
    in_p = (above < p * mass) | (p >= 1)
    in_p[:, 0] = True
    threshold = torch.where(in_p & in_k, ordered, float("inf")).amin(1, keepdim=True)
    threshold = torch.maximum(threshold, best + floats[:, MIN_P, None].log())
    kept = scores.masked_fill(scores < threshold, float("-inf"))
    typical = floats[:, TYPICAL_P, None]
    if bool((typical < 1).any()) if scores.device.type == "cpu" else True:
        kept = torch.where(typical < 1, _typical(kept, typical), kept)
    return kept


def _descending(scores: Tensor) -> Tensor:
    if scores.is_cuda:
        return scores.sort(1, descending=True).values
    # numpy sorts values three times as fast as torch, which sorts indices with them.
    return torch.from_numpy(-np.sort(-scores.numpy(), axis=1))


def _typical(scores: Tensor, typical: Tensor) -> Tensor:
    log_p = scores.log_softmax(1)
    p = log_p.exp()
    entropy = -(log_p * p).nansum(1, keepdim=True)
    surprise = ((-log_p) - entropy).abs()
    order = surprise.argsort(1)
    below = p.gather(1, order).cumsum(1) - p.gather(1, order)
    within = below < typical
    within[:, 0] = True
    bound = torch.where(within, surprise.gather(1, order), float("-inf")).amax(1, keepdim=True)
    return scores.masked_fill(surprise > bound, float("-inf"))


def gumbel(words: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Return Gumbel noise [n, C] float32 of token ids `ids` [1 or n, C] int32 at `positions` [n] under the rules' seeds."""
    key = _mixed(words[:, SEED_LOW] ^ _mixed(words[:, SEED_HIGH] ^ _mixed(positions.int() + _GOLDEN)))
    other = _mixed(key ^ _STEP)
    bits = _mixed(_mixed(ids ^ key[:, None]) + other[:, None])
    # The top 31 bits select the middle of one of 2^31 equal parts of (0, 1). Small values, which win, keep full precision.
    u = (_shifted(bits, 1).float() + 0.5) * 2.0**-31
    wait = torch.where(u < 0.01, u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25))), -torch.log(1.0 - u))
    return -torch.log(wait)


def _int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


_GOLDEN, _STEP = _int32(0x9E3779B9), _int32(0x85EBCA6B)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift int32 right logically."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """Apply a mixing bijection of 32 bits: xor-shift-multiply with the constants of Wellons' "lowbias32". Products wrap."""
    x = (x ^ _shifted(x, 16)) * _int32(0x7FEB352D)
    x = (x ^ _shifted(x, 15)) * _int32(0x846CA68B)
    return x ^ _shifted(x, 16)
