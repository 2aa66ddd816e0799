"""Holds what a policy made of a trace, and reports it: first tokens by tier, goodput, use of the link, byte hit rates and the longest waits."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.limits import HOST_TO_DEVICE_BYTES_PER_S
from bench.simulated_device import SimulatedModel
from bench.trace_workload import Request
from common.model_state import Tier

FIRST_TOKEN_LIMITS_S = (1.0, 3.0)
TOKEN_S = 0.1  # at most, per further token
_TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)
_NUM_LONGEST = 4  # models whose longest wait is named


@dataclass(slots=True)
class Served:
    """A request's outcome, in seconds since the trace began.

    Attributes:
        tier: where the weights were when the request came; None = unknown.
        error: why the request failed, or "".
    """

    request: Request
    tier: Tier | None = None
    first_s: float = float("inf")
    end_s: float = float("inf")
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.request.at_s

    def is_good(self, first_token_s: float = FIRST_TOKEN_LIMITS_S[-1]) -> bool:
        """Whether the first token came within the limit, and each further token within TOKEN_S on average."""
        further = max(1, self.request.output_tokens - 1)
        return not self.error and self.ttft_s <= first_token_s and (self.end_s - self.first_s) / further <= TOKEN_S


@dataclass(frozen=True, slots=True)
class Outcome:
    """All requests of a trace.

    Attributes:
        copied_bytes: weights copied to the device.
        resident_at_start: the models whose weights were on the device when the trace began.
    """

    served: list[Served]
    copied_bytes: int
    span_s: float
    resident_at_start: frozenset[str] = frozenset()

    def goodput(self, first_token_s: float) -> float:
        """Return the requests within the limits, per second."""
        return sum(one.is_good(first_token_s) for one in self.served) / self.span_s


@dataclass(frozen=True, slots=True)
class ByteHits:
    """Shares of the bytes of weights that requests needed.

    Attributes:
        found: on the device when the request came.
        not_copied: without a copy of their own, because the weights were there or were on their way.
    """

    found: float
    not_copied: float


def byte_hits(models: Mapping[str, SimulatedModel], outcome: Outcome) -> ByteHits:
    sizes = [models[one.request.model_id].weight_bytes for one in outcome.served]
    found = sum(size for size, one in zip(sizes, outcome.served, strict=True) if one.tier is Tier.DEVICE)
    return ByteHits(found / sum(sizes), 1 - outcome.copied_bytes / sum(sizes))


FIRST_TOKENS_HEADER = (
    "| line | policy | goodput/s at 1 s | at 3 s | first token p50 / p95 / p99 | on device | in host memory | on disk | longest | failed |\n"
    "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |"
)
MEMORY_HEADER = (
    "| line | policy | copied | of the link | bytes found | not copied | Belady | found / Belady | not copied / Belady | known counts / Belady |\n"
    "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |"
)


def first_tokens_row(line: str, policy: str, outcome: Outcome) -> str:
    """Return the row of goodput and of seconds to the first token, over all requests and by the tier at arrival."""
    cells = [line, policy, *(f"{outcome.goodput(limit):.2f}" for limit in FIRST_TOKEN_LIMITS_S)]
    answered = [one for one in outcome.served if not one.error]
    cells.append(_quantiles([one.ttft_s for one in answered]))
    cells += [_quantiles([one.ttft_s for one in answered if one.tier is tier]) for tier in _TIERS]
    cells.append(f"{max((one.ttft_s for one in answered), default=0.0):.1f} s")
    cells.append(str(len(outcome.served) - len(answered)))
    return f"| {' | '.join(cells)} |"


def memory_row(
    line: str, policy: str, models: Mapping[str, SimulatedModel], outcome: Outcome, belady: float, known_counts: float
) -> str:
    """Return the row of copied bytes and of byte hit rates. `belady`, `known_counts`: byte hit rates of bench/trace_bounds.py."""
    hits, rate = byte_hits(models, outcome), outcome.copied_bytes / outcome.span_s
    cells = [line, policy, f"{rate / 1e9:.1f} GB/s", f"{rate / HOST_TO_DEVICE_BYTES_PER_S:.0%}"]
    shares = (hits.found, hits.not_copied, belady, hits.found / belady, hits.not_copied / belady, known_counts / belady)
    return f"| {' | '.join([*cells, *(f'{share:.0%}' for share in shares)])} |"


def longest_waits(models: Mapping[str, SimulatedModel], outcome: Outcome) -> str:
    """Return the models whose requests waited longest, and those with a request that failed."""
    longest: dict[str, float] = {}
    for one in outcome.served:
        model_id = one.request.model_id
        longest[model_id] = max(longest.get(model_id, 0.0), 0.0 if one.error else one.ttft_s)
    ranked = sorted(longest, key=lambda model_id: -longest[model_id])
    shown = ", ".join(
        f"{model_id} ({models[model_id].kind}) {longest[model_id]:.1f} s" for model_id in ranked[:_NUM_LONGEST]
    )
    median = statistics.median(longest.values())
    failed = sorted({one.request.model_id for one in outcome.served if one.error})
    return (
        f"longest wait of a model: {shown}; median over {len(longest)} models {median:.1f} s; "
        f"models with a failed request: {', '.join(failed) or 'none'}"
    )


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def _quantiles(values: Sequence[float]) -> str:
    return " / ".join(f"{percentile(values, q):.2f}" for q in (50, 95, 99)) + " s" if values else "-"
