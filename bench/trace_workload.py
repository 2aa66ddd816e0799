"""Draws the traces of bench.trace: which model is called when, with how many tokens in and out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.checkpoints import SHAPES
from bench.simulated_device import SimulatedModel

KINDS = ("8B/bf16", "1B/bf16", "8B/nf4", "1B/nf4")
MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 2048, 256
_MEDIAN_PROMPT_TOKENS, _MEDIAN_OUTPUT_TOKENS = 1020, 129  # of the Azure conversation trace


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    model_id: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One line of the report: popularity rank^-alpha, Gamma arrivals with this coefficient of variation, requests a second."""

    alpha: float
    cv: float
    rate: float

    @property
    def name(self) -> str:
        return f"{self.alpha:g}/{self.cv:g}/{self.rate:g}"


def parse_lines(text: str) -> list[TraceLine]:
    """Parse alpha/CV/rate, comma separated. Raises ValueError."""
    return [TraceLine(*(float(part) for part in line.split("/", 2))) for line in text.split(",")]


def make_models(count: int, kinds: Sequence[str] = KINDS) -> dict[str, SimulatedModel]:
    """Return `count` models by id, of these kinds (shape/format) in turns."""
    found = {}
    for index in range(count):
        shape, format_ = kinds[index % len(kinds)].split("/")
        found[f"m{index:02}"] = SimulatedModel(SHAPES[shape], format_)
    return found


def make_trace(
    models: Sequence[str],
    seconds: float,
    rate: float,
    alpha: float,
    cv: float,
    seed: int = 0,
    length_share: float = 1.0,
) -> list[Request]:
    """Requests over `seconds` at `rate` a second: popularity rank^-alpha in a shuffled order, Gamma arrivals with this coefficient of variation.

    `length_share`: of the tokens in and out.
    """
    rng = np.random.default_rng(seed)
    weights = np.arange(1, len(models) + 1, dtype=float) ** -alpha
    order = rng.permutation(len(models))
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, int(seconds * rate * 2) + 100)
    arrivals = np.cumsum(gaps)
    arrivals = arrivals[arrivals < seconds]
    chosen = rng.choice(len(models), len(arrivals), p=weights / weights.sum())
    prompts = _lengths(rng, _MEDIAN_PROMPT_TOKENS, 0.6, len(arrivals), MAX_PROMPT_TOKENS, length_share)
    outputs = _lengths(rng, _MEDIAN_OUTPUT_TOKENS, 1.0, len(arrivals), MAX_OUTPUT_TOKENS, length_share)
    return [
        Request(float(at), models[order[which]], p, o)
        for at, which, p, o in zip(arrivals, chosen, prompts, outputs, strict=True)
    ]


def make_warm_up(models: Sequence[str], gap_s: float, rows: int = 4) -> list[Request]:
    """Return requests that call each model once with `rows` rows, one model every `gap_s`."""
    return [Request(place * gap_s, model_id, 64, 16) for place, model_id in enumerate(models) for _ in range(rows)]


def _lengths(rng: np.random.Generator, median: int, sigma: float, count: int, longest: int, share: float) -> list[int]:
    drawn = np.clip(rng.lognormal(np.log(median), sigma, count), 1, longest)
    lengths: list[int] = np.maximum(1, drawn * share).astype(int).tolist()
    return lengths
