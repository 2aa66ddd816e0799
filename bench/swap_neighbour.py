"""Measures what a model that decodes loses while two other models are swapped in, one after the other without a pause; run by `bench.swap --neighbour`.

The decoding model and one of the others fit on the device. The others are called in turns with a short prompt for one token each, so every call copies
a whole model over the link and computes one prefill step.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.checkpoints import Shape
from bench.limits import HOST_TO_DEVICE_BYTES_PER_S
from runtime.types import Checkpoint, GenerationRequest, SamplingParams, StopParams
from tests.support.engine_process import Asked, Engine, engine

MOST_LOSS = 0.15  # asked
_PROMPT_TOKENS = 256
_CALL_TOKENS = 64
_OTHER_KV_BYTES = 1 << 30
_STATS_S = 1.5  # within which the engine sends its figures


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Rates in tokens per second, gaps between two tokens of a row in seconds.

    Attributes:
        swaps: completed swap-ins of the other models beside the decoding one.
    """

    alone: float
    beside: float
    gaps_alone_s: Sequence[float]
    gaps_beside_s: Sequence[float]
    swaps: int
    beside_s: float
    weight_bytes: int

    @property
    def loss(self) -> float:
        return 1 - self.beside / self.alone

    def row(self, name: str, rows: int) -> str:
        """Return the line of the table."""
        link = self.swaps * self.weight_bytes / self.beside_s / HOST_TO_DEVICE_BYTES_PER_S
        gaps = " | ".join(
            f"{statistics.median(gaps) * 1e3:.1f} / {max(gaps) * 1e3:.0f} ms"
            for gaps in (self.gaps_alone_s, self.gaps_beside_s)
        )
        return (
            f"| {name} | {rows} | {self.alone:.0f} | {self.beside:.0f} | {self.loss:.1%} | {gaps} | "
            f"{self.swaps / self.beside_s:.1f} | {link:.0%} |"
        )


HEADER = (
    "| model | rows | alone, tok/s | beside swaps | loss | a token alone, p50 / longest | beside swaps | swaps/s | of the link |\n"
    "| --- | --: | --: | --: | --: | --: | --: | --: | --: |"
)


def measure_neighbour(
    shape: Shape,
    checkpoints: Sequence[Checkpoint],
    rows: int,
    output_tokens: int,
    device: str,
    slab_bytes: int,
    repeats: int,
) -> Neighbour:
    """Decode `rows` rows of the first checkpoint, alone and beside swaps of both. Raises RuntimeError if nothing was swapped."""
    weight_bytes = max(checkpoint.weight_bytes for checkpoint in checkpoints)
    kv_bytes = rows * (_PROMPT_TOKENS + output_tokens) * shape.kv_bytes_per_token
    other_kv_bytes = min(_OTHER_KV_BYTES, weight_bytes // 4)
    slabs = 2 * -(-weight_bytes // slab_bytes) + -(-kv_bytes // slab_bytes) + -(-other_kv_bytes // slab_bytes)
    config = {
        "device": device,
        "slab_bytes": slab_bytes,
        "device_budget_bytes": slabs * slab_bytes,
        "host_budget_bytes": 3 * weight_bytes + (1 << 30),
        "host_kv_bytes": 0,
        "oversubscribe": "disk" if device == "cpu" else "host",
    }
    rng = np.random.default_rng(1)
    with engine(config) as running:
        for model_id, checkpoint in zip(("decoder", "one", "two"), (checkpoints[0], *checkpoints), strict=True):
            running.load(model_id, checkpoint)
        alone, beside, gaps_alone, gaps_beside = [], [], [], []
        swaps, beside_s = 0, 0.0
        for repeat in range(repeats + 1):
            lone = running.run(_decode(shape, rows, output_tokens, rng))
            running.wait_idle(_STATS_S)
            before = _swap_ins(running)
            shared = running.run_beside(_decode(shape, rows, output_tokens, rng), _calls(shape, rng))
            running.wait_idle(_STATS_S)
            if repeat:  # the first round warms up
                alone.append(lone.tokens_per_s)
                beside.append(shared.tokens_per_s)
                gaps_alone += lone.gaps_s
                gaps_beside += shared.gaps_s
                swaps += _swap_ins(running) - before
                beside_s += shared.wall_s
    if not swaps:
        raise RuntimeError("no model was swapped in beside the decoding one")
    medians = statistics.median(alone), statistics.median(beside)
    return Neighbour(*medians, gaps_alone, gaps_beside, swaps, beside_s, weight_bytes)


def _decode(shape: Shape, rows: int, output_tokens: int, rng: np.random.Generator) -> Asked:
    return [("decoder", _request(shape, _PROMPT_TOKENS, output_tokens, rng)) for _ in range(rows)]


def _calls(shape: Shape, rng: np.random.Generator) -> Iterator[tuple[str, GenerationRequest]]:
    for model_id in itertools.cycle(("one", "two")):
        yield model_id, _request(shape, _CALL_TOKENS, 1, rng)


def _request(shape: Shape, prompt_tokens: int, output_tokens: int, rng: np.random.Generator) -> GenerationRequest:
    return GenerationRequest(
        prompt=tuple(rng.integers(100, shape.vocab, prompt_tokens).tolist()),
        sampling=SamplingParams(temperature=0.0),
        stop=StopParams(max_tokens=output_tokens, ignore_eos=True),
    )


def _swap_ins(running: Engine) -> int:
    if running.stats is None:
        raise RuntimeError("the engine has sent no figures")
    return sum(model.swap_ins_total for model in running.stats.models)
