"""Counts what one model's scheduler has done."""

from dataclasses import dataclass


@dataclass(slots=True)
class Totals:
    """Counters of one model since its load."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
